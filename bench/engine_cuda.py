"""The embedded engine on a GPU: `python -m bench.engine --device cuda`. Knows one model shape, an
8B Llama with random bfloat16 weights; needs no download and about 30 GB of device memory.

First what is right: the decode kernel against plain torch, logits and tokens of small models
against the CPU's in float32. Then what is fast: the kernel alone, output tokens per second at batch
1, 64 and 256, without CUDA graphs and with them, and the share of the memory's bandwidth (of a copy
inside the device, measured here) that reading weights and KV for each token takes.

Every part stands for itself: one that fails says why in the JSON line, and the others go on.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import linear

from bench.engine_cases import BLOCK, Case, Generator, Timing, blocks_for, prompts_of, speed_of
from kvasir.core.specs import LayerSpec
from kvasir.engine.attention import LayerCache, Span
from kvasir.engine.cuda.batch import device_batch
from kvasir.engine.cuda.decode import (
    paged_decode,
    processors_of,
    reference_decode,
    splits_of,
    triton_runs,
)
from kvasir.engine.cuda.prefill import way_of
from kvasir.engine.loader import Loaded
from kvasir.engine.steps import BlockTable
from kvasir.engine.tiny import VOCAB, Architecture, make_tiny
from kvasir.engine.torch_runner import TorchRunner

GOAL: Final = 0.7
SECONDS_MAX: Final = 420  # no part begins later
KINDS: Final[tuple[Architecture, ...]] = ("qwen3", "llama")


class Shape(NamedTuple):
    """A Llama and what is run on it. `small`: lengths of the prompts of small models; `kernel`:
    (rows, positions of each) of the kernel alone, on so many layers' caches in turn."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    cases: tuple[Case, ...]
    alone: str  # the case whose share of the bandwidth counts
    small: tuple[int, ...]
    small_outputs: int
    kernel: tuple[tuple[int, int], ...]
    kernel_layers: int
    copy_bytes: int


SHAPES: Final = {
    "8b": Shape(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128,
        vocab=128_256, context=8192,
        cases=(
            Case("batch 1", (128,), outputs=128), Case("batch 1, 4k", (4096,), outputs=64),
            Case("batch 64", (128,) * 64, outputs=128), Case("batch 256", (128,) * 256, outputs=96),
        ),
        alone="batch 1", small=tuple(range(1, 241, 20)), small_outputs=32,
        kernel=((1, 4096), (1, 8192), (64, 1024), (64, 4096)), kernel_layers=8,
        copy_bytes=1 << 31,
    ),
    "tiny": Shape(
        layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=VOCAB,
        context=128, cases=(Case("batch 1", (5,), outputs=4), Case("batch 3", (5,) * 3, outputs=4)),
        alone="batch 1", small=(1, 20, 40), small_outputs=6, kernel=((2, 40),), kernel_layers=2,
        copy_bytes=1 << 20,
    ),
}  # fmt: skip


class Part(NamedTuple):
    name: str
    run: Callable[[], Any]


