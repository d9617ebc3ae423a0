"""The table of wrong, hostile and unlucky inputs: verb x input -> exit code, seconds, lines.

Every row of `inputs.txt` is the command as a user types it, in a process of its own, against a Ray
head with token authentication, an S3 server and an MLflow database. A row fails where its code is
not that of the cause, where its words do not say what they must, where a traceback or a control
character is shown, where a refusal takes more than one line, or where it takes over a minute.

    python tests/hostile/inputs.py                  # all, as a Markdown table; exit 1 if one fails
    python tests/hostile/inputs.py --only predict   # rows that hold one of these
"""

import argparse
import gzip
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true")

from services import S3, RayHead, free_ports, make_bucket, ray_head, s3_server

# A shell starts its background jobs with SIGINT ignored, and so would the commands be
signal.signal(signal.SIGINT, signal.default_int_handler)
TABLE = Path(__file__).with_suffix(".txt")
RAYBRATS = str(Path(sys.executable).with_name("raybrats"))
LIMIT_S = 60
WORKS_S = 6.0
"""Seconds after which a command waits for a server that never answers."""
PROGRESS = (
    *("indexing: ", "training ", "validating", "predicting: ", "evaluating: ", "reporting: "),
    *("step ", "resumed at ", "drawing"),
)
"""How the lines begin that tell how far the work is."""


