"""Writes the model's folder: weights, tokenizer, card, NOTICE. Knows files; does not train."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from kvasir.engine.tiny import TURN_END, TURN_START, write_tokenizer_config

from .training import CONTEXT_MAX, Corpus, Held, held_out

HERE: Final = Path(__file__).parent
BYTES_MAX: Final = 8_000_000
ANSWER_TOKENS_MAX: Final = 160
TEMPERATURE: Final = 0.7
SAMPLES: Final = (
    "Hello!", "Who are you?", "What is Python?", "What is a decorator?", "What does len() do?",
    "How do I open a file?", "What is the json module?", "What is the difference between a list "
    "and a tuple?", "How do I copy a file?", "What does heapq.heappush do?",
)  # fmt: skip


def write_folder(
    out: Path, model: Qwen3ForCausalLM, tokenizer: Tokenizer, corpus: Path, data: Corpus,
    *, steps: int, minutes: float,
) -> None:  # fmt: skip
    """All files of the folder; weights in bf16. Prints the figures that the card holds."""
    out.mkdir(parents=True, exist_ok=True)
    eos = tokenizer.token_to_id(TURN_END)
    model.generation_config.eos_token_id = eos
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    write_tokenizer_config(out, CONTEXT_MAX)
    shutil.copyfile(HERE / "NOTICE", out / "NOTICE")
    card = Template((HERE / "card.md").read_text("utf-8"))
    figures = _figures(model.float(), tokenizer, corpus, data)
    figures |= {"steps": f"{steps:,}", "minutes": f"{minutes:.0f}", "eos": str(eos)}
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    figures["samples"] = "\n\n".join(_samples(model, tokenizer))
    (out / "README.md").write_text(card.substitute(figures), encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{size:,} bytes in {out}")
    assert size <= BYTES_MAX, f"{size} bytes, limit {BYTES_MAX}"


def _figures(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, corpus: Path, data: Corpus
) -> dict[str, str]:
    texts = {name: (corpus / f"{name}.held.txt").read_text("utf-8") for name in ("prose", "chats")}
    found = {name: held_out(model, tokenizer, text) for name, text in texts.items()}
    guessed = _unigram(data, tokenizer, texts["prose"])
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "prose_tokens": f"{len(data.prose):,}", "chat_tokens": f"{len(data.chats):,}",
        "prose_perplexity": f"{found['prose'].perplexity:.1f}",
        "prose_bits": f"{found['prose'].bits:.2f}",
        "chat_perplexity": f"{found['chats'].perplexity:.1f}",
        "chat_bits": f"{found['chats'].bits:.2f}",
        "unigram_perplexity": f"{guessed.perplexity:.0f}", "unigram_bits": f"{guessed.bits:.2f}",
    }  # fmt: skip


def _unigram(data: Corpus, tokenizer: Tokenizer, text: str) -> Held:
    """What token frequencies alone give: the figure that any model must beat by far."""
    counts = np.bincount(data.prose, minlength=tokenizer.get_vocab_size()) + 1.0
    ids = tokenizer.encode_batch([text])[0].ids
    nats = float(-np.log(counts / counts.sum())[ids].mean())
    return Held(nats, nats / math.log(2) * len(ids) / len(text.encode()))


def _samples(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> Iterator[str]:
    for question in SAMPLES:
        parts = [f"**{question}**"]
        for temperature in (0, TEMPERATURE):
            answer = _answered(model, tokenizer, question, temperature)
            parts += [f"*temperature {temperature}*", _quoted(answer)]
        yield "\n\n".join(parts)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


@torch.no_grad()
def _answered(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, question: str, temperature: float
) -> str:
    torch.manual_seed(0)
    text = f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
    prompt = torch.tensor([tokenizer.encode(text).ids])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER_TOKENS_MAX,
        pad_token_id=model.generation_config.eos_token_id, **({"do_sample": False} | how),
    )  # fmt: skip
    return tokenizer.decode(found[0, prompt.shape[1] :].tolist())
