"""CPU-seconds of peers in interleaved rounds, and the tables of the benchmarks.

Every call of a peer is one sample: user and system time of its process and of the children that
it has waited for. Each peer has a process, so that none meets the memory that another has left to
the allocator, and one thread. Rounds are interleaved, so that another load on the
machine meets all peers alike and the ratios hold where the times do not.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

PHANTOM_SHAPE = (240, 240, 155)


@dataclass
class Peer:
    """One way to do the work, and what it cost."""

    name: str
    call: Callable[[int], object]
    """Takes the number of the round."""
    units: int = 1
    """Cases or patches that one call makes."""
    random: bool = False
    """Its cost differs from call to call by design, so the mean counts, not the median."""
    seconds: list[float] = field(default_factory=list)
    """CPU-seconds a unit, one a round."""

    @property
    def cost(self) -> float:
        """CPU-seconds a unit."""
        return (statistics.fmean if self.random else statistics.median)(self.seconds)


def cpu_seconds() -> float:
    """User and system time of this process and the children that it has waited for."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def interleave(peers: Sequence[Peer], rounds: int, warm: int = 1) -> None:
    """Fills in `seconds`: every peer once a round, after some rounds that do not count."""
    with ExitStack() as stack:
        pipes = [stack.enter_context(_forked(peer)) for peer in peers]
        for turn in range(-warm, rounds):
            for peer, pipe in zip(peers, pipes, strict=True):
                pipe.send(turn % max(rounds, 1))
                spent = pipe.recv()
                if turn >= 0:
                    peer.seconds.append(spent / peer.units)


@contextmanager
def _forked(peer: Peer) -> Iterator[Connection]:
    """A fork of this process that takes numbers of rounds and answers with CPU-seconds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(peer, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join()


def _serve(peer: Peer, pipe: Connection) -> None:
    while (turn := pipe.recv()) is not None:
        gc.collect()
        began = cpu_seconds()
        peer.call(turn)
        pipe.send(cpu_seconds() - began)


def one_thread() -> None:
    """One thread for torch, BLAS, OpenMP and ITK, and no warnings; last, for peers set it too."""
    import torch
    from threadpoolctl import threadpool_limits

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    threadpool_limits(1)
    try:
        import SimpleITK
    except ImportError:
        return
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def parser(doc: str | None, *, rounds: int = 0, cases: bool = False) -> argparse.ArgumentParser:
    """The options that benchmarks share: --json always, --rounds and --cases where they count."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if cases:
        made.add_argument("--cases", help="a tree of 3-D cases in any BraTS layout; else phantoms")
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", action="store_true", help="print one JSON document, no tables")
    return made


@contextmanager
def tree_of(
    cases: str | None, *, num_cases: int = 2, shape: tuple[int, int, int] = PHANTOM_SHAPE
) -> Iterator[str]:
    """The tree of the option --cases, else one of phantoms that is removed at the end."""
    from raybrats.phantom.phantom import write_phantoms

    if cases:
        yield cases
        return
    with tempfile.TemporaryDirectory(prefix="raybrats-bench-") as folder:
        write_phantoms(folder, num_cases=num_cases, shape=shape)
        yield folder


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what peers print out of the tables."""
    with redirect_stdout(sys.stderr):
        yield


def record(peers: Sequence[Peer], own: str, limit: str) -> dict[str, dict[str, float]]:
    """Cost of each peer and its ratios to raybrats and to the limit."""
    costs = {peer.name: peer.cost for peer in peers}
    return {
        name: {
            "cpu_ms": 1e3 * cost,
            "x_raybrats": cost / costs[own],
            "x_limit": cost / costs[limit],
        }
        for name, cost in costs.items()
    }


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of numbers under their names, one line each."""
    columns = list(next(iter(rows.values())))
    wide = max(map(len, [*rows, title]))
    lines = [f"{title:{wide}}" + "".join(f"  {column:>13}" for column in columns)]
    for name, row in rows.items():
        cells = "".join(f"  {_cell(row[column]):>13}" for column in columns)
        lines.append(f"{name:{wide}}{cells}")
    return "\n".join(lines)


def report(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Prints the JSON document or the tables."""
    print(json.dumps(result, indent=1) if as_json else text)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.2f}"
