"""How long one iteration takes, from measured kernels: a sum over a model's operators.

Knows shapes, how they are divided (TP, PP, EP, copied attention), and a few constants of the engine
around the kernels. Must not know requests, queues, policy, or where tables come from.

    iteration = dense(m) + experts(M) + head(rows) + attention + engine

m is the tokens on the busiest attention rank, M those of all ranks. All but attention depends on
counts of tokens alone and is tabulated once; decode attention is made piecewise linear in the total
context, with its joints at the measured context lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvasir.core.specs.deployment import MeasuredCost
from kvasir.core.specs.hardware import HardwareSpec
from kvasir.core.specs.model import ModelShape
from kvasir.cost.curve import Pieces, PiecewiseModel
from kvasir.cost.operators import (
    CONTEXTS,
    FORMAT_BYTES,
    TOKENS,
    Experts,
    Heads,
    Operator,
    Operators,
)  # fmt: skip
from kvasir.cost.step import DecodeLine, Row
from kvasir.cost.tables import Curve, Part, Shares, SystemTables, shares_of

HOP_S: Final = 10e-6  # one stage-to-stage send
HEAD_FORMAT: Final = "bfloat16"  # engines keep the output head unquantised
# Architectures that norm queries and keys over all heads: ranks add up two squares a token between
# them, in float32, and the norm falls apart into small kernels (vLLM's MiniMaxText01RMSNormTP).
NORM_OVER_HEADS: Final = frozenset({"minimax_m2"})
NORM_ELEMENTS: Final = 4  # of bfloat16, for two of float32


class Engine(NamedTuple):
    """What an engine adds to its kernels. Fitted on whole servers by `bench/accuracy.py`."""

    step_s: float = 0.1e-3  # an iteration's own on the accelerator: sampling, hand-over
    row_s: float = 3e-6  # a sequence in it
    host_step_s: float = 1.2e-3  # an iteration's own on the host: scheduling, answers
    host_row_s: float = 36e-6  # a sequence in it
    layer_s: float = 8e-6  # small kernels of a layer: norms, rotary, cache write, activation
    kernel: float = 1.08  # kernels in a server against the same ones measured alone
    prefill_experts: float = 1.2  # experts in a step with prompts, against the same ones measured
    distribution: str = "power_law_1.2"  # of tokens over experts


class Times(NamedTuple):
    """An operator that runs `times` in an iteration."""

    times: float
    operator: Operator


class Mix(NamedTuple):
    """Rows of one iteration, summed up.

    `decoding` rows read `context` positions. `prefills` prompts have `tokens` new positions, hold
    `length` afterwards, and attend over `pairs` of a new position and one it sees.
    """

    decoding: int
    context: int
    prefills: int
    tokens: int
    length: int
    pairs: int


def mix_of(rows: Sequence[Row]) -> Mix:
    """Sums over rows; one of a single new token decodes."""
    decoding = context = tokens = prefills = length = pairs = 0
    for new, before in rows:
        if new == 1:
            decoding += 1
            context += before + 1
        else:
            prefills += 1
            tokens += new
            length += before + new
            pairs += new * before + new * (new + 1) // 2
    return Mix(decoding, context, prefills, tokens, length, pairs)


class Measured(PiecewiseModel):
    """Step time from tables; `parts` says how each operator's time is found.

    With `tables` None, or where they have no answer, a roofline of `hardware` stands in.
    """

    def __init__(
        self, shape: ModelShape, hardware: HardwareSpec, tp: int, pp: int, cost: MeasuredCost,
        tables: SystemTables | None, engine: Engine | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp % cost.dp == 0, f"dp {cost.dp} does not divide tp {tp}"
        self._shape, self._cost, self._engine = shape, cost, engine or Engine()
        self._dp, self._pp = cost.dp, pp
        self._ranks, self._gpus = tp // cost.dp, tp
        self._ops = Operators(tables, hardware)
        self._hop_token_s = shape.hidden * 2 / hardware.nvlink_bandwidth
        self._full = shape.global_layers if shape.window else shape.layers
        self._windowed = shape.layers - self._full
        self._small = 1 + (self._ranks > 1 and shape.architecture in NORM_OVER_HEADS)
        self._dense_parts = self._dense_operators()
        self._dense = _tabulate(self._dense_parts)
        self._expert_parts = self._expert_operators() if shape.experts else ()
        self._experts = _tabulate(self._expert_parts) if shape.experts else None
        self._head_parts = (self._head_gemm(),)
        self._head = _tabulate(self._head_parts)
        self._prefill = [
            (n, self._ops.attention("prefill attention", "prefill_attention", heads))
            for n, heads in self._heads()
        ]
        self._decode = [
            (n, self._ops.attention("decode attention", "decode_attention", heads))
            for n, heads in self._heads()
        ]
        self._fixed: dict[tuple[int, int, int], float] = {}

    @property
    def parts(self) -> tuple[Part, ...]:
        """Each operator and how its time is found."""
        return tuple(self._ops.parts)

    # --- an iteration -----------------------------------------------------------------------------

    def batch(self, rows: Sequence[Row]) -> float:
        """As `StepModel.batch`."""
        assert rows, "a batch without rows"
        mix = mix_of(rows)
        if not mix.prefills:
            return self.iteration_seconds(mix.decoding, mix.context)
        everywhere = mix.tokens + mix.decoding
        seconds = self._tokens_s(self._on_rank(mix), everywhere, len(rows))
        if self._experts is not None:
            slower = (self._engine.prefill_experts - 1) * self._engine.kernel
            seconds += slower * self._experts(everywhere)
        seconds += self._prefill_s(mix.prefills, mix.tokens, mix.length, mix.pairs)
        if mix.decoding:
            here = -(-mix.decoding // self._dp)
            seconds += self._decode_s(here, mix.context / mix.decoding)
        return self._with_host(seconds, len(rows))

    def shares(self, rows: Sequence[Row]) -> Shares:
        """How the kernels' time of an iteration over `rows` is found; the engine's is left out."""
        assert rows, "a batch without rows"
        mix = mix_of(rows)
        here, everywhere = self._on_rank(mix), mix.tokens + mix.decoding
        per_rank = -(-len(rows) // self._dp)
        sizes = ((self._dense_parts, here), (self._expert_parts, everywhere),
                 (self._head_parts, per_rank))  # fmt: skip
        times = [(n * op.seconds(m), op.source(m)) for parts, m in sizes for n, op in parts]
        for kind, count, length in ((self._prefill, mix.prefills, mix.length),
                                    (self._decode, mix.decoding, mix.context)):  # fmt: skip
            rank, mean = -(-count // self._dp), length / max(1, count)
            times += [(n * op(rank, mean), op.source(rank, mean)) for n, op in kind if count]
        return shares_of(times)

    def _on_rank(self, mix: Mix) -> int:
        """Tokens on the busiest attention rank."""
        if not mix.prefills:
            return -(-mix.decoding // self._dp)
        whole = mix.prefills >= self._dp
        busiest = -(-mix.tokens // self._dp) if whole else mix.tokens // mix.prefills
        return busiest + -(-mix.decoding // self._dp)

    def _with_host(self, seconds: float, rows: int) -> float:
        """The host works at the same time (`asynchronous`), or while the accelerator waits."""
        e = self._engine
        seconds += e.step_s + e.row_s * rows
        host_s = e.host_step_s + e.host_row_s * rows
        return max(seconds, host_s) if self._cost.asynchronous else seconds + host_s

    def _tokens_s(self, on_rank: int, everywhere: int, rows: int) -> float:
        """All that depends on counts alone."""
        key = (on_rank, everywhere, rows)
        found = self._fixed.get(key)
        if found is None:
            found = self._dense(on_rank) + self._head(-(-rows // self._dp))
            if self._experts is not None:
                found += self._experts(everywhere)
            found *= self._engine.kernel
            found += self._shape.layers * self._engine.layer_s * self._small
            found += (self._pp - 1) * (HOP_S + self._hop_token_s * on_rank)
            if len(self._fixed) < FIXED_MAX:
                self._fixed[key] = found
        return found

    def _prefill_s(self, rows: int, tokens: int, length: int, pairs: int) -> float:
        """Attention of `rows` prompts, taken as alike; what stands already is not computed again.

        The causal triangle over the whole length less the one that stands: a share of its pairs.
        """
        here = -(-rows // self._dp)
        whole, new = length / rows, tokens / rows
        share = pairs / rows / (whole * (whole + 1) / 2)
        seconds = 0.0
        for layers, attention in self._prefill:
            one = attention(here, new)
            if share < 1 and attention is self._prefill[0][1]:
                one = max(one, attention(here, whole) * share)
            seconds += layers * one
        return seconds * self._engine.kernel

    def _decode_s(self, rows: int, context: float) -> float:
        """Decode attention of all layers at a mean context."""
        return sum(n * a(rows, context) for n, a in self._decode) * self._engine.kernel

    def _pieces(self, batch_size: int) -> Pieces:
        here = -(-batch_size // self._dp)
        fixed = self._tokens_s(here, batch_size, batch_size)
        knots, times, most = [], [], 0.0
        for context in CONTEXTS:
            most = max(most, self._decode_s(here, context))
            knots.append(float(batch_size * context))
            times.append(self._with_host(fixed + most, batch_size))
        starts, lines = [0.0], [DecodeLine(times[0], 0.0)]
        for i in range(1, len(knots)):
            slope = (times[i] - times[i - 1]) / (knots[i] - knots[i - 1])
            starts.append(knots[i - 1])
            lines.append(DecodeLine(times[i - 1] - slope * knots[i - 1], slope))
        return Pieces(tuple(starts), tuple(lines))

    # --- a model's operators ----------------------------------------------------------------------

    def _heads(self) -> list[tuple[int, Heads]]:
        """Layers of each kind of attention; those that see everything first."""
        s = self._shape
        kv_heads = 0 if s.kv_latent else max(1, s.kv_heads // self._ranks)
        head_dim = s.kv_latent or s.head_dim
        one = Heads(self._cost.kv, -(-s.heads // self._ranks), kv_heads, head_dim, 0)
        kinds = [(self._full, one), (self._windowed, one._replace(window=s.window or 0))]
        return [(layers, heads) for layers, heads in kinds if layers]

    def _dense_operators(self) -> tuple[Times, ...]:
        """Projections, dense MLP, their all-reduces and what moves between them."""
        s, ops, form, ranks = self._shape, self._ops, self._cost.gemm, self._ranks
        q, kv = s.heads * s.head_dim // ranks, max(1, s.kv_heads // ranks) * s.head_dim
        found = [
            ops.gemm("qkv", q + 2 * kv, s.hidden, form),
            ops.gemm("o", s.hidden, q, form),
        ]
        inner = s.intermediate if not s.experts else s.shared_expert_intermediate
        inner = -(-inner // ranks)
        if inner:
            up = 2 * inner if s.gated_mlp else inner
            found.append(ops.gemm("gate and up", up, s.hidden, form))
            found.append(ops.gemm("down", s.hidden, inner, form))
        if s.experts:
            found.append(ops.gemm("router", s.experts, s.hidden, "bfloat16"))
        if ranks > 1:
            reduce = ops.collective("all-reduce", "all_reduce", ranks, s.hidden)
            found += [reduce] * (2 if self._dp == 1 else 1)
            if s.architecture in NORM_OVER_HEADS:
                found.append(ops.collective("norm", "all_reduce", ranks, NORM_ELEMENTS))
        moved = 20 * s.hidden + 6 * (q + 2 * kv) + 6 * inner
        if form != "bfloat16":
            moved += 3 * (2 * s.hidden + q + inner)
        found.append(ops.traffic("between", moved))
        return tuple(Times(s.layers, op) for op in found)

    def _expert_operators(self) -> tuple[Times, ...]:
        s, cost, ops = self._shape, self._cost, self._ops
        shape = Experts(cost.moe or cost.gemm, s.hidden, s.intermediate, s.experts_per_token,
                        s.experts, self._gpus // cost.ep, cost.ep)  # fmt: skip
        found = [ops.experts("experts", shape, self._engine.distribution)]
        if self._dp > 1:
            for name, op in (("gather", "all_gather"), ("scatter", "reduce_scatter")):
                found.append(ops.collective(name, op, self._gpus, s.hidden))
        return tuple(Times(s.layers, op) for op in found)

    def _head_gemm(self) -> Times:
        s = self._shape
        return Times(1, self._ops.gemm("head", -(-s.vocab // self._ranks), s.hidden, HEAD_FORMAT))


def _tabulate(parts: Sequence[Times]) -> Curve:
    """A curve of the sum of operators' times."""
    return Curve([(float(m), sum(n * op.seconds(m) for n, op in parts)) for m in KNOTS])


