"""Nodes, switches and links in Linux network namespaces, and all of it gone afterwards.

    with laid_out(topology) as lab:
        subprocess.run([*lab.command("near"), "ping", "-c", "1", lab.address("p")])

Each node is a namespace, all switches are bridges in one more, each link is a veth pair that `htb`
holds to its bandwidth both ways. Beside the links there is a control network, which is not shaped,
as clusters have one for management; the switches' namespace is on it too. Nothing is added to the
namespace that the caller is in. Needs root, `ip` and `tc`; switches must form a tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvasir.core.specs import TopologySpec

FOLDER: Final = Path("/run/netns")
NAME: Final = re.compile(r"kvasir-(\d+)-.+")  # the process that made it
CLONE_NEWNET: Final = 0x40000000
GSO_BYTES: Final = 8192  # smaller bursts than the usual 64 KiB: a shaped link is fairer
QUEUE_S: Final = 0.01  # what a switch port may hold, in seconds of its link
QUEUE_BYTES_MIN: Final = 65536
PIECE: Final = bytes(65536)


class Lab:
    """Built by `laid_out`. Links are named as `net.topology` names them: `leaf0>leaf1`."""

    def __init__(self, topology: TopologySpec) -> None:
        self._prefix = f"kvasir-{os.getpid()}-"
        self.switches = f"{self._prefix}switches"
        self._hosts = {node.name: i for i, node in enumerate(topology.nodes, 2)}
        self._ports: dict[str, tuple[str, str]] = {}  # link: port, and the counter of that way
        self._topology = topology

    def build(self) -> None:
        for name in (self.switches, *map(self._namespace, self._hosts)):
            _do("ip", "netns", "add", name)
            _do("ip", "-n", name, "link", "set", "lo", "up")
        for bridge in ("control", *self._topology.switches):
            self._ip("link", "add", "name", bridge, "address", _mac(), "type", "bridge")
            self._ip("link", "set", bridge, "addrgenmode", "none", "up")
        self._ip("addr", "add", f"{self.control()}/24", "dev", "control")
        for node, i in self._hosts.items():
            self._cable("control", f"c{i}", node, "control", None)
            self._give(node, "control", self.control(node))
        for i, link in enumerate(self._topology.links):
            a, b = link.between
            if a in self._hosts:
                a, b = b, a
            ends = f"p{i}", "data" if b in self._hosts else f"q{i}"
            self._cable(a, ends[0], b, ends[1], link.bandwidth)
            self._ports[f"{a}>{b}"] = (ends[0], "tx")
            self._ports[f"{b}>{a}"] = (ends[0], "rx")
            if b in self._hosts:
                self._give(b, "data", self.address(b))

    def _cable(self, switch: str, port: str, to: str, there: str, bandwidth: float | None) -> None:
        """A veth pair from a bridge to a node or to another bridge, shaped at both ends."""
        host = to in self._hosts
        ends = ((self.switches, port), (self._namespace(to) if host else self.switches, there))
        _do("ip", "link", "add", "name", port, "netns", ends[0][0], "type", "veth",
            "peer", "name", there, "netns", ends[1][0])  # fmt: skip
        self._ip("link", "set", port, "master", switch)
        if not host:
            self._ip("link", "set", there, "master", to)
        for namespace, device in ends:
            _do("ip", "-n", namespace, "link", "set", device, "gso_max_size", str(GSO_BYTES),
                "addrgenmode", "none", "up")  # fmt: skip
            if bandwidth is not None:
                _shape(namespace, device, bandwidth)

    def _give(self, node: str, device: str, address: str) -> None:
        _do("ip", "-n", self._namespace(node), "addr", "add", f"{address}/24", "dev", device)

    def _ip(self, *args: str) -> None:
        _do("ip", "-n", self.switches, *args)

    def _namespace(self, node: str) -> str:
        return self._prefix + node

    # --- what it is good for ----------------------------------------------------------------------

    def address(self, node: str) -> str:
        """On the links."""
        return f"10.77.1.{self._hosts[node]}"

    def control(self, node: str = "") -> str:
        """On the control network; of the switches' namespace unless a node is named."""
        return f"10.77.0.{self._hosts[node] if node else 1}"

    def command(self, node: str = "") -> tuple[str, ...]:
        """What to put before a command that is to run there."""
        return ("ip", "netns", "exec", self._namespace(node) if node else self.switches)

    def counters(self) -> dict[str, str]:
        """By link: the file of its bytes, as the switches' namespace sees it."""
        return {
            link: f"/sys/class/net/{port}/statistics/{way}_bytes"
            for link, (port, way) in self._ports.items()
        }

    def moved(self) -> dict[str, int]:
        """Bytes over each link so far, with all headers."""
        seen = json.loads(_do("ip", "-n", self.switches, "-s", "-j", "link"))
        stats = {port["ifname"]: port["stats64"] for port in seen}
        return {link: int(stats[port][way]["bytes"]) for link, (port, way) in self._ports.items()}

    def inside(self, node: str = "") -> contextlib.AbstractContextManager[None]:
        """Sockets made by this thread in the `with` block, and threads started there, belong to
        that namespace."""
        return _inside(self._namespace(node) if node else self.switches)

    def remove(self) -> None:
        _remove([self.switches, *map(self._namespace, self._hosts)])


