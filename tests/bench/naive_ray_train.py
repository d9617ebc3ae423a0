"""Ray Train and MONAI used as their documentation says, under faults that raybrats is tested with.

    python tests/bench/naive_ray_train.py [--faults F1 F7 F8 F9 F10 rows] [--json] [--folder DIR]

The script under test is the part between the two rules: a TorchTrainer with two gloo workers, Ray
Data through `get_dataset_shard` and `iter_torch_batches`, MONAI's UNet and DiceCELoss, one
checkpoint.pt an epoch with `ray.train.report`, `get_checkpoint` to resume, `max_failures=3`, and
the same run name to go on. Seeds are set, the order of rows is preserved and torch has one thread,
so that bit-equal weights are a fair question. "shuffled" is `random_shuffle` with the documented
`RandomSeedConfig(reseed_after_execution=True)`; "fixed" leaves the shuffling out, for then a
restart at an epoch's beginning meets the same rows again. Random augmentation is left out too.
Ray Train counts a checkpoint when its controller next polls the workers, every 2 seconds; as the
epochs here are shorter than that, faults wait until the first checkpoint counts, except "F1 soon".

Each line of the table is a process of its own with a Ray of its own and 180 seconds. Columns:
fired, how often the fault was injected; restarts of the worker group within the run; steps lost,
those done twice, or, where the run did not go on, those since the newest checkpoint that
`torch.load` opens; seconds from the fault (from the new start, where the fault came between two
starts) to the next training step, or to the end. Lines "none" are what the rest is compared with.
--folder keeps runs and logs.
"""

import argparse
import hashlib
import io
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measure
import numpy as np
import pyarrow
import pyarrow.fs
import ray
import ray.train
import torch
from fsspec.implementations.local import LocalFileSystem
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.utils import set_determinism
from ray.data import RandomSeedConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

WORLD, CASES, EDGE, BATCH = 2, 16, 16, 2
STEPS = CASES // (WORLD * BATCH)
"""Steps an epoch."""
EPOCHS, HALF = 4, 2
LATER, SOON = (1, 1, 1, True), (1, 1, 0, False)
"""Rank, epoch and step of F1, and whether it waits until Ray Train knows of the checkpoint."""
COHORT, PASSES, FLIPS = 369, 3, 40
LIMIT_S = 180
SNAPSHOT = "checkpoint_manager_snapshot.json"
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


# ------------------------------------------------------------------------ the script under test


def phantom(row: dict) -> dict:
    """A case with a ball for a tumour, the same for the same row."""
    rng = np.random.default_rng(row["id"])
    centre = rng.uniform(EDGE / 4, 3 * EDGE / 4, size=(3, 1, 1, 1))
    distance = np.linalg.norm(np.indices((EDGE,) * 3) - centre, axis=0)
    label = np.digitize(-distance, (-EDGE / 3, -EDGE / 4, -EDGE / 6))[None]
    image = label + rng.standard_normal((4, *label.shape[1:]))
    return {"id": row["id"], "image": image.astype(np.float32), "label": label}


def training_set(num_rows: int, shuffled: bool) -> ray.data.Dataset:
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray.data.range(num_rows)
    if shuffled:
        seed = RandomSeedConfig(seed=0, reseed_after_execution=True)
        dataset = dataset.random_shuffle(seed=seed)
    return dataset


