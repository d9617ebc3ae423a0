"""dataset.json of the Decathlon and of nnU-Net: which channel and which label value is what."""

import json
import re
from collections.abc import Mapping

from raybrats import storage
from raybrats.brats import MODALITIES, Modality
from raybrats.errors import DataError

MODALITY_NAMES: Mapping[str, Modality] = {
    **dict.fromkeys(("flair", "t2f"), "flair"),
    **dict.fromkeys(("t1", "t1n", "t1w"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd"), "t1ce"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
}
"""The modality that a file name's ending or a channel's name stands for."""


def read(uri: str) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Channel number of each modality, and the values of NCR, ED and ET.

    Raises:
        DataError: the file does not name them.
        StorageError: it is out of reach.

    Example:
        >>> channels = {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
        >>> labels = {"background": 0, "NCR": 1, "edema": 2, "ET": 3}
        >>> dataset = json.dumps({"channel_names": channels, "labels": labels})
        >>> storage.write_bytes("dataset.json", dataset.encode())
        >>> read("dataset.json")
        ((3, 0, 1, 2), (1, 2, 3))
    """
    dataset = _read_json(uri)
    channels = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(channels, dict) or not isinstance(dataset.get("labels"), dict):
        raise DataError(f"{uri}: neither a Decathlon nor an nnU-Net dataset.json")
    try:
        return _channel_order(uri, channels), _label_values(uri, dataset["labels"])
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
    if len(set(values.values())) != 3 or not all(0 < value < 256 for value in values.values()):
        raise DataError(f"{uri}: its labels do not name necrosis, oedema and enhancing tumour")
    return values["NCR"], values["ED"], values["ET"]
