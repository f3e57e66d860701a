"""The KV codec: how fast, how small, at what loss, and when it is used at all.

    python -m bench.codec [--tokens 512] [--channels 1024] [--layers 4]
    python -m bench.codec --links [--cores 1]
    python -m bench.codec --adapt [--contexts 1000] [--slo 1.0]
    python -m bench.codec --serving [--prompt 4096] [--level-max 2]
    python -m bench.codec --quality FOLDER [--text FILE] [--texts 40] [--context 640] [--ahead 128]

Without a flag: MB of bfloat16 KV a CPU second of one thread, coding and decoding, with numpy and
with numba where it is installed, on made-up KV. `--links`: what the policy chooses for a transfer
by the link's rate, from rates measured here. `--adapt`: bench/codec_adapt.py. `--serving`:
bench/codec_serving.py. `--quality`: bench/codec_quality.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.codec_adapt import adapt
from bench.codec_serving import serving
from kvasir.policy.codec import Task, allowed, choose
from kvasir.transfer.codec import NUMPY, Chunk, Kernels, Tensor, fastest_kernels
from kvasir.transfer.codec.floats import bytes_of
from kvasir.transfer.codec.offers import CODINGS, Rate, measure, offers_of

HELD_OUT = Path(__file__).parents[1] / "tests/data/demo/held_out.txt"  # what models/demo never saw
LINKS_BYTES_S = (1e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10)
GOAL_MB_S = {"numpy": 50, "numba": 200}


def made_up(tokens: int, channels: int, layers: int) -> Chunk:
    """bfloat16 KV: channels with a mean and a width of their own, tokens that resemble the last."""
    rng = np.random.default_rng(0)

    def plane() -> np.ndarray:
        drift = rng.normal(0, 0.05, (tokens, channels)).cumsum(axis=0)
        values = drift + rng.normal(0, 1, (tokens, channels))
        values = values * rng.uniform(0.2, 2, channels) + rng.normal(0, 1, channels)
        return bytes_of(values.astype(np.float32), "bfloat16")

    tensors = [Tensor(layer, which, plane()) for layer in range(layers) for which in (0, 1)]
    return Chunk("bfloat16", layers, tensors)


def every_kernels() -> list[Kernels]:
    fastest = fastest_kernels()
    return [NUMPY] if fastest is NUMPY else [NUMPY, fastest]


def speed(flags: argparse.Namespace) -> dict[str, Any]:
    chunk = made_up(flags.tokens, flags.channels, flags.layers)
    print(f"{chunk.bytes / 1e6:.1f} MB of bfloat16 KV: {flags.tokens} tokens, {flags.layers} "
          f"layers of 2 x {flags.channels}; MB a CPU second, best of {flags.repeats}")  # fmt: skip
    row = "{:<18}{:>8}{:>9}{:>10}{:>10}{:>12}"
    print(row.format("", "kernels", "smaller", "encode", "decode", "both"))
    found: dict[str, Any] = {}
    for kernels in every_kernels():
        for rate in measure(chunk, CODINGS, kernels, time.process_time, flags.repeats):
            found[f"{rate.coding} {kernels.name}"] = {
                "ratio": round(1 / rate.ratio, 3), "encode_mb_s": round(rate.encode_bytes_s / 1e6),
                "decode_mb_s": round(rate.decode_bytes_s / 1e6),
                "both_mb_s": round(both(rate) / 1e6),
            }  # fmt: skip
            print(row.format(
                str(rate.coding), kernels.name, f"{1 / rate.ratio:.2f}",
                f"{rate.encode_bytes_s / 1e6:.0f}", f"{rate.decode_bytes_s / 1e6:.0f}",
                f"{both(rate) / 1e6:.0f}",
            ))  # fmt: skip
    print(f"goals for CacheGen: {GOAL_MB_S['numpy']} with numpy, {GOAL_MB_S['numba']} with numba; "
          "the reference codec does 11 and 5 on a CPU")  # fmt: skip
    return found


def both(rate: Rate) -> float:
    """KV bytes a second of coding and decoding one after the other on one core."""
    return 1 / (1 / rate.encode_bytes_s + 1 / rate.decode_bytes_s)


def links(flags: argparse.Namespace) -> dict[str, Any]:
    chunk = made_up(flags.tokens, flags.channels, flags.layers)
    rates = measure(chunk, CODINGS, fastest_kernels(), time.process_time, flags.repeats)
    offers = allowed(offers_of(rates, cores=flags.cores), "cachegen", flags.level_max)
    print(f"{flags.mib} MiB in {flags.chunks} chunks, {flags.cores} cores a side, levels up to "
          f"{flags.level_max}, {fastest_kernels().name}")  # fmt: skip
    row = "{:>12}{:>20}{:>12}{:>12}{:>8}"
    print(row.format("link MB/s", "chosen", "seconds", "raw", "gain"))
    found = {}
    for link in LINKS_BYTES_S:
        choice = choose(offers, Task(flags.mib << 20, link, flags.chunks))
        seconds, raw_s = choice.seconds, choice.raw_s
        found[f"{link:g}"] = {"name": choice.name, "seconds": seconds, "raw_s": raw_s}
        print(row.format(f"{link / 1e6:g}", choice.name, f"{seconds:.4f}", f"{raw_s:.4f}",
                         f"{raw_s / seconds:.2f}"))  # fmt: skip
    return found


def quality(flags: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tokenizers import Tokenizer

    from bench import codec_quality as q

    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(flags.quality / "tokenizer.json"))
    text = flags.text.read_text(encoding="utf-8")
    texts = q.texts_of(tokenizer, text, flags.texts, flags.context, flags.ahead)
    print(f"{flags.quality.name}: {len(texts)} texts, {flags.context} tokens of context, "
          f"{len(texts) * flags.ahead} predicted")  # fmt: skip
    found = q.measure(flags.quality, texts, fastest_kernels())
    print("\n".join(q.table(found)))
    for kind in ("groups", "tokens"):
        print(f"against the smallest uniform quantisation by {kind} that agrees as often:")
        print("\n".join(_beside(q.beside_uniform(found, kind))))
    print(f"goal: {q.RATIO_GOAL} times smaller than uniform quantisation, agreement at least "
          f"{q.AGREEMENT_GOAL:.0%}")  # fmt: skip
    return {way.name: way._asdict() for way in found}


def _beside(rows: Sequence[Any]) -> Iterator[str]:
    for row in rows:
        yield f"  {row.name:<18}{row.agreement:>9.2%}  {row.uniform:<11} {row.ratio:.2f} smaller"


def flags_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--adapt", action="store_true")
    parser.add_argument("--serving", action="store_true", help="through the simulator")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--quality", type=Path, help="a model folder")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="unknown to the model")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--level-max", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=1000)
    parser.add_argument("--slo", type=float, default=1.0)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--ahead", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    flags = flags_of()
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread")
    if flags.quality:
        found = quality(flags)
    elif flags.adapt:
        found = adapt(flags.contexts, flags.slo, flags.seed)
    elif flags.serving:
        found = serving(flags.prompt, 2, flags.level_max)
    else:
        found = links(flags) if flags.links else speed(flags)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
