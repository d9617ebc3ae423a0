"""dataset.json of the Decathlon and of nnU-Net: which channel and which label value is what."""

import json
import re
from collections.abc import Mapping
from typing import Any

from raybrats import storage
from raybrats.brats import MODALITIES, Modality
from raybrats.errors import DataError, UsageError
from raybrats.label_set import GLIOMA, LabelSet, made

MODALITY_NAMES: Mapping[str, Modality] = {
    **dict.fromkeys(("flair", "t2f"), "flair"),
    **dict.fromkeys(("t1", "t1n", "t1w"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd"), "t1ce"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
}
"""The modality that a file name's ending or a channel's name stands for."""
_GLIOMA = (("NCR", "necro|non-?_? ?enh|ncr|net"), ("ED", "edema|^ed$"), ("ET", "enh|et"))
"""What the names of glioma's labels hold; the first that fits."""


def read(uri: str) -> tuple[tuple[int, ...], tuple[int, ...], LabelSet]:
    """Channel number of each modality, the values of the labels, and what they are.

    Raises:
        DataError: the file does not name them.
        StorageError: it is out of reach.

    Example:
        >>> channels = {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
        >>> labels = {"background": 0, "NCR": 1, "edema": 2, "ET": 3}
        >>> dataset = json.dumps({"channel_names": channels, "labels": labels})
        >>> storage.write_bytes("dataset.json", dataset.encode())
        >>> order, values, labels = read("dataset.json")
        >>> order, values, labels.names
        ((3, 0, 1, 2), (1, 2, 3), ('NCR', 'ED', 'ET'))
    """
    dataset = _read_json(uri)
    channels = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(channels, dict) or not isinstance(dataset.get("labels"), dict):
        raise DataError(f"{uri}: neither a Decathlon nor an nnU-Net dataset.json")
    try:
        return _channel_order(uri, channels), *labels_of(dataset)
    except UsageError as error:
        raise DataError(f"{uri}: its labels cannot be understood ({error})") from None
    except (TypeError, ValueError):
        raise DataError(f"{uri}: its channels and labels are not numbered") from None


def _read_json(uri: str) -> dict:
    try:
        loaded = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:  # whose words may hold what the file holds
        where = f" from line {error.lineno} on" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{uri}: not JSON{where}") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{uri}: not a JSON object")
    return loaded


def _channel_order(uri: str, channels: dict[str, str]) -> tuple[int, ...]:
    """Channel number of each modality, in the order of `MODALITIES`."""
    numbers = {
        MODALITY_NAMES.get(re.sub(r"^(t2-?|mri?_)(?=flair)", "", str(name).lower())): int(number)
        for number, name in channels.items()
    }
    if not set(MODALITIES) <= set(numbers):
        raise DataError(f"{uri}: its channels do not name flair, t1, t1ce and t2")
    return tuple(numbers[m] for m in MODALITIES)


def labels_of(dataset: Mapping[str, Any]) -> tuple[tuple[int, ...], LabelSet]:
    """Values of the labels of a dataset.json, and what they are: glioma's, or any others.

    Labels are numbered by name ({"edema": 1}, nnU-Net) or named by number ({"1": "edema"}, the
    Decathlon). Under `regions_class_order` they are regions, lists of numbers.

    Raises:
        UsageError: they do not fit together.
        TypeError, ValueError: they are not numbered.

    Example:
        >>> labels = {"background": 0, "organ": [1, 2], "lesion": 2}
        >>> values, found = labels_of({"labels": labels, "regions_class_order": [1, 2]})
        >>> values, found.names, found.region_names
        ((1, 2), ('label 1', 'lesion'), ('organ', 'lesion'))
    """
    pairs = [(v, k) if str(k).isdigit() else (k, v) for k, v in dataset["labels"].items()]
    found = {_plain(name): _numbers(value) for name, value in pairs}
    parts = {name: values for name, values in found.items() if values != [0]}
    if "ignore" in parts:
        raise UsageError("one is to be ignored, which is not supported")
    values = sorted({value for part in parts.values() for value in part})
    if not values or not 0 < values[0] <= values[-1] < 256:
        raise UsageError("expected values of 1 to 255")
    named = {part[0]: name for name, part in parts.items() if len(part) == 1}
    if len(named) < sum(len(part) == 1 for part in parts.values()):
        raise UsageError("two have one number")
    if glioma := _glioma_values(parts):
        return glioma, GLIOMA
    numbered = {value: number for number, value in enumerate(values, 1)}
    order = dataset.get("regions_class_order")
    return tuple(values), made(
        [named.get(value, f"label {value}") for value in values],
        {name: [numbered[v] for v in part] for name, part in parts.items()},
        order and [numbered.get(int(value), 0) for value in order],
    )


def _plain(name: str) -> str:
    """The name without what no metric's has."""
    return re.sub(r"[^\w .-]", "_", str(name), flags=re.ASCII).strip()[:40]


def _numbers(value: object) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(str(value))]


def _glioma_values(parts: Mapping[str, list[int]]) -> tuple[int, ...]:
    """Values of NCR, ED and ET, told by their names or as nested regions; empty if they are others.

    A name of two words, as "non-enhancing tumour", is that of the first pattern that fits.
    """
    if len(parts) != len(GLIOMA.names):
        return ()
    by_size = sorted((set(part) for part in parts.values()), key=len)
    if [len(part) for part in by_size] == [1, 2, 3]:
        et, tc, wt = by_size
        return ((tc - et).pop(), (wt - tc).pop(), et.pop()) if et < tc < wt else ()
    values: dict[str, int] = {}
    for name, part in parts.items():
        fitting = (key for key, pattern in _GLIOMA if re.search(pattern, name, re.IGNORECASE))
        values[next(fitting, "")] = part[0]
    single = all(len(part) == 1 for part in parts.values())
    return tuple(values[n] for n in GLIOMA.names) if single and {*values} == {*GLIOMA.names} else ()
