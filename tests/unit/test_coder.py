"""Pieces of cache memory in a coded form and back; what is no such piece is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("zstandard")

from kvasir.core.errors import ConfigError, WireError
from kvasir.transfer import KvForm
from kvasir.transfer.codec import Chunk, Coding, Tensor, encode
from kvasir.transfer.codec.floats import bytes_of
from kvasir.transfer.coder import Coder, coding_of
from kvasir.transfer.memory import Memory, Piece

TOKENS, WIDTHS = 4, ((32, 32), (48,))  # values a token, by layer and plane: one layer is latent
BLOCKS = 40
FORM = KvForm("bfloat16", TOKENS)


def memory(seed: int = 0) -> Memory:
    rng = np.random.default_rng(seed)

    def plane(width: int) -> np.ndarray:
        values = rng.normal(0, 1, (BLOCKS * TOKENS, width)).astype(np.float32)
        return bytes_of(values, "bfloat16").reshape(BLOCKS, -1).copy()

    return Memory([[plane(width) for width in layer] for layer in WIDTHS])


MEMORY = memory()
CODER = Coder(MEMORY, FORM)
WHOLE = Piece(0, 3, 7, np.arange(BLOCKS)[::-1].copy())


def coded(piece: Piece, name: str) -> tuple[str, bytes]:
    done = threading.Event()
    encoded = CODER.submit(piece, name, done.set).result(timeout=20)
    assert done.wait(timeout=20)
    return encoded.form, bytes(encoded.data)


def plain(piece: Piece) -> np.ndarray:
    out = np.empty(MEMORY.size(piece.plane, piece.planes, len(piece.ids)), np.uint8)
    MEMORY.gather(piece, out)
    return out


@pytest.mark.parametrize(
    "piece", [WHOLE, Piece(1, 1, 0, np.arange(9)), Piece(1, 2, 0, np.arange(20))]
)
def test_there_and_back(piece: Piece) -> None:
    """Also over the planes of two layers that differ in width."""
    form, data = coded(piece, "lossless")
    assert form == "lossless" and len(data) < plain(piece).size
    found, back = CODER.decode(piece, memoryview(data))
    assert found == "lossless" and np.array_equal(back, plain(piece))


def test_a_piece_is_copied_when_it_is_handed_over() -> None:
    own = memory(1)
    coder, before = Coder(own, FORM), own.planes[0].copy()
    future = coder.submit(WHOLE, "lossless", lambda: None)
    own.planes[0][:] = 0
    _, back = coder.decode(WHOLE, future.result(timeout=20).data)
    assert np.array_equal(back[: before.size], before[WHOLE.ids].reshape(-1))
    coder.close()


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (Piece(0, 3, 0, np.arange(BLOCKS - 1)), "tokens"),
        (Piece(0, 2, 0, np.arange(BLOCKS)), "other planes"),
        (Piece(1, 2, 0, np.arange(BLOCKS)), "other planes"),
    ],
)
def test_a_sound_stream_of_another_piece_is_refused(piece: Piece, words: str) -> None:
    _, data = coded(WHOLE, "int8")
    with pytest.raises(WireError, match=words):
        CODER.decode(piece, memoryview(data))


def test_a_sound_stream_of_another_dtype_is_refused() -> None:
    rows = [np.zeros((BLOCKS * TOKENS, 4 * w), np.uint8) for layer in WIDTHS for w in layer]
    slots = [(0, 0), (0, 1), (1, 0)]
    tensors = [Tensor(*slot, data) for slot, data in zip(slots, rows, strict=True)]
    data = encode(Chunk("float32", 2, tensors), Coding("lossless"))
    with pytest.raises(WireError, match="float32"):
        CODER.decode(WHOLE, memoryview(data))


@settings(max_examples=60)
@given(form=st.sampled_from(["lossless", "int8", "cachegen-2"]), data=st.data())
def test_damage_is_refused_and_nothing_else_is_raised(form: str, data: st.DataObject) -> None:
    """With frames' own checksums right: a peer that lies."""
    _, stream = STREAMS[form]
    damaged = bytearray(stream)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    if bytes(damaged[:cut]) == stream:
        return
    with pytest.raises(WireError):
        CODER.decode(WHOLE, memoryview(damaged)[:cut])


STREAMS = {form: coded(WHOLE, form) for form in ("lossless", "int8", "cachegen-2")}


@pytest.mark.parametrize("name", ["zip", "cachegen4"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="no codec"):
        coding_of(name)


def test_names_are_those_of_the_codings() -> None:
    for coding in (Coding("int4"), Coding("cachegen", 3), Coding("cachegen_delta", 5)):
        assert coding_of(str(coding)) == coding
