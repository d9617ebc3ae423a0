"""Ranks that come to one decision."""

import sys
from pathlib import Path

import pytest
import torch.distributed
from faulty import SOAK
from ranks import together

from raybrats.errors import CheckpointError, StorageError
from raybrats.runs.agree import agree


def decide(rank, world, _cases, folder, liar, doubter):
    """What each rank comes to is written down; `liar` fails to choose, `doubter` to check."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    checked = []

    def choose():
        if liar:
            raise StorageError("out of reach")
        return {"said by": rank}

    def check(choice):
        checked.append(choice)
        if rank == doubter:
            raise CheckpointError(f"rank {rank} doubts it")

    try:
        found = repr(agree(choose, check))
    except (CheckpointError, StorageError) as error:
        found = repr(error)
    Path(folder, str(rank)).write_text(f"{found} after {len(checked)}")
    sys.stdout.flush()


SELDOM = pytest.mark.skipif(not SOAK, reason="three processes more: make soak")


@pytest.mark.parametrize(
    ("liar", "doubter", "found"),
    [
        (False, -1, "{'said by': 0} after 1"),
        pytest.param(False, 0, "CheckpointError('rank 0 doubts it') after 1", marks=SELDOM),
        (False, 2, "CheckpointError('rank 2 doubts it') after 1"),
        (True, -1, "StorageError('out of reach') after 0"),
    ],
)
def test_all_ranks_come_to_the_same(tmp_path, liar, doubter, found):
    assert together(3, decide, str(tmp_path), liar, doubter) == [0, 0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [found] * 3


def test_alone_a_rank_checks_what_it_chose():
    checked = []
    assert agree(lambda: 7, checked.append) == 7
    assert checked == [7]
