"""A volume's bytes at its URI: one object, or a .hdr and the .img beside it."""

import re
from dataclasses import dataclass

from raybrats import storage
from raybrats.data.nifti.volume import Volume, decode, join_pair
from raybrats.errors import ChangedObjectError


@dataclass(frozen=True)
class Source:
    """One volume as it is stored."""

    uri: str
    """Of the .hdr, where there is one."""
    parts: tuple[bytes, ...]
    """The file, or the header's and the image's."""

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self.parts))

    @property
    def digest(self) -> str:
        """BLAKE3 of all parts, one behind the other."""
        return storage.digest_of(self.parts[0] if len(self.parts) == 1 else b"".join(self.parts))

    def volume(self) -> Volume:
        """Decoded.

        Raises:
            DataError: damaged, or not NIfTI.
        """
        name = storage.name(self.uri)
        if len(self.parts) == 1:
            return decode(self.parts[0], name)
        return decode(join_pair((self.parts[0], self.parts[1]), name), name)


def read(uri: str, *, size: int | None = None, digest: str | None = None) -> Source:
    """The volume's bytes, checked against the size and digest that were recorded.

    Raises:
        StorageError: an object is missing, refused, out of reach, or not the bytes recorded.
    """
    image = image_uri(uri)
    if image is None:
        return Source(uri, (storage.read_bytes(uri, size=size, digest=digest),))
    pair = Source(uri, (storage.read_bytes(uri), storage.read_bytes(image)))
    for kind, recorded in (("size", size), ("digest", digest)):
        if recorded is not None and getattr(pair, kind) != recorded:
            raise ChangedObjectError(f"{uri} and its .img: other bytes than were recorded ({kind})")
    return pair


_HEADER = re.compile(r"hdr(\.gz)?$", re.IGNORECASE)


def image_uri(uri: str) -> str | None:
    """Where the voxels of a .hdr file lie; None for a file that holds its own."""
    match = _HEADER.search(uri)
    if match is None:
        return None
    start = match.start()
    return uri[:start] + ("IMG" if uri[start:].startswith("HDR") else "img") + uri[start + 3 :]
