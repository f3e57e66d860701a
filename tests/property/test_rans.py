"""The entropy coder gives back what it got, with the same bytes from both kernels."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import WireError
from kvasir.transfer.codec import entropy, fastest_kernels
from kvasir.transfer.codec.rans import NUMPY

FASTEST = fastest_kernels()  # numba's, where it is installed


@st.composite
def symbols(draw: st.DrawFn) -> np.ndarray:
    """int8 [rows, lanes], from all alike to uniform over what 8 bits hold, each lane off-centre."""
    rows, lanes = draw(st.integers(1, 300)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    centre = rng.integers(-60, 61, lanes)
    width = draw(st.sampled_from([0.0, 0.3, 2.0, 20.0, 500.0]))
    drawn = np.rint(centre + rng.normal(0, 1, (rows, lanes)) * width * rng.random(lanes))
    return np.clip(drawn, -127, 127).astype(np.int8)


@settings(max_examples=60, deadline=None)
@given(symbols())
def test_symbols_come_back(given_symbols: np.ndarray) -> None:
    data = entropy.pack(given_symbols, NUMPY)
    assert entropy.pack(given_symbols, FASTEST) == data
    rows, lanes = given_symbols.shape
    for kernels in (NUMPY, FASTEST):
        places, shift = entropy.unpack(memoryview(data), rows, lanes, kernels)
        assert (places + shift == given_symbols).all()


@settings(max_examples=60, deadline=None)
@given(symbols(), st.data())
def test_damage_is_an_error_or_other_symbols_never_more(
    given_symbols: np.ndarray, draw: st.DataObject
) -> None:
    """No checksum here: what a flipped bit may do is refuse, or decode to the asked-for shape."""
    data = bytearray(entropy.pack(given_symbols, NUMPY))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    if draw.draw(st.booleans()):
        del data[draw.draw(st.integers(0, len(data))) :]
    rows, lanes = given_symbols.shape
    for kernels in (NUMPY, FASTEST):
        try:
            places, _ = entropy.unpack(memoryview(bytes(data)), rows, lanes, kernels)
        except WireError:
            continue
        assert places.shape == (rows, lanes)


def test_bytes_are_close_to_the_entropy() -> None:
    rng = np.random.default_rng(0)
    drawn = np.clip(np.rint(rng.normal(0, rng.uniform(0.5, 4, 512), (2048, 512))), -15, 15)
    counts = np.stack([(drawn == s).mean(axis=0) for s in range(-15, 16)])
    bits = -(counts * np.log2(np.maximum(counts, 1e-12))).sum(axis=0).mean()
    data = entropy.pack(drawn.astype(np.int8), NUMPY)
    assert len(data) * 8 / drawn.size < 1.02 * bits


def test_a_word_or_a_state_of_another_stream_is_noticed() -> None:
    """Without any checksum: every lane must end in the state that coding began with."""
    rng = np.random.default_rng(2)
    drawn = np.rint(rng.normal(0, 3, (64, 16))).astype(np.int8)
    data = entropy.pack(drawn, NUMPY)
    coded_bytes = 4 * 16 + 2 * entropy._HEAD.unpack_from(data)[4]
    for at in range(len(data) - coded_bytes, len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        for kernels in (NUMPY, FASTEST):
            with pytest.raises(WireError):
                entropy.unpack(memoryview(bytes(broken)), 64, 16, kernels)


@pytest.mark.parametrize(
    ("at", "value"),
    [(32, 0), (32, 4000), (32, 4096), (16, 1)],
    ids=["too little", "too much", "a certain symbol", "a table that there is not"],
)
def test_tables_that_are_none_are_refused(at: int, value: int) -> None:
    """`at`: in centres [16], tables [16], frequencies, as the stream holds them."""
    drawn = np.rint(np.random.default_rng(3).normal(0, 3, (64, 16))).astype(np.int8)
    data = entropy.pack(drawn, NUMPY)
    tables, alphabet, lowest, told, words = entropy._HEAD.unpack_from(data)
    assert tables == 1
    plain = bytearray(zlib.decompress(data[entropy._HEAD.size :][:told]))
    plain[at : at + (2 if at == 32 else 1)] = value.to_bytes(2 if at == 32 else 1, "little")
    if value == 4096:
        plain[34:] = bytes(len(plain) - 34)
    lie = zlib.compress(bytes(plain))
    head = entropy._HEAD.pack(tables, alphabet, lowest, len(lie), words)
    rest = data[entropy._HEAD.size + told :]
    with pytest.raises(WireError, match="do not add up"):
        entropy.unpack(memoryview(head + lie + rest), 64, 16, NUMPY)
