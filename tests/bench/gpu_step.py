"""Ten minutes on one GPU: is the device path right, how fast is it, and what holds it back.

    python tests/bench/gpu_step.py [--budget-s 540] [--only step norm] [--out found.json] [--json]
    python tests/bench/gpu_step.py --device cpu --edge 32 --batches 1 2 --steps 2   # a rehearsal

Needs torch and numpy; neither MONAI, Ray, MLflow, pydantic, tyro, pyarrow, fsspec, nibabel nor
numba. The root of the repository has to be on PYTHONPATH where raybrats is not installed. --out
keeps what is found after each part, should the time end before the program.

    smoke       device and software; fp32 losses and steps that are not finite, CPU against GPU;
                the tests that need a GPU, where pytest is
    profile     kernels of eager bf16 steps by kind (gpu_profile.py has the table), plain and
                augmented; loss and augmentation alone
    norm        norm and activation alone on (2, 32, edge^3) bf16, beside a copy
    step        pace, memory and idle share of configurations, in multiples of the floor (floor.py)
    feeding     the fastest augmented: priority of the side stream, waits, CPU time of the host
    validation  a case of a brain's size by windows at once; its Dice
    copies      a checkpoint to the host; DDP of one rank
    verdict     against the goals, and the kind of kernel that takes most

Each part has its share of --budget-s, and what earlier ones leave; rows for which there is no time
say so, and an error is the words of its row. Steps are those of the loop of a real run, over int16
patches in page-locked memory whose draws differ. cuDNN searches for its fastest kernels, as in a
run; torch keeps what it has chosen as long as it lives, so the row without that search is of a
process of its own (--no-search).

"idle" is the share of a step in which no kernel ran: its time by the clock, less that of the
kernels by the profiler. "waits" is the loop's own `data_wait_fraction`; made_s is what a learner
and its compiler took. host_ms is CPU time of the process, spun_ms that part of it in which it spins
for a GPU's event (not for figures, so that cores_at_50, which leaves it out, are the most).

On a CPU there is one thread, seconds are CPU time, memory is the largest resident set so far, what
is to be compiled is only traced, and a patch below 64 has fewer stages.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import floor
import gpu_parts
import measure
import step
import torch
from gpu_profile import Recorder, busy_ms, by_kind, longest, span_ms
from gpu_rows import (
    NEEDS_GPU,
    PROFILED,
    Row,
    Session,
    batches,
    cleared,
    driven,
    fastest,
    made,
    paced,
    seconds_of,
)

from raybrats.config import AugmentConfig
from raybrats.errors import first_line
from raybrats.model.network import heads
from raybrats.train.learner import Learner
from raybrats.train.ranks import choose_kernels
from raybrats.train.step import augmented

GOAL_PATCHES_S, GOAL_BUSY = 100.0, 0.95
"""What `nnunet` shall reach on one H200."""
ORDER = ("smoke", "profile", "norm", "step", "feeding", "validation", "copies", "verdict")
TEXTS, HIDDEN = ("result", "words"), ("batch", "took_s")
"""Keys of a row that stand behind its numbers, and that only the document has."""
TABLES = (
    *("smoke", "profile", "longest kernels", "norm", "floor", "step", "kernels of those steps"),
    *("feeding", "validation", "copies", "verdict"),
)
TITLES = {
    "kernels of those steps": "kernels of those steps, ms a step",
    "longest kernels": "longest kernels of eager steps, ms a step",
    "profile": "profile, ms a step",
    "feeding": "feeding, host_ms and spun_ms a patch",
    "norm": "norm + activation, forward and backward",
}


def profiled(session: Session) -> None:
    """Kernels of eager bf16 steps by kind, without and with augmentation."""
    first = Row(batch=session.options.batches[0])
    learner, found, longest_kernels = made(first, session), {}, {}

    def recorded(on: bool) -> dict[str, Any]:
        augment = AugmentConfig() if on else step.STILL
        learner.config = replace(learner.config, augment=augment)
        recorder = Recorder(session.device)
        driven(learner, session.options.warmup, PROFILED, recorder)
        if not recorder.kernels:
            return {"words": "the profiler saw no kernel"}
        name, span = "augmented" if on else "plain", span_ms(recorder.kernels) / PROFILED
        found[name] = by_kind(recorder.kernels)
        longest_kernels.update(longest(recorder.kernels, 12))
        row = {name: sum(found[name].values()) / PROFILED}
        if not session.gpu:
            return row
        return row | {"span": span, "idle": 1 - busy_ms(recorder.kernels) / PROFILED / span}

    for on in (False, True):
        name = f"all kernels, {first.name}{' augmented' * on}"
        session.row(name, functools.partial(recorded, on), need_s=8)
    for kind in dict.fromkeys(kind for kinds in found.values() for kind in kinds):
        shares = {name: kinds.get(kind, 0.0) / PROFILED for name, kinds in found.items()}
        session.row(kind, functools.partial(dict, shares), need_s=0)
    session.found["longest kernels"] = {
        name: {"ms": ms / PROFILED}
        for name, ms in sorted(longest_kernels.items(), key=lambda item: -item[1])
    }
    session.row("loss alone", lambda: {"plain": loss_ms(learner, session)})
    session.row("augmentation alone", lambda: {"augmented": augmentation_ms(learner, session)})


def loss_ms(learner: Learner, session: Session) -> float:
    """Milliseconds of the loss, forward and backward, from logits on."""
    batch = batches(learner.config.optim.global_batch, session.options.edge)[0]
    image, labels = augmented(learner, batch)
    with torch.no_grad(), learner.autocast():
        logits = [head.detach() for head in heads(learner.network(image))]

    def both() -> None:
        for head in logits:
            head.requires_grad_().grad = None
        with learner.autocast():
            loss = learner.loss(logits, labels)
        loss.backward()

    return 1e3 * seconds_of(both, session.device)


def augmentation_ms(learner: Learner, session: Session) -> float:
    """Mean milliseconds until a batch is ready, with its copy, over draws."""
    learner.config = replace(learner.config, augment=AugmentConfig())
    coming = iter(batches(learner.config.optim.global_batch, session.options.edge))
    times = 30 if session.gpu else 3
    return 1e3 * seconds_of(lambda: augmented(learner, next(coming)), session.device, times)


def steps(session: Session) -> None:
    """Pace and memory of configurations, those first that decide most; fp32 decides least."""
    options = session.options
    first, more = Row(batch=options.batches[0]), options.batches[1:]
    rows = [first, replace(first, compiled=True), replace(first, compiled=True, last=True)]
    rows, last = [*rows, replace(first, precision="fp16")], replace(first, precision="fp32")
    if options.rows:
        for row in (*rows, last):
            if row.name in options.rows:
                timed(session, row)
    else:
        for row in rows:
            timed(session, row)
        of_rows = session.best
        if of_rows is not None:
            for size in more:
                timed(session, replace(of_rows[1], batch=size))
            row, learner = fastest(session, on=True)
            session.row(row.name, lambda: {**paced(learner, session), "batch": row.batch})
            fastest(session)
            call = functools.partial(unsearched, session, of_rows[1])
            session.row(f"{of_rows[1].name}, no search", call, need_s=40 if session.gpu else 0)
        timed(session, last)
    if not options.no_search:
        beside_floor(session)


def timed(session: Session, row: Row) -> None:
    """Adds a row, and keeps its learner if it is the fastest so far."""

    def call() -> dict[str, Any]:
        if row.precision == "fp16" and not session.gpu:
            return {"words": "left out: a CPU emulates fp16, at 40 s a step"}
        cleared(session.device)
        began = time.perf_counter()
        learner = made(row, session)
        made_s = time.perf_counter() - began
        found = paced(learner, session)
        best = session.best is None or found["patches/s"] > session.best[0]
        if best and not learner.not_compiled:
            session.best = (found["patches/s"], row, learner)
        return {**found, "made_s": made_s, "batch": row.batch}

    session.row(row.name, call, need_s=45 if row.compiled and session.gpu else 6)


def unsearched(session: Session, row: Row) -> dict[str, Any]:
    """A row in a process whose cuDNN takes what its heuristics say."""
    if not session.gpu:
        return {"words": NEEDS_GPU}
    cleared(session.device)
    options = session.options
    command = [sys.executable, __file__, "--only", "step", "--rows", row.name, "--no-search"]
    command += ["--edge", str(options.edge), "--batches", str(row.batch), "--json"]
    command += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    limit = max(10.0, session.left_s)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        return {"words": f"its process: {(done.stderr.strip().splitlines() or ['no words'])[-1]}"}
    return json.loads(done.stdout)["parts"]["step"][row.name]


def beside_floor(session: Session) -> None:
    """Adds multiples of the floor to the rows, and the floor as a table of its own."""
    rows = {name: row for name, row in session.found["step"].items() if "ms" in row}
    pairs = {name: (name.split()[1], row["batch"]) for name, row in rows.items()}
    if not rows:
        return
    limits = floor.floors(sorted(set(pairs.values())), session.options.edge, session.device)
    for name, (precision, batch) in pairs.items():
        limit, spent = limits[f"{precision} batch {batch}"], rows[name]["ms"]
        rows[name] |= {f"x_{kind}": spent / limit[f"{kind}_ms"] for kind in ("roofline", "sum")}
    session.found["floor"] = dict(limits)


def verdict(session: Session) -> None:
    """The best row against the goals, and what takes most of it."""
    rows = {n: row for n, row in session.found.get("step", {}).items() if "patches/s" in row}
    if not rows:
        session.row("verdict", lambda: {"result": "no step was timed (part step)"}, need_s=0)
        return
    name = max(rows, key=lambda each: rows[each]["patches/s"])
    for each in dict.fromkeys([name, *(n for n in rows if n.endswith("augmented"))]):
        row = rows[each]
        words = f"{row['patches/s']:.1f} patches/s, goal {GOAL_PATCHES_S:g}: "
        words += judged(row["patches/s"] >= GOAL_PATCHES_S, session)
        session.row(each, functools.partial(dict, result=words), need_s=0)
        if "idle" in row:
            words = f"{1 - row['idle']:.1%}, goal {GOAL_BUSY:.0%}: "
            words += judged(1 - row["idle"] >= GOAL_BUSY, session)
            session.row(f"busy, {each}", functools.partial(dict, result=words), need_s=0)
        total = sum(row["kinds"].values())
        for kind, ms in list(row["kinds"].items())[:1]:
            words = f"{kind}, {ms:.2f} ms a step, {ms / total:.0%} of all kernels"
            session.row(f"takes most, {each}", functools.partial(dict, result=words), need_s=0)


def judged(kept: bool, session: Session) -> str:
    """Whether a goal is kept; of a CPU it is none."""
    return ("kept" if kept else "MISSED") if session.gpu else "a GPU's, so nothing is judged"


def parts() -> dict[str, tuple[Callable[[Session], None], float]]:
    """Every part in its order, and its share of the time."""
    found = {"profile": (profiled, 40), "step": (steps, 250), "verdict": (verdict, 1)}
    found = {**gpu_parts.PARTS, **found}
    return {name: found[name] for name in ORDER}


def shown(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A part's table: every number that a row has, and its words behind."""
    columns = dict.fromkeys(
        key
        for row in rows.values()
        for key, value in row.items()
        if isinstance(value, int | float) and key not in HIDDEN
    )
    numbers = {name: {key: row.get(key, "-") for key in columns} for name, row in rows.items()}
    head, *lines = measure.table(title, numbers).splitlines()
    words = [" ".join(row[key] for key in TEXTS if row.get(key)) for row in rows.values()]
    pairs = zip(lines, words, strict=True)
    return "\n".join([head, *(f"{line}  {more}".rstrip() for line, more in pairs)])


