"""A volume's bytes at its URI: one object, or a .hdr and the .img beside it."""

import re
from dataclasses import dataclass

from raybrats import storage
from raybrats.data.nifti.volume import Volume, decode, join_pair
from raybrats.errors import ChangedObjectError

_HEADER = re.compile(r"hdr(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One volume as it is stored."""

    uri: str
    """URI of the file, or of the .hdr of a pair."""
    parts: tuple[bytes, ...]
    """Bytes of the file, or of the .hdr and the .img."""

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self.parts))

    @property
    def digest(self) -> str:
        """BLAKE3 of all parts, one after the other."""
        return storage.digest_of(self.parts[0] if len(self.parts) == 1 else b"".join(self.parts))

    def volume(self) -> Volume:
        """The volume that the bytes hold.

        Raises:
            DataError: the bytes are damaged, or not NIfTI.
        """
        name = storage.name(self.uri)
        if len(self.parts) == 1:
            return decode(self.parts[0], name)
        return decode(join_pair((self.parts[0], self.parts[1]), name), name)


def read(uri: str, *, size: int | None = None, digest: str | None = None) -> Source:
    """The volume's bytes, checked against the size and digest that were recorded.

    Raises:
        StorageError: an object is missing, refused, out of reach, or not the bytes recorded.

    Example:
        >>> storage.write_bytes("case/t1.hdr", b"header")
        >>> storage.write_bytes("case/t1.img", b"voxels")
        >>> read("case/t1.hdr").size
        12
    """
    image = img_uri(uri)
    if image is None:
        return Source(uri, (storage.read_bytes(uri, size=size, digest=digest),))
    pair = Source(uri, (storage.read_bytes(uri), storage.read_bytes(image)))
    for kind, recorded in (("size", size), ("digest", digest)):
        if recorded is not None and getattr(pair, kind) != recorded:
            raise ChangedObjectError(f"{uri} and its .img: other bytes than were recorded ({kind})")
    return pair


def img_uri(uri: str) -> str | None:
    """URI of the .img that belongs to a .hdr; None for a file that holds its own voxels.

    Example:
        >>> img_uri("s3://bucket/case/t1.hdr.gz"), img_uri("s3://bucket/case/t1.nii.gz")
        ('s3://bucket/case/t1.img.gz', None)
    """
    match = _HEADER.search(uri)
    if match is None:
        return None
    start = match.start()
    return uri[:start] + ("IMG" if uri[start:].startswith("HDR") else "img") + uri[start + 3 :]
