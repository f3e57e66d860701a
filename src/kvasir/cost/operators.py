"""Times of single operators on one accelerator: from measured tables, else from a roofline.

Knows operators and their sizes. Must not know models or batches. Each look-up says how it was
found (`Part`), the worst of its sources, and up to which size that holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

from kvasir.core.specs.hardware import HardwareSpec
from kvasir.cost.step import LATENT_PREFILL_HEAD_DIM
from kvasir.cost.tables import Curve, Key, Part, Source, SystemTables

# Bytes of a weight, scales included, and flops against those of bfloat16 where hardware has them.
FORMAT_BYTES: Final = {
    "bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4_wo": 0.53,
    "w4a16_mxfp4": 0.53, "w4a8_mxfp4_mxfp8": 0.53,
}  # fmt: skip
FORMAT_FLOPS: Final = {"fp8": 2.0, "fp8_block": 2.0, "nvfp4": 4.0}
TOKENS: Final = tuple(2**i for i in range(16))
CONTEXTS: Final = (1, *(2**i for i in range(1, 18)))
Seconds = Callable[[float], float]


class Heads(NamedTuple):
    """Attention of one layer on one accelerator. `window` 0: none; `kv_heads` 0: a latent
    vector of `head_dim` for all heads (multi-head latent attention; not among the tables)."""

    kv_format: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int


class Experts(NamedTuple):
    """One layer's experts: `tp` accelerators share an expert, `ep` divide them up."""

    format: str
    hidden: int
    intermediate: int
    per_token: int
    experts: int
    tp: int
    ep: int


class Operator(NamedTuple):
    """One operator of a layer: seconds over tokens, `most` of which were measured."""

    part: Part
    seconds: Seconds
    most: float = math.inf

    def source(self, tokens: float) -> Source:
        """How the time of `tokens` is found."""
        return self.part.source if tokens <= self.most else max(self.part.source, Source.OUTSIDE)


class Attention:
    """Seconds over batch size and length, from curves at some batch sizes."""

    def __init__(
        self, part: Part, curves: list[tuple[int, Curve]], scale: float = 1.0
    ) -> None:
        self.part = part
        self._curves = curves
        self._scale = scale

    def __call__(self, batch: float, length: float) -> float:
        """Log-linear in the batch size between curves; beyond the last in proportion."""
        curves = self._curves
        at = 0
        while at < len(curves) and curves[at][0] < batch:
            at += 1
        if at == len(curves):
            size, curve = curves[-1]
            return curve(length) * batch / size * self._scale
        size, curve = curves[at]
        if at == 0 or size == batch:
            return curve(length) * self._scale
        below, under = curves[at - 1]
        share = math.log(batch / below) / math.log(size / below)
        low, high = math.log(under(length)), math.log(curve(length))
        return math.exp(low + share * (high - low)) * self._scale

    def source(self, batch: float, length: float) -> Source:
        """How the time at `batch` and `length` is found; a roofline is one everywhere."""
        most, curve = self._curves[-1]
        if batch <= most and length <= curve.range[1]:
            return self.part.source
        return max(self.part.source, Source.OUTSIDE)