def all_parts(session: Session) -> dict[str, Any]:
    """Every part that is wanted, each until its share of the time is up; keeps what is found."""
    options, began, spent = session.options, time.perf_counter(), 0.0
    wanted = {name: part for name, part in parts().items() if name in options.only}
    whole, device = sum(share for _, share in wanted.values()), gpu_parts.described(session.device)
    result: dict[str, Any] = {"device": device, "options": vars(options), "parts": session.found}
    for name, (part, share) in wanted.items():
        spent += share
        session.part, session.until = name, began + options.budget_s * spent / whole
        try:
            part(session)
        except Exception as error:  # what a part needs before its rows
            session.found.setdefault(name, {})["all"] = {"words": first_line(error)}
        cleared(session.device)
        result["took_s"] = time.perf_counter() - began
        if options.out:
            Path(options.out).write_text(json.dumps(result, indent=1))
    return result


def parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--warmup", type=int, default=10, help="before")
    parser.add_argument("--only", nargs="+", choices=ORDER, default=list(ORDER), metavar="PART")
    parser.add_argument("--rows", nargs="+", default=[], help="only these rows of step, by name")
    parser.add_argument("--no-search", action="store_true", help="cuDNN's heuristics as they are")
    parser.add_argument("--budget-s", type=float, default=540.0, help="until rows are left out")
    parser.add_argument("--out", help="a file for the JSON document, after each part")
    options = parser.parse_args()
    if options.device == "cpu":
        options.warmup = min(options.warmup, options.steps)
    return options


def main() -> None:
    options = parsed()
    session = Session(
        options, torch.device("cuda", 0) if options.device == "cuda" else gpu_parts.CPU
    )
    if session.gpu:
        choose_kernels(Row().config(options.edge))
        torch.backends.cudnn.benchmark = not options.no_search
    else:
        torch.set_num_threads(1)
    with measure.quiet():
        result = all_parts(session)
    kinds = {n: row["kinds"] for n, row in session.found.get("step", {}).items() if "kinds" in row}
    found = {**session.found, **({"kernels of those steps": kinds} if kinds else {})}
    order = [name for name in TABLES if name in found]
    tables = [shown(TITLES.get(name, name), found[name]) for name in order if found[name]]
    text = "\n\n".join([*tables, f"took {result['took_s']:.0f} s"])
    measure.report(result, text, as_json=options.json)


if __name__ == "__main__":
    main()
