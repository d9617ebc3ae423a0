"""The last words of a run that failed."""

import pytest

from raybrats.runs.launch import _root


@pytest.mark.parametrize(
    ("failures", "found"),
    [
        ({0: RuntimeError("out of memory\n  at line 3")}, (0, "RuntimeError: out of memory")),
        ({0: ValueError("")}, (0, "ValueError: no words")),
        (
            {0: RuntimeError("Training failed:\nThe workers did not start within 60 s\nmore")},
            (0, "RuntimeError: Training failed: The workers did not start within 60 s"),
        ),
        (
            {0: RuntimeError("[gloo] Connection closed by peer"), 1: OSError("disk full")},
            (1, "OSError: disk full"),
        ),
        (
            {1: RuntimeError("gloo timed out"), 0: RuntimeError("NCCL timed out")},
            (0, "RuntimeError: NCCL timed out"),
        ),
    ],
)
def test_the_rank_that_failed_first_is_named_in_one_line(failures, found):
    assert _root(failures) == found
