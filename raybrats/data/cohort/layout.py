"""The trees in which BraTS cases come: file names -> the files of each case.

Nothing is opened but dataset.json. Known: one folder a case (Kaggle's BraTS2020 with its case 355,
BraTS 2021, BraTS 2023 and later), the Medical Segmentation Decathlon's Task01 (4-D files) and
nnU-Net raw (dataset.json names channels and labels). A tree may hold several. Files are .nii, .hdr
with its .img, or either zipped.

Nothing outside the tree becomes part of a case: paths that a dataset.json declares are not read,
and a link out of the tree is a problem of its case.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from raybrats import storage
from raybrats.brats import MODALITIES, edition_of, label_set_name, label_values
from raybrats.data.cohort import dataset_json
from raybrats.data.cohort.dataset_json import MODALITY_NAMES
from raybrats.data.cohort.rows import CONTROL, MAX_ID_BYTES, is_name
from raybrats.data.cohort.source import img_uri
from raybrats.errors import DataError
from raybrats.label_set import as_text

_VOLUME = re.compile(r"\.(nii|hdr)(\.gz)?$", re.IGNORECASE)
_MASK = "seg|gtv"
"""How the names of label files end."""
_PART = re.compile(rf"^(.+)([_-])({'|'.join(MODALITY_NAMES)}|{_MASK})$", re.IGNORECASE | re.DOTALL)
_CHANNEL = re.compile(r"_\d{4}$")
_CASE_355_LABELS = re.compile(r"segm?$", re.IGNORECASE)
"""BraTS20_Training_355's label file is named W39_1998.09.19_Segm.nii."""


@dataclass(frozen=True)
class Files:
    """The files of one case as their names say; not opened yet."""

    case_id: str
    edition: str
    layout: str
    image_uris: tuple[str, ...]
    """One per modality in the order of `MODALITIES`, empty for a missing one; or one 4-D file."""
    label_uri: str | None
    label_values: tuple[int, ...]
    """Values of its labels in the label file; empty where the edition's are not known."""
    label_set: str = ""
    """What its masks tell apart, as in a cohort."""
    problem: str = ""
    """What the names alone show to be wrong, apart from missing modalities."""


def find_files(uri: str, edition: str | None = None) -> list[Files]:
    """Every case below a URI, by case id.

    Args:
        uri: local path or URI of a tree.
        edition: whose labels the cases have; told by the beginning of each id where not given. A
            dataset.json names its own.

    Raises:
        DataError: there is none, or a dataset.json cannot be understood.
        StorageError: there is nothing at the URI, or it is out of reach.

    Example:
        >>> for end in ("flair", "t1", "t1ce", "t2", "seg"):
        ...     storage.write_bytes(f"tree/BraTS2021_00000/BraTS2021_00000_{end}.nii.gz", b"")
        >>> [(files.case_id, files.edition, files.problem) for files in find_files("tree")]
        [('BraTS2021_00000', '2021', '')]
    """
    uri = storage.absolute(uri)
    storage.require(uri)
    hidden = "/."
    objects = [name for name in storage.list_objects(uri) if hidden not in f"/{name[len(uri) :]}"]
    claimed: set[str] = set()
    found: list[Files] = []
    for name in objects:
        if storage.name(name) == "dataset.json":
            if _links_out(name, uri):
                raise DataError(f"{name}: a link out of the tree is not followed; copy the file")
            root = name.rpartition("/")[0]
            inside = [other for other in objects if other.startswith(root + "/")]
            found += _dataset_cases(name, inside)
            claimed |= set(inside)
    volumes = [name for name in objects if _VOLUME.search(name) and name not in claimed]
    found += _folder_cases(volumes, edition)
    if not found:
        raise DataError(f"{uri}: no BraTS case found in {len(objects)} files; see README, layouts")
    found = _unique([_nameable(files) for files in found])
    found = [_confined(files, uri) for files in found]
    return sorted(found, key=lambda files: files.case_id)


