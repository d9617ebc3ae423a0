"""Parts of gpu_step.py beside the pace of a step: what each takes alone, and what is right."""

import copy
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import floor
import gpu_rows
import numpy as np
import step
import torch
import torch.distributed
from gpu_rows import NEEDS_GPU, Clocked, Row, Session, cleared, driven, replaced, seconds_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raybrats.data.prepare import Prepared, Scaling
from raybrats.model.inference import predict_case, uploaded
from raybrats.model.regions import region_dice, region_sizes
from raybrats.model.unet import LEAK, _ConvNorm
from raybrats.train import loop
from raybrats.train import step as training_step
from raybrats.train.copies import copied
from raybrats.train.learner import Learner, new_learner
from raybrats.train.step import Inputs, augmented, backward, train_step, update

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[1]
BRAIN = (142, 179, 145)
"""Voxels of a brain's box, of patches of 128^3."""
NORM_PASSES = 8
"""Least that norm and activation read and write of a tensor: forward x twice and y, backward x and
the gradient twice, and the one that comes of it."""
SMALL = {"tiny": ("tiny", 4), "nnunet at 32^3": ("nnunet", 2)}
"""Recipes by which devices are held to each other, and their batches."""


def smoke(session: Session) -> None:
    """What the device and its software are, and whether it computes what a CPU does."""
    for name, words in described(session.device).items():
        session.row(name, functools.partial(dict, result=words))
    for name, (recipe, size) in SMALL.items():
        call = functools.partial(losses_beside, recipe, size, session.device)
        session.row(f"fp32 loss, {name}, 10 steps", call)
        call = functools.partial(left_out_beside, recipe, size, session.device)
        session.row(f"steps that are not finite, {name}", call)
    tests = functools.partial(tests_of_a_gpu, session)
    session.row("tests of a GPU", tests, need_s=15 if session.gpu else 0)


def described(device: torch.device) -> dict[str, str]:
    """The device, its driver, and what compiles for it."""
    gpu, headers = device.type == "cuda", Path(sysconfig.get_paths()["include"], "Python.h")
    asked = "--query-gpu=driver_version,clocks.max.sm,power.limit,memory.total"
    found = {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU, one thread",
        "cores": str(len(os.sched_getaffinity(0))),
        "Python": f"{sys.version.split()[0]}, {'' if headers.exists() else 'no '}headers",
        "torch": torch.__version__,
        "CUDA, cuDNN": f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
        "driver, clock, power, memory": said("nvidia-smi", asked, "--format=csv,noheader"),
        "gcc": said("gcc", "--version"),
        "nvcc": said("nvcc", "--version", line=-1),
        "Triton": "none",
    }
    if importlib.util.find_spec("triton"):
        import triton

        found["Triton"] = triton.__version__
    return found


def said(*command: str, line: int = 0) -> str:
    """A line of what a program says, or that there is none."""
    if shutil.which(command[0]) is None:
        return "none"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return ((done.stdout or done.stderr).strip().splitlines() or ["says nothing"])[line]


def losses_beside(recipe: str, size: int, device: torch.device) -> dict[str, Any]:
    """Largest relative difference of a device's losses from the CPU's, with and without TF32."""
    config, patches = step.settings(recipe, 32, size, "fp32"), step.random_batch(size, 32)

    def losses(there: torch.device, *, tf32: bool) -> Tensor:
        learner = new_learner(config, there)
        with replaced(torch.backends.cudnn, "allow_tf32", tf32), searching(on=False):
            return torch.stack([train_step(learner, patches).cpu() for _ in range(10)])

    gpu, ours = device.type == "cuda", losses(CPU, tf32=False)
    plain, quick = (
        float(((losses(device, tf32=on) - ours).abs() / ours.abs()).max()) if gpu or not on else 0
        for on in (False, True)
    )
    words = f", in TF32 by {quick:.1e}" if gpu else " (the CPU beside itself; TF32 needs a GPU)"
    return {"result": f"differs by {plain:.1e} at most{words}"}


def searching(*, on: bool) -> AbstractContextManager[None]:
    """Whether cuDNN looks for its fastest kernels, which takes longer than a few small steps."""
    return replaced(torch.backends.cudnn, "benchmark", on)


