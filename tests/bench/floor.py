"""What a device would need for a step of the `nnunet` network, by its own measured rates.

    flops  = of forward and backward of the network (torch.utils.flop_counter, meta device),
             over the rate of a matrix product in the row's precision (TF32 where fp32 on a GPU)
    bytes  = 4 P + 2 G + 2 S + 2 A, over the rate of a copy (bytes read and written)
             P parameters: read forward, backward and by the optimiser, which writes them;
             G gradients, S optimiser state, A saved activations: written and read once each

A is what autograd keeps of forward and loss, by `torch.autograd.graph.saved_tensors_hooks`: each
storage once, without the parameters, of one and of two patches, and a straight line for more.
The floor is the larger of the two times (a roofline), or their sum where nothing overlaps.
"""

import functools
from collections.abc import Callable, Sequence

import step
import torch
from torch.utils.flop_counter import FlopCounterMode

from raybrats.config import TrainConfig
from raybrats.model.network import build, heads
from raybrats.train.learner import new_learner
from raybrats.train.step import augmented

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_rate(call: Callable[[], object], amount: float, device: torch.device) -> float:
    """Amount a second, of five calls, the best of five times."""
    now, spent = step.clock(device), []
    for _ in range(6):
        began = now()
        for _ in range(5):
            call()
        spent.append(now() - began)
    return 5 * amount / min(spent[1:])


def product_rates(precisions: Sequence[str], device: torch.device) -> dict[str, float]:
    """FLOP a second of a square matrix product; fp32 in TF32, as convolutions are on a GPU."""
    size, before = 8192 if device.type == "cuda" else 1024, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    rates = {}
    for precision in precisions:
        one, other = torch.randn(2, size, size, device=device, dtype=KINDS[precision])
        result = torch.empty_like(one)
        multiply = functools.partial(torch.mm, one, other, out=result)
        rates[precision] = best_rate(multiply, 2 * size**3, device)
    torch.set_float32_matmul_precision(before)
    return rates


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return best_rate(lambda: target.copy_(source), 2 * source.nbytes, device)


def step_flops(config: TrainConfig) -> int:
    """Of forward and backward of one patch, two a multiplication and addition."""
    with torch.device("meta"):
        network = build(config.network, len(config.data.modalities))
        image = torch.zeros(1, len(config.data.modalities), *config.data.patch_size)
    with FlopCounterMode(display=False) as counter:
        torch.stack([head.mean() for head in heads(network(image))]).sum().backward()
    return counter.get_total_flops()


def saved_bytes(config: TrainConfig, device: torch.device) -> int:
    """What autograd keeps of forward and loss, each storage once, without the parameters."""
    learner, kept = new_learner(config, device), {}
    own = {weight.untyped_storage().data_ptr() for weight in learner.bare.parameters()}
    batch = step.random_batch(config.optim.global_batch, config.data.patch_size[0])
    image, labels = augmented(learner, batch)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with learner.autocast():
            loss = learner.loss(heads(learner.network(image)), labels)
        assert loss.requires_grad, "its graph keeps the storages, so that no address comes twice"
    return sum(kept.values())


def floors(
    wanted: Sequence[tuple[str, int]], edge: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds that the device needs for each precision and batch."""
    precisions = sorted({precision for precision, _ in wanted})
    products, copied = product_rates(precisions, device), copy_rate(device)
    saved = {precision: saved_line(precision, edge, device) for precision in precisions}
    config, found = step.settings("nnunet", edge, 1), {}
    flops, weights = step_flops(config), parameter_bytes(config)
    for precision, batch in wanted:
        first, more = saved[precision]
        kept = first + (batch - 1) * more
        computed = batch * flops / products[precision]
        moved = (8 * weights + 2 * kept) / copied  # G and S are as large as P: 4 + 2 + 2
        found[f"{precision} batch {batch}"] = {
            "TFLOP": batch * flops / 1e12,
            "TFLOP/s": products[precision] / 1e12,
            "saved_GB": kept / 1e9,
            "copy_GB/s": copied / 1e9,
            "flops_ms": 1e3 * computed,
            "bytes_ms": 1e3 * moved,
            "roofline_ms": 1e3 * max(computed, moved),
            "sum_ms": 1e3 * (computed + moved),
        }
    return found


def saved_line(precision: str, edge: int, device: torch.device) -> tuple[int, int]:
    """Saved bytes of one patch, and of each one more."""
    first, second = (
        saved_bytes(step.settings("nnunet", edge, size, precision), device) for size in (1, 2)
    )
    return first, second - first


def parameter_bytes(config: TrainConfig) -> int:
    with torch.device("meta"):
        network = build(config.network, len(config.data.modalities))
    return sum(weight.nbytes for weight in network.parameters())