def stem(uri: str) -> str:
    """The file name without .nii, .hdr or either with .gz.

    Example:
        >>> stem("s3://bucket/case/BraTS2021_00000_t1.nii.gz")
        'BraTS2021_00000_t1'
    """
    return _VOLUME.sub("", storage.name(uri))


def is_volume(uri: str) -> bool:
    """Whether the name is that of a NIfTI file.

    Example:
        >>> is_volume("case/t1.nii.gz"), is_volume("case/notes.txt"), is_volume("case/._t1.nii.gz")
        (True, False, False)
    """
    return bool(_VOLUME.search(uri)) and not storage.name(uri).startswith(".")


def is_modality(uri: str) -> bool:
    """Whether the name ends in a modality.

    Example:
        >>> is_modality("BraTS2021_00000_t1ce.nii.gz"), is_modality("BraTS2021_00000_seg.nii.gz")
        (True, False)
    """
    match = _PART.match(stem(uri))
    return match is not None and not re.fullmatch(_MASK, match[3], re.IGNORECASE)


def is_reference(uri: str) -> bool:
    """Whether the name ends in `seg`, as the editions' own label files do.

    Example:
        >>> is_reference("BraTS2021_00000_seg.nii.gz"), is_reference("BraTS2021_00000.nii.gz")
        (True, False)
    """
    match = _PART.match(stem(uri))
    return match is not None and bool(re.fullmatch(_MASK, match[3], re.IGNORECASE))


def case_id_of(label_uri: str) -> str:
    """The case id in the name of a label or prediction file.

    Example:
        >>> case_id_of("BraTS2021_00000_seg.nii.gz"), case_id_of("predictions/BraTS2021_00000.nii")
        ('BraTS2021_00000', 'BraTS2021_00000')
    """
    return re.sub(rf"[_-]({_MASK}|pred|prediction)$", "", stem(label_uri), flags=re.IGNORECASE)


def _links_out(name: str, root: str) -> bool:
    """Whether the object is a link out of the tree, or in a circle; object storage has no links."""
    path = Path(name)
    if storage.is_remote(name) or not path.is_symlink():
        return False
    try:
        return not path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # until Python 3.13 the latter
        return True


def _nameable(files: Files) -> Files:
    """The case; one that no row can name stands there without its files, as a problem."""
    uris = [uri for uri in (*files.image_uris, files.label_uri) if uri]
    place = next(filter(CONTROL.search, uris), "")
    if is_name(files.case_id) and not place:
        return files
    rule = f"a control character, a backslash, or more than {MAX_ID_BYTES} bytes"
    problem = f"its id or path {place or files.case_id!a} is empty or has {rule}; rename it"
    return replace(
        files,
        case_id=_as_name(files.case_id),
        image_uris=("",) * len(files.image_uris),
        label_uri=None,
        problem=problem,
    )


def _as_name(case_id: str) -> str:
    """An id that is a file name, for one that may be none."""
    if is_name(case_id):
        return case_id
    quoted = quote(case_id, safe=" ", errors="surrogatepass")
    if len(quoted) > MAX_ID_BYTES:
        quoted = f"{quoted[:100]}-{hashlib.sha256(quoted.encode()).hexdigest()[:16]}"
    return quoted or "(empty)"


def _confined(files: Files, root: str) -> Files:
    """The case, with a problem if one of its files lies outside the tree."""
    uris = [uri for uri in (*files.image_uris, files.label_uri) if uri]
    images = [image for uri in uris if (image := img_uri(uri))]
    out = [storage.name(uri) for uri in uris + images if _links_out(uri, root)]
    if not out or files.problem:
        return files
    problem = f"{out[0]} links out of {root} or in a circle; copy the file there"
    return replace(files, problem=problem)