@dataclass(frozen=True)
class Input:
    """A command, and how it must end."""

    code: int
    what: str
    words: str
    """As a shell splits them."""
    says: str = ""
    """What stands in the last line on stderr, or on stdout where it goes well."""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        return (self.words.split() or [""])[0]

    @property
    def lines(self) -> int:
        """Lines on stderr at most; those of progress are not counted."""
        return int(self.options.get("lines", 1))

    @property
    def signal(self) -> tuple[int, str]:
        """The signal that is sent, and how the line begins after which it is; 0 for none."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if number.name in self.options:
                return number, self.options[number.name]
        return 0, ""

    @property
    def shell(self) -> str:
        """What a shell does with the command."""
        ends = {"full": " >/dev/full", "closed": " >&-", "gone": " | true", "": ""}
        errors = " 2>&-" if self.options.get("stderr") == "closed" else ""
        return f'set -o pipefail; "$@"{errors}{ends[self.options.get("stdout", "")]}'

    def environment(self, before: Mapping[str, str]) -> dict[str, str]:
        """The variables of the command; those without a value are unset."""
        own = {name: value for name, value in self.options.items() if name.isupper()}
        return {name: value for name, value in {**before, **own}.items() if value}


def read_inputs(text: str, names: Mapping[str, str]) -> Iterator[Input]:
    """The rows of a table, with what the scene has in place of {names}."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            cells = [cell.strip().format(**names) for cell in line.split(" | ")]
            code, what, words, says, options = [*cells, "", ""][:5]
            pairs = (option.partition("=")[::2] for option in options.split())
            yield Input(int(code), what, words, says, dict(pairs))


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what is wrong with that."""

    code: int
    seconds: float
    err: list[str]
    problem: str


# The scene: what is right, and what is wrong with it

IDS = {
    "ped": ["BraTS-PED-00001-000"],
    "met": ["BraTS-MET-00001-000"],
    "men": ["BraTS-MEN-00001-000"],
    "rt": ["BraTS-MEN-RT-0001-1"],
    "postop": ["BraTS-GLI-00001-100"],
    "stranger": ["patient7"],
    "contradicts": ["BraTS2021_00001"],
    "two_lines": ["BraTS-GLI-00001-000\nall is well"],
    "escapes": ["BraTS-GLI-00001-000\x1b[2J\x1b]0;owned\x07"],
    "long": ["BraTS-GLI-00001-000" + "x" * 200],
    "markup": ["BraTS-GLI-00001-[red]000:skull:", "BraTS-GLI-00002-000"],
    "mixed": ["BraTS-GLI-00001-000", "BraTS-PED-00002-000"],
}
"""Trees of cases of 2023 under other ids."""
FILES: Mapping[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
    "folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("/nowhere.nii.gz"),
    "outside": lambda path: path.symlink_to("/etc/passwd"),
    "circle": lambda path: path.symlink_to(path),
    "empty_file": Path.touch,
    "text": lambda path: path.write_text("root:x:0:0:secret\n" * 99),
    "bomb": lambda path: path.write_bytes(gzip.compress(bytes(2**30), 9)),
    "no_volume": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00garbage"),
}
"""Trees whose one case has this in place of its T1."""
DATASETS = {
    "json_garbage": "{]",
    "json_deep": "[" * 100_000,
    "json_escapes": '{"channel_names": {"0": "../../etc"}, "labels": {"\\u001b[2J": 1}}',
}
RECORDS = {
    "record_garbage": b"\xff[[[",
    "record_other": b'{"model": "models:/other/7"}',
    "record_list": b"[1, 2]",
}
RUNS = {
    "run_garbage": ("run.json", b"\xff[[["),
    "run_empty": ("run.json", b""),
    "run_null": ("run.json", b'{"mlflow_run_id": null, "config": 2}'),
    "lease_garbage": ("lease.json", b"\xff[[["),
    "metrics_garbage": ("metrics.jsonl", b"\xff[[[\n[]\n{}\n"),
}
CHECKPOINTS: Mapping[str, Callable[[Path], object]] = {
    "no_weights": lambda folder: (folder / "weights.safetensors").unlink(),
    "cut_weights": lambda folder: os.truncate(folder / "weights.safetensors", 1000),
    "no_manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "manifest_list": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
}
PREDICTIONS = ("cut_prediction", "text_prediction", "of_nobody")
AFTER_LINE = (*RECORDS, *PREDICTIONS)
"""Made of the predictions that went well."""


def renamed(case: Path, tree: Path, case_ids: Sequence[str]) -> None:
    """Writes a tree of copies of a case under other ids."""
    for case_id in case_ids:
        (tree / case_id).mkdir(parents=True)
        for file in case.iterdir():
            shutil.copy(file, tree / case_id / file.name.replace(case.name, case_id))


def add_trees(root: Path) -> None:
    """What is indexed: right, of other editions, damaged, and none at all."""
    from raybrats.phantom.phantom import write_phantoms

    write_phantoms(str(root / "tree"), num_cases=6, shape=(24, 24, 20), edition="2021")
    write_phantoms(str(root / "gli"), num_cases=1, shape=(24, 24, 20), edition="2023")
    write_phantoms(str(root / "large"), num_cases=40, shape=(64, 64, 64), edition="2021")
    shutil.copytree(root / "tree", root / "fälle" / "bäume")
    (case,) = (root / "gli").iterdir()
    t1 = f"{case.name}-t1n.nii.gz"
    for name, case_ids in IDS.items():
        renamed(case, root / name, case_ids)
    for name, make in FILES.items():
        renamed(case, root / name, [case.name])
        (root / name / case.name / t1).unlink()
        make(root / name / case.name / t1)
    renamed(case, root / "cut", [case.name])
    os.truncate(root / "cut" / case.name / t1, 2000)
    for name, text in DATASETS.items():
        renamed(case, root / name, [case.name])
        (root / name / "dataset.json").write_text(text)


def add_files(root: Path) -> None:
    """What is no tree: folders without cases, files, and what is neither."""
    (root / "nothing").mkdir()
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").write_text("no case")
    for name, data in {
        "garbage.parquet": b"PAR1" + bytes(range(256)) * 20 + b"PAR1",
        "text.parquet": b"root:x:0:0:secret\n",
        "empty.parquet": b"",
        "config.json": b'{"optim": {"steps": "secret"}}',
        "deep.json": b"[" * 100_000,
        "binary.json": bytes(range(256)),
        "file": b"here",
        "file.nii.gz": b"no volume",
        "garbage.db": b"SQLite format 3\0" + bytes(500),
    }.items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "pipe.nii.gz")
    os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")


def add_after_line(root: Path) -> None:
    """What is made of the run and the predictions that went well."""
    for name, data in RECORDS.items():
        shutil.copytree(root / "predicted", root / name)
        (root / name / "predictions.json").write_bytes(data)
    for name in PREDICTIONS:
        shutil.copytree(root / "predicted", root / name)
        file = min((root / name).glob("*.nii.gz"))
        if name == "cut_prediction":
            os.truncate(file, 50)
        elif name == "text_prediction":
            file.write_bytes(b"hello")
        else:
            file.rename(file.with_name("BraTS2021_99999.nii.gz"))
    for name, (file_name, data) in RUNS.items():
        shutil.copytree(root / "runs" / "one", root / "runs" / name)
        (root / "runs" / name / file_name).write_bytes(data)
    for name, spoil in CHECKPOINTS.items():
        shutil.copytree(root / "runs" / "one", root / "runs" / name)
        for manifest in [*(root / "runs" / name).rglob("MANIFEST.json")]:
            spoil(manifest.parent)


def spoil_registry(root: Path, uri: str) -> None:
    """Models in the registry that raybrats did not make, or that somebody has changed since."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    good = client.get_model_version("raybrats", "1")
    source = Path(client.get_model_version_download_uri("raybrats", "1").removeprefix("file://"))
    for name in ("changed", "no_file", "pickled", "untagged"):
        copy = root / f"model_{name}"
        shutil.copytree(source, copy)
        client.create_registered_model(name)
        made = client.create_model_version(name, str(copy), good.run_id)
        for key, value in {} if name == "untagged" else good.tags.items():
            client.set_model_version_tag(name, made.version, key, value)
        (weights,) = copy.rglob("weights.safetensors")
        if name == "changed":
            data = weights.read_bytes()
            weights.write_bytes(data[:-1] + bytes((data[-1] ^ 1,)))
        elif name == "no_file":
            weights.unlink()
        elif name == "pickled":
            (copy / "python_model.pkl").write_bytes(b"cposix\nsystem\n(S'kill $PPID'\ntR.")
            for code in copy.rglob("*.py"):
                code.write_text("raise SystemExit('this code was run')\n")
    client.create_registered_model("no_version")


