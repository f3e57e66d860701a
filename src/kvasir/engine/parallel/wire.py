"""What rank 0 tells the others over socket pairs, and how all add up over torch.distributed.

Knows tensors, frames and process groups; must not know models or caches. No pickle anywhere: frames
are msgspec-typed, a tensor in one is its dtype, shape and bytes. Everything has a time limit but
the wait for the next command, which ends when the other side's process does.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import msgspec
import torch
from torch import distributed

from kvasir.core.errors import WireError
from kvasir.engine.layers import LayerWeights, Matrix

LENGTH_BYTES: Final = 8
FRAME_BYTES_MAX: Final = 1 << 36
LOOPBACK: Final = "127.0.0.1"
# Up to here ranks send each other what they have: no hop from thread to thread inside gloo, and one
# way in place of a ring's two. 2 KiB of 2 ranks take 90 us in place of 280, 1 MiB as long.
EXCHANGED_BYTES_MAX: Final = 1 << 18


# --- frames ---------------------------------------------------------------------------------------


class PlaneAt(msgspec.Struct, frozen=True):
    """A plane of the cache, [slots, kv_heads, width], from byte `offset` of the memory on."""

    offset: int
    shape: tuple[int, int, int]
    dtype: str


class Setup(msgspec.Struct, frozen=True, tag=True):
    """What a rank is told first; `layers_count` LayerWeights and a Head follow. `store` is a file,
    `narrow` as in engine.narrow, `dtype` that of the weights."""

    rank: int
    size: int
    store: str
    limit_s: float
    threads: int
    planes: tuple[tuple[PlaneAt, ...], ...]  # by layer
    block_size: int
    dtype: str
    narrow: str | None
    native: str | None  # the compiled kernel, if they attend by it (engine.native)

    @property
    def layers_count(self) -> int:
        return len(self.planes)


class Head(msgspec.Struct, frozen=True, tag=True):
    matrix: Matrix


class Ready(msgspec.Struct, frozen=True, tag=True):
    """What a rank says first, and again when it has all of the above."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """What it says if it cannot start."""

    why: str


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`engine.attention.Span`, with no more than the blocks that it reaches."""

    start: int
    count: int
    blocks: list[int]
    run: int


class Forward(msgspec.Struct, frozen=True, tag=True):
    """One batch; rank 0 gives what goes into the first layer."""

    pieces: list[Piece]


class Rows(msgspec.Struct, frozen=True, tag=True):
    """So many rows go through the head; rank 0 gives them too."""

    count: int


Told = Setup | LayerWeights | Head | Forward | Rows
Answered = Ready | Failed


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return (name_of(value.dtype), list(value.shape), data.data)
    raise NotImplementedError(f"{type(value).__name__} in a frame")


def _typed(kind: type, value: Any) -> Any:
    if kind is torch.Tensor:
        name, shape, data = value
        return torch.frombuffer(bytearray(data), dtype=dtype_of(name)).view(shape)
    raise NotImplementedError(f"{kind.__name__} in a frame")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), name
    return found


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_plain)
_TOLD: Final = msgspec.msgpack.Decoder(Told, dec_hook=_typed)
_ANSWERED: Final = msgspec.msgpack.Decoder(Answered)


class Link:
    """One end of the socket pair. Raises OSError when the other is gone or too slow."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def tell(self, message: Told | Answered, limit_s: float) -> None:
        body = _ENCODER.encode(message)
        self._sock.settimeout(limit_s)
        self._sock.sendall(len(body).to_bytes(LENGTH_BYTES, "little"))
        self._sock.sendall(body)

    def told(self, limit_s: float | None) -> Told | None:
        """None: the other end is closed."""
        frame = self._frame(limit_s)
        return _TOLD.decode(frame) if frame is not None else None

    def answered(self, limit_s: float) -> Answered | None:
        frame = self._frame(limit_s)
        return _ANSWERED.decode(frame) if frame is not None else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def _frame(self, limit_s: float | None) -> bytearray | None:
        self._sock.settimeout(limit_s)
        head = self._read(LENGTH_BYTES)
        if head is None:
            return None
        length = int.from_bytes(head, "little")
        if length > FRAME_BYTES_MAX:
            raise WireError(f"a frame of {length} bytes")
        return self._read(length)

    def _read(self, count: int) -> bytearray | None:
        data, at = bytearray(count), 0
        view = memoryview(data)
        while at < count:
            got = self._sock.recv_into(view[at:])
            if not got:
                return None
            at += got
        return data


# --- sums -----------------------------------------------------------------------------------------


class Group:
    """The ranks, joined over loopback. What one calls the others answer in the same order; calls
    raise RuntimeError when one is gone or late by `limit_s`. Tensors are contiguous.

    Made directly, not by `init_process_group`: a process may be in several groups.
    """

    def __init__(self, store: str, rank: int, size: int, limit_s: float) -> None:
        kind = distributed.ProcessGroupGloo
        options = kind._Options()
        options._devices = [kind.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=limit_s)
        files = distributed.FileStore(store, size)
        files.set_timeout(timedelta(seconds=limit_s))
        self._rank = rank
        self._others = [one for one in range(size) if one != rank]
        self._group: Any = kind(files, rank, size, options)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank gets the same bytes. `x` may be written over."""
        if x.nbytes > EXCHANGED_BYTES_MAX:
            self._group.allreduce([x]).wait()
            return x
        parts = {rank: torch.empty_like(x) for rank in self._others}
        works = [self._group.send([x], rank, 0) for rank in self._others]
        works += [self._group.recv([part], rank, 0) for rank, part in parts.items()]
        _wait(works)
        parts[self._rank] = x
        total = parts[0]
        for rank in range(1, len(parts)):  # in one order everywhere: rounding is the same
            total = total.add_(parts[rank])
        return total

    def give_all(self, x: torch.Tensor) -> None:
        """From rank 0, to all others."""
        _wait([self._group.send([x], rank, 0) for rank in self._others])

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """What rank 0 gave, in `x`."""
        self._group.recv([x], 0, 0).wait()
        return x

    def give(self, x: torch.Tensor) -> None:
        """To rank 0."""
        self._group.send([x], 0, 0).wait()

    def take(self, into: Sequence[torch.Tensor]) -> None:
        """What ranks 1, 2, ... gave, by rank 0."""
        _wait([self._group.recv([x], rank, 0) for rank, x in enumerate(into, 1)])


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
