"""Trains the model that ships with the package: `python tools/train_demo_model.py --out FOLDER`.

Makes the corpus, a tokenizer of its own and the model, prints held-out perplexity on the way, and
writes the folder. A run that was stopped goes on where it was. docs/demo-model.md says more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from demo.corpus import train_tokenizer, write_corpus
from demo.export import write_folder
from demo.training import Corpus, Training, held_out, load_corpus, new_model
from tokenizers import Tokenizer

from kvasir.engine.tiny import TURN_END

ROOT: Final = Path(__file__).parents[1]
HELD_ROWS: Final = 16  # of the checks on the way


def main() -> None:
    args = _arguments()
    corpus, scratch = args.scratch / "corpus", args.scratch
    tokenizer_path = scratch / "tokenizer.json"
    if not tokenizer_path.is_file():
        write_corpus(corpus, scratch, args.seed, offline=args.offline)
        train_tokenizer(corpus, args.vocab).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    data = load_corpus(corpus, tokenizer)
    training = _trained(args, tokenizer, data)
    write_folder(
        args.out, training.model.eval().to("cpu"), tokenizer, corpus, data,
        steps=training.step, minutes=training.spent_s / 60,
    )  # fmt: skip


def _trained(args: argparse.Namespace, tokenizer: Tokenizer, data: Corpus) -> Training:
    model = new_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(TURN_END), args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    training = Training(model.to(args.device), steps=args.steps, minutes=args.minutes)
    checkpoint = args.scratch / "checkpoint.pt"
    if checkpoint.is_file():
        training.load(checkpoint)
    print(f"{len(data.prose):,} tokens of prose, {len(data.chats):,} of chats", flush=True)
    held = (args.scratch / "corpus" / "prose.held.txt").read_text("utf-8")
    model.train()
    for loss in training.run(data, args.seed, checkpoint):
        found = held_out(model, tokenizer, held, rows=HELD_ROWS)
        print(
            f"{training.progress:6.1%}  step {training.step:5}  {training.spent_s:5.0f} s  loss "
            f"{loss:.3f}  held out {found.loss:.3f}, {found.bits:.3f} bits a byte", flush=True,
        )  # fmt: skip
    return training


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=60, help="training time (default: 60)")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many, not by time")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "demo",
                        help="corpus and checkpoint; empty it to begin again")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offline", action="store_true", help="docstrings alone, no apt")
    return parser.parse_args()


if __name__ == "__main__":
    main()
