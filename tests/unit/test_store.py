"""Shelves by hand: what was written comes back whole, and nothing else ever does."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvasir.store.base import Found, Shelves, StoreError
from kvasir.store.disk import LABEL_BYTES, PAGE, DiskShelves
from kvasir.store.memory import HostShelves
from tests.nodes import keys

SLOTS, BYTES = 8, 5000


def disk(folder: Path, slots: int = SLOTS, name: str = "model", nbytes: int = BYTES) -> DiskShelves:
    return DiskShelves(folder / "sub" / "w.kv", slots, nbytes, name)


@pytest.fixture(params=["host", "disk"])
def shelves(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelves]:
    opened: Shelves = HostShelves(SLOTS, BYTES) if request.param == "host" else disk(tmp_path)
    yield opened
    opened.close()


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, BYTES), dtype=np.uint8)


def read(shelves: Shelves, slots: list[int], names: tuple[bytes, ...]) -> tuple[int, np.ndarray]:
    out = np.zeros((len(slots), BYTES), dtype=np.uint8)
    return shelves.read(slots, names, out), out


def test_what_was_written_comes_back(shelves: Shelves) -> None:
    shelves.write([5, 0, 1, 7], keys(4), rows(4))
    for order in ([0, 1, 2, 3], [3, 1, 0], [2]):
        slots = [[5, 0, 1, 7][i] for i in order]
        count, out = read(shelves, slots, tuple(keys(4)[i] for i in order))
        assert count == len(order) and (out == rows(4)[order]).all()


def test_another_key_is_missing(shelves: Shelves) -> None:
    shelves.write([0, 1, 2], keys(3), rows(3))
    assert read(shelves, [0, 1, 2], (keys(3)[0], keys(9)[8], keys(3)[2]))[0] == 1
    assert read(shelves, [3], keys(1))[0] == 0, "never written"


def test_a_slot_holds_the_last_thing_written(shelves: Shelves) -> None:
    shelves.write([0, 1], keys(2), rows(2))
    shelves.write([1], keys(3)[2:], rows(1, seed=1))
    assert read(shelves, [0, 1], keys(2))[0] == 1
    assert (read(shelves, [1], keys(3)[2:])[1] == rows(1, seed=1)).all()


# --- files ----------------------------------------------------------------------------------------


def written(folder: Path) -> Path:
    shelves = disk(folder)
    shelves.write([2, 3, 6], keys(3), rows(3))
    shelves.close()
    return folder / "sub" / "w.kv"


def test_a_restart_finds_what_was_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600, "nobody else's to read"
    again = disk(tmp_path)
    assert list(again.found()) == [Found(s, k) for s, k in zip((2, 3, 6), keys(3), strict=True)]
    count, out = read(again, [2, 3, 6], keys(3))
    assert count == 3 and (out == rows(3)).all()
    again.close()


@pytest.mark.parametrize("change", [{"slots": 9}, {"name": "other"}, {"nbytes": BYTES + 8}])
def test_another_model_or_layout_finds_nothing(tmp_path: Path, change: dict) -> None:
    written(tmp_path)
    other = disk(tmp_path, **change)
    assert list(other.found()) == []
    assert read(other, [2], keys(1))[0] == 0 if "nbytes" not in change else True
    other.close()
    back = disk(tmp_path)
    assert list(back.found()) == [], "it was emptied"
    back.close()


def at_slot(slot: int) -> int:
    return -(-(PAGE + SLOTS * LABEL_BYTES) // PAGE) * PAGE + slot * BYTES


def at_label(slot: int) -> int:
    return PAGE + slot * LABEL_BYTES


@pytest.mark.parametrize("where", [at_slot(3), at_slot(3) + BYTES - 1, at_label(3),
                                   at_label(3) + 16, at_label(3) + 24])  # fmt: skip
def test_one_changed_byte_is_a_missing_block(tmp_path: Path, where: int) -> None:
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    again = disk(tmp_path)
    assert read(again, [2, 3, 6], keys(3))[0] == 1
    assert read(again, [6], keys(3)[2:])[0] == 1, "the others are there"
    again.close()


def test_two_blocks_that_changed_places_are_missing(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    a, b = slice(at_slot(2), at_slot(3)), slice(at_slot(3), at_slot(4))
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)
    again = disk(tmp_path)
    assert read(again, [2], keys(1))[0] == 0 and read(again, [3], keys(2)[1:])[0] == 0
    again.close()


def test_a_cut_file_is_a_missing_tail(tmp_path: Path) -> None:
    path = written(tmp_path)
    again = disk(tmp_path)
    os.truncate(path, at_slot(3) + 10)
    assert read(again, [2, 3, 6], keys(3))[0] == 1
    again.close()


def test_a_process_killed_in_the_middle_of_a_write_leaves_no_torn_block(tmp_path: Path) -> None:
    """It is stopped by SIGKILL between the two halves of a block's bytes."""
    written(tmp_path)
    code = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.unit.test_store import disk, keys, rows
shelves, whole, put = disk(Path({str(tmp_path)!r})), os.pwrite, 0
def torn(file, data, at):
    if len(data) > 4096:
        whole(file, data[: len(data) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(file, data, at)
os.pwrite = torn
shelves.write([3], keys(9)[8:], rows(1, seed=3))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    again = disk(tmp_path)
    assert [one.slot for one in again.found()] == [2, 6]
    assert read(again, [3], keys(9)[8:])[0] == 0 and read(again, [3], keys(2)[1:])[0] == 0
    assert read(again, [2], keys(1))[0] == 1
    again.close()


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    first = disk(tmp_path)
    with pytest.raises(StoreError, match="another process"):
        disk(tmp_path)
    first.close()
    disk(tmp_path).close()


def test_a_deleted_file_is_noticed(tmp_path: Path) -> None:
    shelves = disk(tmp_path)
    shelves.write([0], keys(1), rows(1))
    (tmp_path / "sub" / "w.kv").unlink()
    assert read(shelves, [0], keys(1))[0] == 1, "what is open can be read"
    with pytest.raises(StoreError, match="deleted"):
        shelves.write([1], keys(2)[1:], rows(1))
    shelves.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "sub").write_text("a file")
    with pytest.raises(StoreError):
        disk(tmp_path)


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk."""
    shelves = disk(tmp_path)
    shelves.write([0], keys(1), rows(1))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_slot(4), old[1]))
    try:
        with pytest.raises(StoreError, match=os.strerror(errno.EFBIG)):
            shelves.write([3, 4], keys(3)[1:], rows(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert read(shelves, [0], keys(1))[0] == 1 and read(shelves, [4], keys(3)[2:])[0] == 0
    shelves.close()
