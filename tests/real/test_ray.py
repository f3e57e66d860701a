"""A sweep on a real Ray cluster of this machine: the same bytes as without one."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed (pip install 'kvasir-llm[ray]')",
    ),
]
START_S_MAX = 240
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a head node on the loopback that ends with the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with log.open("wb") as out:
        head = subprocess.Popen(
            [*RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port",
             str(port), "--num-cpus", "2", "--include-dashboard", "false"],
            stdout=out, stderr=subprocess.STDOUT, env=os.environ | LOOPBACK,
        )  # fmt: skip
    try:
        until = time.monotonic() + START_S_MAX
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def compare(folder: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    line = "compare local --policies round_robin,netkv --grid route.cache_weight=0,1 --limit 30"
    return subprocess.run(
        [sys.executable, "-m", "kvasir", *line.split(), "--json", f"{name}.json", *flags],
        cwd=folder, env=os.environ | LOOPBACK, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip


def test_a_cluster_gives_the_same_bytes_as_one_process(cluster: str, tmp_path: Path) -> None:
    here = compare(tmp_path, "here", "--jobs", "1")
    there = compare(tmp_path, "there", "--ray", cluster)
    assert here.returncode == 0, here.stderr
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()
    assert here.stdout == there.stdout


def test_what_a_case_raises_there_is_said_here(cluster: str, tmp_path: Path) -> None:
    failed = compare(tmp_path, "failed", "--ray", cluster, "--trace", "mooncake-conversation")
    assert failed.returncode == 2 and "set block_size: 512" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_no_cluster_is_said(tmp_path: Path) -> None:
    failed = compare(tmp_path, "none", "--ray", "127.0.0.1:9")
    assert failed.returncode == 2 and "no cluster answers" in failed.stderr
    assert "Traceback" not in failed.stderr
