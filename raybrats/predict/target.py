"""Where the labels of a patient may be written; imports nothing heavy, so a typo costs nothing."""

import os
from pathlib import Path

from raybrats import storage
from raybrats.errors import UsageError


def check_target(uri: str | os.PathLike[str]) -> str:
    """The URI, absolute, if a NIfTI file can be put there.

    Raises:
        UsageError: it is not .nii or .nii.gz, or there is something else than a file.

    Example:
        >>> check_target("s3://bucket/case7.nii.gz")
        's3://bucket/case7.nii.gz'
    """
    out = storage.absolute(os.fspath(uri))
    if not out.endswith((".nii", ".nii.gz")):
        raise UsageError(f"{out}: expected a file name that ends in .nii or .nii.gz")
    if not storage.is_remote(out) and Path(out).exists() and not Path(out).is_file():
        raise UsageError(f"{out}: is no file; choose another name")
    return out
