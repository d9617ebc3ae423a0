"""How a whole case is segmented: its windows, and what is made of the probabilities."""

from dataclasses import dataclass

from raybrats.config.section import Section, require


@dataclass(frozen=True, kw_only=True)
class PredictionConfig(Section):
    """How whole cases are segmented: in validation, by the registered model and by `predict`.

    Values a region are in the order of the label set's regions (glioma: WT TC ET); none: the rule
    is off for all.
    """

    overlap: float = 0.5
    """Overlap of the sliding windows, as a fraction of the patch."""
    mirror: tuple[int, ...] = ()
    """Axes (0 1 2: i j k) along which a window is also seen mirrored, in all combinations, whose
    logits are averaged (nnU-Net: all three); slices have no k."""
    threshold: tuple[float, ...] = ()
    """Probability above which a voxel belongs to a region, one a region; none: 0.5 each."""
    smallest_voxels: tuple[int, ...] = ()
    """Voxels that a connected component of a region has at least, one a region; smaller ones become
    what lies around (the winner of BraTS 2023: 250 150 100)."""
    replace_below_voxels: tuple[int, ...] = ()
    """Voxels that a region has at least in the whole case, one a region; with fewer it becomes the
    next outer region (the winner of BraTS 2020: 0 0 200, which makes NCR of so little ET)."""
    temperature: tuple[float, ...] = ()
    """Number by which a region's logit is divided before it becomes a probability that is written
    or judged, one a region; none: 1 each. Labels do not depend on it."""
    look_below: float | None = None
    """Expected Dice below which a case is marked as one to look at; none: no case is."""

    def __post_init__(self) -> None:
        require(0 <= self.overlap < 1, "prediction.overlap", "in 0..1", self.overlap)
        axes = self.mirror
        different = len(set(axes)) == len(axes) and set(axes) <= {0, 1, 2}
        require(different, "prediction.mirror", "different axes among 0 1 2", axes)
        cuts = self.threshold
        require(all(0 < t < 1 for t in cuts), "prediction.threshold", "between 0 and 1 each", cuts)
        for name in ("smallest_voxels", "replace_below_voxels"):
            counts = getattr(self, name)
            require(all(n >= 0 for n in counts), f"prediction.{name}", ">= 0 each", counts)
        heat = self.temperature
        fits = all(0.01 <= t <= 100 for t in heat)
        require(fits, "prediction.temperature", "in 0.01..100 each", heat)
        look = self.look_below
        require(look is None or 0 <= look <= 1, "prediction.look_below", "in 0..1", look)

    def check_regions(self, number: int) -> None:
        """Refuses values a region that are not as many as there are regions.

        Raises:
            UsageError: with the field.

        Example:
            >>> PredictionConfig(threshold=(0.4, 0.5)).check_regions(3)
            Traceback (most recent call last):
            raybrats.errors.UsageError: prediction.threshold must be one a region (3) or none, ...
        """
        for name in ("threshold", "smallest_voxels", "replace_below_voxels", "temperature"):
            values = getattr(self, name)
            fits = len(values) in (0, number)
            require(fits, f"prediction.{name}", f"one a region ({number}) or none", values)