def left_out_beside(recipe: str, size: int, device: torch.device) -> dict[str, Any]:
    """Whether steps without a finite gradient change nothing, on this device and on a CPU."""
    pairs = [left_out(recipe, size, there) for there in (CPU, device)]
    (one, ours), (other, theirs) = pairs
    alike = "the same" if ours[:2] == theirs[:2] else f"NOT THE SAME: {ours} and {theirs}"
    kept = "nothing changed" if one and other else "WEIGHTS OR MOMENTA CHANGED"
    late = "by itself" if theirs[2] else "told by the host"
    return {"result": f"{kept}; CPU and {device.type} count {alike}; it leaves them out {late}"}


def left_out(
    recipe: str, size: int, device: torch.device
) -> tuple[bool, tuple[int, list[int], bool]]:
    """Whether weights and momenta stay in bad steps, and the learner's count of them."""
    learner = new_learner(step.settings(recipe, 32, size, "fp32"), device)
    coming, kept = Inputs(*augmented(learner, step.random_batch(size, 32))), True
    for bad in (False, False, True, False, True, True):
        with searching(on=False):
            backward(learner, coming)
        before = copy.deepcopy((learner.weights(), learner.optimizer.state_dict()["state"]))
        if bad:
            next(learner.bare.parameters()).grad.fill_(torch.nan)  # ty: ignore[unresolved-attribute]
        late = learner.skips_itself
        update(learner)
        now = learner.weights(), learner.optimizer.state_dict()["state"]
        kept &= not bad or all(map(torch.equal, tensors_of(before), tensors_of(now)))
    learner.settle()
    return kept, (learner.skipped, learner.skipped_in_a_row, late)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings and sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_of(value)


def tests_of_a_gpu(session: Session) -> dict[str, Any]:
    """The last line of those tests that need a GPU."""
    if not session.gpu:
        return {"words": NEEDS_GPU}
    if importlib.util.find_spec("pytest") is None:
        return {"words": "left out: no pytest"}
    files = [str(path) for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text()]
    # tests' own set-up and options want Ray and pytest-timeout
    options = ["-m", "gpu", "-q", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=session.left_s)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED"))][:1]
    return {"result": "; ".join([*lines, (done.stdout.strip().splitlines() or [done.stderr])[-1]])}


def norm(session: Session) -> None:
    """Norm and activation alone, forward and backward, beside the rate of a copy."""
    device, edge = session.device, session.options.edge
    copied_at = 0.0

    def copying() -> dict[str, Any]:
        nonlocal copied_at
        copied_at = floor.copy_rate(device)
        return {"GB/s": copied_at / 1e9}

    session.row("a copy", copying)
    was = nn.Sequential(nn.InstanceNorm3d(32, affine=True), nn.LeakyReLU(LEAK, inplace=True))
    ours = _ConvNorm(step.settings("nnunet", edge, 2).network, 3, (32, 32))
    ours.conv = nn.Identity()  # ty: ignore[invalid-assignment]
    ways = {
        "as it was: InstanceNorm3d, in place": (was, False, False),
        "as it is": (ours, False, False),
        "as it is, channels_last": (ours, False, True),
        "compiled": (ours, True, False),
        "compiled, channels_last": (ours, True, True),
    }
    for name, (block, compiled, last) in ways.items():

        def call(block: nn.Module = block, on: bool = compiled, last: bool = last) -> dict:
            image = torch.randn(2, 32, edge, edge, edge, device=device, dtype=torch.bfloat16)
            layout = torch.channels_last_3d if last else torch.contiguous_format
            image = image.contiguous(memory_format=layout).requires_grad_()
            seconds = norm_seconds(block.to(device), image, compiled=on)
            rate = NORM_PASSES * image.nbytes / seconds
            row = {"ms": 1e3 * seconds, "GB/s": rate / 1e9}
            row |= {"of_a_copy": rate / copied_at} if copied_at else {}
            traced = on and device.type == "cpu"
            return row | ({"words": "traced, not compiled: a CPU's rehearsal"} if traced else {})

        session.row(name, call, need_s=10 if compiled and session.gpu else 2)


