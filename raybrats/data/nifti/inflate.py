"""gzip bytes -> bytes: every CRC and length checked, no more allocated than the header claims."""

import gzip
import io
import zlib

import deflate

from raybrats.data.nifti.memory import keep_freed
from raybrats.errors import DataError

_RATIO = 1032
"""Bytes that one deflated byte can hold at most, by the format."""
_SLACK = 2**20
"""Bytes behind the voxels that are tolerated."""
_WINDOW = 2**16
"""Deflated bytes in which the header is looked for first."""
_RULE = "its CRC, its length or its code is wrong"


def is_gzip(data: bytes) -> bool:
    """Whether the bytes start as gzip does; the file's name does not matter.

    Example:
        >>> is_gzip(gzip.compress(b"voxels")), is_gzip(b"voxels")
        (True, False)
    """
    return data[:2] == b"\x1f\x8b"


def inflate_start(data: bytes, num_bytes: int, name: str) -> bytes:
    """The first `num_bytes` inflated, or fewer where there are no more.

    Raises:
        DataError: the gzip is damaged.

    Example:
        >>> inflate_start(gzip.compress(b"header and voxels"), 6, "t1.nii.gz")
        b'header'
    """
    try:
        found = zlib.decompressobj(wbits=31).decompress(data[:_WINDOW], num_bytes)
        if len(found) < num_bytes:  # a first member of a few bytes, or the whole file
            found = gzip.GzipFile(fileobj=io.BytesIO(data)).read(num_bytes)
    except (zlib.error, OSError) as error:  # whose words may hold bytes of the file
        raise DataError(f"{name}: damaged gzip ({_RULE}); fetch it again") from error
    except EOFError:
        pass  # truncated: too few bytes, which the header's reader says
    return found


def inflate(data: bytes, length: int, name: str) -> bytearray:
    """All bytes inflated, of which the header claims `length`; the buffer is the caller's own.

    Raises:
        DataError: the gzip is damaged, truncated, or of another length.

    Example:
        >>> inflate(gzip.compress(b"voxels"), 6, "t1.nii.gz")
        bytearray(b'voxels')
    """
    keep_freed()
    claim = int.from_bytes(data[-4:], "little")  # length of the last member
    if length <= claim <= min(length + _SLACK, _RATIO * len(data)):
        try:
            raw = deflate.gzip_decompress(data, claim)
        except deflate.DeflateError:
            raise DataError(f"{name}: damaged gzip ({_RULE}); fetch it again") from None
        if len(raw) == claim:
            return raw
    return _members(data, length, name)


def _members(data: bytes, length: int, name: str) -> bytearray:
    """All bytes of a gzip of several members (bgzip, pigz), or an error that says what is wrong."""
    if length > _RATIO * len(data):
        raise DataError(
            f"{name}: {len(data)} bytes cannot hold the {length} that its header claims; "
            "truncated, or no volume: fetch it again"
        )
    out = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while len(out) <= length + _SLACK and (piece := file.read(_SLACK)):
                out += piece
    except EOFError:
        raise DataError(f"{name}: truncated after {len(out)} bytes; fetch it again") from None
    except (zlib.error, OSError) as error:  # whose words may hold bytes of the file
        raise DataError(f"{name}: damaged gzip ({_RULE}); fetch it again") from error
    if len(out) > length + _SLACK:
        raise DataError(f"{name}: longer than the {length} bytes of its header; fetch it again")
    return out
