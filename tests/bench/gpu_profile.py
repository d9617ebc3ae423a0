"""What a device did in some steps, kernel by kernel: by kind, and how long it did nothing.

Kernels are told apart by their names. A transposed convolution is one of cuDNN's convolutions to
them, so "up-sampling" is interpolation; what a compiler has fused is "norm" where it reduces or
divides by a deviation, else "elementwise", as activations are; "layout" is cuDNN's turning between
NCDHW and NDHWC; "sums" are gradients of biases, and of the loss. A GPU's kernels beside the stream
that convolves make the next batch ready, by copying and augmentation: "side stream". Of a CPU,
operators and their own time stand in place of kernels.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SIDE, HOST = "side stream", "host copies"
_LAYOUT = "(nchw|nhwc|ncdhw|ndhwc)"
KINDS = (
    (HOST, r"memcpy (htod|dtoh)"),
    ("layout", rf"{_LAYOUT}_?to_?(folded)?{_LAYOUT}|foldednhwc|addpadding|tensortransform"),
    ("convolution", r"triton_tem.*conv"),
    ("norm", r"^triton_(red|per)|^triton.*(norm|var_mean|rsqrt)"),
    ("elementwise", r"^triton_"),
    ("optimiser", r"multi_tensor|fused_?(sgd|adam)|lpnorm|vector_norm|optimizer|unscale"),
    ("norm", r"batch_?norm|instance_?norm|welford|\bbn_|norm_(fw|bw)|var_mean"),
    ("up-sampling", r"upsample|interpolate|slow_conv_transpose|max_unpool"),
    ("convolution", r"conv(?!ert)|[dw]grad|fprop|gemm|cutlass|winograd|xmma|nvjet|splitk|2col"),
    ("loss", r"sigmoid|softmax|cross_entropy|nll_loss"),
    ("sums", r"reduce_kernel|aten::(sum|mean|any)\b"),
    ("random", r"distribution|grid_sampl|philox|normal_"),
    ("copies", r"catarray|copy|memcpy|memset|fill|convert|aten::(cat|zero_|repeat|clone|to)\b"),
    ("elementwise", r"elementwise|relu|aten::(add|sub|mul|div|eq|ne|where|clamp|exp)"),
)
"""Kinds of kernels and what their names have in them; the first that fits counts."""


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    stream: int
    start_us: float
    end_us: float


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name.

    Example:
        >>> kind_of("sm90_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc")
        'convolution'
        >>> kind_of("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float, true>(...)")
        'layout'
        >>> kind_of("void at::native::batch_norm_backward_kernel<c10::BFloat16, float, int>")
        'norm'
        >>> kind_of("triton_red_fused_leaky_relu_var_mean_3")
        'norm'
        >>> kind_of("triton_poi_fused_cat_leaky_relu_7")
        'elementwise'
        >>> kind_of("void at::native::vectorized_elementwise_kernel<4, leaky_relu_kernel(...)>")
        'elementwise'
        >>> kind_of("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda(...)>")
        'copies'
        >>> kind_of("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor<float, 3>>")
        'optimiser'
        >>> kind_of("Memcpy HtoD (Pinned -> Device)")
        'host copies'
        >>> kind_of("void at::native::log_sigmoid_backward_kernel(...)")
        'loss'
        >>> kind_of("void at::native::reduce_kernel<512, 1, ReduceOp<float, sum_functor>>")
        'sums'
        >>> kind_of("something else")
        'other'
    """
    return next((kind for kind, words in KINDS if re.search(words, name, re.IGNORECASE)), "other")


def by_kind(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Milliseconds of each kind, the most first; kernels beside the main stream are one kind.

    Example:
        >>> one = Kernel("xmma_fprop", stream=7, start_us=0, end_us=2000)
        >>> two = Kernel("elementwise", stream=20, start_us=500, end_us=1500)
        >>> by_kind([one, two])
        {'convolution': 2.0, 'side stream': 1.0}
    """
    streams: Counter[int] = Counter()
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        spent = kernel.end_us - kernel.start_us
        streams[kernel.stream] += spent * (1 + 1000 * (kind_of(kernel.name) == "convolution"))
    main = max(streams, key=streams.__getitem__, default=0)
    for kernel in kernels:
        kind = kind_of(kernel.name)
        kind = SIDE if kernel.stream != main and kind != HOST else kind
        found[kind] += (kernel.end_us - kernel.start_us) / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def busy_ms(kernels: Sequence[Kernel]) -> float:
    """Milliseconds in which at least one kernel ran; copies from and to the host are none.

    Example:
        >>> times = ((0, 2000), (1000, 3000), (5000, 6000))
        >>> busy_ms([Kernel("gemm", 7, start, end) for start, end in times])
        4.0
    """
    total = last = 0.0
    for kernel in sorted(kernels, key=lambda each: each.start_us):
        if kind_of(kernel.name) != HOST:
            total += max(0.0, kernel.end_us - max(kernel.start_us, last))
            last = max(last, kernel.end_us)
    return total / 1e3


def span_ms(kernels: Sequence[Kernel]) -> float:
    """Milliseconds from the begin of the first kernel to the end of the last.

    Example:
        >>> span_ms([Kernel("gemm", 7, 1000, 2000), Kernel("gemm", 7, 4000, 5000)])
        4.0
    """
    ends = [kernel.end_us for kernel in kernels] or [0.0]
    return (max(ends) - min([kernel.start_us for kernel in kernels] or [0.0])) / 1e3


def longest(kernels: Sequence[Kernel], count: int) -> dict[str, float]:
    """Milliseconds of the kernels that take most together, by kind and the begin of their names.

    Example:
        >>> longest([Kernel("one", 7, 0, 1000), Kernel("two", 7, 1000, 3000)], count=1)
        {'other: two': 2.0}
    """
    total: Counter[str] = Counter()
    for kernel in kernels:
        name = kernel.name.removeprefix("void ").removeprefix("at::native::")
        total[f"{kind_of(kernel.name)}: {name[:80]}"] += kernel.end_us - kernel.start_us
    return {name: spent / 1e3 for name, spent in total.most_common(count)}


class Recorder:
    """A context that notes the kernels of what is done within, and waits for them."""

    def __init__(self, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.kernels: list[Kernel] = []
        self._device = device
        self._profile = profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])

    def __enter__(self) -> Self:
        self._wait()
        self._profile.__enter__()
        return self

    def __exit__(self, *of: object) -> None:
        self._wait()
        self._profile.__exit__(None, None, None)
        gpu = self._device.type == "cuda"
        for event in self._profile.events() or ():
            if (event.device_type == DeviceType.CUDA) != gpu or (
                gpu and getattr(event, "is_user_annotation", False)
            ):
                continue
            start, stream = event.time_range.start, event.device_resource_id if gpu else 0
            end = event.time_range.end if gpu else start + event.self_cpu_time_total
            self.kernels.append(Kernel(event.name, stream, start, end))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