def _folder_cases(volumes: list[str], edition: str | None) -> Iterator[Files]:
    """Cases whose files are named by case id and modality, one folder each or together in one."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    strays: dict[str, list[str]] = {}
    for uri in volumes:
        folder, match = uri.rpartition("/")[0], _PART.match(stem(uri))
        if match:
            part = re.sub(f"^({_MASK})$", "seg", match[3].lower())
            parts = groups.setdefault((folder, match[1]), {})
            parts.setdefault(MODALITY_NAMES.get(part, part), []).append(uri)
        elif _CASE_355_LABELS.search(stem(uri)):
            strays.setdefault(folder, []).append(uri)
    for (folder, case_id), parts in groups.items():
        if set(parts) == {"seg"}:  # label files alone: predictions, references
            continue
        if "seg" not in parts and folder in strays:
            alone = sum(other == folder for other, _ in groups) == 1
            parts |= {"seg": strays[folder]} if alone else {}
        yield _folder_case(case_id, parts, edition or edition_of(case_id))


def _folder_case(case_id: str, parts: dict[str, list[str]], edition: str) -> Files:
    return Files(
        case_id=case_id,
        edition=edition,
        layout="brats",
        image_uris=_in_order(parts),
        label_uri=parts.get("seg", [None])[0],
        label_values=label_values(edition),
        label_set=label_set_name(edition),
        problem=_duplicates(parts),
    )


def _in_order(parts: Mapping[str, list[str]]) -> tuple[str, ...]:
    """The first file of each modality, in the order of `MODALITIES`; empty for a missing one."""
    return tuple(parts.get(modality, [""])[0] for modality in MODALITIES)


def _duplicates(parts: Mapping[str, list[str]]) -> str:
    """The first part (modality or `seg`) that has two files, as a problem; empty if none has."""
    for part, uris in parts.items():
        if len(uris) > 1:
            return f"two files for {part}: {', '.join(map(storage.name, uris))}; remove one"
    return ""


def _dataset_cases(uri: str, inside: list[str]) -> Iterator[Files]:
    """Cases of a folder with dataset.json: nnU-Net raw if channels are numbered, else MSD."""
    order, values, labels_known = dataset_json.read(uri)
    root = uri.rpartition("/")[0]
    labels: dict[str, list[str]] = {}
    for name in inside:
        if name.startswith(f"{root}/labels") and _VOLUME.search(name):
            labels.setdefault(stem(name), []).append(name)
    images = [n for n in inside if n.startswith(f"{root}/images") and _VOLUME.search(n)]
    numbered = [name for name in images if _CHANNEL.search(stem(name))]
    if not numbered and order != tuple(range(len(MODALITIES))):
        raise DataError(f"{uri}: channels {order} of {MODALITIES}; expected FLAIR, T1w, T1gd, T2w")
    if numbered:
        cases = _nnunet_cases(numbered, order)
    else:
        cases = ((stem(name), (name,), "") for name in images)
    kind = "nnunet" if numbered else "msd"
    for case_id, uris, problem in cases:
        masks = labels.get(case_id, [])
        if len(masks) > 1:
            problem = _duplicates({"seg": masks})
        mask = masks[0] if masks else None
        yield Files(case_id, kind, kind, uris, mask, values, as_text(labels_known), problem)


def _nnunet_cases(
    images: list[str], order: tuple[int, ...]
) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Case id, its files in the order of `MODALITIES`, and what is wrong with them."""
    modality = dict(zip(order, MODALITIES, strict=True))
    groups: dict[str, dict[str, list[str]]] = {}
    for name in images:
        case_id, _, channel = stem(name).rpartition("_")
        if int(channel) in modality:
            parts = groups.setdefault(case_id, {})
            parts.setdefault(modality[int(channel)], []).append(name)
    for case_id, parts in groups.items():
        yield case_id, _in_order(parts), _duplicates(parts)


def _unique(found: list[Files]) -> list[Files]:
    """One entry per case id; an id found in two places becomes a problem."""
    unique: dict[str, Files] = {}
    for files in found:
        first = unique.get(files.case_id)
        if first is not None:
            places = [max(f.image_uris).rpartition("/")[0] for f in (first, files)]
            problem = f"case id found twice: {' and '.join(places)}; rename or remove one"
            files = replace(files, problem=problem)
        unique[files.case_id] = files
    return list(unique.values())