def norm_seconds(block: nn.Module, image: Tensor, *, compiled: bool) -> float:
    """Seconds of a block forward and backward."""
    device, gradient = image.device, torch.randn_like(image)
    with gpu_rows.compiler(device):
        called = torch.compile(block, dynamic=False) if compiled else block

    def both() -> None:
        image.grad = None
        block.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            result = called(image)
        result.backward(gradient)

    return seconds_of(both, device, times=20 if device.type == "cuda" else 2)


def feeding(session: Session) -> None:
    """The fastest configuration augmented: what the side stream's priority does, and the host."""
    (row, learner), options = gpu_rows.fastest(session, on=True), session.options

    def fed(priority: int) -> dict[str, Any]:
        clock, waited = Clocked(session.device), [0.0]
        with replaced(training_step, "PRIORITY", priority), noting_waits(waited):
            figures = driven(learner, options.warmup, options.steps, clock)
        patches = row.batch * gpu_rows.counted(options.steps)
        every = gpu_rows.counted(options.warmup) / gpu_rows.counted(options.steps) + 1
        host, waits = 1e3 * clock.host_s / patches, 1e3 * waited[0] / patches / every
        return {
            "patches/s": patches / clock.seconds,
            "data_wait": figures["data_wait_fraction"],
            "host_ms": host,
            "spun_ms": waits,
            "cores_at_50": 50 * max(0.0, host - waits) / 1e3,
            "words": learner.not_compiled[:200],
        }

    for priority in (0, -1):
        session.row(f"{row.name}, priority {priority}", functools.partial(fed, priority))
    if not session.gpu:
        session.row("waits of the host, by line", lambda: {"words": NEEDS_GPU})
        return
    session.row("waits of the host, by line", lambda: host_waits(learner))
    for place, count in (
        session.found["feeding"]["waits of the host, by line"].get("by", {}).items()
    ):
        session.row(f"  {place}", functools.partial(dict, a_step=count), need_s=0)


@contextmanager
def noting_waits(waited: list[float]) -> Iterator[None]:
    """Adds up the seconds for which the host waits for events of a GPU, spinning."""
    wait = torch.cuda.Event.synchronize

    def noted(event: torch.cuda.Event) -> None:
        began = time.perf_counter()
        wait(event)
        waited[0] += time.perf_counter() - began

    with replaced(torch.cuda.Event, "synchronize", noted):
        yield


def host_waits(learner: Learner) -> dict[str, Any]:
    """Where the host waits for the GPU, and how often a step; torch tells, but of no event."""
    steps = loop.LOG_EVERY_STEPS

    @contextmanager
    def watched() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        driven(learner, steps, steps, watched())
    places = [
        f"{one.filename}:{one.lineno}"
        for one in said
        if "synchronizing CUDA operation" in str(one.message)
    ]
    found = {place: count / steps for place, count in Counter(places).most_common(12)}
    return {"a_step": len(places) / steps, "by": found}


def validation(session: Session) -> None:
    """A case of a brain's size through the network, by windows at once; and its Dice."""
    row, learner = gpu_rows.fastest(session)
    device, edge = session.device, session.options.edge
    prepared = a_case(edge)
    for last in (False, True):
        network = new_learner(replace(row, last=last).config(edge), device).validated.eval()

        def predicted(at_once: int, network: nn.Module = network) -> dict[str, Any]:
            cleared(device)
            case, clock = uploaded(prepared, device), Clocked(device)
            with learner.autocast():
                call = functools.partial(predict_case, network, learner.config, case, at_once)
                call()
                with clock:
                    call()
                    call()
            return {
                "cases/s": 2 / clock.seconds,
                "ms": 5e2 * clock.seconds,
                **gpu_rows.peaks(device),
            }

        for at_once in (1, 2, 4, 8):
            name = f"{'channels_last, ' * last}{at_once} at once"
            session.row(name, functools.partial(predicted, at_once))
    session.row("loop.validate, 4 cases", lambda: validated(learner, prepared))
    session.row("Dice sums of a case", lambda: dice_sums(prepared, device))
    upload = functools.partial(uploaded, prepared, device)
    session.row("upload of a case", lambda: {"ms": 1e3 * seconds_of(upload, device)})