class Operators:
    """Look-ups for one system, remembering in `parts` how each operator was found."""

    def __init__(self, tables: SystemTables | None, hardware: HardwareSpec) -> None:
        self._tables = tables
        self._flop_s = 1.0 / (hardware.flops * hardware.flops_efficiency)
        self._byte_s = 1.0 / (hardware.memory_bandwidth * hardware.bandwidth_efficiency)
        self._link_byte_s = 1.0 / hardware.nvlink_bandwidth
        self.parts: list[Part] = []

    def _part(self, name: str, source: Source) -> Part:
        self.parts.append(Part(name, source))
        return self.parts[-1]

    def gemm(self, name: str, n: int, k: int, form: str) -> Operator:
        """One m x k by k x n product, over m.

        Block-scaled fp8 was measured kernel by kernel, and at few rows shows the time to launch it
        and its scaling. In a captured graph that vanishes; both fp8 kinds read the same bytes, so
        it takes at most BLOCK_SCALED times plain fp8.
        """
        found = self._tables.gemm(form, n, k) if self._tables is not None else None
        if found is None:
            return Operator(self._part(name, Source.ROOFLINE), self._gemm_roofline(n, k, form))
        part, most = self._part(name, found.source), found.curve.range[1]
        plain = self._tables.gemm("fp8", n, k) if self._tables is not None else None
        if plain is None or form != "fp8_block":
            return Operator(part, found.curve, most)
        block, whole = found.curve, plain.curve
        return Operator(part, lambda m: min(block(m), BLOCK_SCALED * whole(m)), most)

    def _gemm_roofline(self, n: int, k: int, form: str) -> Seconds:
        flop_s = 2 * n * k * self._flop_s / FORMAT_FLOPS.get(form, 1.0)
        read_s = n * k * FORMAT_BYTES[form] * self._byte_s
        return lambda m: max(flop_s * m, read_s)

    def attention(self, name: str, op: str, shape: Heads) -> Attention:
        """`op`: `prefill_attention` over prompt lengths or `decode_attention` over contexts."""
        if self._tables is not None:
            curves = self._tables.by_batch(op, tuple(shape))
            if curves:
                return Attention(self._part(name, Source.MEASURED), curves)
            near = self._nearest_heads(op, shape)
            if near is not None:
                scale = shape.heads / int(near[1]) if op == "prefill_attention" else 1.0
                part = self._part(name, Source.INTERPOLATED)
                return Attention(part, self._tables.by_batch(op, near), scale)
        return self._attention_roofline(self._part(name, Source.ROOFLINE), op, shape)

    def _nearest_heads(self, op: str, shape: Heads) -> Key | None:
        """Measured with as many KV heads and nearly as many heads, at most twice or half."""
        assert self._tables is not None
        want = (shape.kv_format, *shape[2:])
        same = [k for k in self._tables.keys(op) if (k[0], *k[2:]) == want]
        near = min(same, key=lambda k: abs(math.log(int(k[1]) / shape.heads)), default=None)
        if near is None or not 0.5 <= int(near[1]) / shape.heads <= 2:
            return None
        return near

    def _attention_roofline(self, part: Part, op: str, shape: Heads) -> Attention:
        latent_prefill = not shape.kv_heads and op == "prefill_attention"
        computed = LATENT_PREFILL_HEAD_DIM if latent_prefill else shape.head_dim
        pair_s = 4 * shape.heads * computed * self._flop_s
        planes = 2 * shape.kv_heads or 1
        read_s = planes * shape.head_dim * FORMAT_BYTES[shape.kv_format] * self._byte_s

        def seconds(length: int) -> float:
            seen = min(length, shape.window) if shape.window else length
            if op == "decode_attention":
                return max(pair_s, read_s) * seen
            return max(pair_s * (length - seen / 2) * seen, read_s * length)

        curve = Curve([(float(n), seconds(n)) for n in CONTEXTS])
        return Attention(part, [(1, curve)])

    def experts(self, name: str, shape: Experts, distribution: str) -> Operator:
        """One layer's experts, routing included, over the tokens of all ranks."""
        if self._tables is not None:
            curve = self._tables.curve("moe", (*shape, distribution))
            if curve is not None:
                return Operator(self._part(name, Source.MEASURED), curve, curve.range[1])
            near = self._nearest_experts(shape, distribution)
            if near is not None:
                return Operator(self._part(name, Source.OUTSIDE), self._scaled(shape, *near))
        return Operator(self._part(name, Source.ROOFLINE), self._experts_roofline(shape))

    def _nearest_experts(
        self, shape: Experts, distribution: str
    ) -> tuple[Experts, Curve] | None:
        """The measured experts of the same format that do most alike work."""
        assert self._tables is not None

        def unlike(key: Key) -> float:
            other = Experts(*key[:-1])  # type: ignore[arg-type]
            pairs = zip(_sizes(other), _sizes(shape), strict=True)
            return sum(abs(math.log(a / b)) for a, b in pairs)

        want = (shape.format, distribution)
        keys = [k for k in self._tables.keys("moe") if (k[0], k[-1]) == want]
        near = min(keys, key=unlike, default=None)
        curve = self._tables.curve("moe", near) if near is not None else None
        if near is None or curve is None:
            return None
        return Experts(*near[:-1]), curve  # type: ignore[arg-type]

    def _scaled(self, shape: Experts, near: Experts, curve: Curve) -> Seconds:
        """The roofline of `shape` at the efficiency that `near` was measured to have."""
        own, other = self._experts_roofline(shape), self._experts_roofline(near)
        return lambda m: own(m) * curve(m) / other(m)

    def _experts_roofline(self, shape: Experts) -> Seconds:
        weights = 3 * shape.hidden * shape.intermediate / shape.tp
        flop_s = 2 * weights * shape.per_token / shape.ep * self._flop_s
        flop_s /= FORMAT_FLOPS.get(shape.format, 1.0)
        read_s = weights * FORMAT_BYTES[shape.format] * self._byte_s
        here, missed = shape.experts / shape.ep, 1 - shape.per_token / shape.experts
        return lambda m: max(flop_s * m, read_s * here * (1 - missed**m))

    def collective(self, name: str, op: str, ranks: int, token_elements: int) -> Operator:
        """`all_reduce`, `all_gather` or `reduce_scatter` of bfloat16, over tokens."""
        curve = self._tables.curve(op, (ranks,)) if self._tables is not None else None
        if curve is None:
            sides = 2 if op == "all_reduce" else 1
            token_s = sides * (ranks - 1) / ranks * token_elements * 2 * self._link_byte_s
            part = self._part(name, Source.ROOFLINE)
            return Operator(part, lambda m: COLLECTIVE_S + token_s * m)
        found = curve
        part, most = self._part(name, Source.MEASURED), found.range[1] / token_elements
        return Operator(part, lambda m: found(m * token_elements), most)

    def traffic(self, name: str, nbytes: float) -> Operator:
        """What moves `nbytes` a token through memory and was not measured, at full bandwidth."""
        token_s = nbytes * self._byte_s
        return Operator(Part(name, Source.ROOFLINE), lambda m: token_s * m)


def _sizes(shape: Experts) -> tuple[float, ...]:
    """What makes experts alike: a token's work, an expert's bytes, how many are here, how many
    a token uses."""
    expert = shape.hidden * shape.intermediate / shape.tp
    here = shape.experts / shape.ep
    return expert * shape.per_token / shape.ep, expert, here, float(shape.per_token)


BLOCK_SCALED: Final = 1.25
COLLECTIVE_S: Final = 10e-6
