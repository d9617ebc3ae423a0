"""A node's cache that others can write to: nothing of theirs is used, and one line says so."""

import os
from pathlib import Path

import numpy as np
import pytest

from raybrats.config import DataConfig
from raybrats.data import cache
from raybrats.data.cache import Tally, prepared
from raybrats.data.cohort.case import prepare_case
from raybrats.data.cohort.index import find_cases, verify_case
from raybrats.phantom.phantom import write_phantoms

HIT, MISS, NOT_KEPT = Tally(hits=1), Tally(misses=1), Tally(misses=1, failed=1)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    tree = str(tmp_path_factory.mktemp("tree"))
    write_phantoms(tree, num_cases=1, shape=(24, 24, 20))
    return verify_case(find_cases(tree)[0])


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_process", cache._Process())
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def entry_of(config):
    (entry,) = Path(config.cache_dir).glob("*.safetensors")
    return entry


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o720])
def test_a_folder_that_others_may_write_is_not_used(case, config, mode, caplog):
    prepared(case, config)
    Path(config.cache_dir).chmod(mode)
    for _ in range(3):
        made, tally = prepared(case, config)
        assert tally == NOT_KEPT
        np.testing.assert_array_equal(made.image, prepare_case(case, config).image)
    (record,) = caplog.records
    assert f"chmod go-w {config.cache_dir}, or set data.cache_dir" in record.getMessage()


def test_a_folder_in_which_others_cannot_replace_files_is_used(case, config):
    prepared(case, config)
    Path(config.cache_dir).chmod(0o1777)
    assert prepared(case, config)[1] == HIT


@as_root
def test_an_entry_of_another_user_is_made_anew(case, config):
    prepared(case, config)
    os.chown(entry_of(config), 65534, 65534)
    assert [prepared(case, config)[1] for _ in range(2)] == [MISS, HIT]
    assert entry_of(config).stat().st_uid == os.getuid()


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_an_entry_that_others_may_write_is_made_anew(case, config, mode):
    prepared(case, config)
    entry_of(config).chmod(mode)
    assert [prepared(case, config)[1] for _ in range(2)] == [MISS, HIT]
    assert entry_of(config).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_no_file_is_made_anew(case, config, kind, tmp_path):
    prepared(case, config)
    entry = entry_of(config)
    entry.rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(entry, 0o600)
    else:
        entry.symlink_to(tmp_path / "elsewhere")
    assert [prepared(case, config)[1] for _ in range(2)] == [MISS, HIT]
    assert entry.is_file()
    assert not entry.is_symlink()


def test_an_entry_of_deep_lists_is_made_anew(case, config):
    prepared(case, config)
    text = b"[" * 200_000
    entry_of(config).write_bytes(len(text).to_bytes(8, "little") + text)
    assert prepared(case, config)[1] == Tally(misses=1, damaged=1)
