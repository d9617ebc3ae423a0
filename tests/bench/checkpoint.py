"""What a checkpoint's manifest and its verification cost, beside a plain torch.save, and catch.

    python tests/bench/checkpoint.py [--rounds 5] [--flips 200] [--step-ms 40] [--json]
    python tests/bench/checkpoint.py --measure-step      # the step of this CPU instead of --step-ms
    python tests/bench/checkpoint.py --s3 s3://bucket/folder     # AWS_* variables as usual

The learner is that of the `nnunet` recipe with its momentum filled. The peer is one torch.save of
the same weights and the same optimiser's state to a file, neither digested nor read back. Ours is
what the saver does: a copy that the step waits for; then, behind the training, a look whether the
weights are finite, `checkpoint.write`, and `checkpoint.verify` of every byte. Rounds are
interleaved; nobody calls fsync. Wall time holds on a quiet machine, CPU time on any.

An epoch is 250 steps, after which a checkpoint is due. --flips: single bits of the files, in
memory, file by file in turn; a flip counts as rejected where reading raises.
"""

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import measure
import torch

from raybrats import storage
from raybrats.errors import CheckpointError, MissingObjectError
from raybrats.recipes import nnunet
from raybrats.train import checkpoint
from raybrats.train.checkpoint import Snapshot
from raybrats.train.copies import copied
from raybrats.train.learner import Learner, new_learner

EPOCH = 250
COPY, FINITE = "ours: copy, the step waits", "ours: are the weights finite"
WRITE, DIGEST = "ours: checkpoint.write", "  of which BLAKE3"
VERIFY, READ = "ours: checkpoint.verify", "ours: checkpoint.read, to resume"
SAVE, LOAD = "peer: torch.save", "peer: torch.load"
FLIPS_URI = "memory://raybrats-flips"


@dataclass
class Cost:
    """What one part took in each round."""

    megabytes: float = 0.0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Medians, and the rate on the wall."""
        wall, cpu = statistics.median(self.wall), statistics.median(self.cpu)
        return {
            "MB": self.megabytes,
            "wall_s": wall,
            "wall_min": min(self.wall),
            "cpu_s": cpu,
            "MB/s": self.megabytes / wall,
        }


def filled_learner() -> Learner:
    """At step 1, with a momentum of every weight."""
    learner = new_learner(nnunet(), torch.device("cpu"))
    for group in learner.optimizer.param_groups:
        for weight in group["params"]:
            learner.optimizer.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    learner.step = 1
    return learner


def snapshot_of(learner: Learner, kept: tuple | None = None) -> Snapshot:
    """A copy, as the saver takes it, in memory that it has where there is some."""
    weights, state = copied((learner.weights(), learner.state()), kept)
    return Snapshot(step=learner.step, weights=weights, state=state)


def plain_save(snapshot: Snapshot, uri: str) -> int:
    """The peer's checkpoint; its size."""
    whole, buffer = {"weights": snapshot.weights, "state": snapshot.state}, io.BytesIO()
    if not storage.is_remote(uri):
        torch.save(whole, uri)
        return Path(uri).stat().st_size
    torch.save(whole, buffer)
    storage.write_bytes(uri, buffer.getvalue())
    return len(buffer.getvalue())


def plain_load(uri: str) -> object:
    source = io.BytesIO(storage.read_bytes(uri)) if storage.is_remote(uri) else uri
    return torch.load(source, weights_only=True)


