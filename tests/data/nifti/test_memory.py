"""A process that keeps what it frees has no page mapped anew for the next array."""

import ctypes
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from raybrats.data.nifti.memory import keep_freed
if sys.argv[1] == "keep":
    keep_freed()
def turn():
    return [b"x" * 2**24, b"x" * 2**24, b"x" * 2**24]  # NumPy would ask for huge pages
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
turn(), turn()
before = faults()
turn()
print(faults() - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_arrays_made_again_fault_no_page_in():
    assert page_faults("keep") < 100
    assert page_faults("leave") > 4000