# Running them


class Process:
    """A command in a process group of its own, of which nothing is left."""

    def __init__(self, given: Input, folder: Path, env: Mapping[str, str]) -> None:
        """Starts it; what it writes on stderr is read meanwhile."""
        self._signal, self._after = given.signal
        self._begun, self.sent = time.monotonic(), False
        self.err: list[str] = []
        self._process = subprocess.Popen(
            ["bash", "-c", given.shell, "bash", RAYBRATS, *shlex.split(given.words)],
            env=given.environment(env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stderr or ():
            self.err.append(line.rstrip("\n"))
            if self._signal and line.startswith(self._after):
                self.interrupt()

    def interrupt(self) -> None:
        """Sends the signal once, to the command alone: the shell waits for it."""
        if not self.sent:
            self.sent, self._begun = True, time.monotonic()  # what counts is how soon it leaves
            with suppress(ProcessLookupError):
                os.kill(_child(self._process.pid), self._signal)

    def end(self) -> tuple[int, float, str]:
        """Exit code, seconds and stdout; what does not end is killed."""
        try:
            self._process.wait(3 * LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGABRT)
        seconds = time.monotonic() - self._begun
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        out = self._process.stdout.read() if self._process.stdout else ""
        code = self._process.wait()
        self._reader.join(10)
        return code, seconds, out


def run(given: Input, folder: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs the command and judges how it ended."""
    process = Process(given, folder, environment)
    if given.signal[1] == "time":
        time.sleep(WORKS_S)
        process.interrupt()
    code, seconds, out = process.end()
    shown = [line for line in process.err if not line.startswith(PROGRESS)]
    problem = _problem(given, code, seconds, out, shown)
    if given.signal[0] and not process.sent:
        problem = f"it ended before its signal; {problem}"
    return Outcome(code, seconds, shown, problem)


def _child(pid: int) -> int:
    """The one process that a shell waits for; the shell itself where it has become it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def _problem(given: Input, code: int, seconds: float, out: str, err: Sequence[str]) -> str:
    """What is wrong with an outcome; empty if it is as it must be."""
    text = "\n".join(err) + out
    last = err[-1] if err else ""
    refused = code not in (0, signal.SIGINT + 128) and given.lines > 0
    problems = {
        f"code {code}, not {given.code}": code != given.code,
        f"{seconds:.0f} s": seconds > int(given.options.get("seconds", LIMIT_S)),
        "a traceback": "Traceback" in text or '  File "' in text,
        "an error that nobody foresaw": "unexpected " in text,
        f"{len(err)} lines": len(err) > given.lines,
        "no line of its own": refused and not last.startswith("raybrats: "),
        "a control character": any(not c.isprintable() for c in text.replace("\n", "")),
        "a secret": "hush" in text or "secret" in text,
        f"it does not say {given.says!r}": given.says not in (out if code == 0 else last),
    }
    return ", ".join(words for words, holds in problems.items() if holds)


@contextmanager
def silent() -> Iterator[str]:
    """A server that accepts connections and says nothing."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    held.append(listening.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def names_of(root: Path) -> dict[str, str]:
    """What stands for files, servers and words that many rows have."""
    small = "--data.patch-size 16 16 16 --network.widths 4 8 8 --network.deep-supervision 1"
    tiny = f"tiny {small} --run.storage-uri {root}/runs --optim.steps 4 --optim.global-batch 2"
    tiny += " --cluster.workers 1"  # another one costs the time that it takes to import all
    case = f"{root}/tree/BraTS2021_00000/BraTS2021_00000"
    files = {modality: f"{case}_{modality}.nii.gz" for modality in ("flair", "t1", "t1ce", "t2")}
    return {path.name: str(path) for path in root.iterdir()} | {
        "root": str(root),
        "cohort": f"{root}/cohort.parquet",
        "predicted": f"{root}/predicted",
        "model": "models:/raybrats/1",
        "case": case,
        "other": case.replace("/tree/", "/large/"),
        "files": " ".join(f"--{modality} {file}" for modality, file in files.items()),
        "out": f"--out {root}/x.parquet",
        "train": f"train {tiny}",
        "tiny": f"train tiny --data.cohort {root}/cohort.parquet",
        "run": f"train {tiny} --data.cohort {root}/cohort.parquet --run.name",
        "sweep": f"tune {tiny} --data.cohort {root}/cohort.parquet --run.name t",
        "dead": f"127.0.0.1:{free_ports(1)[0]}",
        "esc": "\x1b",
        "newline": "\n",
        "byte": "\udcff",
        "many": "x" * 50_000,
        "long_name": "x" * 300,
        "parentheses": "(" * 5000,
        "zeros": "0" * 32,
    }


def rows(root: Path, only: Sequence[str] = ("",)) -> Iterator[tuple[Input, Outcome]]:
    """Every input with its outcome, in the servers and files that they need."""
    with ExitStack() as stack:
        for name in ("s3", "ray", "scene"):
            (root / name).mkdir()
        scene = root / "scene"
        s3 = stack.enter_context(s3_server(root / "s3"))
        paths = {**s3.environment(), "PYTHONPATH": str(Path(__file__).parents[2])}
        head = stack.enter_context(ray_head(root / "ray", paths))
        add_trees(scene)
        add_files(scene)
        names = names_of(scene) | {"bucket": make_bucket(s3, "inputs")}
        names |= {name: f"{scene}/{name}" for name in AFTER_LINE}
        names |= {"silent": stack.enter_context(silent())}
        environment = _environment(s3, head, scene)
        line, _, others = TABLE.read_text("utf-8").partition("# What does not:\n")
        for given in read_inputs(line, names):
            yield given, run(given, scene, environment)
        add_after_line(scene)
        spoil_registry(scene, environment["MLFLOW_TRACKING_URI"])
        for given in read_inputs(others, names):
            if any(part in given.words or part in given.what for part in only):
                yield given, run(given, scene, environment)


def _environment(s3: S3, head: RayHead, scene: Path) -> dict[str, str]:
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{scene}/mlflow.db", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **s3.environment(), **head.environment, **own}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words = "parts of a command or of what the input is"
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help=words)
    args = parser.parse_args()
    found: list[tuple[Input, Outcome]] = []
    print("| verb | input | code | s | lines | last line | |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="inputs-") as folder:
        for given, outcome in rows(Path(folder), args.only):
            found.append((given, outcome))
            last = (outcome.err or [""])[-1].replace(f"{folder}/scene", "").replace("|", r"\|")
            cells = (given.verb, given.what, outcome.code, f"{outcome.seconds:.1f}")
            cells += (len(outcome.err), last, outcome.problem)
            texts = (str(cell).encode("unicode_escape").decode()[:120] for cell in cells)
            print(f"| {' | '.join(texts)} |", flush=True)
            for line in outcome.err if outcome.problem else ():
                print(ascii(line), file=sys.stderr, flush=True)
    print("\n" + summary(found))
    return int(any(outcome.problem for _, outcome in found))


def summary(found: Sequence[tuple[Input, Outcome]]) -> str:
    """Counts by verb and code, the slowest, and what is wrong."""
    verbs = Counter(given.verb if given.verb.isalpha() else "none" for given, _ in found)
    codes = Counter(outcome.code for _, outcome in found)
    given, slowest = max(found, key=lambda row: row[1].seconds)
    wrong = [row for row in found if row[1].problem]
    return "\n".join(
        [
            f"inputs: {len(found)} ({', '.join(f'{v} {n}' for v, n in verbs.items() if n > 1)})",
            "exit codes: " + ", ".join(f"{code}: {n}" for code, n in sorted(codes.items())),
            f"slowest: {slowest.seconds:.1f} s ({given.verb}, {given.what})",
            f"as they must be: {len(found) - len(wrong)}; not: {len(wrong)}",
            *(f"- {g.verb}, {g.what[:60]!a}: {outcome.problem}" for g, outcome in wrong),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
