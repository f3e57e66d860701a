"""What fewer bits cost in quality: perplexity and the likeliest token, on real weights and text.

    python -m bench.bits [FOLDER] [--text FILE] [--texts 24] [--tokens 256]

Each text is cut into pieces of `--tokens` tokens, which are computed token after token as when
decoding, so that each one reads KV as it was kept; the last three quarters are judged. Weights of 8
and 4 bits and KV of one byte stand beside bfloat16 and float32: mean divergence from float32,
perplexity, and how often the likeliest token is float32's. The demo model and the text that its
tests hold out, unless told otherwise. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer

import kvasir.models
from kvasir.core.effects import Row, Step
from kvasir.core.request import Sampling
from kvasir.engine.torch_runner import TorchRunner

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0.0, ignore_eos=True)
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 weights": {"dtype": "bfloat16", "weights": "int8"},
    "int4 weights": {"dtype": "bfloat16", "weights": "int4"},
    "int8 KV": {"dtype": "bfloat16", "kv": "int8"},
    "fp8 KV": {"dtype": "bfloat16", "kv": "fp8"},
    "int8 weights and KV": {"dtype": "bfloat16", "weights": "int8", "kv": "int8"},
}


class Watched(TorchRunner):
    """Keeps the logits that it draws from."""

    logits: torch.Tensor

    def _draw(self, logits: torch.Tensor, works: Any) -> Any:
        self.logits = logits.float().clone()
        return super()._draw(logits, works)


class Silent:
    def layer_done(self, layer: int) -> None: ...
    def sampled(self, batch: Any) -> None: ...
    def cut(self) -> bool:
        return False


def logits_of(folder: Path, pieces: list[list[int]], values: dict[str, Any]) -> torch.Tensor:
    """[pieces, tokens, vocab]: all pieces side by side, one token each a step, as given."""
    size = 16
    blocks = -(-len(pieces[0]) // size)
    runner = Watched(folder, blocks_count=blocks * len(pieces), block_size=size, **values)
    for i, piece in enumerate(pieces):
        runner.open(f"r{i}", 1, piece[:1], 0, b"")
    found = []
    for at in range(len(pieces[0])):
        rows = tuple([_row(i, at, blocks) for i in range(len(pieces))])
        runner.step(Step(at + 1, rows), Silent())
        found.append(runner.logits)
        for i, piece in enumerate(pieces):  # the text goes on, whatever was drawn
            tokens = runner._attempts[f"r{i}", 1].tokens
            tokens[at + 1 :] = piece[at + 1 : at + 2]
    return torch.stack(found, dim=1)


def _row(i: int, at: int, blocks: int) -> Row:
    own = tuple(range(i * blocks, (i + 1) * blocks)) if at == 0 else ()
    return Row(f"r{i}", 1, at, 1, own, at == 0, True, at, 1 << 30, "g", GREEDY)


def pieces_of(folder: Path, text: str, count: int, tokens: int) -> list[list[int]]:
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    every = [ids[i : i + tokens] for i in range(0, len(ids) - tokens, tokens)]
    return every[:count]


def judged(got: torch.Tensor, exact: torch.Tensor, pieces: list[list[int]]) -> dict[str, float]:
    start = len(pieces[0]) // 4
    told, wanted = got.log_softmax(-1), exact.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - told)).sum(-1)[:, start:]
    same = (got.argmax(-1) == exact.argmax(-1))[:, start:].float()
    following = torch.tensor(pieces)[:, start + 1 :, None]
    loss = -told[:, start:-1].gather(-1, following).mean()
    return {
        "divergence": float(divergence.mean()), "perplexity": float(loss.exp()),
        "top1": float(same.mean()), "positions": same.numel(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    demo = Path(kvasir.models.__path__[0]) / "demo"
    parser.add_argument("folder", type=Path, nargs="?", default=demo)
    parser.add_argument("--text", type=Path, default=ROOT / "tests/data/demo/held_out.txt")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    flags = parser.parse_args()
    pieces = pieces_of(flags.folder, flags.text.read_text(), flags.texts, flags.tokens)
    exact, found = None, {}
    row = "{:<22}{:>12}{:>12}{:>16}"
    print(row.format("", "divergence", "perplexity", "likeliest same"))
    for name, values in KINDS.items():
        got = logits_of(flags.folder, pieces, values)
        exact = got if exact is None else exact
        one = found[name] = judged(got, exact, pieces)
        print(row.format(name, f"{one['divergence']:.5f}", f"{one['perplexity']:.2f}",
                         f"{one['top1']:.1%}"), flush=True)  # fmt: skip
    print(f"{found['float32']['positions']} positions of {len(pieces)} pieces")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
