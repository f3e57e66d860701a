"""Speed of guessing tokens ahead, beside the same engine without: output tokens per CPU second.

    python -m bench.speculation [--repeat 3] [--dtypes float32 bfloat16] [--tokens 6]

One prompt at a time (batches of four and eight at the end), greedy, one thread, a worker node over
the torch runner, so that the policy decides who guesses. Sides take turns in one process. Texts:

    loops      the model's own text that says the same again and again, guessed from n-grams
    right N %  guesses taken from the known text, each wrong with probability 1 - N %: what a text
               that is copied so well would bring, and what wrong guesses cost. In float32 only:
               in bfloat16 another batch shape is another text, sooner or later
    free text  nothing repeats; n-grams find little
    trained    the demo model goes on with documentation that its training held out, from places
               in the file that follow one another
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

import kvasir
from bench.engine_cases import BLOCK, CONTEXT, GREEDY, SHAPE, Heard, make_model, processor
from kvasir.core.effects import Release, Step
from kvasir.core.messages import Capacity, Dispatch, Prompt, StepDone
from kvasir.core.request import Request
from kvasir.cost.acceptance import accepted_tokens
from kvasir.engine.speculate import NgramGuesser
from kvasir.engine.steps import Guess, Guesser, Wish
from kvasir.engine.tiny import make_tiny
from kvasir.engine.torch_runner import TorchRunner
from kvasir.node.config import WorkerConfig
from kvasir.node.worker import Worker
from kvasir.policy.speculate import Drafting

GOAL: Final = 1.5
PROMPT: Final = 128
DEMO: Final = Path(kvasir.__file__).parent / "models" / "demo"
HELD_OUT: Final = Path(__file__).parents[1] / "tests" / "data" / "demo" / "held_out.txt"
SHARES: Final = (1.0, 0.9, 0.8, 0.6, 0.3, 0.0)


class Known:
    """Satisfies `engine.steps.Guesser`: what the text is known to be, with mistakes."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], share: float) -> None:
        self._texts, self._share = texts, share

    def guess(self, wishes: Sequence[Wish]) -> list[Guess]:
        found: list[Guess] = []
        for wish in wishes:
            text = self._texts[tuple(wish.attempt.tokens[:PROMPT])]
            guess = text[wish.index : wish.index + wish.count]
            right = accepted_tokens(wish.key[0], wish.index, len(guess), self._share)
            tokens = [t if i != right else (t + 1) % 1000 for i, t in enumerate(guess)]
            found.append(Guess(tokens))
        return found

    def forget(self, key: tuple[str, int]) -> None: ...


class Served(NamedTuple):
    """`outputs` by prompt. `share` of the guesses that were right; 0 without any."""

    outputs: list[list[int]]
    seconds: float
    drafted: int
    accepted: int


def serve(
    runner: TorchRunner, guesser: Guesser | None, prompts: list[list[int]], outputs: int,
    rule: Drafting | None,
) -> Served:  # fmt: skip
    """All prompts at once through a worker node."""
    runner.guesser = guesser
    spec = runner.spec
    capacity = Capacity(spec.blocks_count, BLOCK, spec.kv_token_bytes, 16, 2048, CONTEXT)
    node = Worker(WorkerConfig("w", 1, ("mixed",), "m", "m", capacity, speculate=rule))
    began, drafted, accepted, texts = time.process_time(), 0, 0, dict[str, list[int]]()
    effects: list[Any] = []
    for i, prompt in enumerate(prompts):
        name = f"r{i}"
        request = Request(name, "m", len(prompt), outputs, sampling=GREEDY)
        runner.open(name, 1, prompt, 0, b"")
        texts[name] = []
        effects += node.handle(0.0, Dispatch(1, request, 1, 0, "both", "prefill"))
        effects += node.handle(0.0, Prompt(name, 1, len(prompt)))
    while effects:
        following: list[Any] = []
        for effect in effects:
            if isinstance(effect, Step):
                heard = Heard()
                done = runner.step(effect, heard)
                for one in heard.drawn:
                    texts[one.request_id].append(one.token)
                drafted += sum(row.drafted for row in done.rows)
                accepted += sum(row.accepted for row in done.rows)
                following += node.handle(0.0, StepDone(effect.id, done.steps_done, done.rows))
            elif isinstance(effect, Release):
                runner.close(effect.request_id, effect.attempt)
        effects = following
    return Served(list(texts.values()), time.process_time() - began, drafted, accepted)


