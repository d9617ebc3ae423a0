"""What is done to one patch, and how it is drawn: from numbers that belong to its draw alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raybrats.config import AugmentConfig
from raybrats.data.augment.axes import Axes
from raybrats.data.augment.intensity import BIAS_ORDER
from raybrats.data.augment.local import Box, Bump
from raybrats.data.augment.resample import Warp
from raybrats.data.plan import generator

_PURPOSE = 1
"""Purpose of the random numbers of a draw; placing its patch has 0 and 3."""
_PURPOSE_OF_DA5 = 2
"""Purpose of those for what nnU-Net's DA5 adds: what was drawn before there was any stays as it
was."""
_OF_DA5 = (
    *("median", "brightness_added", "blank_rectangles", "brightness_gradient", "local_gamma"),
    *("sharpening", "rotate90", "transpose"),
)
_BUMP_CENTRES = (-0.5, 1.5)
"""Places of a Gaussian over the edge of the patch (DA5)."""
_BUMP_DEVIATIONS = (1 / 6, 1.0)
"""Its deviations over that edge, as likely below as above their geometric mean (DA5)."""
_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Orders of the axes that are not the one they have."""


@dataclass(frozen=True)
class Change:
    """What is done to one patch, from top to bottom; each default does nothing.

    Tuples have one value a modality (None leaves it alone), or are empty.

    Example:
        >>> Change(gamma=(0.7, None, None, 1.5), mirrored=(True, False, False)).blur
        ()
    """

    warp: Warp | None = None
    """Rotation, scale and elastic deformation."""
    bias_field: tuple[np.ndarray | None, ...] = ()
    """Coefficients (4, 4, 4) of the polynomial."""
    noise: tuple[tuple[float, int] | None, ...] = ()
    """Deviation and seed."""
    noise_before_blur: bool = True
    """Whether noise is blurred with the rest, or comes after blur and median."""
    blur: tuple[tuple[float, float, float] | None, ...] = ()
    """Sigma along each axis, in voxels."""
    median: tuple[int | None, ...] = ()
    """Edge of the window, in voxels."""
    brightness: tuple[float | None, ...] = ()
    """Factor."""
    brightness_added: tuple[float | None, ...] = ()
    """Number that is added."""
    contrast: tuple[float | None, ...] = ()
    """Factor about the brain's mean."""
    contrast_keeps_range: bool = True
    """Whether what contrast moves out of the brain's range is cut off."""
    low_resolution: tuple[float | None, ...] = ()
    """Zoom of the coarser grid, at most 1."""
    inverted_gamma: tuple[float | None, ...] = ()
    """Exponent, applied to the negative."""
    gamma: tuple[float | None, ...] = ()
    """Exponent."""
    gamma_keeps_moments: bool = False
    """Whether gamma keeps the brain's mean and deviation, instead of its range."""
    blank_rectangles: tuple[Sequence[Box] | None, ...] = ()
    """Boxes that become their mean."""
    brightness_gradient: tuple[tuple[float, Bump] | None, ...] = ()
    """Height and place of a Gaussian that is added."""
    local_gamma: tuple[tuple[float, Bump] | None, ...] = ()
    """Exponent, and place of the Gaussian that weighs it."""
    sharpening: tuple[float | None, ...] = ()
    """Factor on the Laplacian."""
    dropped: int | None = None
    """Modality that becomes background."""
    rotate90: tuple[int, Axes] | None = None
    """Quarter turns, and the axes by precedence: the first two with equal edges are turned."""
    transpose: Axes | None = None
    """Order of the axes with equal edges."""
    mirrored: tuple[bool, bool, bool] = (False, False, False)
    """Whether each axis is reversed."""


def draw_change(config: AugmentConfig, seed: int, draw: int, num_modalities: int) -> Change:
    """The parameters of one draw.

    As many random numbers are taken for what does not happen, so switching one change on or off
    leaves the others as they are.

    Example:
        >>> change = draw_change(AugmentConfig(rotation=1.0, noise=0.0), 0, 7, num_modalities=4)
        >>> change.warp is None, change.noise
        (False, ())
    """
    rng, of_da5 = (generator(seed, draw, purpose) for purpose in (_PURPOSE, _PURPOSE_OF_DA5))
    count = num_modalities

    def sometimes(probability: float, values: Sequence[Any], each: float = 1.0) -> tuple:
        return _some(rng, rng.random() < probability, values, each)

    warp = _draw_warp(config, rng, of_da5)
    bias_field = sometimes(config.bias_field, _polynomials(config, rng, count))
    deviation = float(rng.uniform(*np.sqrt(config.noise_variance)))
    noise = [(deviation, int(s)) for s in rng.integers(2**62, size=count)]
    sigmas = rng.uniform(*config.blur_sigma_voxels, (count, 3))
    if not config.blur_each_axis:
        sigmas[:, 1:] = sigmas[:, :1]
    zooms = rng.uniform(*config.low_resolution_range, count).tolist()
    noise = sometimes(config.noise, noise)
    smoothed = rng.random()  # blur takes it from 0 upwards, median from 1 downwards
    change = Change(
        warp=warp,
        bias_field=bias_field,
        noise=noise,
        noise_before_blur=config.noise_before_blur,
        blur=_some(rng, smoothed < config.blur, sigmas.tolist(), config.blur_per_modality),
        brightness=sometimes(config.brightness, _factors(config.brightness_range, rng, count)),
        contrast=sometimes(
            config.contrast,
            _factors(config.contrast_range, rng, count),
            config.contrast_per_modality,
        ),
        low_resolution=sometimes(config.low_resolution, zooms, config.low_resolution_per_modality),
        inverted_gamma=sometimes(config.inverted_gamma, _factors(config.gamma_range, rng, count)),
        gamma=sometimes(config.gamma, _factors(config.gamma_range, rng, count)),
        gamma_keeps_moments=config.gamma_keeps == "moments",
        dropped=_draw_dropped(config, rng, count),
        mirrored=tuple((rng.random(3) < config.mirror).tolist()),
    )
    if not any(getattr(config, name) for name in _OF_DA5) and config.contrast_keeps_range == 1:
        return change  # the rest takes half of the time (measured)
    return _with_da5(change, config, of_da5, count, smoothed >= 1 - config.median)