def kv_tokens(
    shape: ModelShape, hardware: HardwareSpec, tp: int, pp: int, cost: MeasuredCost,
    memory_fraction: float,
) -> int:  # fmt: skip
    """Positions whose KV fits beside weights and workspace, over all copies of attention.

    0 or less when nothing fits.
    """
    ranks = tp // cost.dp
    shards = 1 if shape.kv_latent else min(ranks, shape.kv_heads)
    values = shape.kv_latent or 2 * shape.kv_heads * shape.head_dim
    token_bytes = -(-shape.layers // pp) * values * FORMAT_BYTES[cost.kv] / shards
    free = hardware.memory_bytes * memory_fraction - WORKSPACE_BYTES
    return int((free - weight_bytes(shape, cost, tp) / pp) / token_bytes) * cost.dp


def weight_bytes(shape: ModelShape, cost: MeasuredCost, tp: int) -> int:
    """Bytes of weights on the fullest accelerator, pipeline stages not counted."""
    ranks = tp // cost.dp
    dense = shape.attention_weights / ranks
    matrices = 3 if shape.gated_mlp else 2
    expert = 0.0
    if shape.experts:
        dense += matrices * shape.hidden * shape.shared_expert_intermediate / ranks
        expert = shape.experts * matrices * shape.hidden * shape.intermediate / tp
    else:
        dense += shape.mlp_weights(active=False) / ranks
    ends = (1 if shape.tied_embeddings else 2) * shape.vocab * shape.hidden / ranks
    nbytes = shape.layers * dense * FORMAT_BYTES[cost.gemm] + ends * 2
    return math.ceil(nbytes + shape.layers * expert * FORMAT_BYTES[cost.moe or cost.gemm])


KNOTS: Final = tuple(sorted({
    *TOKENS, *range(1, 17), *(48, 80, 96, 112, 160, 192, 224, 320, 384, 768, 1536, 3072, 6144),
    17, 33, 49, 65, 97, 129, 257, 513, 769, 1025, 12288, 20480,
}))  # fmt: skip
FIXED_MAX: Final = 200_000
WORKSPACE_BYTES: Final = 4 * 10**9  # activations, graphs and collectives' buffers of an engine
