"""CPU-milliseconds a random patch of four modalities and labels, from cases that are prepared.

    make bench
    .venv-bench/bin/python tests/bench/patches.py [--cases TREE] [--edges 128 96 64] [--rounds 8]

raybrats draws from its node cache, one patch in three centred on tumour. The limit is the copy of
the patch's int16 bytes into a buffer that is kept. Where a peer draws at random what it does to a
patch, the mean over the rounds counts, else the median. MONAI cuts one patch a case by default, as
raybrats does, and four in its spleen tutorial; copy_cache=False leaves out its deep copy of the
cached case. All run in one thread, without workers.
The peers' rows "+ augmentation" are what each does by default or in its tutorial, not the same
transforms; raybrats augments on the training device, its row on the CPU is for comparison only.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import measure
import monai.data as md
import monai.transforms as mt
import nnunet
import numpy as np
import torch
import torchio as tio
from measure import Peer

from raybrats.config import DataConfig
from raybrats.data import batch, cache
from raybrats.data.augment import augment
from raybrats.data.cohort.case import Case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.patch import PatchRule, draw_patch
from raybrats.recipes import nnunet as nnunet_recipe

Call = Callable[[int], object]
OWN, LIMIT = "raybrats, from the node cache", "limit: memcpy int16, kept buffer"
AT_ONCE = 8
"""Patches that a call makes, of the cheap ways."""


def own_peers(cases: Sequence[Case], edge: int, folder: Path) -> list[Peer]:
    data = DataConfig(patch_size=(edge,) * 3, foreground_share=1 / 3, cache_dir=str(folder))
    rule = PatchRule(data, data.patch_size, seed=0)
    numbers = itertools.count()

    def draw(prepared: object) -> tuple[object, tuple[np.ndarray, np.ndarray]]:
        number = next(numbers)
        case, ordinal = number % len(cases), number // len(cases)
        kept = prepared(case)
        return kept, draw_patch(kept, rule, draw=number, case=case, ordinal=ordinal)

    def opened(case: int) -> object:
        return cache.prepared(cases[case], data)[0]

    held = [opened(case) for case in range(len(cases))]
    change = nnunet_recipe().augment

    def augmented(_: int) -> object:
        prepared, (image, labels) = draw(opened)
        image, labels = (torch.from_numpy(array[None]) for array in (image, labels))
        scaling = prepared.scaling.map(lambda array: torch.from_numpy(np.array(array)[None]))
        image, brain = batch.normalise(image, scaling)
        draws = torch.tensor([next(numbers)])
        return augment.augment(change, 0, draws, (image, labels, brain))

    return [
        Peer(OWN, lambda _: _times(AT_ONCE, lambda: draw(opened)), AT_ONCE),
        Peer("  the same, cases kept open", _repeat(lambda: draw(held.__getitem__)), AT_ONCE),
        Peer("  + augmentation, on the CPU", augmented, random=True),
    ]


def copy_peers(edge: int) -> list[Peer]:
    sources = np.random.default_rng(0).integers(0, 9999, (AT_ONCE, 4, *(edge,) * 3), np.int16)
    kept = np.zeros_like(sources[0])
    turns = itertools.count()
    return [
        Peer("memcpy int16, fresh copy", _repeat(lambda: _next(sources, turns).copy()), AT_ONCE),
        Peer(LIMIT, _repeat(lambda: np.copyto(kept, _next(sources, turns))), AT_ONCE),
    ]


class Monai:
    """CacheDataset + RandCropByPosNegLabeld, the indices of tumour and background cached."""

    def __init__(self, cases: Sequence[Case], edge: int) -> None:
        keys = ["image", "label"]
        self._items = [{"image": list(c.image_uris), "label": c.label_uri} for c in cases]
        self._keys, self._edge = keys, edge
        self._fixed = [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.CropForegroundd(keys, source_key="image"),
            mt.SpatialPadd(keys, (edge,) * 3),
            mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            mt.EnsureTyped(keys, track_meta=False),
            mt.FgBgToIndicesd("label"),
        ]
        self._cache = self._dataset(1, cache_rate=1.0)._cache

    def peers(self) -> list[Peer]:
        change = [
            *(mt.RandFlipd(self._keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            mt.RandScaleIntensityd("image", factors=0.1, prob=1.0),
            mt.RandShiftIntensityd("image", offsets=0.1, prob=1.0),
        ]
        return [
            Peer("MONAI CacheDataset + RandCrop", self._loop(1), 1),
            Peer("  four crops a case", self._loop(4), 4),
            Peer("  four crops, copy_cache=False", self._loop(4, copy_cache=False), 4),
            Peer("  four crops + flips, scale, shift", self._loop(4, change), 4, random=True),
        ]

    def _loop(self, num_crops: int, change: Sequence[object] = (), **options: bool) -> Call:
        dataset = self._dataset(num_crops, change, cache_rate=0.0, **options)
        dataset._cache, dataset.cache_num = self._cache, len(self._cache)  # all share one
        batches = _endless(md.DataLoader(dataset, batch_size=1, shuffle=True, num_workers=0))
        return lambda _: next(batches)

    def _dataset(
        self, num_crops: int, change: Sequence[object] = (), **options: float
    ) -> md.CacheDataset:
        crop = mt.RandCropByPosNegLabeld(
            self._keys,
            label_key="label",
            spatial_size=(self._edge,) * 3,
            pos=1,
            neg=2,
            num_samples=num_crops,
            fg_indices_key="label_fg_indices",
            bg_indices_key="label_bg_indices",
        )
        transform = mt.Compose([*self._fixed, crop, *change])
        return md.CacheDataset(self._items, transform, progress=False, num_workers=1, **options)


def torchio_peers(cases: Sequence[Case], edge: int) -> list[Peer]:
    """Queue + LabelSampler over subjects in memory, four patches a volume, loader of two."""
    data = DataConfig(patch_size=(edge,) * 3, cache_gb=0)
    subjects = []
    for case in cases:
        prepared = cache.prepared(case, data)[0]
        scaling = prepared.scaling.map(lambda values: values[:, None, None, None])
        image = prepared.image.astype(np.float32) * scaling.gain + scaling.bias
        image = np.ascontiguousarray(image)
        labels = np.ascontiguousarray(prepared.labels[None])
        room = [(0, 0), *((0, max(0, edge - n)) for n in labels.shape[1:])]
        image, labels = (torch.from_numpy(np.pad(array, room)) for array in (image, labels))
        tumour = tio.LabelMap(tensor=(labels > 0).byte())
        subject = {"image": tio.ScalarImage(tensor=image), "label": tio.LabelMap(tensor=labels)}
        subjects.append(tio.Subject(subject, tumour=tumour))
    change = tio.Compose(
        [
            tio.RandomFlip((0, 1, 2)),
            tio.RandomAffine(p=0.2),
            tio.RandomNoise(p=0.15),
            tio.RandomGamma(p=0.15),
            tio.RandomBlur(p=0.1),
        ]
    )

    def peer(name: str, transform: tio.Transform | None) -> Peer:
        sampler = tio.data.LabelSampler(edge, "tumour", {0: 2, 1: 1})
        dataset = tio.SubjectsDataset(subjects, transform=transform)
        queue = tio.Queue(dataset, max_length=8, samples_per_volume=4, sampler=sampler)
        loader = _endless(tio.SubjectsLoader(queue, batch_size=2))
        call = lambda _: [next(loader) for _ in range(4)]  # noqa: E731 - one filling of the queue
        return Peer(name, call, 8, random=True)

    names = "TorchIO Queue + LabelSampler", "  + flip, affine, noise, gamma, blur"
    return [peer(names[0], None), peer(names[1], change)]


def nnunet_peers(dataset: nnunet.Dataset, edge: int) -> list[Peer]:
    """Its loader over its own preprocessed files, as `nnUNetTrainer.get_dataloaders` builds it."""
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans, size = dataset.read("nnUNetPlans.json"), (edge,) * 3
    plans["continue_training"] = False
    settings = plans["configurations"]["3d_fullres"]
    settings |= {"patch_size": list(size), "batch_size": 2}
    settings["architecture"]["arch_kwargs"]["strides"] = [[1] * 3] + [[2] * 3] * 5
    description = dataset.read("dataset.json")
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, description, device=torch.device("cpu"))
    turned, flat, larger, mirrored = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    labels = trainer.label_manager
    transforms = trainer.get_training_transforms(
        size,
        turned,
        trainer._get_deep_supervision_scales(),
        mirrored,
        flat,
        use_mask_for_norm=settings["use_mask_for_norm"],
        is_cascaded=False,
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )

    def peer(name: str, read: Sequence[int], chain: object) -> Peer:
        files = nnUNetDatasetBlosc2(str(dataset.preprocessed / "nnUNetPlans_3d_fullres"))
        options = {"oversample_foreground_percent": 0.33, "transforms": chain}
        loader = nnUNetDataLoader(files, 2, read, size, labels, **options)
        return Peer(name, lambda _: next(loader), 2, random=True)

    return [
        peer("nnU-Net loader", size, None),
        peer("  + default augmentation", larger, transforms),
    ]


def _times(count: int, call: Callable[[], object]) -> None:
    for _ in range(count):
        call()


def _repeat(call: Callable[[], object]) -> Call:
    return lambda _: _times(AT_ONCE, call)


def _next(sources: np.ndarray, turns: Iterator[int]) -> np.ndarray:
    return sources[next(turns) % len(sources)]


def _endless(loader: object) -> Iterator[object]:
    while True:
        yield from loader


def main() -> None:
    parser = measure.parser(__doc__, rounds=8, cases=True)
    parser.add_argument("--edges", type=int, nargs="+", default=[128, 96, 64])
    options = parser.parse_args()
    result, text = {}, []
    with measure.tree_of(options.cases) as tree, tempfile.TemporaryDirectory() as folder:
        with measure.quiet():
            cases = [verify_case(case) for case in find_cases(tree)]
            dataset = nnunet.make(cases, Path(folder) / "nnunet", preprocess=True)
        measure.one_thread()
        for edge in options.edges:
            with measure.quiet():
                peers = [
                    *nnunet_peers(dataset, edge),
                    *Monai(cases, edge).peers(),
                    *torchio_peers(cases, edge),
                    *own_peers(cases, edge, Path(folder) / "cache"),
                    *copy_peers(edge),
                ]
                measure.interleave(peers, options.rounds, warm=2)
            result[str(edge)] = rows = measure.record(peers, OWN, LIMIT)
            megabytes = 4 * 2 * edge**3 / 1e6
            text.append(measure.table(f"one {edge}^3 patch, {megabytes:.1f} MB int16", rows))
    measure.report({"cases": len(cases), "edges": result}, "\n\n".join(text), as_json=options.json)


if __name__ == "__main__":
    main()
