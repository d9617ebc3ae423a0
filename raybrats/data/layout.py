"""The trees in which BraTS cases come: file names -> the files of each case.

Nothing is opened but dataset.json. Known: one folder a case (Kaggle's BraTS2020 with its case 355,
BraTS 2021, BraTS 2023 and later), the Medical Segmentation Decathlon's Task01 (4-D files) and
nnU-Net raw (dataset.json names channels and labels). A tree may hold several.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raybrats.brats import EDITIONS, MODALITIES, Modality
from raybrats.data import storage
from raybrats.errors import DataError

_MODALITY_NAMES: Mapping[str, Modality] = {
    **dict.fromkeys(("flair", "t2f"), "flair"),
    **dict.fromkeys(("t1", "t1n", "t1w"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd"), "t1ce"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
}
_VOLUME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_PART = re.compile(rf"^(.+)([_-])({'|'.join(_MODALITY_NAMES)}|seg)$", re.IGNORECASE)
_CHANNEL = re.compile(r"_\d{4}$")
_CASE_355_LABELS = re.compile(r"segm?$", re.IGNORECASE)
"""BraTS20_Training_355's label file is named W39_1998.09.19_Segm.nii."""


@dataclass(frozen=True)
class Files:
    """The files of one case as their names tell it; not opened yet."""

    case_id: str
    edition: str
    layout: str
    image_uris: tuple[str, ...]
    """One a modality in the order of `MODALITIES`, or a single 4-D file."""
    label_uri: str | None
    label_values: tuple[int, int, int]
    """Values of NCR, ED and ET in the label file."""
    problem: str = ""
    """What the names alone show to be wrong."""


def find_files(uri: str) -> list[Files]:
    """Every case below a URI, by case id.

    Raises:
        DataError: there is none, or a dataset.json cannot be understood.
        StorageError: there is nothing at the URI, or it is out of reach.
    """
    uri = storage.absolute(uri)
    storage.require(uri)
    objects = [name for name in storage.list_objects(uri) if not _hidden(name, uri)]
    claimed: set[str] = set()
    found: list[Files] = []
    for name in objects:
        if storage.name(name) == "dataset.json":
            root = name.rpartition("/")[0]
            inside = [other for other in objects if other.startswith(root + "/")]
            found += _dataset_cases(name, inside)
            claimed |= set(inside)
    volumes = [name for name in objects if _VOLUME.search(name) and name not in claimed]
    found += _folder_cases(volumes)
    if not found:
        raise DataError(f"{uri}: no BraTS case found in {len(objects)} files; see README, layouts")
    return sorted(_without_twins(found), key=lambda files: files.case_id)


def stem(uri: str) -> str:
    """File name without .nii or .nii.gz."""
    return _VOLUME.sub("", storage.name(uri))


def is_volume(uri: str) -> bool:
    """Whether the name is that of a NIfTI file."""
    return bool(_VOLUME.search(uri)) and not storage.name(uri).startswith(".")


def is_modality(uri: str) -> bool:
    """Whether the name ends in a modality."""
    match = _PART.match(stem(uri))
    return match is not None and match[3].lower() != "seg"


def is_reference(uri: str) -> bool:
    """Whether the name ends in `seg`, as the editions' own label files do."""
    match = _PART.match(stem(uri))
    return match is not None and match[3].lower() == "seg"


def case_id_of(label_uri: str) -> str:
    """Case id that a label or prediction file is named by."""
    return re.sub(r"[_-](seg|pred|prediction)$", "", stem(label_uri), flags=re.IGNORECASE)


def _hidden(name: str, root: str) -> bool:
    below = name[len(root) :]
    return any(part.startswith(".") for part in below.split("/"))


def _folder_cases(volumes: list[str]) -> Iterator[Files]:
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    strays: dict[str, list[str]] = {}
    for uri in volumes:
        folder, match = uri.rpartition("/")[0], _PART.match(stem(uri))
        if match:
            part = match[3].lower()
            parts = groups.setdefault((folder, match[1]), {})
            parts.setdefault(_MODALITY_NAMES.get(part, part), []).append(uri)
        elif _CASE_355_LABELS.search(stem(uri)):
            strays.setdefault(folder, []).append(uri)
    for (folder, case_id), parts in groups.items():
        if set(parts) == {"seg"}:  # label files alone: predictions, references
            continue
        if "seg" not in parts and folder in strays:
            alone = sum(other == folder for other, _ in groups) == 1
            parts |= {"seg": strays[folder]} if alone else {}
        yield _folder_case(case_id, parts)


def _folder_case(case_id: str, parts: dict[str, list[str]]) -> Files:
    first = next(iter(parts.values()))[0]
    edition = EDITIONS[_edition_of(case_id, stem(first))]
    images = tuple(parts[m][0] for m in MODALITIES if m in parts)
    labels = parts.get("seg", [None])[0]
    values = edition.label_values
    return Files(case_id, edition.name, "brats", images, labels, values, _problem(parts))