def run(device: str = "cuda", shape: str = "8b") -> dict[str, Any]:
    """What the bench's JSON line says; progress goes to stderr. A CPU rehearses: it runs the same
    parts, whose figures mean nothing there."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"bench": "engine", "skipped": "torch sees no CUDA device here"}
    began, parts = time.monotonic(), dict[str, Any]()
    with ExitStack() as stack:
        lab = Lab(torch.device(device), SHAPES[shape], stack)
        for part in lab.parts():
            if time.monotonic() - began > SECONDS_MAX:
                parts[part.name] = {"skipped": f"{SECONDS_MAX} s are over"}
            else:
                parts[part.name] = tried(part)
            say(f"{part.name}: {parts[part.name]}")
    failed = [name for name, part in parts.items() if isinstance(part, dict) and "failed" in part]
    return {
        "bench": "engine", **machine(torch.device(device)), "shape": shape, "goal": GOAL,
        "seconds": round(time.monotonic() - began, 1), "failed": failed, "parts": parts,
    }  # fmt: skip


def tried(part: Part) -> Any:
    try:
        return part.run()
    except Exception as error:  # whatever it is, the other parts are wanted
        traceback.print_exc(file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "triton": None, "cuda": torch.version.cuda}
    if find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, a rehearsal"
    return {"device": name, "processors": processors_of(device), **versions}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Lab:
    """The parts, and what they hand on: the bandwidth and the one large model."""

    def __init__(self, device: torch.device, shape: Shape, stack: ExitStack) -> None:
        self._device, self._shape = device, shape
        self._home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._dtype = torch.bfloat16
        self._bandwidth = 0.0
        self._weight_bytes = 0
        self._runner: TorchRunner | None = None

    def parts(self) -> list[Part]:
        shape, ways = self._shape, {"no graphs": False, "graphs": True}
        found = [
            Part("ways", self.ways),
            Part("kernel against torch", self.kernel_differences),
            *(Part(f"logits {kind}", lambda kind=kind: self.logit_differences(kind))
              for kind in KINDS),
            *(Part(f"tokens {kind}, {name}", lambda kind=kind, on=on: self.same_tokens(kind, on))
              for kind in KINDS for name, on in ways.items()),
            Part("bandwidth", self.copy_bandwidth),
            Part("kernel alone", self.kernel_speed),
            Part("linear layers alone", self.linear_speed),
            Part("model", self.make_model),
        ]  # fmt: skip
        for name, on in ways.items():
            for case in shape.cases:
                run = lambda case=case, on=on: self.rate(case, on)  # noqa: E731
                found.append(Part(f"{case.name}, {name}", run))
        return found

    # --- right ---

    def ways(self) -> dict[str, Any]:
        query = torch.empty(1, self._shape.heads, self._shape.head_dim, dtype=self._dtype,
                            device=self._device)  # fmt: skip
        return {"decode": "triton" if triton_runs(self._device.type) else "plain torch",
                "prompts": way_of(query)}  # fmt: skip

    def kernel_differences(self) -> dict[str, float]:
        """Largest difference from plain torch in float32, by dtype, heads and window; the values
        are of a standard normal distribution."""
        found = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if self._device.type == "cpu" and dtype == torch.bfloat16:
                continue  # Triton's interpreter multiplies no bfloat16 matrices
            for heads, kv_heads in ((8, 8), (8, 2), (8, 1)):
                for window in (None, 40):
                    name = f"{str(dtype).removeprefix('torch.')} {heads}/{kv_heads} {window or ''}"
                    found[name.strip()] = self._kernel_difference(dtype, heads, kv_heads, window)
        return found

    def _kernel_difference(
        self, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None
    ) -> float:
        lengths, dim = (1, 16, 17, 150, 301), max(self._shape.head_dim, 16)
        width = -(-max(lengths) // BLOCK)
        every = torch.randperm(len(lengths) * width, device=self._device)
        tables = every.view(len(lengths), width).int()
        query, key, value = (
            torch.randn(*size, dim, device=self._device).to(dtype)
            for size in ((len(lengths), heads), *((len(every) * BLOCK, kv_heads),) * 2)
        )
        at = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        expected = reference_decode(
            query.float(), key, value, tables, at, BLOCK, dim**-0.5, window, None
        )
        got = paged_decode(query, key, value, tables, at, block_size=BLOCK, window=window)
        return float((got.float() - expected).abs().max())

    def logit_differences(self, kind: Architecture) -> dict[str, float]:
        """Largest difference of a small model's logits from the CPU's in float32, by dtype; and the
        standard deviation of these."""
        folder = self._small(kind)
        tokens = torch.arange(3, 60)
        expected = self._logits(TorchRunner(folder, blocks_count=8, rehearse=True), tokens)
        found = {"deviation": float(expected.std())}
        for dtype in ("float32", "bfloat16"):
            runner = TorchRunner(folder, blocks_count=8, dtype=dtype, device=self._device.type,
                                 rehearse=True)  # fmt: skip
            found[dtype] = float((self._logits(runner, tokens) - expected).abs().max())
        return found

    @torch.inference_mode()
    def _logits(self, runner: TorchRunner, tokens: torch.Tensor) -> torch.Tensor:
        """A prompt in one go, then one decode row."""
        table = BlockTable()
        table.extend([5, 1, 3, 2])
        caches = [cache for cache in runner._caches if isinstance(cache, LayerCache)]
        device = caches[0].key.device
        logits = []
        for start, count in ((0, len(tokens) - 1), (len(tokens) - 1, 1)):
            batch = device_batch(caches, runner.spec.block_size, [Span(start, count, table)])
            positions = torch.arange(start, start + count)
            hidden = runner.decoder.forward(
                tokens[positions].to(device), positions.to(device), batch
            )
            logits.append(runner.decoder.logits(hidden).cpu())
        return torch.cat(logits)

    def same_tokens(self, kind: Architecture, graphs: bool) -> dict[str, Any]:
        """Greedy float32 tokens of small models: as the CPU's own way has them?"""
        shape = self._shape
        case = Case(f"small {kind}", shape.small, outputs=shape.small_outputs)
        prompts = [[token % VOCAB for token in one] for one in prompts_of(case, 0).whole]
        cpu = TorchRunner(self._small(kind), blocks_count=blocks_for(case))
        there = TorchRunner(
            self._small(kind), blocks_count=blocks_for(case), device=self._device.type,
            graphs=graphs, rehearse=True,
        )  # fmt: skip
        expected, found = (Generator(one).generate(prompts, case.outputs) for one in (cpu, there))
        same = sum(a == b for a, b in zip(expected, found, strict=True))
        return {"same": same, "of": len(expected), **counters(there)}

    def _small(self, kind: Architecture) -> Path:
        folder = self._home / kind
        if not folder.exists():
            make_tiny(folder, kind, context_max=512)
        return folder

    # --- fast ---

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy inside the device: the best of ten."""
        source = torch.zeros(self._shape.copy_bytes, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(10):
            synchronise(self._device)
            began = time.perf_counter()
            target.copy_(source)
            synchronise(self._device)
            best = min(best, time.perf_counter() - began)
        self._bandwidth = 2 * self._shape.copy_bytes / best
        return self._bandwidth

    def kernel_speed(self) -> dict[str, Any]:
        """Seconds of a call, and what its reading of KV is of the bandwidth, by rows and length."""
        found = {}
        for rows, length in self._shape.kernel:
            seconds, nbytes = self._kernel_seconds(rows, length), self._kv_bytes(rows, length)
            splits = splits_of(rows, self._shape.kv_heads, processors_of(self._device))
            found[f"{rows} x {length}"] = {
                "us": seconds * 1e6, "splits": splits, "share": self._share(nbytes, seconds)
            }  # fmt: skip
        return found

    def _kernel_seconds(self, rows: int, length: int, repeat: int = 5) -> float:
        """Several layers' caches in turn, so that none waits in the device's cache."""
        shape, device = self._shape, self._device
        width = -(-length // BLOCK)
        tables = torch.randperm(rows * width, device=device).view(rows, width).int()
        at = torch.full((rows,), length, dtype=torch.int32, device=device)
        planes = [
            torch.randn(rows * width * BLOCK, shape.kv_heads, shape.head_dim, device=device,
                        dtype=self._kernel_dtype)
            for _ in range(2 * shape.kernel_layers)
        ]  # fmt: skip
        query = torch.randn(rows, shape.heads, shape.head_dim, device=device,
                            dtype=self._kernel_dtype)  # fmt: skip

        def every_layer() -> None:
            for key, value in zip(planes[::2], planes[1::2], strict=True):
                paged_decode(query, key, value, tables, at, block_size=BLOCK)

        return self._mean_seconds(every_layer, repeat) / shape.kernel_layers

    def linear_speed(self) -> dict[str, Any]:
        """Seconds of one linear layer, and what reading its weight is of the bandwidth, by outputs,
        inputs and rows: the floor of a step, and where the rest of the bandwidth goes."""
        shape, found = self._shape, dict[str, Any]()
        dim = shape.head_dim
        for out, into in (
            ((shape.heads + 2 * shape.kv_heads) * dim, shape.hidden), (shape.hidden, shape.hidden),
            (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate),
        ):  # fmt: skip
            for rows in (1, 64, 256):
                seconds = self._linear_seconds(out, into, rows)
                share = self._share(2 * out * into, seconds)
                found[f"{out} x {into}, {rows}"] = {"us": seconds * 1e6, "share": share}
        return found

    def _linear_seconds(self, out: int, into: int, rows: int, repeat: int = 5) -> float:
        """Several weights in turn, as many as overflow the device's cache."""
        count = 1 + min(16, self._shape.copy_bytes // 8 // (2 * out * into))
        weights = [
            torch.randn(out, into, device=self._device, dtype=self._dtype) for _ in range(count)
        ]
        x = torch.randn(rows, into, device=self._device, dtype=self._dtype)

        def every_weight() -> None:
            for weight in weights:
                linear(x, weight)

        return self._mean_seconds(every_weight, repeat) / count

    def _mean_seconds(self, work: Callable[[], None], repeat: int) -> float:
        """Once to warm up, then so many times without waiting in between."""
        work()
        synchronise(self._device)
        began = time.perf_counter()
        for _ in range(repeat):
            work()
        synchronise(self._device)
        return (time.perf_counter() - began) / repeat

    @property
    def _kernel_dtype(self) -> torch.dtype:
        return self._dtype if self._device.type == "cuda" else torch.float16

    def _kv_bytes(self, rows: int, length: int) -> int:
        """Of one layer."""
        return 2 * rows * length * self._shape.kv_heads * self._shape.head_dim * 2

    def _share(self, nbytes: float, seconds: float) -> float | None:
        return nbytes / seconds / self._bandwidth if self._bandwidth else None

    def make_model(self) -> dict[str, Any]:
        loaded = llama(self._shape, self._device, self._dtype)
        self._weight_bytes = weight_bytes(loaded.model)
        self._runner = TorchRunner(
            self._small("llama"), blocks_count=max(map(blocks_for, self._shape.cases)),
            block_size=BLOCK, dtype="bfloat16", device=self._device.type, loaded=loaded,
            rehearse=True,
        )  # fmt: skip
        return {"weight_bytes": self._weight_bytes}

    def rate(self, case: Case, graphs: bool) -> dict[str, Any]:
        assert self._runner is not None, "there is no model"
        assert self._runner.path is not None
        self._runner.path.set_graphs(graphs)
        speed = speed_of(case, [self._timed(case)])
        found: dict[str, Any] = {
            "per_s": speed.per_s, "step_ms": speed.step_ms, "prefill_per_s": speed.prefill_per_s,
            **counters(self._runner),
        }  # fmt: skip
        context = sum(length + case.outputs / 2 for length in case.lengths)
        read = self._weight_bytes + context * self._runner.spec.kv_token_bytes
        found["share"] = self._share(read, speed.step_ms / 1e3)
        if case.name == self._shape.alone and found["share"] is not None:
            found["reached"] = found["share"] >= GOAL
        return found

    def _timed(self, case: Case) -> Timing:
        """As engine_cases.timed, with tokens of this vocabulary and runs that wait for the device.
        The first run compiles kernels and captures graphs, for as many rows as there are."""
        assert self._runner is not None
        generator, vocab, seconds = Generator(self._runner), self._shape.vocab, []
        prompts = prompts_of(case, 0)
        runs = ((prompts.warm, 4), (prompts.first, 1), (prompts.whole, case.outputs))
        for asked, outputs in runs:
            asked = [[token % vocab for token in one] for one in asked]
            synchronise(self._device)
            began = time.perf_counter()
            generator.generate(asked, outputs)
            synchronise(self._device)
            seconds.append(time.perf_counter() - began)
        return Timing(seconds[2], seconds[1])


def counters(runner: TorchRunner) -> dict[str, int]:
    """Iterations that graphs ran, and that were under way before they were asked for."""
    if runner.path is None or runner.path.decoding is None:
        return {"replays": 0, "ahead": 0}
    return {"replays": runner.path.decoding.replays, "ahead": runner.path.decoding.ahead}


def llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab,
        max_position_embeddings=shape.context, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    layer = LayerSpec(kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="bfloat16")
    return Loaded(model, (layer,) * shape.layers, shape.vocab, shape.context, (), "random")


def weight_bytes(model: Any) -> int:
    """What one token's forward pass reads: all weights but the rows of the embedding."""
    every = sum(one.numel() * one.element_size() for one in model.parameters())
    table = model.model.embed_tokens.weight
    return int(every - table.numel() * table.element_size())