def _with_da5(
    change: Change, config: AugmentConfig, rng: np.random.Generator, count: int, median: bool
) -> Change:
    """The change with what nnU-Net's DA5 adds."""

    def sometimes(probability: float, values: Sequence[Any]) -> tuple:
        return _some(rng, rng.random() < probability, values, config.local_per_modality)

    low, high = config.median_size_voxels
    shifts = rng.normal(0, config.brightness_added_deviation, count).tolist()
    heights = rng.uniform(*config.brightness_gradient_range, count) * rng.choice((-1, 1), count)
    below, above = (
        rng.uniform(*span, count) for span in (config.local_gamma_below, config.local_gamma_above)
    )
    gammas = np.where(rng.random(count) < 0.5, below, above)
    strengths = rng.uniform(*config.sharpening_range, count).tolist()
    quarters, axes = int(rng.integers(1, 4)), tuple(rng.permutation(3).tolist())
    order = _ORDERS[rng.integers(len(_ORDERS))]
    turned, transposed = rng.random(2) < (config.rotate90, config.transpose)
    return replace(
        change,
        median=_some(
            rng, median, rng.integers(low, high + 1, count).tolist(), config.local_per_modality
        ),
        brightness_added=sometimes(config.brightness_added, shifts),
        contrast_keeps_range=bool(rng.random() < config.contrast_keeps_range),
        brightness_gradient=sometimes(config.brightness_gradient, _at_bumps(heights, rng)),
        local_gamma=sometimes(config.local_gamma, _at_bumps(gammas, rng)),
        sharpening=sometimes(config.sharpening, strengths),
        rotate90=(quarters, axes) if turned else None,
        transpose=order if transposed else None,
        blank_rectangles=sometimes(config.blank_rectangles, _boxes(config, rng, count)),
    )


def _some(rng: np.random.Generator, happens: bool, values: Sequence[Any], each: float) -> tuple:
    """Each value with a probability, else None; none at all where it does not happen."""
    chosen = rng.random(len(values)) < each
    return tuple(v if c else None for v, c in zip(values, chosen, strict=True)) if happens else ()


def _draw_warp(
    config: AugmentConfig, rng: np.random.Generator, of_da5: np.random.Generator
) -> Warp | None:
    rotated, scaled, deformed = rng.random(3) < (config.rotation, config.scale, config.elastic)
    angles = rng.uniform(-config.rotation_degrees, config.rotation_degrees, 3)
    scale, largest = rng.uniform(*config.scale_range), rng.uniform(*config.elastic_voxels)
    about = rotated & (of_da5.random(3) < config.rotation_per_axis)
    scales = tuple(of_da5.uniform(*config.scale_range, 3).tolist())
    warp = Warp(
        angles_degrees=tuple(np.where(about, angles, 0.0).tolist()),
        scale=(scales if config.scale_each_axis else scale) if scaled else 1.0,
        elastic_voxels=largest if deformed else 0.0,
        spacing_voxels=config.elastic_spacing_voxels,
        seed=int(rng.integers(2**62)),
    )
    return warp if about.any() or scaled or deformed else None


def _draw_dropped(config: AugmentConfig, rng: np.random.Generator, count: int) -> int | None:
    """The modality that is dropped, which is never the only one, or None."""
    happens, modality = rng.random() < config.drop_modality, int(rng.integers(count))
    return modality if happens and count > 1 else None


def _factors(span: tuple[float, float], rng: np.random.Generator, count: int) -> list[float]:
    """Factors in a span: half of them below 1 where it reaches both sides (nnU-Net)."""
    low, high = span
    middle = min(max(low, 1.0), high)
    fraction_below = 0.5 if low < 1 < high else float(high <= 1)
    below, above = rng.uniform(low, middle, count), rng.uniform(middle, high, count)
    return np.where(rng.random(count) < fraction_below, below, above).tolist()


def _polynomials(config: AugmentConfig, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Coefficients [a, b, c] of i^a j^b k^c for each modality, 0 above the total degree."""
    size = BIAS_ORDER + 1
    largest = config.bias_field_coefficient
    cubes = rng.uniform(-largest, largest, (count, size, size, size))
    return list(cubes * (np.indices((size,) * 3).sum(axis=0) < size))


def _at_bumps(values: np.ndarray, rng: np.random.Generator) -> list[tuple[float, Bump]]:
    """Each value with a Gaussian of its own."""
    centres = rng.uniform(*_BUMP_CENTRES, (len(values), 3))
    deviations = np.exp(rng.uniform(*np.log(_BUMP_DEVIATIONS), (len(values), 3)))
    return list(zip(values.tolist(), np.stack([centres, deviations], 1).tolist(), strict=True))


def _boxes(config: AugmentConfig, rng: np.random.Generator, count: int) -> list[list[Box]]:
    """One or more boxes for each modality."""
    most = config.blank_rectangles_most
    numbers = rng.integers(1, most + 1, count)
    edges = rng.uniform(*config.blank_rectangles_range, (count, most, 3))
    boxes = np.stack([edges, rng.random((count, most, 3))], axis=2).tolist()
    return [several[:number] for several, number in zip(boxes, numbers, strict=True)]
