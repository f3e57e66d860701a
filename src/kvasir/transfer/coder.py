"""KV of a transfer in a coded form and back: pieces of planes, and bytes that describe themselves.

Knows how a model's KV lies in planes; what a form does is in `codec`. Coding goes on in a thread
beside the sender's own, on a copy, so that nothing of it touches cache memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvasir.core.codec import RAW
from kvasir.core.errors import (
    ConfigError,
    TransferError,
    UnsupportedEffect,
    WireError,
    nearest,
)
from kvasir.transfer.base import KvForm
from kvasir.transfer.codec import FORMS, Chunk, Coding, Tensor, decode, encode, fastest_kernels
from kvasir.transfer.codec.container import read_head
from kvasir.transfer.codec.floats import item_bytes

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Memory, Piece

PIECE_TOKENS: Final = 512  # enough for an entropy coder's tables to pay


class Encoded(NamedTuple):
    """`form` `raw`: the bytes as they are, since no others would be fewer, or could be."""

    form: str
    data: memoryview


def coding_of(name: str) -> Coding:
    """Of its name, `cachegen-3`. Raises ConfigError when there is no such form or level."""
    form, _, level = name.partition("-")
    for known in FORMS:
        if known == form:
            return Coding(known, int(level or 0))
    raise ConfigError(f"no codec {name!r}", nearest=nearest(name, FORMS))


class Coder:
    """Both directions of one worker. Any thread may decode."""

    def __init__(self, memory: Memory, form: KvForm) -> None:
        """Raises ConfigError for KV that has no coded form."""
        item_bytes(form.dtype)
        self.form = form
        self.piece_blocks = max(1, PIECE_TOKENS // form.block_tokens)
        self._memory = memory
        self._kernels = fastest_kernels()
        self._thread = ThreadPoolExecutor(1, "kv-code")

    def submit(self, piece: Piece, name: str, done: Callable[[], None]) -> Future[Encoded]:
        """Copy a piece now and code the copy; `done` is called on any thread."""
        size = self._memory.size(piece.plane, piece.planes, len(piece.ids))
        copy: Bytes = np.empty(size, np.uint8)
        self._memory.gather(piece, copy)
        future = self._thread.submit(self._encode, piece, copy, coding_of(name))
        future.add_done_callback(lambda _: done())
        return future

    def _encode(self, piece: Piece, copy: Bytes, coding: Coding) -> Encoded:
        try:
            data = encode(self._chunk(piece, copy), coding, self._kernels)
        except (TransferError, UnsupportedEffect):  # no finite numbers; no library for it here
            return Encoded(RAW, copy.data)
        if len(data) >= copy.size:
            return Encoded(RAW, copy.data)
        return Encoded(str(coding), memoryview(data))

    def decode(self, piece: Piece, data: memoryview) -> tuple[str, Bytes]:
        """The form's name and a piece's bytes, flat. Raises WireError for what is no such piece."""
        head = read_head(data)
        expected = self._chunk(piece, None)
        shape = (self.form.dtype, expected.layers, len(piece.ids) * self.form.block_tokens)
        if (head.dtype, head.layers, head.tokens) != shape:
            raise WireError(f"a coded piece of {head.tokens} tokens of {head.dtype}, not {shape}")
        width = item_bytes(self.form.dtype)
        parts = [(part.layer, part.plane, part.channels * width) for part in head.parts]
        wanted = [(t.layer, t.plane, t.data.shape[1]) for t in expected.tensors]
        if parts != wanted:
            raise WireError("a coded piece of other planes")
        size = self._memory.size(piece.plane, piece.planes, len(piece.ids))
        chunk = decode(data, self._kernels, size)
        form = str(Coding(head.form, head.level))
        return form, np.concatenate([tensor.data.reshape(-1) for tensor in chunk.tensors])

    def _chunk(self, piece: Piece, flat: Bytes | None) -> Chunk:
        """A piece as rows of tokens; of its shape alone without `flat`."""
        tokens, at, tensors = len(piece.ids) * self.form.block_tokens, 0, []
        for plane in range(piece.plane, piece.plane + piece.planes):
            layer, which = self._memory.slot_of(plane)
            width = self._memory.block_bytes(plane) // self.form.block_tokens
            if flat is None:
                rows = np.broadcast_to(np.uint8(0), (tokens, width))
            else:
                rows = flat[at : at + tokens * width].reshape(tokens, width)
                at += tokens * width
            tensors.append(Tensor(layer, which, rows))
        return Chunk(self.form.dtype, self._memory.layers, tensors)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
