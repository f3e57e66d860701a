"""Tiny models with random weights, for tests, demos and tools. Knows shapes; must not know runners.

Their text is nonsense, but everything about them is real: architecture, files, tokenizer. The same
arguments give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvasir.engine.loader import quiet

Architecture = Literal["qwen3", "llama"]

BYTES: Final = 256
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS: Final = (END_OF_TEXT, TURN_START, TURN_END)  # ids from 256 on
VOCAB: Final = BYTES + len(SPECIALS)
EOS_TOKEN_ID: Final = BYTES + SPECIALS.index(TURN_END)

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny(
    folder: str | Path,
    architecture: Architecture = "qwen3",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    vocab: int = VOCAB,
    context_max: int = 4096,
    tied: bool = False,
    initializer_range: float = 0.12,
    seed: int = 0,
    shard_bytes_max: int | None = None,
) -> Path:
    """Write a whole model folder (config, weights in float32, tokenizer) and return it.

    Greedy text does not settle into one repeated token, thanks to `initializer_range` 0.12 (with
    transformers' 0.02 it does) and an output head of its own (`tied` prefers the last token again).
    With `shard_bytes_max` the weights are split over several files with an index.
    """
    folder = Path(folder)
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": context_max,
        "tie_word_embeddings": tied,
        "initializer_range": initializer_range,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": None,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config.eos_token_id = EOS_TOKEN_ID
    shards = {} if shard_bytes_max is None else {"max_shard_size": shard_bytes_max}
    with quiet():
        model.save_pretrained(folder, **shards)
    write_tokenizer(folder, context_max)
    return folder


def write_tokenizer(folder: Path, context_max: int) -> None:
    """tokenizer.json and tokenizer_config.json: one token per byte, its id the byte; ChatML."""
    tokenizer = Tokenizer(BPE(vocab=byte_names(), merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteDecoder()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, context_max)


def write_tokenizer_config(folder: Path, context_max: int) -> None:
    """tokenizer_config.json of a tokenizer with `SPECIALS`: ChatML, a turn's end ends the text."""
    config = {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": context_max,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def byte_names() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others, in order, for U+0100 and following.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(BYTES) if byte not in plain]
    return {chr(b if b in plain else 0x100 + others.index(b)): b for b in range(BYTES)}
