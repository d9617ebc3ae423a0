"""CPU-seconds a case, from .nii.gz files to a cropped case whose normalisation is known.

    make bench
    .venv-bench/bin/python tests/bench/decode.py [--cases TREE] [--rounds 9] [--json] [--check]

The peers end at cropped, z-scored float32; raybrats ends at cropped int16 with a gain and a bias a
modality, which the device applies. Its row "as indexed" checks size and digest of every file, as a
run from a cohort file does. --check compares the prepared voxels with nibabel's get_fdata.
"""

import multiprocessing
import tempfile
from pathlib import Path

import deflate
import measure
import monai.transforms as mt
import nibabel as nib
import nnunet
import numpy as np
import SimpleITK
import torch
import torchio as tio
from blake3 import blake3
from measure import Peer
from nibabel import orientations

from raybrats.brats import MODALITIES
from raybrats.config import DataConfig
from raybrats.data.cohort.case import Case, prepare_case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.data.nifti.volume import CANONICAL

OWN, LIMIT = "raybrats, as indexed", "limit: libdeflate alone"

_monai = mt.Compose(
    [
        mt.LoadImaged(["image", "label"]),
        mt.EnsureChannelFirstd(["image", "label"]),
        mt.CropForegroundd(["image", "label"], source_key="image"),
        mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
    ]
)
_torchio_zscore = tio.ZNormalization(masking_method=lambda x: x != 0)


def nibabel_zscore(case: Case) -> object:
    image = np.stack([nib.load(uri).get_fdata() for uri in case.image_uris])
    labels = nib.load(case.label_uri).get_fdata()
    box = _box((image != 0).any(axis=0))
    image = image[:, *box]
    for modality in image:
        brain = modality != 0
        modality[brain] = (modality[brain] - modality[brain].mean()) / modality[brain].std()
    return image.astype(np.float32), labels[box].astype(np.uint8)


def monai_chain(case: Case) -> object:
    return _monai({"image": list(case.image_uris), "label": case.label_uri})


def torchio_chain(case: Case) -> object:
    images = {m: tio.ScalarImage(u) for m, u in zip(MODALITIES, case.image_uris, strict=True)}
    subject = tio.Subject(**images, label=tio.LabelMap(case.label_uri))
    subject.load()
    brain = torch.stack([subject[m].data != 0 for m in MODALITIES]).any(dim=0)
    subject.add_image(tio.LabelMap(tensor=brain.byte(), affine=subject["t1"].affine), "brain")
    return _torchio_zscore(tio.CropOrPad(mask_name="brain")(subject))


def simpleitk_numpy(case: Case) -> object:
    """The fastest of the plain ways: integers are cropped before anything becomes float."""
    files = [SimpleITK.ReadImage(uri) for uri in (*case.image_uris, case.label_uri)]
    *images, labels = map(SimpleITK.GetArrayViewFromImage, files)
    brain = images[0] != 0
    for image in images[1:]:
        brain |= image != 0
    box = _box(brain)
    out = np.empty((len(images), *brain[box].shape), np.float32)
    for image, target in zip(images, out, strict=True):
        target[:] = image[box]
        inside = target != 0
        values = target[inside]
        target -= values.mean(dtype=np.float64)
        target *= 1 / values.std(dtype=np.float64)
        target *= inside
    return out, np.ascontiguousarray(labels[box], np.uint8)


class NnunetPreprocessor:
    """`DefaultPreprocessor.run_case` with the plans that nnU-Net's planner makes."""

    def __init__(self, cases: list[Case], folder: Path) -> None:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        self._dataset = nnunet.make(cases, folder, preprocess=False)
        self._plans = PlansManager(self._dataset.read("nnUNetPlans.json"))
        self._configuration = self._plans.get_configuration("3d_fullres")
        self._json = self._dataset.read("dataset.json")
        self._preprocessor = self._configuration.preprocessor_class(verbose=False)

    def __call__(self, case: Case) -> object:
        images, labels = self._dataset.files(case.case_id)
        settings = self._plans, self._configuration, self._json
        return self._preprocessor.run_case(images, labels, *settings)


