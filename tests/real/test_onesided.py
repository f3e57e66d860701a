"""NIXL and Mooncake's transfer engine between two processes: bytes, completion, deaths, stops.

Real parts: skipped where they are not installed. Nothing here is timed.
"""

import importlib
import time
from pathlib import Path

import pytest

from tests.live.test_transfer import (
    BLOCK_BYTES,
    BLOCKS,
    LAYERS,
    WAIT_S,
    digest,
    far,
    here,
    other,
    planes_of,
    wait_until,
)


def usable(name: str) -> bool:
    """Installed, with the system libraries that it needs."""
    try:
        importlib.import_module({"nixl": "nixl_cu12", "mooncake": "mooncake.engine"}[name])
    except ImportError:
        return False
    return True


KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not usable(kind), reason=f"needs {kind}"))
    for kind in ("nixl", "mooncake")
]
pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_completion(kind: str, run_dir: Path) -> None:
    runs, scattered = list(range(10, 50)), list(range(BLOCKS - 1, 39, -1))
    with other("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        for attempt, source in enumerate((runs, scattered)):
            d.do("expect", "a", attempt, 5, list(range(30, 70)), LAYERS, far())
            p.end.open("a", attempt, d.address, far())
            p.do("push_all", "a", attempt, 5, source)
            p.do("finish", "a", attempt, [42])
            assert p.events.get(timeout=WAIT_S) == ("a", attempt, True, "")
            received = d.event()
            nbytes = 40 * LAYERS * 2 * BLOCK_BYTES
            assert received[2:6] == [True, "", nbytes, kind]
            assert received[8] == digest(planes_of(7), source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_that_changed_is_refused(kind: str, run_dir: Path) -> None:
    """Its checksum is taken while the transfer runs; then the first frame is told of another."""
    with other("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        checksum = p.end._memory.checksum  # type: ignore[union-attr]
        p.end._memory.checksum = lambda piece: checksum(piece) ^ 1  # type: ignore[union-attr]
        d.do("expect", "a", 1, 0, [1, 2], LAYERS, far())
        p.end.open("a", 1, d.address, far())
        p.do("push_all", "a", 1, 0, [1, 2])
        p.do("finish", "a", 1, [])
        over, received = p.events.get(timeout=WAIT_S), d.event()
        assert not over[2] and over[3].startswith("checksum of layer 0")
        assert not received[2] and received[3] == over[3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_ends_both(kind: str, run_dir: Path) -> None:
    with other("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        d.do("expect", "a", 1, 0, [1, 2], LAYERS, far())
        p.end.open("a", 1, d.address, far())
        p.end.push("a", 1, 0, [1, 2], 0)
        wait_until(lambda: p.end.timeline("a", 1).first_frame_s is not None)
        p.end.stop("a", 1)
        assert p.events.get(timeout=WAIT_S) == ("a", 1, False, "stopped")
        assert d.event()[2:4] == [False, "given up by the sender: stopped"]


@pytest.mark.parametrize("kind", KINDS)
def test_deadlines(kind: str, run_dir: Path) -> None:
    with here("receiver", kind, None, run_dir) as d, other("sender", kind, 7, run_dir) as p:
        d.end.expect("late", 1, 0, [1], LAYERS, time.monotonic() + 2.0)
        p.do("open", "late", 1, d.address, far())
        p.do("push", "late", 1, 0, [1], 0)
        assert d.events.get(timeout=WAIT_S)[:4] == ("late", 1, False, "deadline")
        assert p.event()[:3] == ["late", 1, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_receiver_ends_the_send(kind: str, run_dir: Path) -> None:
    with here("sender", kind, 7, run_dir) as p, other("receiver", kind, None, run_dir) as d:
        d.do("expect", "a", 1, 0, [1], LAYERS, far())
        p.end.open("a", 1, d.address, far())
        p.end.push("a", 1, 0, [1], 0)
        wait_until(lambda: p.end.timeline("a", 1).first_frame_s is not None)
        d.kill()
        over = p.events.get(timeout=WAIT_S)
        assert over[:3] == ("a", 1, False) and over[3].startswith("connection lost")


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_senders_blocks_wait_until_nothing_is_on_its_way(
    kind: str, run_dir: Path
) -> None:
    with here("receiver", kind, None, run_dir) as d, other("sender", kind, 7, run_dir) as p:
        d.end.expect("a", 1, 0, [1], LAYERS, far())
        p.do("open", "a", 1, d.address, far())
        p.do("push", "a", 1, 0, [1], 0)
        wait_until(lambda: bool(d.planes[0][1][1].any()))
        killed_s = time.monotonic()
        p.kill()
        received = d.events.get(timeout=WAIT_S)
        assert received[:3] == ("a", 1, False) and received[3].startswith("connection lost")
        assert time.monotonic() - killed_s >= 1.0
