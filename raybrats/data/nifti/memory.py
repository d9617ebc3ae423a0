"""How a process that decodes and cuts keeps the memory of its large arrays."""

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_KEPT_BYTES = 2**27
"""Freed bytes that stay with the process: two volumes of 240x240x155 float32, and a crop."""
_HEAP_BYTES = 2**25
"""Largest block that is taken from them; glibc allows no more."""


@cache
def keep_freed() -> None:
    """Keeps freed memory with the process: to map pages anew costs a fifth of decoding a volume.

    It does nothing where the C library is not glibc.

    Example:
        >>> keep_freed()
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)
