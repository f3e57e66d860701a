"""KV over links between network namespaces: it really goes there, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.namespaces import FOLDER, Cross, laid_out, unable
from bench.netkv_live import FILE
from kvasir.cli.files import load_deployment

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
COMMAND = (
    sys.executable, "-m", "bench.netkv_live", "--repeat", "1", "--requests", "6",
    "--arms", "round_robin", "--conditions", "idle",
)  # fmt: skip
WAIT_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def _able() -> None:
    if reason := unable():
        pytest.skip(f"no network namespaces here: {reason}")


class Bench:
    """One run of the bench, and what runs in its namespaces."""

    def __init__(self, folder: Path) -> None:
        self._out = (folder / "out").open("w+")
        self.process = subprocess.Popen(
            COMMAND, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._out,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip

    @property
    def said(self) -> str:
        return Path(self._out.name).read_text()

    def namespaces(self) -> list[str]:
        return [path.name for path in FOLDER.glob(f"kvasir-{self.process.pid}-*")]

    def serving(self) -> set[int]:
        """Waits for it; pids of servers and workers, one of each for every node that has one."""
        end = time.monotonic() + WAIT_S
        while "deployments serve" not in self.said:
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)
        assert len(self.namespaces()) == 7
        found = {pid for name in self.namespaces() for pid in pids_in(name)}
        assert len(found) >= 5, found
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
        self._out.close()


def pids_in(namespace: str) -> set[int]:
    said = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    return set(map(int, said.stdout.split()))


def interfaces() -> list[str]:
    said = subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout
    return sorted(link["ifname"] for link in json.loads(said))


def runs(pid: int) -> bool:
    """One that ended may stand in the table until somebody takes its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(bench: Bench, pids: set[int]) -> bool:
    return not bench.namespaces() and not any(map(runs, pids))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_kv_moves_over_the_links_and_everything_is_removed(bench: Bench) -> None:
    before = interfaces()
    pids = bench.serving()
    assert bench.process.wait(WAIT_S) == 0, bench.said
    assert gone(bench, pids)
    assert interfaces() == before
    report: dict[str, Any] = json.loads(bench.said.splitlines()[-1])
    (row,) = report["conditions"]["idle"]
    for link in ("near", "trunk"):  # headers come on top; control messages go elsewhere
        assert 0 < row["kv_mb"][link] <= row["link_mb"][link] <= 1.1 * row["kv_mb"][link]
    assert row["shares"] == {f"decode-{i}": pytest.approx(1 / 3) for i in range(3)}


def test_ctrl_c_leaves_nothing(bench: Bench) -> None:
    pids = bench.serving()
    bench.process.send_signal(signal.SIGINT)
    assert bench.process.wait(30) == 1
    assert gone(bench, pids)
    assert "Traceback" not in bench.said


def test_what_a_killed_run_left_is_removed_by_the_next(bench: Bench) -> None:
    pids = bench.serving()
    bench.process.kill()
    bench.process.wait()
    assert not gone(bench, pids)
    with laid_out(load_deployment(FILE).topology):
        assert gone(bench, pids)


def test_links_carry_their_bandwidth_and_no_more() -> None:
    topology = load_deployment(FILE).topology
    with laid_out(topology) as lab:
        begun, before = time.monotonic(), lab.moved()
        cross = Cross(lab, "x0", "x1")
        time.sleep(1.5)
        cross.close()
        after, seconds = lab.moved(), time.monotonic() - begun
        rate = (after["leaf0>leaf1"] - before["leaf0>leaf1"]) / seconds
        (trunk,) = (k.bandwidth for k in topology.links if k.between == ("leaf0", "leaf1"))
        assert 0.6 * trunk < rate < 1.05 * trunk
        assert after["leaf0>near"] - before["leaf0>near"] < 10_000  # nothing strays