def peers_for(cases: list[Case], folder: Path) -> list[Peer]:
    # elsewhere, for it changes how a process keeps memory, and each peer is a fork of this one
    with multiprocessing.get_context("fork").Pool(1) as pool:
        indexed = pool.map(verify_case, cases)
    held = [[Path(uri).read_bytes() for uri in (*c.image_uris, c.label_uri)] for c in cases]
    preprocessor = NnunetPreprocessor(cases, folder)

    def inflate(files: list[bytes]) -> object:
        return [deflate.gzip_decompress(f, int.from_bytes(f[-4:], "little")) for f in files]

    def read_and_inflate(case: Case) -> object:
        return inflate([Path(uri).read_bytes() for uri in (*case.image_uris, case.label_uri)])

    def with_digests(case: Case) -> object:
        files = [Path(uri).read_bytes() for uri in (*case.image_uris, case.label_uri)]
        return inflate(files), [blake3(f).digest() for f in files]

    def own(case: Case) -> object:
        return prepare_case(case, DataConfig())

    def over(call, given: list) -> object:
        return lambda turn: call(given[turn % len(given)])

    return [
        Peer("nibabel get_fdata + crop + z-score", over(nibabel_zscore, cases)),
        Peer("MONAI load + crop + normalise", over(monai_chain, cases)),
        Peer("nnU-Net DefaultPreprocessor.run_case", over(preprocessor, cases)),
        Peer("TorchIO load + crop + z-score", over(torchio_chain, cases)),
        Peer("SimpleITK + numpy", over(simpleitk_numpy, cases)),
        Peer(OWN, over(own, indexed)),
        Peer("raybrats, as found", over(own, cases)),
        Peer("read + libdeflate + digests", over(with_digests, cases)),
        Peer("read + libdeflate", over(read_and_inflate, cases)),
        Peer(LIMIT, over(inflate, held)),
    ]


def check(case: Case) -> dict[str, object]:
    """How far the prepared voxels are from nibabel's, on canonical axes and after the same crop."""
    prepared = prepare_case(case, DataConfig())
    apart, whole = 0.0, True
    for modality, uri in enumerate(case.image_uris):
        there = _canonical(uri)[prepared.box]
        whole &= bool((there == np.rint(there)).all())
        stored = prepared.image[modality]
        if whole:
            apart = max(apart, float(np.abs(there - stored).max()))
            continue
        inside = (prepared.image != prepared.scaling.background[:, None, None, None]).any(axis=0)
        there = (there - there[inside].mean()) / there[inside].std()
        mine = prepared.scaling.gain[modality] * stored + prepared.scaling.bias[modality]
        apart = max(apart, float(np.abs(there - mine)[inside].max()))
    labels = _canonical(case.label_uri)[prepared.box]
    table = np.zeros(256, np.uint8)
    table[list(case.label_values)] = (1, 2, 3)
    same = bool((table[labels.astype(np.uint8)] == prepared.labels).all())
    return {"integers": whole, "max_difference": apart, "labels_equal": same}


def _canonical(uri: str) -> np.ndarray:
    nifti = nib.load(uri)
    own = orientations.io_orientation(nifti.affine)
    turn = orientations.ornt_transform(own, orientations.axcodes2ornt(CANONICAL))
    return orientations.apply_orientation(nifti.get_fdata(), turn)


def _box(brain: np.ndarray) -> tuple[slice, ...]:
    spans = []
    for axis in range(3):
        places = np.flatnonzero(brain.any(axis=tuple(a for a in range(3) if a != axis)))
        spans.append(slice(places[0], places[-1] + 1))
    return tuple(spans)


def main() -> None:
    parser = measure.parser(__doc__, rounds=9, cases=True)
    parser.add_argument("--check", action="store_true", help="compare with nibabel, no timing")
    options = parser.parse_args()
    with measure.tree_of(options.cases) as tree, tempfile.TemporaryDirectory() as folder:
        cases = find_cases(tree)
        if options.check:
            rows = {case.case_id: check(case) for case in cases}
            measure.report(rows, measure.table("case", rows), as_json=options.json)
            return
        with measure.quiet():
            peers = peers_for(cases, Path(folder))
            measure.one_thread()  # nnU-Net's planner has set its own
            measure.interleave(peers, options.rounds, warm=2)
    rows = measure.record(peers, OWN, LIMIT)
    text = measure.table("one case, files to cropped", rows)
    measure.report({"cases": len(cases), "peers": rows}, text, as_json=options.json)


if __name__ == "__main__":
    main()
