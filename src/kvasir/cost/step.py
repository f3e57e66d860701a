"""How long one iteration takes: roofline from data sheets, or constants fitted to measurements.

Knows shapes and hardware. Must not know requests, queues, policy or the network.

A row (new_tokens, context_before) computes new tokens after context_before ones whose KV stands.
The *context* of a decode row is the KV positions that it reads in this iteration, its own new one
included: context_before + 1. A row of one new token is a decode row, whatever it came from.

For b decode rows and nothing else the time is linear in K, the sum of their contexts:

    iteration(b, K)  = base(b) + per_context * K
    elapsed(b, K, k) = k * base(b) + per_context * (k * K + b * k (k - 1) / 2)

since each iteration adds one position per row. So k iterations cost one evaluation, and the inverse
is a quadratic.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kvasir.core.errors import ConfigError
from kvasir.core.specs.deployment import FittedCost
from kvasir.core.specs.hardware import HardwareSpec
from kvasir.core.specs.model import DTYPE_BYTES, ModelShape

Row = tuple[int, int]  # new tokens, context before them

PREFILLS_MAX = 4096  # remembered at once
HOP_S = 10e-6  # latency of one all-reduce or one stage-to-stage send
# Latent attention computes prefill with keys of 192 and values of 128 per head: as many flops as
# equal ones of 160. DeepSeek-V2 (arXiv 2405.04434, sections 2.1 and 3.1); V3 and Kimi-K2 alike.
LATENT_PREFILL_HEAD_DIM = 160


class StepCost(msgspec.Struct, frozen=True, gc=False):
    """What one iteration costs. `joules` None: not known."""

    seconds: float
    joules: float | None = None


class DecodeLine(NamedTuple):
    """Seconds of a pure-decode iteration: base_s + per_context_s * total context."""

    base_s: float
    per_context_s: float


class StepModel:
    """Seconds of an iteration, and the closed forms that follow from a line per batch size."""

    def __init__(self) -> None:
        self._lines: dict[int, DecodeLine] = {}
        self._prefills: dict[tuple[int, int, int], float] = {}

    def batch(self, rows: Sequence[Row]) -> float:
        """Seconds of one iteration over `rows`, at least one, prefill and decode mixed."""
        raise NotImplementedError

    def _line(self, batch_size: int) -> DecodeLine:
        raise NotImplementedError

    def cost(self, rows: Sequence[Row]) -> StepCost:
        """`batch` with its energy, where that is known."""
        return StepCost(self.batch(rows))

    def decode_line(self, batch_size: int) -> DecodeLine:
        """The line of `batch_size` >= 1 decode rows; `batch` of such rows is on it exactly."""
        line = self._lines.get(batch_size)
        if line is None:
            assert batch_size > 0, f"a batch of {batch_size} rows"
            line = self._lines[batch_size] = self._line(batch_size)
        return line

    def iteration_seconds(self, batch_size: int, context: int, j: int = 0) -> float:
        """Seconds of the j-th iteration (from 0) when the first has total context `context`."""
        line = self.decode_line(batch_size)
        return line.base_s + line.per_context_s * (context + batch_size * j)

    def elapsed(self, batch_size: int, context: int, k: int) -> float:
        """Seconds of k iterations, the first with total context `context`. Grows with k."""
        line = self.decode_line(batch_size)
        read = k * context + batch_size * (k * (k - 1) // 2)
        return k * line.base_s + line.per_context_s * read

    def steps_within(self, batch_size: int, context: int, seconds: float) -> int:
        """The k with elapsed(k) <= seconds < elapsed(k + 1), in the very floats of `elapsed`.

        `seconds` is finite; below 0 none are done.
        """
        if seconds < 0:
            return 0
        line = self.decode_line(batch_size)
        square = line.per_context_s * batch_size / 2
        linear = line.base_s + line.per_context_s * (context - batch_size / 2)
        k = int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds)))
        while k and self.elapsed(batch_size, context, k) > seconds:
            k -= 1
        while self.elapsed(batch_size, context, k + 1) <= seconds:
            k += 1
        return k

    def prefill_seconds(self, tokens: int, cached: int, batch_tokens_max: int) -> float:
        """Seconds to prefill `tokens` whose first `cached` stand already, alone, in chunks.

        Sum over chunks of at most `batch_tokens_max`; 0 when nothing is left to compute. Remembered
        for a while: a router asks it of every worker, and most have nothing cached.
        """
        asked = (tokens, cached, batch_tokens_max)
        seconds = self._prefills.get(asked)
        if seconds is None:
            seconds = 0.0
            for start in range(cached, tokens, batch_tokens_max):
                seconds += self.batch(((min(batch_tokens_max, tokens - start), start),))
            if len(self._prefills) >= PREFILLS_MAX:
                self._prefills.clear()
            self._prefills[asked] = seconds
        return seconds


class Fitted(StepModel):
    """Step time from measured constants: the formula stands at `FittedCost`.

    A prompt's `new * context` is the number of pairs of a new token and a position it attends to.
    Raises ConfigError when a decode step would take no time.
    """

    def __init__(self, fitted: FittedCost) -> None:
        super().__init__()
        self._overhead_s = fitted.overhead_s
        self._per_token_s = fitted.per_token_s
        self._per_attention_s = fitted.per_attention_s
        self._per_context_s = fitted.per_context_s
        self._per_row_s = fitted.per_row_s
        self._per_prompt_context_s = fitted.per_prompt_context_s
        self._knots = [tokens for tokens, _ in fitted.curve]
        self._curve = [seconds for _, seconds in fitted.curve]
        if self._line(1).base_s <= 0:
            raise ConfigError(
                "a fitted cost has overhead_s 0 and per_token_s 0: steps would take no time",
                next_step="give at least one of them, or a curve",
            )

    def batch(self, rows: Sequence[Row]) -> float:
        """As `StepModel.batch`."""
        work = work_of(rows)
        return (
            self._tokens_s(work.new_tokens)
            + self._per_row_s * len(rows)
            + self._per_context_s * work.decode_context
            + self._per_attention_s * work.prefill_pairs
            + self._per_prompt_context_s * work.prefill_context
        )

    def _line(self, batch_size: int) -> DecodeLine:
        base_s = self._tokens_s(batch_size) + self._per_row_s * batch_size
        return DecodeLine(base_s, self._per_context_s)

    def _tokens_s(self, tokens: int) -> float:
        seconds = self._overhead_s + self._per_token_s * tokens
        if not self._knots:
            return seconds
        at = min(bisect_left(self._knots, tokens), len(self._knots) - 1)
        if at == 0:
            return seconds + self._curve[0]
        low, high = self._knots[at - 1], self._knots[at]
        slope = (self._curve[at] - self._curve[at - 1]) / (high - low)
        return seconds + self._curve[at - 1] + slope * (tokens - low)


class Roofline(StepModel):
    """Step time from a data sheet: each operator takes the longer of its flops and its bytes.

    Operators: attention projections, MLP, output head (one position a row), prefill attention,
    decode attention. Tensor parallelism divides flops and bytes by `tp`, except KV, of which each
    accelerator holds at least one head (MLA's latent whole), and adds two all-reduces a layer over
    NVLink. Pipeline stages run one after another for a batch, with one hop between two.

    Left out: sliding windows (their layers cost as full attention), MLA's own projection sizes and
    leading dense layers (all are taken as alike), writes of activations and KV, uneven expert use
    (tokens pick experts at random), links slower than NVLink inside an instance.
    """

    def __init__(self, shape: ModelShape, hardware: HardwareSpec, tp: int, pp: int) -> None:
        super().__init__()
        flop_s = 1.0 / (hardware.flops * hardware.flops_efficiency * tp)
        byte_s = 1.0 / (hardware.memory_bandwidth * hardware.bandwidth_efficiency * tp)
        width = DTYPE_BYTES[shape.dtype]
        layers, hidden = shape.layers, shape.hidden
        self._projection_token_s = layers * 2 * shape.attention_weights * flop_s
        self._projection_read_s = layers * shape.attention_weights * width * byte_s
        self._head_row_s = 2 * shape.vocab * hidden * flop_s
        self._head_read_s = shape.vocab * hidden * width * byte_s
        self._mlp_token_s = layers * 2 * shape.mlp_weights(active=True) * flop_s
        expert, always = _mlp_parts(shape)
        self._expert_read_s = layers * expert * width * byte_s
        self._mlp_read_s = layers * always * width * byte_s
        self._experts = shape.experts
        self._untouched = 1 - shape.experts_per_token / shape.experts if shape.experts else 0.0

        kv_byte_s = byte_s * tp / kv_shards(shape, tp)
        self._context_read_s = shape.kv_token_bytes * kv_byte_s
        decode_dim = shape.kv_latent or shape.head_dim
        prefill_dim = LATENT_PREFILL_HEAD_DIM if shape.kv_latent else shape.head_dim
        pair_s = 4 * layers * shape.heads * flop_s  # q.k and p.v, multiply and add, per dimension
        self._pair_s = pair_s * prefill_dim
        self._context_s = max(pair_s * decode_dim, self._context_read_s)

        hop_token_s = hidden * width / hardware.nvlink_bandwidth
        reduces, hops = (2 * layers if tp > 1 else 0), pp - 1
        self._link_token_s = (reduces * 2 * (tp - 1) / tp + hops) * hop_token_s
        self._fixed_s = (reduces + hops) * HOP_S + hardware.step_overhead_s

    def batch(self, rows: Sequence[Row]) -> float:
        """As `StepModel.batch`."""
        work = work_of(rows)
        base_s = self._linear_s(work.new_tokens, len(rows)) + self._context_s * work.decode_context
        attention_s = self._pair_s * work.prefill_pairs
        read_s = self._context_read_s * work.prefill_context
        return base_s + (attention_s if attention_s > read_s else read_s)

    def _line(self, batch_size: int) -> DecodeLine:
        return DecodeLine(self._linear_s(batch_size, batch_size), self._context_s)

    def _linear_s(self, tokens: int, rows: int) -> float:
        """All that does not depend on context."""
        mlp_read_s = self._mlp_read_s
        if self._experts:
            touched = self._experts * (1 - self._untouched**tokens)
            mlp_read_s += self._expert_read_s * touched
        return (
            max(self._projection_token_s * tokens, self._projection_read_s)
            + max(self._mlp_token_s * tokens, mlp_read_s)
            + max(self._head_row_s * rows, self._head_read_s)
            + self._link_token_s * tokens
            + self._fixed_s
        )


class Work(NamedTuple):
    """What a batch amounts to.

    `decode_context`: positions read by decode rows. `prefill_context`: positions that the other
    rows hold afterwards. `prefill_pairs`: pairs of a new token and a position it attends to there.
    """

    new_tokens: int
    decode_context: int
    prefill_context: int
    prefill_pairs: int


def work_of(rows: Sequence[Row]) -> Work:
    """Sums over the rows of a batch. Exact: causal attention sums 1 + ... + n over n new tokens."""
    assert rows, "a batch without rows"
    new_tokens = decode_context = prefill_context = pairs = 0
    for new, before in rows:
        new_tokens += new
        if new == 1:
            decode_context += before + 1
        else:
            prefill_context += before + new
            pairs += new * before + new * (new + 1) // 2
    return Work(new_tokens, decode_context, prefill_context, pairs)


def _mlp_parts(shape: ModelShape) -> tuple[int, int]:
    """Parameters of one layer's MLP: one expert's, and those read whatever the tokens are."""
    everything = shape.mlp_weights(active=False)
    if not shape.experts:
        return 0, everything
    matrices = 3 if shape.gated_mlp else 2
    expert = matrices * shape.hidden * shape.intermediate
    return expert, everything - shape.experts * expert


# --- memory ---------------------------------------------------------------------------------------


def kv_shards(shape: ModelShape, tp: int) -> int:
    """Among how many of `tp` accelerators KV is divided; beyond that it is copied."""
    return 1 if shape.kv_latent else min(tp, shape.kv_heads)


def kv_blocks(
    shape: ModelShape,
    hardware: HardwareSpec,
    tp: int,
    pp: int,
    block_size: int,
    memory_fraction: float,
) -> int:
    """Blocks of `block_size` tokens that fit beside the weights in `memory_fraction` of memory.

    Counted on the accelerator of the stage with most layers; windows are ignored. Raises
    ConfigError when the weights leave no room for a block.
    """
    layers = -(-shape.layers // pp)
    block_bytes = block_size * (shape.kv_token_bytes // shape.layers) * layers
    block_bytes = -(-block_bytes // kv_shards(shape, tp))
    weight_bytes = -(-shape.weight_bytes // (tp * pp))
    usable = int(hardware.memory_bytes * memory_fraction)
    blocks = (usable - weight_bytes) // block_bytes
    if blocks < 1:
        raise ConfigError(
            f"weights take {weight_bytes / 1e9:.1f} GB of each accelerator and one KV block "
            f"{block_bytes / 1e9:.3f} GB; {usable / 1e9:.1f} GB of {hardware.name} are usable",
            where=f"tp {tp}, pp {pp}, memory_fraction {memory_fraction}",
            next_step="raise tp or pp, or take hardware with more memory",
        )
    return blocks
