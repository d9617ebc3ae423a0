"""The healthy head of a phantom: hemispheres, folds, ventricles, nuclei, cerebellum and stem.

Geometry lives in millimetres around the thalami (x left, y back, z up), so that a case looks the
same on every lattice. Structures are fields of depth in millimetres, positive inside.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Shape = tuple[int, int, int]
Points = tuple[np.ndarray, ...]
Vector = tuple[float, ...]
Ellipsoids = tuple[tuple[Vector, Vector], ...]

FIELD_MM = (240.0, 240.0, 155.0)
"""Extent of every BraTS volume."""

WM, GM, CSF, VESSEL, OEDEMA, RIM, NECROSIS = range(7)

PARTS = (  # either side, in order of painting: tissue, fraction, two ends (x, y, z / 1.5, radius)
    (GM, 0.75, (10, 1, 2, 6.0), (11, 15, 2, 7.5)),  # thalamus
    (GM, 0.90, (24, -16, 1, 5.0), (28, 8, 1, 4.0)),  # putamen and pallidum
    (GM, 1.00, (16, -30, 5, 4.5), (17, -14, 9, 3.0)),  # caudate
    (CSF, 1.00, (11, -34, 4, 3.5), (8, -14, 8, 5.5)),  # lateral ventricle: frontal horn,
    (CSF, 1.00, (8, -14, 8, 5.5), (15, 22, 10, 5.0)),  # body,
    (CSF, 1.00, (15, 22, 10, 5.0), (25, 34, 4, 6.5)),  # atrium,
    (CSF, 1.00, (25, 34, 4, 6.5), (23, 58, 2, 1.5)),  # occipital horn,
    (CSF, 1.00, (25, 34, 4, 6.5), (34, 4, -11, 2.0)),  # temporal horn
    (CSF, 1.00, (0, -8, -2, 1.5), (0, 16, 1, 2.0)),  # third ventricle
    (CSF, 1.00, (0, 27, -31, 2.0), (0, 28, -24, 4.5)),  # fourth ventricle
    (VESSEL, 0.60, (15, 24, 9, 1.0), (24, 33, 4, 2.2)),  # choroid plexus
)

CEREBELLUM: Ellipsoids = (((20, 42, -40), (31, 29, 22)), ((0, 46, -41), (14, 25, 19)))
STEM: Ellipsoids = (
    ((0, 6, -14), (15, 11, 14)),
    ((0, 7, -33), (17, 13, 14)),
    ((0, 15, -44), (9, 9, 21)),
)
"""Ellipsoids: centre and radii in mm, the same on either side."""


@dataclass(frozen=True)
class Frame:
    """Where the voxels around the head lie, and the random generator of the case."""

    rng: np.random.Generator
    axes: Points
    """Positions in mm along x, y and z."""
    box: tuple[slice, ...]
    """Where these voxels are in the volume."""
    voxel_mm3: float

    @property
    def mesh(self) -> Points:
        """Positions in mm that broadcast to the box."""
        return np.meshgrid(*self.axes, indexing="ij", sparse=True)

    def noise(self, scale_mm: float, axes: Points | None = None) -> np.ndarray:
        """A smooth field of unit variance: a cubic spline of random knots, at voxels or `axes`."""
        num_knots = int(230 / scale_mm) + 4
        field = self.rng.standard_normal((num_knots,) * 3, dtype=np.float32) / 0.332
        weights = []
        for mm in axes or self.axes:
            t = abs((mm[:, None] + 115) / scale_mm + 1 - np.arange(num_knots, dtype=np.float32))
            weights.append(np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.maximum(2 - t, 0) ** 3 / 6))
        return np.tensordot(weights[0], weights[1] @ (field @ weights[2].T), 1)

    def paint(
        self,
        fractions: np.ndarray,
        tissue: int,
        depth: np.ndarray,
        *,
        fraction: float | np.ndarray = 1,
    ) -> None:
        """Replaces what lies inside a structure by a tissue, in part at its boundary."""
        inside = fraction * np.clip(depth / max(1.4, self.voxel_mm3 ** (1 / 3)) + 0.5, 0, 1)
        fractions *= 1 - inside
        fractions[tissue] += inside

    def level(self, field: np.ndarray, cm3: float) -> float:
        """The value under which the lowest voxels of a field fill a volume."""
        count = max(1, round(1000 * cm3 / self.voxel_mm3))
        return float(np.partition(field, count, axis=None)[count])


@dataclass(frozen=True)
class Tumour:
    """Place of a tumour, and the volumes of its parts."""

    centre: Vector
    """Position in mm."""
    stretch: Vector
    """Relative extent along x, y and z."""
    rim_cm3: float
    necrosis_cm3: float
    oedema_cm3: float


def make_frame(rng: np.random.Generator, shape: Shape) -> Frame:
    """The voxels near a head that lies almost in the middle of the field.

    Example:
        >>> frame = make_frame(np.random.default_rng(0), (24, 24, 20))
        >>> [len(mm) for mm in frame.axes], frame.voxel_mm3
        ([16, 20, 20], 775.0)
    """
    axes, box, spacing = [], [], np.divide(FIELD_MM, shape)
    middle = np.array((120, 120, 77)) + rng.uniform(-2, 2, 3)
    for n, step, centre, reach in zip(shape, spacing, middle, (80, 98, 98), strict=True):
        mm = ((np.arange(n) + 0.5) * step - centre).astype(np.float32)
        near = np.flatnonzero(abs(mm) < reach)
        box.append(slice(int(near[0]), int(near[-1]) + 1))
        axes.append(mm[near])
    return Frame(rng, tuple(axes), tuple(box), float(spacing.prod()))


def draw_head(frame: Frame, tumour: Tumour) -> tuple[np.ndarray, np.ndarray]:
    """Brain mask (i, j, k) and fractions (tissue, i, j, k) before the tumour infiltrates them.

    Example:
        >>> frame = make_frame(np.random.default_rng(0), (24, 24, 20))
        >>> brain, fractions = draw_head(frame, Tumour((30, 0, 20), (1, 1, 1), 20, 10, 50))
        >>> fractions.shape, bool(brain.any())
        ((7, 16, 20, 20), True)
    """
    x, y, z = points = _displaced(frame, tumour)
    sides = (abs(x), y, z)
    hull, radius = _hull(points)
    cerebellum, stem = _ellipsoids(sides, CEREBELLUM), _ellipsoids(sides, STEM)
    hindbrain = np.maximum(cerebellum, stem)
    sulcus, vein = _folds(frame, points, hull, radius)
    pial = np.minimum(np.minimum(hull, sulcus), _fissures(frame, sides))
    pial = np.where(z < -14, np.minimum(pial, -1.5 - hindbrain), pial)
    fractions = np.zeros((7, *pial.shape), np.float32)
    fractions[WM] = 1
    frame.paint(fractions, GM, 3.6 - pial)
    frame.paint(fractions, CSF, 0.7 - pial)
    wave = 2 * np.pi * (0.9 * z + 0.4 * y + 2 * frame.noise(8))
    frame.paint(fractions, GM, cerebellum + 0.5)
    frame.paint(fractions, CSF, cerebellum, fraction=0.3 * np.clip(np.cos(wave / 4.5), 0, 1))
    frame.paint(fractions, WM, cerebellum - 9.5 + 3 * np.cos(wave / 13))
    frame.paint(fractions, WM, stem, fraction=0.8)
    for tissue, fraction, start, end in PARTS:
        depth = _capsule((abs(x), y, z / 1.5), start, end)
        frame.paint(fractions, tissue, depth, fraction=fraction)
    frame.paint(fractions, VESSEL, np.where(hull > -1, 1 - np.hypot(vein, pial), -9))
    return np.maximum(hull, hindbrain) > -0.7, fractions


def _displaced(frame: Frame, tumour: Tumour) -> Points:
    """Where each voxel's tissue was in a symmetric head, before the tumour pushed it aside."""
    offsets = [p - c for p, c in zip(frame.mesh, tumour.centre, strict=True)]
    radius = 6.2 * (tumour.rim_cm3 + tumour.necrosis_cm3) ** (1 / 3)
    distance = np.sqrt(sum(o**2 for o in offsets))
    push = 0.3 * radius * np.exp(-((distance / (1.6 * radius)) ** 2)) / (distance + 3)
    sizes = frame.rng.uniform(0.96, 1.03, 3).tolist()
    parts = zip(frame.mesh, offsets, sizes, strict=True)
    return tuple((p - o * push) / size + 1.6 * frame.noise(32) for p, o, size in parts)


