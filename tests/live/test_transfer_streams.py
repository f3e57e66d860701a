"""Several TCP streams for one pair: the same bytes, one end, whatever becomes of each stream."""

from __future__ import annotations

import queue
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from kvasir.core.errors import ConfigError
from kvasir.core.specs.deployment import TransportSpec
from kvasir.engine.fake import fake_tokens
from kvasir.engine.tiny import make_tiny
from kvasir.transfer import ReceiveResult, Trailer, make_receiver, make_sender, open_media
from kvasir.transfer.stripes import BETWEEN, dealt, share
from tests.live.cluster import cluster, deployment_of, run

pytestmark = pytest.mark.timeout(60)

WAIT_S = 20.0
LAYERS, BLOCKS, BLOCK_BYTES = 5, 12, 4096


def planes(seed: int | None) -> list[list[np.ndarray[Any, np.dtype[np.uint8]]]]:
    rng = np.random.default_rng(seed)
    if seed is None:
        return [[np.zeros((BLOCKS, BLOCK_BYTES), np.uint8) for _ in "kv"] for _ in range(LAYERS)]
    return [[rng.integers(0, 256, (BLOCKS, BLOCK_BYTES), np.uint8) for _ in "kv"]
            for _ in range(LAYERS)]  # fmt: skip


class Pair:
    def __init__(self, streams: int, at_receiver: int | None = None, **more: Any) -> None:
        self.source, self.target = planes(7), planes(None)
        self.over: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.received: queue.Queue[ReceiveResult] = queue.Queue()
        self.sender = make_sender(
            open_media("tcp", self.source), self.source, streams=streams,
            on_over=lambda *a: self.over.put(a), **more,
        )  # fmt: skip
        self.receiver = make_receiver(
            open_media("tcp", self.target), self.target, on_received=self.received.put,
            streams=at_receiver or streams,
        )  # fmt: skip
        (self.address,) = self.receiver.addresses

    def alike(self, theirs: list[int], ours: list[int]) -> bool:
        return all(
            np.array_equal(a[theirs], b[ours])
            for here, there in zip(self.source, self.target, strict=True)
            for a, b in zip(here, there, strict=True)
        )


@contextmanager
def pair(streams: int, **more: Any) -> Iterator[Pair]:
    found = Pair(streams, **more)
    try:
        yield found
    finally:
        found.sender.close()
        found.receiver.close()


def far() -> float:
    return time.monotonic() + WAIT_S


@pytest.mark.parametrize("streams", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_same_bytes_over_any_number_of_streams(streams: int, by_layer: bool) -> None:
    theirs, ours = [3, 4, 9, 0], [1, 11, 2, 3]
    with pair(streams) as p:
        assert len(p.address.split(BETWEEN)) == min(streams, LAYERS)
        for attempt in (1, 2):
            p.receiver.expect("a", attempt, 0, ours, LAYERS, far())
            p.sender.open("a", attempt, p.address, far())
            for part in range(0, 4, 2):
                for layers in range(LAYERS) if by_layer else [range(LAYERS)]:
                    p.sender.push("a", attempt, part, theirs[part : part + 2], layers)
            p.sender.finish("a", attempt, Trailer((42,)))
            assert p.over.get(timeout=WAIT_S) == ("a", attempt, True, "")
            result = p.received.get(timeout=WAIT_S)
            assert (result.ok, result.bytes, result.transport) == (
                True, 4 * LAYERS * 2 * BLOCK_BYTES, "tcp"
            )  # fmt: skip
            assert result.trailer is not None and result.trailer.tokens == (42,)
            timeline = p.sender.timeline("a", attempt)
            assert timeline is not None and timeline.bytes == result.bytes
            assert p.alike(theirs, ours)
            for layer in p.target:
                for plane in layer:
                    plane[:] = 0
        assert p.over.empty() and p.received.empty(), "each end is told once"


def test_layers_are_dealt_out_without_loss() -> None:
    rng = random.Random(5)
    for _ in range(500):
        layers, streams = rng.randint(1, 40), rng.randint(1, 9)
        start = rng.randint(0, layers)
        wanted = range(start, rng.randint(start, layers))
        parts = dealt([[layer] for layer in range(layers)], streams)  # type: ignore[arg-type,list-item]
        found = sorted(
            parts[i][local][0] for i in range(len(parts)) for local in share(wanted, i, len(parts))
        )  # type: ignore[type-var]
        assert found == list(wanted)


def test_a_stop_ends_all_streams_and_is_told_once() -> None:
    with pair(3, bytes_per_s_max=100e3, frame_bytes_max=BLOCK_BYTES) as p:
        p.receiver.expect("a", 1, 0, [1, 2], LAYERS, far())
        p.sender.open("a", 1, p.address, far())
        p.sender.push("a", 1, 0, [1, 2], range(LAYERS))
        begun = None
        while begun is None:
            timeline = p.sender.timeline("a", 1)
            begun = timeline.first_frame_s if timeline is not None else None
        p.sender.stop("a", 1)
        assert p.over.get(timeout=WAIT_S) == ("a", 1, False, "stopped")
        result = p.received.get(timeout=WAIT_S)
        assert not result.ok and result.by_sender
        time.sleep(0.05)
        assert p.over.empty() and p.received.empty()


def test_one_stream_that_fails_fails_all() -> None:
    """The second stream's receiver is nobody: its end is the transfer's."""
    with pair(2) as p, socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        nobody.close()
        first = p.address.split(BETWEEN)[0]
        p.receiver.expect("a", 1, 0, [1, 2], LAYERS, far())
        p.sender.open("a", 1, f"{first}{BETWEEN}tcp://127.0.0.1:{port}", far())
        p.sender.push("a", 1, 0, [1, 2], range(LAYERS))
        p.sender.finish("a", 1, Trailer())
        name, attempt, ok, reason = p.over.get(timeout=WAIT_S)
        assert (name, attempt, ok) == ("a", 1, False) and "connect" in reason
        p.receiver.forget("a", 1)
        assert not p.received.get(timeout=WAIT_S).ok
        assert p.over.empty() and p.received.empty()


def test_a_cluster_ships_over_three_streams(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "qwen3")
    plain = deployment_of(folder, engine="fake", transport="tcp")
    transport = plain.transport.model_copy(update={"streams": 3})

    async def main() -> None:
        async with cluster(plain.model_copy(update={"transport": transport})) as c:
            for i in range(4):
                prompt = list(range(i, 100 + i))
                answer = await c.ask(prompt, 8)
                assert answer.tokens == fake_tokens(prompt, 8)
                assert answer.report.transport == "tcp" and answer.report.transfer_bytes
            await c.at_rest()

    run(main())


def test_both_sides_must_have_as_many() -> None:
    """An address comes from a peer: a wrong one ends that transfer only."""
    with pair(3, at_receiver=2) as p:
        p.sender.open("a", 1, p.address, far())
        p.sender.push("a", 1, 0, [1, 2], range(LAYERS))
        p.sender.finish("a", 1, Trailer())
        name, attempt, ok, reason = p.over.get(timeout=WAIT_S)
        assert (name, attempt, ok) == ("a", 1, False) and "3 streams here, 2 at" in reason
        assert p.over.empty()


def test_a_deployment_says_how_many() -> None:
    assert TransportSpec(kind="tcp", streams=4).streams == 4
    with pytest.raises((ConfigError, ValueError), match="several streams"):
        TransportSpec(kind="shm", streams=4)
