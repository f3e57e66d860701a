"""What coding KV costs in quality: bytes, perplexity and top-1 agreement, on a model's real KV.

Each text is cut: its context is prefilled once, its KV goes through a codec as bfloat16, and the
continuation is predicted in one pass over what came back. Compared with the same pass over the
bfloat16 KV itself. Beside the codec stands uniform quantisation of 2 to 8 bits without entropy
coding, in groups of 64 channels (a lowest value and a step each) and by whole tokens (one scale).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from kvasir.transfer.codec import LEVELLED, Chunk, Coding, Kernels, Tensor, decode, encode, groups
from kvasir.transfer.codec.floats import bytes_of, floats_of
from kvasir.transfer.codec.levels import LEVELS

DTYPE = "bfloat16"
AGREEMENT_GOAL = 0.98
RATIO_GOAL = 3.5

Restore = Callable[[Chunk], tuple[Chunk, float]]  # what comes back, and the bytes that it took


class Text(NamedTuple):
    """`context` is prefilled; `wanted` [n] follows the first n of `given` [n]."""

    context: torch.Tensor
    given: torch.Tensor
    wanted: torch.Tensor


class Quality(NamedTuple):
    """`bits` of a value; `agreement`: share of positions whose most likely token is the same;
    `right`: whose most likely token is the text's own; `off`: root mean square error of KV over
    that of KV around its channels' means."""

    name: str
    bits: float
    perplexity: float
    agreement: float
    right: float
    off: float

    @property
    def ratio(self) -> float:
        return 16 / self.bits


class Heard(NamedTuple):
    """Of one continuation: nats of each wanted token, and the most likely one."""

    nats: torch.Tensor
    best: torch.Tensor


def texts_of(tokenizer: Tokenizer, text: str, count: int, context: int, ahead: int) -> list[Text]:
    """Cut one after the other; each begins where the last one ended."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    size = context + ahead
    found = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)][:count]
    return [Text(row[:context], row[context - 1 : -1], row[context:]) for row in found]


@torch.inference_mode()
def measure(folder: Path, texts: Sequence[Text], kernels: Kernels) -> list[Quality]:
    """One line for each way, the first being KV as it is."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ways = dict(_ways(kernels))
    sums = {name: _Sum() for name in ways}
    for text in texts:
        chunk = _kv(model, text)
        plain = _hear(model, text, chunk)
        for name, restore in ways.items():
            back, size = restore(chunk)
            sums[name].add(chunk, back, size, plain, _hear(model, text, back), text)
    return [total.quality(name) for name, total in sums.items()]


class _Sum:
    def __init__(self) -> None:
        self.bytes = self.plain_bytes = 0.0
        self.nats = 0.0
        self.same = self.right = self.tokens = 0
        self.error = self.spread = 0.0

    def add(
        self, chunk: Chunk, back: Chunk, size: float, plain: Heard, heard: Heard, text: Text
    ) -> None:
        self.bytes += size
        self.plain_bytes += chunk.bytes
        self.nats += float(heard.nats.sum())
        self.same += int((heard.best == plain.best).sum())
        self.right += int((heard.best == text.wanted).sum())
        self.tokens += len(heard.best)
        for mine, other in zip(_floats(chunk), _floats(back), strict=True):
            self.error += float(((mine - other) ** 2).sum())
            self.spread += float(((mine - mine.mean(axis=0)) ** 2).sum())

    def quality(self, name: str) -> Quality:
        return Quality(
            name, 16 * self.bytes / self.plain_bytes, math.exp(self.nats / self.tokens),
            self.same / self.tokens, self.right / self.tokens,
            math.sqrt(self.error / self.spread),
        )  # fmt: skip


def _ways(kernels: Kernels) -> Iterator[tuple[str, Restore]]:
    yield "bfloat16", lambda chunk: (chunk, chunk.bytes)
    codings = [Coding("lossless"), Coding("int8"), Coding("int4")]
    codings += [Coding(form, level) for form in LEVELLED for level in LEVELS]
    for coding in codings:
        yield str(coding), lambda chunk, c=coding: _through(chunk, c, kernels)
    for bits in range(2, 9):
        yield f"groups-{bits}b", lambda chunk, b=bits: _uniform(chunk, b, _groups)
        yield f"tokens-{bits}b", lambda chunk, b=bits: _uniform(chunk, b, _tokens)