def parts(learner: Learner, snapshot: Snapshot, folder: str) -> dict[str, Callable[[], Any]]:
    """What is timed, in the order of a save."""
    peer, ours = storage.join(folder, "peer.pt"), storage.join(folder, "ours")
    uri = checkpoint.write(ours, learner.config, snapshot)
    files = checkpoint.read(uri).files
    return {
        COPY: lambda: snapshot_of(learner, (snapshot.weights, snapshot.state)),
        SAVE: lambda: plain_save(snapshot, peer),
        FINITE: lambda: all(bool(w.isfinite().all()) for w in snapshot.weights.values()),
        WRITE: lambda: checkpoint.write(ours, learner.config, snapshot),
        DIGEST: lambda: [storage.digest_of(data) for data in files.values()],
        VERIFY: lambda: checkpoint.verify(uri),
        READ: lambda: checkpoint.read(uri),
        LOAD: lambda: plain_load(peer),
    }


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Cost]:
    """Each once a round, after one round that does not count."""
    costs = {name: Cost() for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            began = time.perf_counter(), time.process_time()
            call()
            ended = time.perf_counter(), time.process_time()
            if turn >= 0:
                costs[name].wall.append(ended[0] - began[0])
                costs[name].cpu.append(ended[1] - began[1])
    return costs


def measured(learner: Learner, folder: str, rounds: int) -> dict[str, dict[str, float]]:
    """Megabytes, seconds and rate of every part at a place."""
    snapshot = snapshot_of(learner)
    calls = parts(learner, snapshot, folder)
    tensors = [*snapshot.weights.values(), *_tensors(snapshot.state)]
    uri = checkpoint.place(storage.join(folder, "ours"), snapshot.step)
    own = sum(map(len, checkpoint.read(uri).files.values())) / 1e6
    plain = plain_save(snapshot, storage.join(folder, "peer.pt")) / 1e6
    weights = sum(w.nbytes for w in snapshot.weights.values()) / 1e6
    sizes = {COPY: sum(t.nbytes for t in tensors) / 1e6, FINITE: weights, SAVE: plain, LOAD: plain}
    costs = timed(calls, rounds)
    for name, cost in costs.items():
        cost.megabytes = sizes.get(name, own)
    return {name: cost.figures() for name, cost in costs.items()}


def _tensors(state: object) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


def shares(rows: dict[str, dict[str, float]], step_s: float) -> dict[str, dict[str, float]]:
    """Per cent of an epoch, by the wall and by CPU time."""
    groups = {
        "the training waits: copy": (COPY,),
        "behind it: digests and verification": (DIGEST, VERIFY),
        "behind it: everything": (FINITE, WRITE, VERIFY),
        "the peer, if it were waited for": (SAVE,),
    }
    return {
        name: {
            f"%_of_{kind}": 100 * sum(rows[part][key] for part in group) / (EPOCH * step_s)
            for kind, key in (("wall", "wall_s"), ("best", "wall_min"), ("cpu", "cpu_s"))
        }
        for name, group in groups.items()
    }


def flipped(learner: Learner, flips: int) -> dict[str, dict[str, int]]:
    """How many flips of a bit each way to read rejects."""
    snapshot, rng = snapshot_of(learner), random.Random(0)
    uri = checkpoint.write(FLIPS_URI, learner.config, snapshot)
    files = {name: fsspec.filesystem("memory").store[path] for path, name in _paths(uri).items()}
    peer = io.BytesIO()
    torch.save({"weights": snapshot.weights, "state": snapshot.state}, peer)
    ours, plain = dict.fromkeys(files, 0), 0
    turns = dict.fromkeys(files, 0)
    for number in range(flips):
        name = list(files)[number % len(files)]
        turns[name] += 1
        with _flip(files[name], rng):
            ours[name] += _raises(lambda: checkpoint.read(uri), CheckpointError)
        with _flip(peer, rng):
            plain += _raises(lambda: torch.load(peer, weights_only=True), Exception)
    fsspec.filesystem("memory").rm(FLIPS_URI, recursive=True)
    rows = {f"ours: {n}": {"flips": turns[n], "rejected": ours[n]} for n in files}
    rows["ours: all files"] = {"flips": flips, "rejected": sum(ours.values())}
    return rows | {"peer: torch.load": {"flips": flips, "rejected": plain}}


def _paths(uri: str) -> dict[str, str]:
    found = storage.list_objects(uri)
    return {f"/{one.removeprefix('memory://').lstrip('/')}": storage.name(one) for one in found}


@contextmanager
def _flip(file: io.BytesIO, rng: random.Random) -> Iterator[None]:
    """One bit of a file is wrong meanwhile."""
    place, bit = rng.randrange(len(file.getbuffer())), 1 << rng.randrange(8)
    file.getbuffer()[place] ^= bit
    file.seek(0)
    yield
    file.getbuffer()[place] ^= bit


def _raises(call: Callable[[], object], kind: type[Exception]) -> bool:
    with suppress(kind):
        call()
        return False
    return True


def cpu_step_s() -> float:
    """Of the recipe, on one thread of this CPU."""
    import step

    config = step.settings("nnunet", 128, 2, augmented=True)
    learner = new_learner(config, torch.device("cpu"))
    ((seconds, _),) = step.timed(learner, step.random_batch(2, 128), step.Timing(1))
    return seconds


@contextmanager
def place(s3: str | None) -> Iterator[str]:
    """A folder that is removed at the end."""
    if s3 is None:
        with tempfile.TemporaryDirectory(prefix="raybrats-bench-") as folder:
            yield folder
        return
    folder = storage.join(s3, f"bench-{uuid.uuid4().hex[:8]}")
    try:
        yield folder
    finally:
        with suppress(MissingObjectError):
            storage.delete(folder)


def parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, rounds=5)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=40.0, help="an H200 at 50 patches/s")
    parser.add_argument("--measure-step", action="store_true", help="one step of this CPU instead")
    parser.add_argument("--s3", help="also at this s3:// URI")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    with measure.quiet():
        learner, result = filled_learner(), {}
        step_s = cpu_step_s() if options.measure_step else options.step_ms / 1e3
        for name, uri in (("local", None), ("s3", options.s3))[: 1 + bool(options.s3)]:
            with place(uri) as folder:
                rows = measured(learner, folder, options.rounds)
            result[name] = {"parts": rows, "share of an epoch": shares(rows, step_s)}
        result["flips"] = flipped(learner, options.flips)
    told = f"{EPOCH} steps of {1e3 * step_s:.0f} ms, {options.rounds} rounds, {sys.platform}"
    tables = [told]
    for name in ("local", "s3")[: 1 + bool(options.s3)]:
        tables += [measure.table(f"{name}: {k}", rows) for k, rows in result[name].items()]
    tables.append(measure.table("single bits flipped", result["flips"]))
    report = {"of": told, "step_s": step_s, **result}
    measure.report(report, "\n\n".join(tables), as_json=options.json)


if __name__ == "__main__":
    main()
