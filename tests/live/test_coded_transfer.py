"""Coded KV between a real sender and a real receiver: over TCP, broken, flipped, and told of."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zstandard")

from kvasir.core.codec import Sent
from kvasir.transfer import (
    KvForm,
    ReceiveResult,
    Trailer,
    make_receiver,
    make_sender,
    open_media,
)
from kvasir.transfer.arena import Arena
from kvasir.transfer.codec.floats import bytes_of, floats_of
from kvasir.transfer.frames import HEADER_BYTES
from tests.live.test_transfer import Cutter, Relay

LAYERS, BLOCKS, TOKENS, CHANNELS = 3, 80, 16, 128
BLOCK_BYTES = TOKENS * CHANNELS * 2
FORM = KvForm("bfloat16", TOKENS)
WAIT_S = 20.0
FAR_S = 60.0
ARENA = Arena()
Planes = list[list[np.ndarray]]


def planes_of(seed: int | None) -> Planes:
    """Values as of KV, of channels with spreads of their own; or zeros for None."""
    rng = np.random.default_rng(seed)

    def plane() -> np.ndarray:
        found = ARENA.take(BLOCKS * BLOCK_BYTES).reshape(BLOCKS, BLOCK_BYTES)
        if seed is None:
            return found
        values = rng.normal(0, 1, (BLOCKS * TOKENS, CHANNELS)) * rng.uniform(0.2, 2, CHANNELS)
        found[:] = bytes_of(values.astype(np.float32), "bfloat16").reshape(BLOCKS, BLOCK_BYTES)
        return found

    return [[plane(), plane()] for _ in range(LAYERS)]


def off_by(here: Planes, there: Planes, ids: list[int], theirs: list[int]) -> float:
    """The largest error, in standard deviations of a plane."""
    worst = 0.0
    for layer, other in zip(here, there, strict=True):
        for a, b in zip(layer, other, strict=True):
            mine, other_values = (
                floats_of(np.ascontiguousarray(p[blocks]), "bfloat16")
                for p, blocks in ((a, ids), (b, theirs))
            )
            worst = max(worst, float(np.abs(mine - other_values).max() / mine.std()))
    return worst


class Pair:
    """Both ends in this process, and all that they said."""

    def __init__(
        self, kind: str = "tcp", cap: float | None = None, *, codes: bool = True, run_dir: str = ""
    ) -> None:
        self.here, self.there = planes_of(7), planes_of(None)
        self.over: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.received: queue.Queue[ReceiveResult] = queue.Queue()
        self.sent: queue.Queue[Sent] = queue.Queue()
        self.receiver = make_receiver(
            open_media(kind, self.there, run_dir=run_dir), self.there,
            on_received=self.received.put, form=FORM if codes else None,
        )  # fmt: skip
        arena = ARENA if kind == "shm" else None
        self.sender = make_sender(
            open_media(kind, self.here, run_dir=run_dir, arena=arena), self.here,
            bytes_per_s_max=cap,
            on_over=lambda *end: self.over.put(end), on_sent=self.sent.put, form=FORM,
        )  # fmt: skip

    @property
    def address(self) -> str:
        return self.receiver.addresses[0]

    def ship(
        self, coding: str, ids: list[int], *, address: str = "", by_layer: bool = False
    ) -> ReceiveResult:
        """To the same blocks in reverse."""
        self.receiver.expect("a", 1, 0, ids[::-1], LAYERS, time.monotonic() + FAR_S)
        self.sender.open("a", 1, address or self.address, time.monotonic() + FAR_S)
        if by_layer:
            for layer in range(LAYERS):
                self.sender.push("a", 1, 0, ids, layer, coding, tell=layer == LAYERS - 1)
        else:
            self.sender.push("a", 1, 0, ids, range(LAYERS), coding, tell=True)
        self.sender.finish("a", 1, Trailer((42,)))
        return self.received.get(timeout=WAIT_S)

    def same(self, ids: list[int]) -> bool:
        pairs = zip(self.here, self.there, strict=True)
        return all(
            np.array_equal(a[ids], b[ids[::-1]])
            for layer, other in pairs for a, b in zip(layer, other, strict=True)
        )  # fmt: skip

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.close()


SCATTERED = [(i * 37) % BLOCKS for i in range(BLOCKS)]
WHOLE = BLOCKS * LAYERS * 2 * BLOCK_BYTES


@pytest.mark.parametrize("by_layer", [False, True])
def test_lossless_brings_the_very_bytes_in_fewer(pair: Pair, by_layer: bool) -> None:
    result = pair.ship("lossless", SCATTERED, by_layer=by_layer)
    assert result.ok and result.bytes == WHOLE and pair.same(SCATTERED)
    assert result.coded is not None and result.coded.forms == "lossless"
    assert 0.5 * WHOLE < result.coded.wire_bytes < 0.8 * WHOLE
    sent = pair.sent.get(timeout=WAIT_S)
    assert (sent.request_id, sent.first_block) == ("a", 0)
    assert sent.wire_bytes == result.coded.wire_bytes
    assert pair.sent.empty() and pair.over.get(timeout=WAIT_S) == ("a", 1, True, "")
    pair.sender.check()
    pair.receiver.check()


@pytest.mark.parametrize(
    ("coding", "most", "off"), [("int8", 0.54, 0.05), ("cachegen-3", 0.35, 0.7)]
)
def test_lossy_forms_bring_values_near_those_that_were_sent(
    pair: Pair, coding: str, most: float, off: float
) -> None:
    result = pair.ship(coding, SCATTERED)
    assert result.ok and result.coded is not None and result.coded.forms == coding
    assert result.coded.wire_bytes < most * WHOLE
    assert 0 < off_by(pair.here, pair.there, SCATTERED, SCATTERED[::-1]) < off


def test_values_that_are_no_numbers_go_as_they_are(pair: Pair) -> None:
    """One piece of them does; the others are coded."""
    pair.here[2][1][SCATTERED[0]] = 0xFF  # NaN
    result = pair.ship("int8", SCATTERED, by_layer=True)
    assert result.ok and result.coded is not None and result.coded.forms == "int8+raw"
    assert np.array_equal(pair.there[2][1][SCATTERED[-1]], pair.here[2][1][SCATTERED[0]])


def test_random_bytes_go_as_they_are(pair: Pair) -> None:
    """Coded they would be more."""
    rng = np.random.default_rng(3)
    for layer in pair.here:
        for plane in layer:
            plane[:] = rng.integers(0, 256, plane.shape, dtype=np.uint8)
    result = pair.ship("lossless", SCATTERED)
    assert result.ok and result.coded is None and pair.same(SCATTERED)


@pytest.mark.parametrize("cut_at", [[100], [HEADER_BYTES + 5], [400_000, 700_000, 300_000]])
def test_a_broken_connection_is_gone_on_with(pair: Pair, cut_at: list[int]) -> None:
    breaks = len(cut_at)
    relay = Cutter(pair.address, cut_at)
    result = pair.ship("lossless", SCATTERED, address=relay.address, by_layer=True)
    assert result.ok and result.bytes == WHOLE and pair.same(SCATTERED)
    assert relay.served == breaks + 1
    assert pair.over.get(timeout=WAIT_S) == ("a", 1, True, "")
    told = pair.sent.get(timeout=WAIT_S)
    assert told.first_block == 0 and pair.sent.empty(), "told once"
    relay.close()


def test_a_bit_flipped_in_a_coded_frame_is_refused(pair: Pair) -> None:
    relay = Relay(pair.address, 2 * HEADER_BYTES + 4711)
    result = pair.ship("lossless", list(range(8)), address=relay.address)
    over = pair.over.get(timeout=WAIT_S)
    pair.close()
    relay.close()
    assert not result.ok and not over[2]
    assert over[3] == result.reason and result.reason.startswith("checksum of layer 0 plane 0")
    assert result.bytes == 0, "none of it was taken"


def test_who_has_no_codec_refuses_what_is_coded() -> None:
    pair = Pair(codes=False)
    result = pair.ship("int8", SCATTERED)
    assert not result.ok and "there is no codec here" in result.reason
    pair.close()


def test_a_transport_that_sends_no_stream_sends_bytes_as_they_are(tmp_path: Path) -> None:
    pair = Pair("shm", run_dir=str(tmp_path))
    result = pair.ship("int8", SCATTERED)
    assert result.ok and result.coded is None and pair.same(SCATTERED)
    assert pair.sent.get(timeout=WAIT_S).wire_bytes == WHOLE
    pair.close()


@pytest.mark.parametrize("coding", ["raw", "lossless"])
def test_what_a_link_gives_is_measured_under_a_cap(coding: str) -> None:
    """Over parts that follow one another; coded or not, the link gives the same."""
    cap = 5e6
    pair = Pair(cap=cap)
    pair.receiver.expect("a", 1, 0, range(BLOCKS), LAYERS, time.monotonic() + FAR_S)
    pair.sender.open("a", 1, pair.address, time.monotonic() + FAR_S)
    for first in range(0, BLOCKS, 16):
        ids = range(first, first + 16)
        pair.sender.push("a", 1, first, ids, range(LAYERS), coding, tell=True)
    pair.sender.finish("a", 1, Trailer())
    assert pair.received.get(timeout=WAIT_S).ok
    told = [pair.sent.get(timeout=WAIT_S) for _ in range(5)]
    assert [one.first_block for one in told] == [0, 16, 32, 48, 64]
    rate = sum(one.link_bytes for one in told) / sum(one.link_s for one in told)
    assert 0.6 * cap < rate < 1.1 * cap, "a busy machine is slower, never faster"
    pair.close()
