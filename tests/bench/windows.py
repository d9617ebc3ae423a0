"""What sliding windows cost above the bare forwards of the same windows, and peak memory of a case.

    .venv-bench/bin/python tests/bench/windows.py [--edge 128] [--shape I J K] [--memory]

A phantom, cropped to its brain, through a small U-Net; wall seconds of one
thread, in interleaved rounds. Peers blend with a Gaussian and overlap by half: nnU-Net's predictor
and MONAI's inferer, each beside the bare forwards of the windows that it lays itself.

--memory: peak resident set of `segment_prepared` on 240 x 240 x 155 and 512^3, all brain, each in a
process of its own, less that before the case was there; beside the formula in its docstring.
"""

import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
import torch
from torch import nn

from raybrats.config import NetworkConfig, TrainConfig, override_all
from raybrats.data.prepare import Prepared, Scaling, prepare
from raybrats.model import windows
from raybrats.model.inference import Member, predict_case, segment_prepared, uploaded
from raybrats.model.network import build
from raybrats.phantom.phantom import make_phantom

CPU = torch.device("cpu")
NETWORK = NetworkConfig(widths=(8, 16, 32, 64), deep_supervision=0)


class Counted(nn.Module):
    """A network that keeps how many windows it has seen, and the shape of one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, 0

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        self.seen += len(window)
        return self.network(window)


def config_of(edge: int) -> TrainConfig:
    return override_all(TrainConfig(network=NETWORK), {"data.patch_size": [edge] * 3})


def ours(network: nn.Module, edge: int, image: torch.Tensor) -> torch.Tensor:
    said = windows.blend_windows(network, image, config_of(edge))
    return said.total.div_(said.weight)


def monais(network: nn.Module, edge: int, image: torch.Tensor) -> torch.Tensor:
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(image, [edge] * 3, 1, network, 0.5, "gaussian", 0.125)


def nnunets(network: nn.Module, edge: int, image: torch.Tensor) -> torch.Tensor:
    from types import SimpleNamespace

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=False, device=CPU, perform_everything_on_device=False, allow_tqdm=False
    )
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=[edge] * 3)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=3)
    predictor.allowed_mirroring_axes = None
    return predictor.predict_sliding_window_return_logits(image[0])[None]


PEERS = {"raybrats": ours, "MONAI": monais, "nnU-Net": nnunets}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        call()
    return time.perf_counter() - began


def beside(edge: int, rounds: int, shape: tuple[int, int, int]) -> dict[str, dict[str, Any]]:
    """Each peer's windows, its time, that of as many bare forwards, and their ratio."""
    torch.manual_seed(0)
    network = Counted(build(NETWORK, 4).eval())
    image = uploaded(prepare(list(make_phantom(0, shape=shape)[0])), CPU).image
    window, counts, said = torch.randn(1, 4, edge, edge, edge), {}, {}
    for name, predict in PEERS.items():
        network.seen = 0
        with torch.inference_mode():
            said[name] = predict(network, edge, image).float()
        counts[name] = network.seen

    def bare(count: int) -> None:
        for _ in range(count):
            network(window)

    times: dict[str, list[float]] = {name: [] for name in PEERS}
    bares: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(rounds):
        for name, predict in PEERS.items():
            bares[name].append(seconds(lambda name=name: bare(counts[name])))
            times[name].append(seconds(lambda f=predict: f(network, edge, image)))
    rows = {}
    for name in PEERS:
        whole, forwards = (statistics.median(each[name]) for each in (times, bares))
        ratios = [a / b for a, b in zip(times[name], bares[name], strict=True)]
        rows[name] = {
            "windows": counts[name],
            "s": whole,
            "bare_s": forwards,
            "ratio": statistics.median(ratios),
            "above_ms": 1e3 * (whole - forwards) / counts[name],
            "differs": float((said[name] - said["raybrats"]).abs().max()),
            "labels": float(((said[name] > 0) != (said["raybrats"] > 0)).float().mean()),
        }
    return rows


def brain(shape: tuple[int, int, int]) -> Prepared:
    """A prepared case of four modalities whose every voxel is brain."""
    voxels = np.empty((4, *shape[::-1]), np.int16)
    for modality in voxels:
        for plane in modality:
            plane[...] = np.random.default_rng(0).integers(1, 1000, plane.shape, np.int16)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.int16)
    scaling = Scaling(ones / 500, -ones, zeros, zeros + 1000, zeros)
    box = tuple(slice(0, edge) for edge in shape)
    nothing = np.empty(0, np.int32)
    return Prepared(
        voxels.transpose(0, 3, 2, 1), None, scaling, nothing, np.zeros(4, np.int64), box, shape
    )


def resident() -> int:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()


def peak(shape: tuple[int, int, int], members: int, asked: bool) -> None:
    """Prints the bytes that a case takes at its peak, itself among them."""
    torch.set_num_threads(1)
    # a network of one convolution: what stays is what the windows themselves take
    made = [Member(nn.Conv3d(4, 3, 1).eval(), config_of(128)) for _ in range(members)]
    small = uploaded(brain((64, 64, 64)), CPU)
    predict_case(made[0].network, made[0].config, small)
    before = resident()
    segment_prepared(made, brain(shape), probabilities=asked)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def stated(shape: tuple[int, int, int], members: int, asked: bool) -> int:
    """The formula of `segment_prepared`: bytes of four modalities, three outputs and regions."""
    voxel = 2 * 4 + 2 * 4 + 4 * 4 + 4 * (3 + 1) + 1 + members
    voxel += 4 * 3 * (members > 1) + 2 * 3 * asked
    return math.prod(shape) * (voxel + 1 + 2 * 3 * asked)


def memory() -> dict[str, dict[str, Any]]:
    rows = {}
    for shape in (measure.PHANTOM_SHAPE, (512, 512, 512)):
        for members, asked in ((1, False), (2, True)):
            words = [*map(str, shape), str(members), str(int(asked))]
            command = [sys.executable, __file__, "--only", *words]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            due = stated(shape, members, asked)
            name = f"{'x'.join(map(str, shape))}, {members} member{'s, probabilities' * asked}"
            rows[name] = {"stated_GB": due / 1e9, "peak_GB": int(done.stdout) / 1e9}
            rows[name]["ratio"] = int(done.stdout) / due
    return rows


def main() -> int:
    parser = measure.parser(__doc__, rounds=3)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--shape", type=int, nargs=3, default=measure.PHANTOM_SHAPE)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", nargs=5, type=int, metavar="N")
    options = parser.parse_args()
    if options.only:
        i, j, k, members, asked = options.only
        peak((i, j, k), members, bool(asked))
        return 0
    if options.memory:
        rows = memory()
    else:
        torch.set_num_threads(1)
        with measure.quiet():
            rows = beside(options.edge, options.rounds, tuple(options.shape))
    title = "peak memory of a case" if options.memory else f"windows of {options.edge}^3"
    measure.report(rows, measure.table(title, rows), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