def train_func(config: dict) -> None:
    set_determinism(seed=0)
    torch.set_num_threads(1)
    model = UNet(3, 4, 4, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    note(config["notes"], "start")
    start_epoch = resume(model, optimizer)
    model = prepare_model(model)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    shard = ray.train.get_dataset_shard("train")
    for epoch in range(start_epoch, config["epochs"]):
        for step, batch in enumerate(shard.iter_torch_batches(batch_size=BATCH)):
            optimizer.zero_grad()
            loss = loss_function(model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            note(config["notes"], "step", epoch=epoch, step=step, rows=batch["id"].tolist())
            kill_if(config, epoch, step)
        save(model, optimizer, epoch, loss.item())


def resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The epoch to begin with."""
    checkpoint = ray.train.get_checkpoint()
    if not checkpoint:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "checkpoint.pt"))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"] + 1


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, epoch: int, loss: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            state = {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
            }
            torch.save(state, os.path.join(folder, "checkpoint.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"loss": loss, "epoch": epoch}, checkpoint=checkpoint)


def trainer(
    folder: Path, config: dict, *, shuffled: bool, filesystem: pyarrow.fs.FileSystem | None
) -> TorchTrainer:
    return TorchTrainer(
        train_func,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ray.train.ScalingConfig(num_workers=WORLD),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(folder),
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": training_set(CASES, shuffled).map(phantom)},
    )


# ------------------------------------------------------------------------ notes and injections


def note(folder: str | Path, kind: str, **facts: object) -> None:
    """Adds a line to what this process says about the run; the one that starts runs has rank -1."""
    rank = -1 if kind == "fit" else ray.train.get_context().get_world_rank()
    line = {"kind": kind, "rank": rank, "pid": os.getpid(), "time": time.time(), **facts}
    with open(Path(folder) / f"rank{rank}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def notes(folder: Path, kind: str) -> list[dict]:
    files = sorted(folder.glob("rank*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted((line for line in lines if line["kind"] == kind), key=lambda n: n["time"])


def fire(folder: str | Path) -> None:
    """Remembers that a fault was injected."""
    with open(Path(folder) / "fired", "a") as file:
        file.write(f"{time.time()}\n")


def fired(folder: Path) -> list[float]:
    """When faults were injected."""
    file = folder / "fired"
    return [float(line) for line in file.read_text().split()] if file.exists() else []


def kill_if(config: dict, epoch: int, step: int) -> None:
    """SIGKILL of this process, if it is time."""
    if not config["kill"]:
        return
    *place, wait = config["kill"]
    rank, folder = ray.train.get_context().get_world_rank(), Path(config["notes"])
    if [rank, epoch, step] != place or fired(folder):
        return
    if wait:
        wait_for_snapshot(folder)
    fire(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_snapshot(folder: Path) -> None:
    """Until Ray Train has registered a checkpoint, as it has long since in a real epoch."""
    while not (folder / "run" / SNAPSHOT).exists():
        time.sleep(0.5)


class CutStorage(pyarrow.fs.FSSpecHandler):
    """A local file system that gives a `CutFile` for the second checkpoint.pt."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalFileSystem())
        self.folder = folder

    def open_output_stream(self, path: str, metadata: dict) -> pyarrow.NativeFile:
        others = list(Path(path).parent.parent.glob("*/checkpoint.pt"))
        if path.endswith("checkpoint.pt") and len(others) == 1 and not fired(self.folder):
            return pyarrow.PythonFile(CutFile(path, self.folder), mode="w")
        return super().open_output_stream(path, metadata)


class CutFile(io.FileIO):
    """Kills its process when half of the first piece is written."""

    def __init__(self, path: str, folder: Path) -> None:
        super().__init__(path, "wb")
        self._folder = folder

    def write(self, data: bytes) -> int:
        super().write(data[: len(data) // 2])
        wait_for_snapshot(self._folder)
        fire(self._folder)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first; directories of the run, whether its snapshot knows them or not."""
    return sorted(folder.glob("run/checkpoint_*/"))


def orphans(folder: Path) -> list[str]:
    """Names of checkpoint directories that Ray Train's snapshot does not know."""
    snapshot = json.loads((folder / "run" / SNAPSHOT).read_text())
    known = {result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]}
    return [place.name for place in checkpoints(folder) if place.name not in known]


def newest(folder: Path) -> Path:
    return checkpoints(folder)[-1] / "checkpoint.pt"


def truncate(file: Path, part: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * part))


def damage_all(folder: Path) -> None:
    for place in checkpoints(folder):
        truncate(place / "checkpoint.pt")
        fire(folder)


def flip(file: Path, seed: int) -> None:
    """Flips one bit of the model's tensors, drawn from all of them alike."""
    data, spans = bytearray(file.read_bytes()), list(weight_spans(file))
    bit = random.Random(seed).randrange(8 * sum(len(span) for span in spans))
    place = [byte for span in spans for byte in span][bit // 8]
    data[place] ^= 1 << bit % 8
    file.write_bytes(data)


def weight_spans(file: Path) -> Iterator[range]:
    """Where in the archive the tensors of "model" lie, which are saved before the others."""
    count = len(torch.load(file)["model"])
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        for number in range(count):
            info = next(i for i in archive.infolist() if i.filename.endswith(f"/data/{number}"))
            raw.seek(info.header_offset + 26)
            head = raw.read(4)
            lengths = int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
            start = info.header_offset + 30 + lengths
            yield range(start, start + info.file_size)


# ------------------------------------------------------------------------ what a process does


def fit(
    folder: Path,
    *,
    epochs: int = EPOCHS,
    shuffled: bool = False,
    kill: tuple[int, int, int, bool] | None = None,
    filesystem: pyarrow.fs.FileSystem | None = None,
) -> None:
    """Starts the run, or goes on with it, and writes down how that ended."""
    note(folder, "fit")
    config = {"epochs": epochs, "notes": str(folder), "kill": kill}
    result = trainer(folder, config, shuffled=shuffled, filesystem=filesystem).fit()
    with result.checkpoint.as_directory() as place:
        weights = torch.load(os.path.join(place, "checkpoint.pt"))["model"]
    end(folder, weights=digest(weights))


def end(folder: Path, **facts: object) -> None:
    (folder / "end.json").write_text(json.dumps({"time": time.time(), **facts}))


def digest(weights: dict) -> str:
    parts = (weights[name].numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def told(error: BaseException) -> str:
    """The exception and what it says first, with the first of the worker's where it has those."""
    inner = next(iter(getattr(error, "worker_failures", {}).values()), None)
    inner = inner or getattr(error, "controller_failure", None)
    inner = getattr(inner, "_base_exc", inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0].split('. ')[0]}".removesuffix(": ")
    if isinstance(error, ray.exceptions.ActorDiedError):  # the cause ends a long text
        return f"{type(error).__name__}: {lines[-1].split('. ')[0]}"
    return f"{text} {told(inner)}" if inner else text


def cut_upload(folder: Path) -> None:
    """F10: the run, and then once more under its name with another epoch."""
    filesystem = pyarrow.fs.PyFileSystem(CutStorage(folder))
    fit(folder, filesystem=filesystem)
    ended = (folder / "end.json").read_text()
    sizes = {p.name: (p / "checkpoint.pt").stat().st_size for p in checkpoints(folder)}
    left = {"sizes": sizes, "orphans": orphans(folder)}
    (folder / "left.json").write_text(json.dumps(left))
    fit(folder, epochs=EPOCHS + 1, filesystem=filesystem)
    (folder / "end.json").write_text(ended)


def flips(folder: Path) -> None:
    """F7c: copies with one bit flipped each, and what `torch.load` says of them."""
    source, noticed, changed = newest(folder), 0, 0
    right = digest(torch.load(source)["model"])
    for seed in range(FLIPS):
        copy = folder / "copy.pt"
        shutil.copy(source, copy)
        flip(copy, seed)
        fire(folder)
        try:
            changed += digest(torch.load(copy)["model"]) != right
        except Exception:
            noticed += 1
    assert noticed + changed == FLIPS
    end(folder, words=f"torch.load notices {noticed} of {FLIPS}, gives {changed} other weights")


def count_rows(folder: Path, world: int) -> None:
    """Which rows the ranks are given in some epochs."""
    words = []
    for name, shuffled in (("fixed", False), ("shuffled", True)):
        place = folder / name
        place.mkdir()
        TorchTrainer(
            read_rows,
            train_loop_config={"notes": str(place)},
            torch_config=TorchConfig(backend="gloo", timeout_s=60),
            scaling_config=ray.train.ScalingConfig(
                num_workers=world, resources_per_worker={"CPU": 0.5}
            ),
            run_config=ray.train.RunConfig(name="rows", storage_path=str(place)),
            datasets={"train": training_set(COHORT, shuffled)},
        ).fit()
        words.append(f"{name}: {rows_words(notes(place, 'step'))}")
    end(folder, words="; ".join(words))


def read_rows(config: dict) -> None:
    shard = ray.train.get_dataset_shard("train")
    for epoch in range(PASSES):
        rows = [r for b in shard.iter_torch_batches(batch_size=BATCH) for r in b["id"].tolist()]
        note(config["notes"], "step", epoch=epoch, step=0, rows=rows)


def rows_words(steps: list[dict]) -> str:
    by_epoch = [[n["rows"] for n in steps if n["epoch"] == epoch] for epoch in range(PASSES)]
    seen = [{row for rows in ranks for row in rows} for ranks in by_epoch]
    each = sorted({len(rows) for ranks in by_epoch for rows in ranks})
    assert all(
        sum(map(len, ranks)) == len(rows) for ranks, rows in zip(by_epoch, seen, strict=True)
    )
    counts = " ".join(str(len(rows)) for rows in seen)
    missing = [" ".join(map(str, sorted(set(range(COHORT)) - rows))) for rows in seen]
    never = COHORT - len(set.union(*seen))
    return (
        f"{counts} of {COHORT} rows in {PASSES} epochs, a rank {' '.join(map(str, each))}, "
        f"left out rows {' / '.join(missing)}, never seen {never}"
    )


# ------------------------------------------------------------------------ the lines of the table


@dataclass(frozen=True)
class Line:
    """One process."""

    fault: str
    how: str
    act: Callable[[Path], None]
    source: str = ""
    """The line whose folder it begins with, and whose run it goes on with."""
    like: str = ""
    """The line whose weights it should end with."""
    fires: int = 1
    rows: bool = False
    """Tell which rows came twice."""


def then_fit(damage: Callable[[Path], None], folder: Path) -> None:
    """Damages what the first half left and starts the second."""
    before = contents(folder / "run")
    damage(folder)
    assert contents(folder / "run") != before
    if not fired(folder):
        fire(folder)
    fit(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def twice(shuffled: bool, folder: Path) -> None:
    """Two runs of the same, one after the other."""
    fit(folder, shuffled=shuffled)
    first = json.loads((folder / "end.json").read_text())["weights"]
    (folder / "again").mkdir()
    fit(folder / "again", shuffled=shuffled)
    again = json.loads((folder / "again" / "end.json").read_text())["weights"]
    words = f"two runs, bit-equal: {'yes' if again == first else 'no'}"
    end(folder, weights=first, words=words)


def halves(shuffled: bool, folder: Path) -> None:
    fit(folder, shuffled=shuffled)


def half(shuffled: bool, folder: Path) -> None:
    fit(folder, epochs=HALF, shuffled=shuffled)
    facts = json.loads((folder / "end.json").read_text())
    end(folder, weights=facts["weights"], words=f"{HALF} of {EPOCHS} epochs")


ORDERS = {"fixed": False, "shuffled": True}
NONE = [
    line
    for order, shuffled in ORDERS.items()
    for line in (
        Line(f"none, {order}", "", partial(twice, shuffled), fires=0, rows=True),
        Line(f"none, first half, {order}", "", partial(half, shuffled), fires=0),
        Line(
            f"none, second half, {order}",
            "started again under the same name",
            partial(halves, shuffled),
            source=f"none, first half, {order}",
            like=f"none, {order}",
            fires=0,
            rows=True,
        ),
    )
]


def killed(name: str, order: str, place: tuple[int, int, int, bool]) -> Line:
    rank, epoch, step, later = place
    how = f"SIGKILL of rank {rank} after step {step} of epoch {epoch}, rows {order}"
    how += "" if later else f", soon after the report of epoch {epoch - 1}"
    act = partial(fit, shuffled=ORDERS[order], kill=place)
    return Line(name, how, act, like=f"none, {order}", rows=True)


def damaged(fault: str, how: str, damage: Callable[[Path], None], fires: int = 1) -> Line:
    act = partial(then_fit, damage)
    return Line(fault, how, act, "none, first half, fixed", "none, fixed", fires)


FAULTS = {
    "F1": [
        *(killed(f"F1 {order}", order, LATER) for order in ORDERS),
        killed("F1 soon", "fixed", SOON),
    ],
    "F7": [
        damaged("F7a", "newest checkpoint.pt cut to a half", lambda f: truncate(newest(f))),
        damaged("F7b", "newest checkpoint.pt cut to 0 bytes", lambda f: truncate(newest(f), 0)),
        damaged("F7c", "one bit of the newest weights flipped", lambda f: flip(newest(f), 0)),
        Line(
            "F7c, torch.load",
            f"one random bit of the weights, {FLIPS} copies",
            flips,
            source="none, first half, fixed",
            fires=FLIPS,
        ),
        damaged("F7d", "newest checkpoint.pt deleted", lambda f: newest(f).unlink()),
    ],
    "F8": [damaged("F8", "every checkpoint.pt cut to a half", damage_all, HALF)],
    "F9": [
        damaged("F9a", f"{SNAPSHOT} cut to a half", lambda f: truncate(f / "run" / SNAPSHOT)),
        damaged(
            "F9b", "newest checkpoint directory deleted", lambda f: shutil.rmtree(newest(f).parent)
        ),
    ],
    "F10": [
        Line("F10", "SIGKILL of rank 0 half-way through copying", cut_upload, like="none, fixed")
    ],
    "rows": [
        Line(f"rows, {world} ranks", "", partial(count_rows, world=world), fires=0)
        for world in (2, 4)
    ],
}
LINES = {line.fault: line for line in (*NONE, *(line for some in FAULTS.values() for line in some))}


# ------------------------------------------------------------------------ one line, run and judged


def run(line: Line, work: Path) -> dict:
    """Runs a line in a process of its own and says what came of it."""
    folder = work / slug(line.fault)
    if line.source:
        shutil.copytree(work / slug(line.source), folder)
        (folder / "end.json").unlink()
    else:
        folder.mkdir()
    command = [sys.executable, __file__, "--line", line.fault, "--folder", str(work)]
    token = secrets.token_hex(16)
    environment = os.environ | ENVIRONMENT | {"RAY_AUTH_TOKEN": token}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            for pid in (*below(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    return judge(line, work)


def slug(fault: str) -> str:
    return fault.replace(", ", "-").replace(" ", "-")


def below(pid: int) -> Iterator[int]:
    """Processes that a process has started, and those that these have."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from below(int(child))
            yield int(child)


def run_here(line: Line, work: Path) -> None:
    """What the process of a line does."""
    folder = work / slug(line.fault)
    with tempfile.TemporaryDirectory(prefix="naive-") as temp:
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=300_000_000,
            include_dashboard=False,
            _temp_dir=temp,
        )
        try:
            line.act(folder)
        except Exception as error:
            print(repr(error), file=sys.stderr)
            end(folder, error=told(error))
        ray.shutdown()


def judge(line: Line, work: Path) -> dict:
    folder = work / slug(line.fault)
    times = fired(folder)
    assert len(times) == line.fires, f"{line.fault}: fired {len(times)} times, see {folder}/log.txt"
    file = folder / "end.json"
    ended = json.loads(file.read_text()) if file.exists() else {}
    went_on = steps_after(folder, times[-1]) if times else []
    starts = sum(n["rank"] == 0 for n in notes(folder, "start"))
    until = min([*went_on, ended.get("time", float("inf"))])
    return {
        "fault": line.fault,
        "injected": line.how,
        "fired": len(times),
        "restarts": max(0, starts - len(notes(folder, "fit"))),
        "steps lost": lost(folder, bool(went_on)) if times and line.like else None,
        "seconds": round(until - times[-1], 1) if times and line.like and ended else None,
        "outcome": outcome(line, work, ended),
    }


def steps_after(folder: Path, fault: float) -> list[float]:
    """When processes trained that had not before the fault."""
    steps = notes(folder, "step")
    old = {n["pid"] for n in steps if n["time"] <= fault}
    return [n["time"] for n in steps if n["pid"] not in old]


def lost(folder: Path, went_on: bool) -> int:
    done = [(n["epoch"], n["step"]) for n in notes(folder, "step") if n["rank"] == 0]
    if went_on:
        return len(done) - len(set(done))
    epochs = [state["epoch"] + 1 for state in map(opened, checkpoints(folder)) if state]
    return len(done) - STEPS * max(epochs, default=0)


def opened(place: Path) -> dict | None:
    try:
        return torch.load(place / "checkpoint.pt")
    except Exception:
        return None


def outcome(line: Line, work: Path, ended: dict) -> str:
    folder, words = work / slug(line.fault), []
    if not ended:
        return f"no end within {LIMIT_S} s"
    if "error" in ended:
        words.append(f"stops: {ended['error']}")
    if line.like and "weights" in ended:
        wanted = json.loads((work / slug(line.like) / "end.json").read_text())["weights"]
        words.append(f"ends, bit-equal: {'yes' if ended['weights'] == wanted else 'no'}")
    if "words" in ended:
        words.append(ended["words"])
    if line.rows and "weights" in ended:
        words.append(order_words(folder, work / slug(line.like or line.fault)))
    if (folder / "left.json").exists():
        words.append(left_words(folder))
    elif "weights" in ended and (count := len(orphans(folder))):
        words.append(f"{count} directory stays that the snapshot does not know")
    return "; ".join(words)


def attempts(folder: Path) -> list[dict[int, list]]:
    """The rows of each epoch by worker group: what rank 0 and rank 1 saw, step by step."""
    steps = notes(folder, "step")
    pids = {
        rank: list(dict.fromkeys(n["pid"] for n in steps if n["rank"] == rank)) for rank in (0, 1)
    }
    made = [{} for _ in pids[0]]
    for n in sorted(steps, key=lambda n: (n["epoch"], n["step"], n["rank"])):
        group = made[pids[n["rank"]].index(n["pid"])]
        group.setdefault(n["epoch"], []).append((n["rank"], n["rows"]))
    return made


def order_words(folder: Path, reference: Path) -> str:
    """Which rows were seen in the epochs that count, which in vain, and in whose order."""
    made, (usual, *_) = attempts(folder), attempts(reference)
    final = {epoch: rows for group in made for epoch, rows in group.items()}
    tries = [(e, row) for group in made for e, rows in group.items() for _, r in rows for row in r]
    again = len(tries) - len(set(tries))
    count = {(e, row) for e, rows in final.items() for _, r in rows for row in r}
    never = CASES * EPOCHS - len(count)
    names = [next((str(e) for e in usual if usual[e] == rows), "?") for rows in final.values()]
    return (
        f"rows seen twice in an epoch: {again}, never: {never}; "
        f"order of epochs {' '.join(map(str, final))} is that of {' '.join(names)}"
    )


def left_words(folder: Path) -> str:
    left = json.loads((folder / "left.json").read_text())
    sizes, whole = [left["sizes"][name] for name in left["orphans"]], max(left["sizes"].values())
    still = len(set(left["orphans"]) & set(orphans(folder)))
    return (
        f"directories left that the snapshot does not know: {len(sizes)} "
        f"({' '.join(map(str, sizes))} of {whole} bytes), after one more start with one more "
        f"epoch: {still}"
    )


def table(rows: list[dict]) -> str:
    """The lines under their names, as Markdown."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [["-" if cell in (None, "") else str(cell) for cell in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--folder", type=Path, help="empty or new; keeps runs and logs")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line:
        run_here(LINES[options.line], options.folder)
        return
    chosen = [line for fault in options.faults for line in FAULTS[fault]]
    if options.faults != ["rows"]:
        chosen = [*NONE, *chosen]
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        work.mkdir(parents=True, exist_ok=True)
        rows = [run(line, work) for line in chosen]
    measure.report({"lines": rows}, table(rows), as_json=options.json)


if __name__ == "__main__":
    main()