def _hull(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Depth below the surface that spans the hemispheres, and radius relative to it."""
    x, y, z = points
    floor = 27 + (23 - 20 * np.exp(-((x / 18) ** 2))) * np.exp(-(((y + 4) / 33) ** 4))
    scaled = (x / (71.5 + 0.06 * y), y / 87, z / np.where(z > 0, np.float32(68), floor))
    radius = sum(abs(s) ** 2.25 for s in scaled) ** (1 / 2.25)
    return np.sqrt(x**2 + y**2 + z**2) * (1 / np.maximum(radius, 0.02) - 1), radius


def _folds(
    frame: Frame, points: Points, depth: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the nearest sulcus and vein: crumpled sheets on the hull, extended inwards."""
    grid = (np.arange(-110, 111, 2.5, dtype=np.float32),) * 3
    fields = [frame.noise(scale, grid) for scale in (6.5, 5.5, 14, 12)]
    outward = np.maximum(radius, 0.1) ** -0.8
    where = np.stack([(p * outward + 110) / 2.5 for p in points])
    for n, field in enumerate(fields):
        slope = np.sqrt(sum(g**2 for g in np.gradient(field, 2.5))) + 0.03
        flat = 17 + 5 * field if n == 3 else abs(field) / slope
        fields[n] = ndimage.map_coordinates(flat, where, order=1, mode="nearest")
    major, minor, crossing, floor = fields
    deep = np.hypot(major, np.maximum(depth - np.clip(floor, 4, 25), 0))
    shallow = np.hypot(minor, np.maximum(depth - np.clip(floor - 8, 1, 12), 0))
    return np.minimum(deep, shallow), np.hypot(major, crossing)


def _fissures(frame: Frame, sides: Points) -> np.ndarray:
    """Distance from the cleft between the hemispheres and from the Sylvian fissures."""
    x, y, z = sides
    callosum = (1 - np.hypot((y - 2) / 42, (z - 4) / 23)) * 23
    middle = np.hypot(x, 2 * np.maximum(np.maximum(callosum, -14 - z), 0))
    wide, rise = x - 40 + 2.5 * frame.noise(9), abs(z + 2 - 0.3 * y + 2.5 * frame.noise(11))
    beyond = np.maximum(abs(y + 2) - 27, 0)
    lateral = np.hypot(rise, np.maximum(np.maximum(-wide, beyond), 0))
    insula = np.hypot(wide, np.maximum(np.maximum(rise - 11, beyond), 0))
    return np.minimum(middle, np.minimum(lateral, insula))


def _ellipsoids(points: Points, parts: Ellipsoids) -> np.ndarray:
    depths = []
    for centre, radii in parts:
        scaled = [(p - c) / r for p, c, r in zip(points, centre, radii, strict=True)]
        depths.append(min(radii) * (1 - np.sqrt(sum(s**2 for s in scaled))))
    return np.maximum.reduce(depths)


def _capsule(points: Points, start: Vector, end: Vector) -> np.ndarray:
    a, step = np.array(start, np.float32), np.subtract(end, start, dtype=np.float32)
    offsets = [p - c for p, c in zip(points, a[:3], strict=True)]
    along = sum(o * s for o, s in zip(offsets, step[:3], strict=True)) / sum(step[:3] ** 2)
    along = np.clip(along, 0, 1)
    squares = sum((o - along * s) ** 2 for o, s in zip(offsets, step[:3], strict=True))
    return a[3] + along * step[3] - np.sqrt(squares)
