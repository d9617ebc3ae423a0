"""Prepared case <-> bytes of a cache's entry: a safetensors file with a digest of each tensor.

The library's own writer copies all bytes twice, 50 ms a case, or leaves files when killed.
"""

import json
import mmap
from dataclasses import fields

import deflate
import numpy as np

from raybrats.data.prepare import Prepared, Scaling

_DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "I16": "<i2", "U8": "|u1"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def encode(case: Prepared) -> list[memoryview]:
    """The bytes of an entry, in parts: the header, then the tensors, uncopied where they can be.

    Example:
        >>> from raybrats.data.prepare import prepare
        >>> from raybrats.phantom.phantom import make_phantom
        >>> case = prepare(list(make_phantom(0, shape=(24, 24, 20))[0]))
        >>> decode(b"".join(encode(case)), verify=True).shape
        (24, 24, 20)
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in _tensors(case).items()}
    digests = {name: str(deflate.crc32(array.ravel())) for name, array in arrays.items()}
    header: dict[str, object] = {"__metadata__": digests}
    end = 0
    for name, array in arrays.items():
        first, end = end, end + array.nbytes
        dtype = _NAMES[array.dtype.newbyteorder("<").str]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (first, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    return [memoryview(size + text), *(array.data for array in arrays.values())]


def decode(entry: mmap.mmap | bytes, *, verify: bool) -> Prepared:
    """The case of an entry, its arrays views of the bytes; `verify` compares their digests.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the bytes are not what was written.

    Example:
        >>> decode((2).to_bytes(8, "little") + b"{}", verify=True)
        Traceback (most recent call last):
        KeyError: '__metadata__'
    """
    start = 8 + int.from_bytes(entry[:8], "little")
    header = json.loads(entry[8:start])
    digests = header.pop("__metadata__")
    arrays = {}
    for name, tensor in header.items():
        first, last = (start + offset for offset in tensor["data_offsets"])
        if verify and deflate.crc32(memoryview(entry)[first:last]) != int(digests[name]):
            raise ValueError(f"{name} is damaged")
        dtype = np.dtype(_DTYPES[tensor["dtype"]])
        flat = np.frombuffer(entry, dtype, (last - first) // dtype.itemsize, first)
        arrays[name] = flat.reshape(tensor["shape"])
    i, j, k = (slice(int(first), int(last)) for first, last in arrays["box"])
    num_i, num_j, num_k = (int(extent) for extent in arrays["shape"])
    labels = arrays["labels"]
    return Prepared(
        image=arrays["image"].transpose(0, 3, 2, 1),
        labels=labels.T if labels.ndim == 3 else None,
        scaling=Scaling(**{each.name: arrays[each.name] for each in fields(Scaling)}),
        tumour=arrays["tumour"],
        counts=arrays["counts"],
        box=(i, j, k),
        shape=(num_i, num_j, num_k),
    )


def _tensors(case: Prepared) -> dict[str, np.ndarray]:
    """The case as arrays in memory order, the widest numbers first, so that each is aligned."""
    arrays = {
        "image": case.image.transpose(0, 3, 2, 1),
        "labels": np.empty(0, np.uint8) if case.labels is None else case.labels.T,
        **vars(case.scaling),
        "tumour": case.tumour,
        "counts": case.counts,
        "box": np.array([(span.start, span.stop) for span in case.box], np.int64),
        "shape": np.array(case.shape, np.int64),
    }
    return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
