"""Calls the compiled kernel. Knows tensors, block tables and what the kernel may be asked; must not
know layers or requests. All bounds are checked here, once a batch: the kernel checks none.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from kvasir.core.errors import ModelError
from kvasir.engine.narrow import SCALE_BYTES, Narrow
from kvasir.engine.native.build import COMMAND, library

DIM_MAX: Final = 256
KINDS: Final = {torch.float32: 0, torch.bfloat16: 1}
NARROW: Final = 2  # int8 with its scale, as engine.narrow keeps it
LINE: Final = 64  # bytes; a head's vector is a whole number of these


@dataclass(frozen=True, slots=True)
class Seen:
    """`count` rows of a packed batch from row `at` on, at positions from `start` on, and the blocks
    that hold their context. `fixed`: each of them sees the first `fixed` positions of `blocks`;
    None: those up to its own."""

    at: int
    start: int
    count: int
    blocks: Sequence[int]
    fixed: int | None = None


class _Batch(ctypes.Structure):
    """`Batch` of attention.cpp."""

    _fields_ = (
        ("spans", ctypes.c_int64), ("block_size", ctypes.c_int64), ("window", ctypes.c_int64),
        ("span", ctypes.c_void_p), ("tables", ctypes.c_void_p), ("threads", ctypes.c_int64),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    """`Layer` of attention.cpp."""

    _fields_ = (
        ("query", ctypes.c_void_p), ("key", ctypes.c_void_p), ("value", ctypes.c_void_p),
        ("out", ctypes.c_void_p), ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in (
            "heads", "kv_heads", "dim", "query_token", "query_head", "key_token", "key_head",
            "value_token", "value_head", "out_token",
        )),
        ("query_kind", ctypes.c_int32), ("cache_kind", ctypes.c_int32),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
    )  # fmt: skip


class Plan:
    """Which rows of a packed batch see what: the same in all layers of a kind.

    `tokens`: rows of the packed batch; `slots`: of the caches; `seen`: not empty. Asserts that
    every position that a row sees is in a block of its table, and every block in the cache.
    """

    def __init__(
        self, seen: Sequence[Seen], block_size: int, slots: int, tokens: int, window: int | None
    ) -> None:
        self.tokens, self.slots = tokens, slots
        spans, tables = array("q"), array("i")
        for one in seen:
            reach = one.start + one.count if one.fixed is None else one.fixed
            needed = -(-reach // block_size)
            assert one.start >= 0 and one.count > 0 and reach > 0, f"nothing to see: {one}"
            assert one.at >= 0 and one.at + one.count <= tokens, f"rows not in the batch: {one}"
            assert needed <= len(one.blocks), f"a position beyond the block table: {one}"
            spans.extend((one.start, one.count, one.at, len(tables), one.fixed or 0))
            tables.extend(one.blocks[:needed])
        blocks_count = slots // block_size
        known = min(tables) >= 0 and max(tables) < blocks_count
        assert known, f"a block not in [0, {blocks_count})"
        self._held = (spans, tables)
        self._batch = _Batch(
            len(seen), block_size, window or 0, spans.buffer_info()[0], tables.buffer_info()[0], 1
        )
        self.address = ctypes.addressof(self._batch)

    def on(self, threads: int) -> None:
        self._batch.threads = threads


class Kernel:
    """The compiled kernel in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        code = ctypes.CDLL(str(path))
        code.kvasir_sizes.restype = ctypes.c_int64
        wanted = ctypes.sizeof(_Batch) << 32 | ctypes.sizeof(_Layer)
        assert code.kvasir_sizes() == wanted, f"{path} is of another source"
        self._attend: Any = code.kvasir_attend  # without the interpreter's lock, as all of CDLL
        self._attend.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._attend.restype = ctypes.c_int32

    def takes(self, query: torch.Tensor, plane: torch.Tensor, narrow: Narrow | None) -> bool:
        """Whether it computes `query`, [tokens, heads, dim], over `plane`, [slots, kv_heads, _]."""
        dim = query.shape[2]
        held = query.dtype == plane.dtype if narrow is None else narrow == "int8"
        return (
            held and query.dtype in KINDS and dim <= DIM_MAX
            and dim * query.dtype.itemsize % LINE == 0 and query.shape[1] % plane.shape[1] == 0
        )  # fmt: skip

    def attend(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scale: float | None,
        softcap: float | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Write the plan's rows of `out`, [tokens, heads, dim]; and of `lse`, float32 [tokens,
        heads]. `query` as `out`; `key`, `value`: caches, [slots, kv_heads, dim], or with scales
        (engine.narrow). Strides are free, but for the last dimension's. `softcap` c: a score x
        counts as c * tanh(x / c)."""
        tokens, heads, dim = query.shape
        slots, kv_heads = key.shape[:2]
        narrow = key.dtype == torch.uint8
        width = dim + SCALE_BYTES if narrow else dim
        assert (tokens, slots) == (plan.tokens, plan.slots), "a plan of another batch"
        assert key.shape == value.shape == (slots, kv_heads, width), "caches of another shape"
        assert out.shape == query.shape and out.dtype == query.dtype and out.is_contiguous()
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1, "values not side by side"
        assert lse is None or (lse.shape == (tokens, heads) and lse.is_contiguous())
        layer = _Layer(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            None if lse is None else lse.data_ptr(), heads, kv_heads, dim, query.stride(0),
            query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            out.stride(0), KINDS[query.dtype], NARROW if narrow else KINDS[key.dtype],
            dim**-0.5 if scale is None else scale, softcap or 0.0,
        )  # fmt: skip
        plan.on(torch.get_num_threads())
        if self._attend(plan.address, ctypes.addressof(layer)):
            raise MemoryError("no memory for attention")


def kernel_of(wanted: Kernel | bool | None) -> Kernel | None:
    """None: the kernel if it is built. True: or ModelError. False: no kernel."""
    if isinstance(wanted, Kernel):
        return wanted
    path = library()
    if wanted is False or (wanted is None and not path.exists()):
        return None
    if not path.exists():
        raise ModelError("the native kernel is not built", where=str(path), next_step=COMMAND)
    return _kernel(path)


@cache
def _kernel(path: Path) -> Kernel:
    return Kernel(path)