@contextlib.contextmanager
def laid_out(topology: TopologySpec) -> Iterator[Lab]:
    """The network, until the block ends, however it does. Of processes that were killed before they
    could tidy up, what they left is removed first. Raises OSError with the words of `ip` or `tc`.
    """
    _sweep()
    lab = Lab(topology)
    try:
        lab.build()
        yield lab
    finally:
        with _undisturbed():
            lab.remove()


def unable() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid():
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` (Debian: iproute2)"
    name = f"kvasir-{os.getpid()}-probe"
    try:
        _do("ip", "netns", "add", name)
        _do("ip", "-n", name, "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1")
        _shape(name, "v0", 1e6)
    except OSError as error:
        return str(error)
    finally:
        _remove([name])
    return ""


class Cross:
    """Others' traffic: one TCP connection that takes what the links give, until closed."""

    def __init__(self, lab: Lab, source: str, target: str) -> None:
        with lab.inside(target), socket.create_server((lab.address(target), 0)) as server:
            with lab.inside(source):
                self._source = socket.create_connection(server.getsockname()[:2], timeout=5)
            self._sink, _ = server.accept()
        self._threads = [
            threading.Thread(target=self._pump, daemon=True),
            threading.Thread(target=self._drain, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self) -> None:
        self._source.settimeout(None)
        with contextlib.suppress(OSError):
            while True:
                self._source.sendall(PIECE)

    def _drain(self) -> None:
        room = bytearray(len(PIECE))
        with contextlib.suppress(OSError):
            while self._sink.recv_into(room):
                pass

    def close(self) -> None:
        for sock in (self._source, self._sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._source.close()
        self._sink.close()


# --- the machine ----------------------------------------------------------------------------------


def _do(*command: str) -> str:
    """Raises OSError with the command and its own words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}`: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _shape(namespace: str, device: str, bandwidth: float) -> None:
    """`bandwidth` in bytes a second, counted with Ethernet headers as the kernel does."""
    rate, burst = f"{round(8 * bandwidth)}bit", f"{2 * GSO_BYTES}b"
    queue = max(round(QUEUE_S * bandwidth), QUEUE_BYTES_MIN)
    tc = ("tc", "-n", namespace)
    _do(*tc, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    _do(*tc, "class", "add", "dev", device, "parent", "1:", "classid", "1:1", "htb", "rate", rate,
        "burst", burst, "cburst", burst, "quantum", str(GSO_BYTES))  # fmt: skip
    _do(*tc, "qdisc", "add", "dev", device, "parent", "1:1", "bfifo", "limit", str(queue))


def _mac() -> str:
    """Of a bridge: without one of its own it takes on that of its newest port."""
    return "02:" + ":".join(f"{byte:02x}" for byte in os.urandom(5))


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    with Path("/proc/thread-self/ns/net").open("rb") as before:
        with (FOLDER / namespace).open("rb") as there:
            _setns(there.fileno())
        try:
            yield
        finally:
            _setns(before.fileno())


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C, a limit of time or a hang-up does not stop the block half-way."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {name: signal.signal(name, signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, action in before.items():
            signal.signal(name, action)


def _sweep() -> None:
    """Remove namespaces whose maker is dead."""
    there = [path.name for path in FOLDER.glob("kvasir-*")]
    left = [n for n in there if (m := NAME.fullmatch(n)) and not Path("/proc", m[1]).exists()]
    _remove(left)


def _remove(namespaces: list[str]) -> None:
    """With whatever still runs in them: nothing else than what was started there can."""
    there = [name for name in namespaces if (FOLDER / name).exists()]
    for name in there:
        for pid in map(int, _do("ip", "netns", "pids", name).split()):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(_do("ip", "netns", "pids", name).split() for name in there):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed: OSError | None = None
    for name in there:
        try:
            _do("ip", "netns", "del", name)
        except OSError as error:
            failed = error if (FOLDER / name).exists() else failed
    if failed is not None:
        raise failed