class Row(NamedTuple):
    dtype: str
    text: str
    batch: int
    plain_per_s: float
    guessing_per_s: float
    ratio: float
    share: float
    drafted: int


def prompts_of(text: str, count: int, seed: int) -> list[list[int]]:
    if text == "trained":
        return held_out(count, seed % 16)
    rng = Random(f"guesses {seed}")
    return [rng.choices(range(300, SHAPE["vocab"]), k=PROMPT) for _ in range(count)]


def held_out(count: int, seed: int) -> list[list[int]]:
    """Passages of the text that the demo model has not seen, as its token ids."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokens = tokenizer.encode(HELD_OUT.read_text(), add_special_tokens=False).ids
    at = [PROMPT * (count * (seed + 1) + i) for i in range(count)]
    return [tokens[i : i + PROMPT] for i in at]


def compare(
    runner: TorchRunner, text: str, batch: int, flags: argparse.Namespace, dtype: str
) -> Row:
    """The same prompts with guesses and without, in turns."""
    rule, rates, ratios = Drafting(flags.tokens, flags.rows_max), [], []
    drafted = accepted = 0
    for seed in range(flags.repeat):
        prompts = prompts_of(text, batch, seed)
        plain = serve(runner, None, prompts, flags.outputs, None)
        guesser: Guesser = NgramGuesser(2, 4)
        if text.startswith("right"):
            known = {tuple(p): o for p, o in zip(prompts, plain.outputs, strict=True)}
            guesser = Known(known, int(text.split()[1]) / 100)
        guessing = serve(runner, guesser, prompts, flags.outputs, rule)
        if dtype == "float32" and guessing.outputs != plain.outputs:
            sys.exit(f"{text}: the text is another one with guesses")
        count = batch * flags.outputs
        rates.append((count / plain.seconds, count / guessing.seconds))
        ratios.append(plain.seconds / guessing.seconds)
        drafted, accepted = drafted + guessing.drafted, accepted + guessing.accepted
    return Row(
        dtype, text, batch, median(a for a, _ in rates), median(b for _, b in rates),
        median(ratios), accepted / max(1, drafted), drafted,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--rows-max", type=int, default=4)
    parser.add_argument("--outputs", type=int, default=128)
    flags = parser.parse_args()
    print(f"{processor()}, one thread, CPU s, medians of {flags.repeat}; up to {flags.tokens}")
    print(f"guesses, {PROMPT} tokens in, {flags.outputs} out, prompts included in the rate")
    row = "{:<10}{:<12}{:>6}{:>12}{:>12}{:>8}{:>9}{:>10}"
    print(row.format("dtype", "text", "batch", "plain tok/s", "guessing", "ratio", "guessed",
                     "right"))  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        shape: dict[str, Any] = SHAPE | {"initializer_range": 0.02}
        loops = make_tiny(Path(name) / "loops", "qwen3", context_max=CONTEXT, **shape)
        free = make_model(Path(name) / "free")
        for dtype in flags.dtypes:
            for text, folder, batch in cases(loops, free, dtype):
                blocks = batch * -(-(PROMPT + flags.outputs) // BLOCK) + 32
                runner = TorchRunner(folder, blocks_count=blocks, block_size=BLOCK, dtype=dtype)
                serve(runner, None, prompts_of(text, 1, 99), 4, None)  # warms
                rows.append(one := compare(runner, text, batch, flags, dtype))
                print(row.format(one.dtype, one.text, one.batch, f"{one.plain_per_s:.1f}",
                                 f"{one.guessing_per_s:.1f}", f"{one.ratio:.2f}", one.drafted,
                                 f"{one.share:.2f}"), flush=True)  # fmt: skip
    print(f"goal: at least {GOAL} at batch 1 where a text copies; free text loses what it loses")
    print(json.dumps([one._asdict() for one in rows]))


def cases(loops: Path, free: Path, dtype: str) -> list[tuple[str, Path, int]]:
    found = [("loops", loops, batch) for batch in (1, 4, 8)] + [("free text", free, 1)]
    found.append(("trained", DEMO, 1))
    if dtype == "float32":
        found += [(f"right {int(share * 100)} %", free, 1) for share in SHARES]
        found.append(("right 0 %", free, 4))
    return found


if __name__ == "__main__":
    main()
