"""Trains the demo model. Knows tensors, optimisers and a clock; not where text comes from.

Muon for the matrices of the layers (Jordan et al. 2024; torch.optim.Muon), AdamW for the embedding
and the norms, a constant rate that falls linearly to zero at the end (WSD), bf16 where it pays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvasir.engine.tiny import END_OF_TEXT, TURN_END, TURN_START

CONTEXT_MAX: Final = 1024
STEP_TOKENS: Final = 4096
WARM_UP_STEPS: Final = 40
DECAY_FROM: Final = 0.55  # of the whole; until then rates are constant
CHATS_SHARE: Final = (0.5, 0.85)  # of the rows, before and while rates fall
# Lengths of rows, one for each step: attention over long ones is dear, and can be learned late.
ROW_TOKENS: Final = ((256,), (256,) * 6 + (512,) * 2 + (CONTEXT_MAX,) * 2)
MUON_RATE, ADAM_RATE = 6e-3, 4e-3
WEIGHT_DECAY: Final = 0.05
CHECKPOINT_EVERY_S: Final = 120.0
REPORT_EVERY: Final = 50
SHAPE: Final[Mapping[str, Any]] = {
    "hidden_size": 256, "num_hidden_layers": 5, "intermediate_size": 384,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": CONTEXT_MAX, "tie_word_embeddings": True,
    "bos_token_id": None, "pad_token_id": None, "use_cache": True,
}  # fmt: skip

Ids = NDArray[np.int64]


class Corpus(NamedTuple):
    """Token streams, and where paragraphs and chats begin in them."""

    prose: Ids
    prose_starts: Ids
    chats: Ids
    chat_starts: Ids


class Held(NamedTuple):
    """`loss` in nats a token; `bits` a byte of text."""

    loss: float
    bits: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def load_corpus(folder: Path, tokenizer: Tokenizer) -> Corpus:
    """Token ids of both training files. A row of prose begins with a document or a heading, a row
    of chats with a chat."""
    prose = _ids(tokenizer, (folder / "prose.txt").read_text("utf-8"), END_OF_TEXT)
    chats = _ids(tokenizer, (folder / "chats.txt").read_text("utf-8"), f"{TURN_END}\n")
    end, turn = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_START)
    hashes = [i for name, i in tokenizer.get_vocab().items() if name in ("#", "##", "###")]
    prose_starts = np.flatnonzero(np.isin(prose, hashes) | (np.roll(prose, 1) == end))
    first = np.roll(chats, -1)
    asks = {tokenizer.encode(role).ids[0] for role in ("user", "system")}
    starts = np.flatnonzero((chats == turn) & np.isin(first, sorted(asks)))
    return Corpus(prose, prose_starts, chats, starts)


def _ids(tokenizer: Tokenizer, text: str, end: str) -> Ids:
    parts = [part + end for part in text.split(end) if part.strip()]
    return np.concatenate([np.asarray(e.ids) for e in tokenizer.encode_batch(parts)])


def batch(corpus: Corpus, seed: int, step: int, *, late: bool) -> torch.Tensor:
    """Rows [rows, length] of one step: a function of the arguments, so a resumed run goes on."""
    rng = np.random.default_rng((seed, step))
    length = int(rng.choice(ROW_TOKENS[late]))
    rows = STEP_TOKENS // length
    chats = int(rng.binomial(rows, CHATS_SHARE[late]))
    drawn = [_chat_row(corpus, rng, length) for _ in range(chats)]
    drawn += [_cut(corpus.prose, corpus.prose_starts, rng, length) for _ in range(rows - chats)]
    return torch.from_numpy(np.stack(drawn))


def _cut(ids: Ids, starts: Ids, rng: np.random.Generator, length: int) -> Ids:
    whole = int(np.searchsorted(starts, len(ids) - length, side="right"))  # the last do not fit
    at = int(starts[rng.integers(whole)])
    return ids[at : at + length]


def _chat_row(corpus: Corpus, rng: np.random.Generator, length: int) -> Ids:
    """Chats from here and there, the last one cut."""
    parts, size = [], 0
    while size < length:
        which = int(rng.integers(len(corpus.chat_starts) - 1))
        part = corpus.chats[corpus.chat_starts[which] : corpus.chat_starts[which + 1]]
        parts.append(part)
        size += len(part)
    return np.concatenate(parts)[:length]


def new_model(vocab: int, eos: int, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=vocab, eos_token_id=eos, **SHAPE)
    return Qwen3ForCausalLM(config)


def loss_of(model: Qwen3ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats a token of predicting each token of `rows` [rows, length] but the first."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))


@torch.no_grad()
def held_out(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, text: str, *, length: int = 512, rows: int = 0
) -> Held:
    """Loss on `text`, cut into rows that know nothing of each other; `rows` 0 takes all of it."""
    ids = torch.tensor(tokenizer.encode_batch([text])[0].ids)
    whole = ids[: len(ids) // length * length].view(-1, length)
    whole = whole[:rows] if rows else whole
    device = next(model.parameters()).device
    loss = sum(float(loss_of(model, part.to(device))) * len(part) for part in whole.split(8))
    nats = loss / len(whole)
    text_bytes = len(tokenizer.decode(whole.flatten().tolist(), skip_special_tokens=False).encode())
    return Held(nats, nats / math.log(2) * whole.numel() / text_bytes)


class Training:
    """Model, optimisers and how far they are. `save` and `load` keep all of it."""

    def __init__(self, model: Qwen3ForCausalLM, *, steps: int, minutes: float) -> None:
        self.model, self.steps, self.seconds = model, steps, minutes * 60
        self.step, self.spent_s = 0, 0.0
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        self._optimisers = [
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]  # fmt: skip
        self._rates = [MUON_RATE, ADAM_RATE]

    @property
    def progress(self) -> float:
        """0 to 1: of the steps if their number was given, else of the time."""
        return self.step / self.steps if self.steps else self.spent_s / self.seconds

    def take(self, corpus: Corpus, seed: int) -> float:
        """One step; its loss."""
        decay = min(1.0, (1 - self.progress) / (1 - DECAY_FROM))
        scale = min(decay, (self.step + 1) / WARM_UP_STEPS)
        rows = batch(corpus, seed, self.step, late=decay < 1).to(self.model.device)
        loss = loss_of(self.model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = max(0.0, rate * scale)
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(), "step": self.step, "spent_s": self.spent_s,
            "optimisers": [o.state_dict() for o in self._optimisers],
        }  # fmt: skip
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)  # a stop in between loses nothing

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.model.device)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.spent_s = state["step"], state["spent_s"]

    def run(self, corpus: Corpus, seed: int, checkpoint: Path) -> Iterator[float]:
        """Steps to the end, each giving the mean loss of the last `REPORT_EVERY` ones when due."""
        started, saved, losses = time.monotonic() - self.spent_s, self.spent_s, []
        while self.progress < 1:
            losses.append(self.take(corpus, seed))
            self.spent_s = time.monotonic() - started
            if self.spent_s - saved > CHECKPOINT_EVERY_S:
                self.save(checkpoint)
                saved = self.spent_s
            if len(losses) == REPORT_EVERY:
                yield sum(losses) / len(losses)
                losses.clear()
        self.save(checkpoint)