def _through(chunk: Chunk, coding: Coding, kernels: Kernels) -> tuple[Chunk, float]:
    data = encode(chunk, coding, kernels)
    return decode(data, kernels), len(data)


def _uniform(
    chunk: Chunk, bits: int, way: Callable[[np.ndarray, int], tuple[np.ndarray, float]]
) -> tuple[Chunk, float]:
    tensors, size = [], 0.0
    for tensor, values in zip(chunk.tensors, _floats(chunk), strict=True):
        back, bits_each = way(values, bits)
        tensors.append(tensor._replace(data=bytes_of(back.astype(np.float32), DTYPE)))
        size += values.size * bits_each / 8
    return chunk._replace(tensors=tensors), size


def _groups(values: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    return groups.restore(groups.quantise(values, bits)), groups.wire_bits(values.shape[1], bits)


def _tokens(values: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    limit = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-30) / limit
    return np.rint(values / scale) * scale, bits + 16 / values.shape[1]


def _floats(chunk: Chunk) -> list[np.ndarray]:
    return [floats_of(tensor.data, chunk.dtype) for tensor in chunk.tensors]


# --- the model ---------------------------------------------------------------------------------


def _kv(model: torch.nn.Module, text: Text) -> Chunk:
    """KV of all of the context but its last token, which is the first one that is given."""
    cache = DynamicCache()
    model(input_ids=text.context[None, :-1], past_key_values=cache, use_cache=True)
    tensors = [
        Tensor(at, plane, _plane(kept))
        for at, layer in enumerate(cache.layers)
        for plane, kept in enumerate((layer.keys, layer.values))
    ]
    return Chunk(DTYPE, len(cache.layers), tensors)


def _plane(kept: torch.Tensor) -> np.ndarray:
    """[1, heads, tokens, dim] to uint8 [tokens, bytes]"""
    rows = kept[0].transpose(0, 1).flatten(1).to(torch.bfloat16).contiguous()
    return rows.view(torch.uint8).numpy()


def _hear(model: torch.nn.Module, text: Text, chunk: Chunk) -> Heard:
    config = model.config
    cache = DynamicCache()
    kept = [torch.from_numpy(values.copy()) for values in _floats(chunk)]
    for layer in range(chunk.layers):
        key, value = (
            rows.view(len(rows), config.num_key_value_heads, -1).transpose(0, 1)[None]
            for rows in kept[2 * layer : 2 * layer + 2]
        )
        cache.update(key, value, layer)
    logits = model(input_ids=text.given[None], past_key_values=cache, use_cache=True).logits[0]
    nats = torch.nn.functional.cross_entropy(logits.float(), text.wanted, reduction="none")
    return Heard(nats, logits.argmax(dim=-1))


# --- what is printed ---------------------------------------------------------------------------


class Beside(NamedTuple):
    """A way of the codec and the smallest uniform quantisation that agrees as often."""

    name: str
    bits: float
    agreement: float
    uniform: str
    ratio: float  # its bytes over the codec's


def beside_uniform(found: Sequence[Quality], kind: str) -> list[Beside]:
    """`kind`: groups or tokens. Ways that no uniform one of 8 bits or fewer equals are left out."""
    uniform = sorted((q for q in found if q.name.startswith(kind)), key=lambda q: q.bits)
    rows = []
    for way in found:
        equals = [u for u in uniform if u.agreement >= way.agreement]
        if way.name.startswith("cachegen") and equals:
            best = equals[0]
            rows.append(Beside(way.name, way.bits, way.agreement, best.name, best.bits / way.bits))
    return rows


def table(found: Sequence[Quality]) -> Iterator[str]:
    row = "{:<18}{:>8}{:>9}{:>12}{:>12}{:>9}{:>10}"
    yield row.format("", "bits", "smaller", "perplexity", "agreement", "right", "rms off")
    for q in found:
        yield row.format(
            q.name, f"{q.bits:.2f}", f"{q.ratio:.2f}", f"{q.perplexity:.3f}",
            f"{q.agreement:.2%}", f"{q.right:.2%}", f"{q.off:.3f}",
        )  # fmt: skip