def _problem(parts: Mapping[str, list[str]]) -> str:
    """What is twice or missing among the files of a case, which go by modality or `seg`."""
    for part, uris in parts.items():
        if len(uris) > 1:
            return f"two files for {part}: {', '.join(map(storage.name, uris))}"
    missing = [m for m in MODALITIES if m not in parts]
    return f"no {', '.join(missing)} file" if missing else ""


def _edition_of(case_id: str, file_stem: str) -> str:
    if file_stem[len(case_id) :][:1] == "-":
        return "2023"
    return "2021" if case_id.lower().startswith("brats2021") else "2020"


def _dataset_cases(uri: str, inside: list[str]) -> Iterator[Files]:
    """Cases of a folder with dataset.json: nnU-Net raw if channels are numbered, else MSD."""
    dataset = _read_json(uri)
    root = uri.rpartition("/")[0]
    channels = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(channels, dict) or not isinstance(dataset.get("labels"), dict):
        raise DataError(f"{uri}: neither a Decathlon nor an nnU-Net dataset.json")
    try:
        order, values = _channel_order(uri, channels), _label_values(uri, dataset["labels"])
    except (TypeError, ValueError) as error:
        raise DataError(f"{uri}: channels and labels are not numbered ({error})") from None
    labels: dict[str, list[str]] = {}
    for name in inside:
        if name.startswith(f"{root}/labels") and _VOLUME.search(name):
            labels.setdefault(stem(name), []).append(name)
    images = [n for n in inside if n.startswith(f"{root}/images") and _VOLUME.search(n)]
    numbered = [name for name in images if _CHANNEL.search(stem(name))]
    if not numbered and order != tuple(range(len(MODALITIES))):
        raise DataError(f"{uri}: channels {channels}; expected FLAIR, T1w, T1gd, T2w")
    cases = _nnunet_cases(numbered, order) if numbered else _decathlon_cases(images)
    kind = "nnunet" if numbered else "msd"
    for case_id, uris, problem in cases:
        masks = labels.get(case_id, [])
        if len(masks) > 1:
            problem = f"two files for seg: {', '.join(map(storage.name, masks))}"
        yield Files(case_id, kind, kind, uris, masks[0] if masks else None, values, problem)


def _decathlon_cases(images: list[str]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Case id, its one file, and no problem."""
    for name in images:
        yield stem(name), (name,), ""


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
        yield case_id, tuple(parts[m][0] for m in MODALITIES if m in parts), _problem(parts)


def _read_json(uri: str) -> dict:
    try:
        loaded = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri}: not JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{uri}: not a JSON object")
    return loaded


def _channel_order(uri: str, channels: dict[str, str]) -> tuple[int, ...]:
    """Channel number of each modality, in the order of `MODALITIES`."""
    named = {
        _MODALITY_NAMES.get(re.sub(r"^(t2-?|mri?_)(?=flair)", "", str(name).lower())): int(number)
        for number, name in channels.items()
    }
    if not set(MODALITIES) <= set(named):
        raise DataError(f"{uri}: channels {channels} do not name flair, t1, t1ce and t2")
    return tuple(named[m] for m in MODALITIES)


def _label_values(uri: str, labels: dict) -> tuple[int, int, int]:
    """Values of NCR, ED and ET from {"0": "background", ...}, {"edema": 1, ...} or regions."""
    pairs = [(v, k) if str(k).isdigit() else (k, v) for k, v in labels.items()]
    values: dict[str, int] = {}
    for name, value in pairs:
        word = str(name).lower()
        if isinstance(value, list | tuple):
            continue
        for key, pattern in (
            ("NCR", "necro|non-?_? ?enh|ncr|net"),
            ("ED", "edema|^ed$"),
            ("ET", "enh|et"),
        ):
            if re.search(pattern, word):
                values[key] = int(value)
                break
    regions = sorted((set(v) for _, v in pairs if isinstance(v, list | tuple)), key=len)
    regions += [
        {int(v)} for n, v in pairs if not isinstance(v, list | tuple) and "back" not in n.lower()
    ]
    regions.sort(key=len)
    if len(values) != 3 and [len(r) for r in regions] == [1, 2, 3]:
        et, tc, wt = regions
        if et < tc < wt:
            values = {"NCR": (tc - et).pop(), "ED": (wt - tc).pop(), "ET": et.pop()}
    if len(set(values.values())) != 3:
        raise DataError(f"{uri}: labels {labels} do not name necrosis, oedema and enhancing tumour")
    return values["NCR"], values["ED"], values["ET"]


def _without_twins(found: list[Files]) -> list[Files]:
    """One entry a case id; an id found in two places becomes a problem."""
    unique: dict[str, Files] = {}
    for files in found:
        first = unique.get(files.case_id)
        if first is not None:
            places = [f.image_uris[0].rpartition("/")[0] for f in (first, files) if f.image_uris]
            problem = f"case id found twice: {' and '.join(places)}"
            files = Files(**{**vars(files), "problem": problem})
        unique[files.case_id] = files
    return list(unique.values())
