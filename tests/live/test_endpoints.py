"""Workers at addresses of their own: control over TCP, KV at a given host, a command before."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.served import (
    HOST,
    Server,
    Stream,
    deployment,
    eventually,
    kvasir,
    prompt_of,
    short,
    written,
)

pytestmark = pytest.mark.timeout(90)

PROCESSES = ("main", "prefill-0", "decode-0", "decode-1")
KV_HOST = "127.0.0.7"  # the loopback has many


def free_ports(count: int) -> list[int]:
    """Nobody's now."""
    socks = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def apart(**changes: Any) -> dict[str, Any]:
    """A deployment whose workers could be anywhere; `changes` by process."""
    ports = zip(PROCESSES, free_ports(len(PROCESSES)), strict=True)
    endpoints: dict[str, Any] = {name: {"control": f"{HOST}:{port}"} for name, port in ports}
    for name in PROCESSES[1:]:
        endpoints[name] |= {"kv": KV_HOST, "command": ["env", f"RUNS_AS={name}"]}
    for name, more in changes.items():
        endpoints[name.replace("_", "-")] |= more
    return deployment(transport={"kind": "tcp"}, endpoints=endpoints)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(written(tmp_path_factory.mktemp("apart"), apart())) as server:
        yield server


def test_answers_come_from_workers_that_only_addresses_join(server: Server) -> None:
    answers = [Stream(server, prompt_of(100, seed), 8) for seed in range(4)]
    assert {one.check().path for one in answers} == {"disaggregated"}
    assert list(server.run_dirs[0].glob("*.ipc")) == []
    assert server.total("kvasir_kv_transfer_bytes_total") > 0
    assert KV_HOST in listening(server.workers()["decode-0.1"])


def listening(pid: int) -> set[str]:
    """Addresses that a process takes TCP connections at."""
    inodes = {
        link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()
    }
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        socket.inet_ntoa(bytes.fromhex(row[1].partition(":")[0])[::-1])
        for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes
    }  # fmt: skip


def test_the_command_became_the_worker(server: Server) -> None:
    for name, pid in server.workers().items():
        own = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert f"RUNS_AS={name.partition('.')[0]}".encode() in own


def test_a_killed_worker_comes_back_at_its_address(server: Server) -> None:
    server.kill("decode-0", "decode-1")
    eventually(lambda: {"decode-0.2", "decode-1.2"} <= set(server.workers()), "restarted")
    eventually(server.healthy, "healthy")
    for seed in range(10, 14):
        Stream(server, prompt_of(60, seed), 6).check()
    server.at_rest()


@pytest.mark.parametrize(("process", "wrong", "words"), [
    ("decode_0", {"command": ["no-such-command"]}, ["decode-0", "'no-such-command' cannot be run"]),
    ("decode_0", {"kv": "192.0.2.77"}, ["decode-0", "KV cannot come in there", "192.0.2.77"]),
    ("decode_1", {"control": "192.0.2.77:7000"}, ["messages cannot come in there", "192.0.2.77"]),
    ("main", {"control": "192.0.2.77:7000"}, ["messages cannot come in there", "192.0.2.77"]),
    ("main", {"control": f"{HOST}:0"}, ["not host:port", "kvasir.yaml:"]),
    ("main", {"control": ""}, ["a control address or none: not main", "kvasir.yaml:"]),
    ("main", {"kv": HOST}, ["main takes no KV", "kvasir.yaml:"]),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_few_lines(
    process: str, wrong: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    path = written(tmp_path, apart(**{process: wrong}))
    done = kvasir("serve", path, "--port", "0", cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


def test_endpoints_of_nobody_and_for_shared_memory_are_wrong(tmp_path: Path) -> None:
    config = deployment(endpoints={"decode-9": {"command": ["env"]}})
    done = kvasir("config", "validate", written(tmp_path, config))
    assert done.returncode == 2 and "no worker 'decode-9'" in done.stderr
    assert "nearest: decode-" in done.stderr and short(done.stderr)
    config = deployment(endpoints={"decode-0": {"kv": KV_HOST}})  # transport shm
    done = kvasir("config", "validate", written(tmp_path, config))
    assert done.returncode == 2 and "an address of transport tcp, this is shm" in done.stderr


def test_a_command_alone_needs_no_addresses(tmp_path: Path) -> None:
    """Another network namespace of this host still has its socket files."""
    endpoints = {"decode-0": {"command": ["env", "A=1"]}}
    with Server(written(tmp_path, deployment(endpoints=endpoints))) as server:
        Stream(server, prompt_of(60), 6).check()
        assert len(list(server.run_dirs[0].glob("*.ipc"))) == len(PROCESSES)