def validated(learner: Learner, prepared: Prepared) -> dict[str, Any]:
    """Cases one after the other, as a run validates them."""
    cases = (uploaded(prepared, learner.device) for _ in range(4))
    with Clocked(learner.device) as clock:
        loop.validate(learner, cases)
    return {
        "cases/s": 4 / clock.seconds,
        "ms": 250 * clock.seconds,
        **gpu_rows.peaks(learner.device),
    }


def dice_sums(prepared: Prepared, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a case's figures, read by the host."""
    labels = uploaded(prepared, device).labels
    assert labels is not None
    return {"ms": 1e3 * seconds_of(lambda: region_dice(region_sizes(labels, labels)), device)}


def a_case(edge: int) -> Prepared:
    """A noisy case of a brain's size with a tumour, as `prepare` would have it."""
    i, j, k = (round(n * edge / 128) for n in BRAIN)
    noise = np.random.default_rng(0).integers(200, 1800, (4, k, j, i)).astype(np.int16)
    labels = np.zeros((k, j, i), np.uint8)
    for label, share in ((1, 3), (2, 4), (3, 5)):
        labels[k // share : -k // share, j // share : -j // share, i // share : -i // share] = label
    each = np.ones(4, np.float32)
    scaling = Scaling(
        gain=each / 462,
        bias=each * -1000 / 462,
        low=np.full(4, 0, np.int16),
        high=np.full(4, 2000, np.int16),
        background=np.zeros(4, np.int16),
    )
    return Prepared(
        image=noise.transpose(0, 3, 2, 1),
        labels=labels.T,
        scaling=scaling,
        tumour=np.empty(0, np.int32),
        counts=np.bincount(labels.ravel(), minlength=4),
        box=(slice(0, i), slice(0, j), slice(0, k)),
        shape=(i, j, k),
    )


def copies(session: Session) -> None:
    """A checkpoint's copy to the host; ranks' exchange with one rank, which costs what it must."""
    device, row = session.device, Row(batch=session.options.batches[0])
    learner = gpu_rows.made(row, session)
    train_step(learner, gpu_rows.batches(row.batch, session.options.edge)[0])
    kept: Any = None

    def once() -> dict[str, Any]:
        nonlocal kept
        gpu_rows.waited_for(device)
        began, state = time.perf_counter(), (learner.weights(), learner.state())
        kept = copied(state, kept)
        gpu_rows.waited_for(device)
        seconds, size = time.perf_counter() - began, sum(t.nbytes for t in tensors_of(state))
        return {"ms": 1e3 * seconds, "GB/s": size / 1e9 / seconds}

    for name in ("first", "second", "third"):
        session.row(f"copy of a checkpoint, the {name}", once)
    session.row(f"plain {row.name}", lambda: stepped(learner, session))
    backend = "nccl" if session.gpu and torch.distributed.is_nccl_available() else "gloo"
    session.row(f"DDP of one rank, {backend}", lambda: wrapped(learner, session, backend))


def stepped(learner: Learner, session: Session) -> dict[str, Any]:
    """Milliseconds of a step."""
    options = session.options
    with nullcontext(Clocked(session.device)) as clock:
        driven(learner, options.warmup, options.steps, clock)
    return {"ms": 1e3 * clock.seconds / gpu_rows.counted(options.steps)}


def wrapped(learner: Learner, session: Session, backend: str) -> dict[str, Any]:
    """Milliseconds of a step under DDP, with an exchange that has nobody to exchange with."""
    with tempfile.TemporaryDirectory(prefix="raybrats-gpu-") as folder:
        torch.distributed.init_process_group(
            backend,
            init_method=f"file://{folder}/ranks",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
        )
        try:
            ids = [session.device.index] if session.gpu else None
            learner.network = learner.ddp = DistributedDataParallel(learner.bare, device_ids=ids)
            return stepped(learner, session)
        finally:
            learner.network, learner.ddp = learner.bare, None
            torch.distributed.destroy_process_group()


PARTS: dict[str, tuple[Callable[[Session], None], float]] = {
    "smoke": (smoke, 45),
    "norm": (norm, 45),
    "feeding": (feeding, 40),
    "validation": (validation, 45),
    "copies": (copies, 30),
}
"""Parts of this file, and their shares of the time."""
