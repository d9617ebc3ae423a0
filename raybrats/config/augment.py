"""Random changes of a batch."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from raybrats.config.section import Section, require


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """Random changes of a batch: the probability of each a patch, and its range.

    Values are nnU-Net v2's where no other source is named; what it lacks is off, and where that is
    what its trainer DA5 adds (nnunetv2 2.8.1, `nnUNetTrainerDA5`), ranges are DA5's.
    """

    CHANGES: ClassVar[tuple[str, ...]] = (
        *("rotation", "scale", "elastic", "bias_field", "noise", "blur", "median", "brightness"),
        *("brightness_added", "contrast", "low_resolution", "inverted_gamma", "gamma"),
        *("blank_rectangles", "brightness_gradient", "local_gamma", "sharpening"),
        *("drop_modality", "rotate90", "transpose", "mirror"),
    )
    """The fields that are probabilities of a change, in the order in which changes are made."""
    _FRACTIONS: ClassVar[tuple[str, ...]] = (
        *("rotation_per_axis", "blur_per_modality", "contrast_per_modality"),
        *("contrast_keeps_range", "low_resolution_per_modality", "local_per_modality"),
    )

    rotation: float = 0.2
    rotation_degrees: float = 30.0
    """Largest angle about each axis, either way."""
    rotation_per_axis: float = 1.0
    """Fraction of the axes about which a patch that is rotated turns (DA5: half)."""
    scale: float = 0.2
    scale_range: tuple[float, float] = (0.7, 1.4)
    """Source voxels a voxel, as in nnU-Net: 0.7 magnifies, 1.4 makes the head smaller."""
    scale_each_axis: bool = False
    """Whether each axis has a scale of its own (DA5)."""
    elastic: float = 0.0
    """Probability of a smooth deformation (the BraTS 2020 winner: 0.3)."""
    elastic_voxels: tuple[float, float] = (0.0, 7.5)
    """Largest displacement of a control point (TorchIO: 7.5 mm)."""
    elastic_spacing_voxels: float = 32.0
    """Distance of the control points (TorchIO: 7 over a head, about 32 mm)."""
    bias_field: float = 0.0
    """Probability of smooth shading, another for each modality."""
    bias_field_coefficient: float = 0.5
    """Largest coefficient of the polynomial over the patch (TorchIO)."""
    noise: float = 0.1
    noise_variance: tuple[float, float] = (0.0, 0.01)
    """Between the roots of these the deviation is drawn (nnU-Net: up to 0.1; what it calls the
    variance it takes for the deviation)."""
    noise_before_blur: bool = True
    """Whether noise is blurred with the rest, or comes after blur and median (DA5)."""
    blur: float = 0.2
    blur_per_modality: float = 0.5
    """Fraction of the modalities that is blurred where a patch is."""
    blur_sigma_voxels: tuple[float, float] = (0.5, 1.0)
    blur_each_axis: bool = True
    """Whether each axis has a sigma of its own (DA5: one for all)."""
    median: float = 0.0
    """Probability of a median filter; while this and `blur` are at most 1 together, no patch has
    both."""
    median_size_voxels: tuple[int, int] = (2, 7)
    """Edge of the median's window."""
    brightness: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    brightness_added: float = 0.0
    brightness_added_deviation: float = 0.5
    """Deviation of the Gaussian number that is added to a modality."""
    contrast: float = 0.15
    contrast_per_modality: float = 1.0
    """Fraction of the modalities that is changed where a patch is (DA5: half)."""
    contrast_range: tuple[float, float] = (0.75, 1.25)
    contrast_keeps_range: float = 1.0
    """Fraction of those patches that keep the brain's least and greatest value (DA5: half)."""
    low_resolution: float = 0.25
    low_resolution_per_modality: float = 0.5
    """Fraction of the modalities that is coarsened where a patch is."""
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    """Edge of the coarse grid over the edge of the patch."""
    inverted_gamma: float = 0.1
    """Probability of a gamma of the negative, within the same range."""
    gamma: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    gamma_keeps: Literal["range", "moments"] = "moments"
    """Statistics of the brain that a gamma keeps: least and greatest value, or mean and deviation
    (nnU-Net). Ends are outliers, so with `range` a gamma of 0.7 or 1.5 moves the mean by 0.8 to
    2.3 deviations (measured on two BraTS 2021 cases)."""
    blank_rectangles: float = 0.0
    """Probability that boxes take the mean of what they hold."""
    blank_rectangles_most: int = 4
    """Greatest number of boxes in a modality; the least is 1."""
    blank_rectangles_range: tuple[float, float] = (0.1, 1 / 3)
    """Edge of a box over the edge of the patch, axis by axis."""
    brightness_gradient: float = 0.0
    """Probability that a Gaussian about a place in or near the patch is added."""
    brightness_gradient_range: tuple[float, float] = (1.0, 5.0)
    """Its height, up or down."""
    local_gamma: float = 0.0
    """Probability of a gamma whose weight is such a Gaussian."""
    local_gamma_below: tuple[float, float] = (0.01, 0.8)
    """Exponents of one half of them."""
    local_gamma_above: tuple[float, float] = (1.5, 4.0)
    """Exponents of the other half."""
    sharpening: float = 0.0
    """Probability that edges are raised by the negative Laplacian."""
    sharpening_range: tuple[float, float] = (0.1, 1.0)
    """Factor on it."""
    local_per_modality: float = 0.5
    """Fraction of the modalities that median, added brightness, rectangles, gradient, local gamma
    and sharpening change where they change a patch, each another one."""
    drop_modality: float = 0.0
    """Probability that one modality, never the only one, becomes background."""
    rotate90: float = 0.0
    """Probability of one to three quarter turns in a plane whose two edges are equal."""
    transpose: float = 0.0
    """Probability that axes of equal edges change places."""
    mirror: float = 0.5
    """Probability of mirroring, axis by axis."""

    def __post_init__(self) -> None:
        angle, spacing = self.rotation_degrees, self.elastic_spacing_voxels
        largest = self.bias_field_coefficient
        for name in (*self.CHANGES, *self._FRACTIONS):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name}", "a probability", value)
        for name, span in vars(self).items():
            if isinstance(span, tuple):
                holds = 0 <= span[0] <= span[1] < math.inf
                require(holds, f"augment.{name}", "0 <= low <= high", span)
        require(self.scale_range[0] > 0, "augment.scale_range", "above 0", self.scale_range)
        coarse = self.low_resolution_range
        holds = coarse[0] > 0 and coarse[1] <= 1
        require(holds, "augment.low_resolution_range", "above 0 and at most 1", coarse)
        # the windows of a plane are sorted at once: 11 are 1331 numbers a voxel
        window, boxes = self.median_size_voxels, self.blank_rectangles_range
        holds = window[0] >= 1 and window[1] <= 11
        require(holds, "augment.median_size_voxels", "in 1..11", window)
        require(boxes[1] <= 1, "augment.blank_rectangles_range", "at most 1", boxes)
        most, spread = self.blank_rectangles_most, self.brightness_added_deviation
        require(1 <= most <= 64, "augment.blank_rectangles_most", "in 1..64", most)
        require(0 <= spread < math.inf, "augment.brightness_added_deviation", ">= 0", spread)
        require(0 <= angle <= 180, "augment.rotation_degrees", "in 0..180", angle)
        rule = ">= 4 and 2.5 times augment.elastic_voxels (else a patch could fold)"
        unfolded = spacing >= max(4, 2.5 * self.elastic_voxels[1])
        require(unfolded, "augment.elastic_spacing_voxels", rule, spacing)
        require(0 <= largest < math.inf, "augment.bias_field_coefficient", ">= 0", largest)
