"""KV through each form of the codec: error bounds, sizes, damage, what cannot be coded."""

import struct

import numpy as np
import pytest
import xxhash

from kvasir.core.errors import ConfigError, TransferError, UnsupportedEffect, WireError
from kvasir.transfer import codec
from kvasir.transfer.codec import NUMPY, Chunk, Coding, Kernels, Tensor, container, groups
from kvasir.transfer.codec.cachegen import sections
from kvasir.transfer.codec.floats import bytes_of, floats_of, short_above, short_below, short_floats
from kvasir.transfer.codec.levels import LEVELS, bins_of, width_of

DTYPES = ("bfloat16", "float16", "float32")
CODINGS = [
    Coding("lossless"), Coding("int8"), Coding("int4"),
    *[Coding("cachegen", level) for level in LEVELS],
    *[Coding("cachegen_delta", level) for level in LEVELS],
]  # fmt: skip


def every_kernels() -> list[Kernels]:
    fastest = codec.fastest_kernels()
    return [NUMPY] if fastest is NUMPY else [NUMPY, fastest]


def values_of(tokens: int, channels: int, seed: int) -> np.ndarray:
    """Like KV: channels with a mean and a width of their own, tokens that resemble the last one."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 1, (tokens, channels)).cumsum(axis=0) * 0.1
    noise = rng.normal(0, 1, (tokens, channels))
    drawn = (steps + noise) * rng.uniform(0.1, 2, channels) + rng.normal(0, 3, channels)
    return drawn.astype(np.float32)


def chunk_of(dtype: str = "bfloat16", tokens: int = 64, widths: tuple[int, ...] = (64,)) -> Chunk:
    tensors = [
        Tensor(at // 2, at % 2, bytes_of(values_of(tokens, width, at), dtype))
        for at, width in enumerate(widths)
    ]
    return Chunk(dtype, max(1, len(widths) // 2), tensors)


def floats(chunk: Chunk) -> list[np.ndarray]:
    return [floats_of(tensor.data, chunk.dtype) for tensor in chunk.tensors]


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "widths"), [(1, (1,)), (11, (48, 20)), (40, (128,) * 6)])
def test_shape_and_place_come_back(
    coding: Coding, dtype: str, tokens: int, widths: tuple[int, ...]
) -> None:
    chunk = chunk_of(dtype, tokens, widths)
    streams = {codec.encode(chunk, coding, kernels) for kernels in every_kernels()}
    assert len(streams) == 1, "kernels differ"
    for kernels in every_kernels():
        back = codec.decode(*streams, kernels)
        assert (back.dtype, back.layers) == (chunk.dtype, chunk.layers)
        for mine, other in zip(chunk.tensors, back.tensors, strict=True):
            assert (mine.layer, mine.plane) == (other.layer, other.plane)
            assert mine.data.shape == other.data.shape
            if coding.form == "lossless":
                assert mine.data.tobytes() == other.data.tobytes()


def test_lossless_keeps_every_bit_pattern() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(16, -1)
    chunk = Chunk("bfloat16", 1, [Tensor(0, 0, every)])
    back = codec.decode(codec.encode(chunk, Coding("lossless")))
    assert back.tensors[0].data.tobytes() == every.tobytes()


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4)])
def test_groups_are_off_by_half_a_step(form: codec.Form, bits: int) -> None:
    chunk = chunk_of("float32", 33, (128, 64))
    back = codec.decode(codec.encode(chunk, Coding(form)))
    for mine, other in zip(floats(chunk), floats(back), strict=True):
        grid = mine.reshape(33, -1, 64)
        step = (grid.max(axis=2) - grid.min(axis=2)) / ((1 << bits) - 1)
        off = np.abs(mine - other).reshape(33, -1, 64).max(axis=2)
        assert (off <= step / 2 * 1.03 + np.abs(grid).max(axis=2) / 2**8 / ((1 << bits) - 1)).all()
        assert off.max() > 0


@pytest.mark.parametrize("level", LEVELS)
def test_released_form_is_off_by_half_a_bin(level: int) -> None:
    chunk = chunk_of("float32", 70, (64,) * 6)
    back = codec.decode(codec.encode(chunk, Coding("cachegen", level)))
    for tensor, mine, other in zip(chunk.tensors, floats(chunk), floats(back), strict=True):
        limit = bins_of(level, tensor.layer, chunk.layers, tensor.plane) // 2 - 1
        bound = np.abs(mine).max(axis=1, keepdims=True) / limit / 2 * (1 + 2**-7)
        assert (np.abs(mine - other) <= bound).all()


@pytest.mark.parametrize("level", LEVELS)
def test_delta_form_is_off_by_half_a_bin_of_deltas(level: int) -> None:
    chunk = chunk_of("float32", 75, (64,) * 6)
    back = codec.decode(codec.encode(chunk, Coding("cachegen_delta", level)))
    for tensor, mine, other in zip(chunk.tensors, floats(chunk), floats(back), strict=True):
        largest = np.abs(mine[::10]).max(axis=1, keepdims=True)
        assert (np.abs(mine[::10] - other[::10]) <= largest / 127 / 2 * (1 + 2**-7)).all()
        rest = np.arange(75) % 10 != 0
        deltas = mine[rest] - np.repeat(other[::10], 10, axis=0)[:75][rest]
        width = width_of(level, tensor.layer, chunk.layers)
        steps = np.maximum(width * np.sqrt((deltas**2).mean(axis=0)),
                           np.abs(deltas).max(axis=0) / 127)  # fmt: skip
        assert (np.abs(mine - other)[rest] <= steps / 2 * (1 + 2**-6)).all()


def test_each_level_is_smaller_and_loses_more() -> None:
    chunk = chunk_of("bfloat16", 320, (64,) * 24)
    for form in codec.LEVELLED:
        streams = [codec.encode(chunk, Coding(form, level)) for level in LEVELS]
        sizes = [len(s) for s in streams]
        losses = [
            sum(float(((a - b) ** 2).sum()) for a, b in
                zip(floats(chunk), floats(codec.decode(s)), strict=True))
            for s in streams
        ]  # fmt: skip
        assert sizes == sorted(sizes, reverse=True) and losses == sorted(losses), form


def test_a_constant_and_a_zero_tensor() -> None:
    for value in (0.0, -2.5):
        data = bytes_of(np.full((30, 32), value, np.float32), "bfloat16")
        for coding in CODINGS:
            chunk = Chunk("bfloat16", 1, [Tensor(0, 0, data)])
            back = codec.decode(codec.encode(chunk, coding))
            assert np.allclose(floats(back)[0], value, rtol=2**-7), coding


def test_short_floats_bound_what_they_came_from() -> None:
    values = values_of(50, 50, 3).reshape(-1)
    below, above = short_floats(short_below(values)), short_floats(short_above(values))
    assert (below <= values).all() and (values <= above).all()
    assert (above - below <= np.abs(values) * 2**-6).all()


def test_groups_divide_any_row() -> None:
    assert [groups.group_of(n) for n in (1, 7, 48, 64, 80, 576, 1024)] == [1, 7, 16, 64, 16, 64, 64]
    assert groups.wire_bits(1024, 4) == 4.5


def test_sections_cover_every_tensor_once() -> None:
    widths = [3000, 1000, 1000, 5000, 1, 1]
    parts = [list(range(6))[section] for section in sections(widths)]
    assert parts == [[0, 1], [2], [3], [4, 5]]


# --- what cannot be coded --------------------------------------------------------------------


@pytest.mark.parametrize("coding", [c for c in CODINGS if c.form != "lossless"], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(coding: Coding, value: float) -> None:
    values = values_of(20, 32, 0)
    values[3, 4] = value
    data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    with np.errstate(invalid="ignore"), pytest.raises(TransferError, match="finite"):
        codec.encode(Chunk("bfloat16", 1, [Tensor(0, 0, data)]), coding)


def test_other_dtypes_and_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="no codec for KV of float8_e4m3fn"):
        codec.encode(chunk_of()._replace(dtype="float8_e4m3fn"), Coding("int8"))
    with pytest.raises(ConfigError, match="no codec level 6"):
        codec.encode(chunk_of(), Coding("cachegen", 6))


def test_lossless_without_zstandard_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(UnsupportedEffect, match=r"kvasir-llm\[codec\]"):
        codec.encode(chunk_of(), Coding("lossless"))


def test_without_numba_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "numba", None)
    monkeypatch.delitem(modules, "kvasir.transfer.codec.kernels", raising=False)
    assert codec.fastest_kernels() is NUMPY


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_a_flipped_bit_anywhere_is_refused(coding: Coding) -> None:
    data = codec.encode(chunk_of(tokens=24, widths=(32, 32)), coding)
    rng = np.random.default_rng(0)
    for at in {*range(40), *rng.integers(0, len(data), 200).tolist()}:
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(WireError):
            codec.decode(bytes(broken))


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_a_stream_cut_or_prolonged_is_refused(coding: Coding) -> None:
    data = codec.encode(chunk_of(tokens=24, widths=(32, 32)), coding)
    for cut in {0, 1, 24, 25, len(data) // 2, len(data) - 1}:
        with pytest.raises(WireError):
            codec.decode(data[:cut])
    with pytest.raises(WireError):
        codec.decode(data + b"\0")


def resealed(data: bytes, flip: int, bit: int) -> bytes:
    """With one bit of head or body flipped and checksum and sizes made right again."""
    size = container._FRAME.size
    magic, version, head_bytes, _, _ = container._FRAME.unpack_from(data)
    rest = bytearray(data[size:])
    rest[flip % len(rest)] ^= 1 << bit
    return struct.pack("<4sBIQQ", magic, version, head_bytes, len(rest) - head_bytes,
                       xxhash.xxh3_64_intdigest(bytes(rest))) + bytes(rest)  # fmt: skip


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_a_lie_with_the_right_checksum_is_refused_or_harmless(coding: Coding) -> None:
    """A peer may send anything: it decodes to the shape that its head says, or raises."""
    data = codec.encode(chunk_of(tokens=24, widths=(32, 32)), coding)
    rng = np.random.default_rng(1)
    for at in {*range(160), *rng.integers(0, len(data), 200).tolist()}:
        lie = resealed(data, at, int(rng.integers(8)))
        for kernels in every_kernels():
            try:
                back = codec.decode(lie, kernels, bytes_max=1 << 20)
            except WireError:
                continue
            assert back.bytes == codec.read_head(lie).plain_bytes


def test_room_is_made_only_for_what_the_reader_allows() -> None:
    data = codec.encode(chunk_of(tokens=64, widths=(64,)), Coding("int8"))
    assert codec.decode(data, bytes_max=64 * 128).bytes == 64 * 128
    with pytest.raises(WireError, match="a chunk of 8192 bytes, max 8191"):
        codec.decode(data, bytes_max=64 * 128 - 1)


def test_another_version_is_named() -> None:
    data = bytearray(codec.encode(chunk_of(), Coding("int8")))
    data[4] = 2
    with pytest.raises(WireError, match="codec version 2, this side speaks 1"):
        codec.decode(bytes(data))


def test_a_head_tells_what_is_in_it() -> None:
    head = codec.read_head(codec.encode(chunk_of(tokens=24, widths=(32, 8)), Coding("cachegen", 3)))
    assert (head.form, head.level, head.tokens) == ("cachegen", 3, 24)
    assert [p.channels for p in head.parts] == [32, 8]
    assert head.plain_bytes == 24 * 40 * 2
