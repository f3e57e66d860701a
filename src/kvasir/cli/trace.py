"""`kvasir trace`: what a trace holds, and traces made from other files, recordings or a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from kvasir.cli.simulate import Positive

if TYPE_CHECKING:
    from kvasir.core.specs import WorkloadSpec
    from kvasir.traces.record import Trace
    from kvasir.traces.sharegpt import Tokens

app = App(name="trace")
CAPACITIES: Final = (1_000, 10_000, 100_000, None)
PERCENTILES: Final = (50, 95, 99, 100)
KEY_BYTES: Final = 32
HALF: Final = 0.5
BYTES: Final = "bytes"
Above = Annotated[float, Parameter(validator=Number(gt=0))]
Share = Annotated[float | None, Parameter(validator=Number(gt=0, lt=1))]
AtLeastOne = Annotated[int, Parameter(validator=Number(gte=1))]
Lengths = Literal["lognormal", "zipf", "fixed"]


@app.command
def stats(
    name: str,
    /,
    *,
    limit: Positive = None,
    tokenizer: str | None = None,
    rate: Above = 4.0,
    seed: int = 0,
) -> None:
    """Print a trace's rates, lengths and attainable prefix hits.

    Parameters
    ----------
    name
        A bundled trace (mooncake-conversation, azure-2023-conv), a file, or a recording's folder.
    limit
        Only the first requests.
    tokenizer
        For ShareGPT: bytes, or a folder with a tokenizer.json.
    rate
        For ShareGPT, which has no times: requests per second.
    seed
        Of those times.
    """
    trace = _read(name, limit, tokenizer, rate, seed, None)
    for line in (*_rates(trace), *_lengths(trace), *_hits(trace)):
        print(line)
    _say_notes(trace)


@app.command
def convert(
    name: str,
    out: Path,
    /,
    *,
    limit: Positive = None,
    block_size: Positive = None,
    key_file: Path | None = None,
    tokenizer: str | None = None,
    rate: Above = 4.0,
    seed: int = 0,
) -> None:
    """Write any trace, result or recording as Mooncake JSON lines.

    Parameters
    ----------
    name
        A bundled trace, a file in any format of docs/traces.md, or a recording's folder.
    out
        Where to write; packed when it ends in .gz.
    limit
        Only the first requests.
    block_size
        Tokens of a block, a multiple of the trace's own (default: the same).
    key_file
        Key for the block ids of a recording (default: a new one, which is forgotten).
    tokenizer
        For ShareGPT: bytes, or a folder with a tokenizer.json.
    rate
        For ShareGPT, which has no times: requests per second.
    seed
        Of those times.
    """
    from kvasir.traces.mooncake import reblocked

    trace = _read(name, limit, tokenizer, rate, seed, key_file)
    _write(out, trace if block_size is None else reblocked(trace, block_size))
    _say_notes(trace)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What to draw.

    Parameters
    ----------
    requests
        How many.
    rate
        Requests per second over all.
    arrivals
        Law of the gaps.
    burstiness
        Shape of gamma gaps: 1 is Poisson, less comes in bursts.
    on_s
        Mean seconds of a stretch with arrivals (on_off).
    off_s
        Mean seconds of silence (on_off).
    input
        Law of the prompts' lengths.
    input_mean
        Tokens.
    input_sigma
        Of the logarithm (lognormal).
    input_min
        Tokens.
    input_max
        Tokens.
    output
        Law of the answers' lengths.
    output_mean
        Tokens.
    output_sigma
        Of the logarithm (lognormal).
    output_min
        Tokens.
    output_max
        Tokens.
    prefix_share
        Share of the requests that start with a common prefix.
    prefix_groups
        How many such prefixes there are.
    prefix_tokens
        How long each is.
    adapters
        How many LoRA adapters the requests (or sessions) are spread over; 0: none.
    turns
        Mean turns of a session; each prompt holds all turns before it.
    think_s
        Mean seconds between turns.
    context_max
        A session ends before a prompt exceeds this.
    block_size
        Tokens that one id stands for.
    seed
        Of everything random.
    """

    requests: AtLeastOne = 1000
    rate: Above = 4.0
    arrivals: Literal["poisson", "gamma", "on_off", "constant"] = "poisson"
    burstiness: Above = 1.0
    on_s: Above = 10.0
    off_s: Above = 10.0
    input: Lengths = "lognormal"
    input_mean: Above = 1266.0
    input_sigma: float = 1.0
    input_min: AtLeastOne = 32
    input_max: AtLeastOne = 3000
    output: Lengths = "lognormal"
    output_mean: Above = 200.0
    output_sigma: float = 0.8
    output_min: AtLeastOne = 4
    output_max: AtLeastOne = 1000
    prefix_share: float = 0.0
    prefix_groups: AtLeastOne = 8
    prefix_tokens: int = 1024
    adapters: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    turns: Annotated[float, Parameter(validator=Number(gte=1))] = 1.0
    think_s: Above = 10.0
    context_max: AtLeastOne = 131072
    block_size: AtLeastOne = 512
    seed: int = 0

    def spec(self) -> WorkloadSpec:
        from kvasir.core.specs import LengthSpec, WorkloadSpec

        return WorkloadSpec(
            kind=self.arrivals, rate=self.rate, requests=self.requests,
            burstiness=self.burstiness, on_s=self.on_s, off_s=self.off_s,
            input=LengthSpec(
                kind=self.input, mean=self.input_mean, sigma=self.input_sigma,
                min=self.input_min, max=self.input_max,
            ),
            output=LengthSpec(
                kind=self.output, mean=self.output_mean, sigma=self.output_sigma,
                min=self.output_min, max=self.output_max,
            ),
            prefix_share=self.prefix_share, prefix_groups=self.prefix_groups,
            prefix_tokens=self.prefix_tokens, adapters=self.adapters, turns=self.turns,
            think_s=self.think_s, context_max=self.context_max,
        )  # fmt: skip


@app.command
def generate(out: Path, /, *, flags: Drawn = Drawn()) -> None:
    """Write seeded arrivals as Mooncake JSON lines: the same flags give the same file.

    Parameters
    ----------
    out
        Where to write; packed when it ends in .gz.
    """
    from kvasir.traces.generators import generate as drawn

    trace = drawn(flags.spec(), flags.block_size, flags.seed)
    _write(out, trace)
    _say_notes(trace)


@app.command
def split(
    name: str,
    first: Path,
    second: Path,
    /,
    *,
    share: Share = None,
    at_s: Annotated[float | None, Parameter(validator=Number(gt=0))] = None,
    by_session: Annotated[bool, Parameter(negative=())] = False,
    seed: int = 0,
) -> None:
    """Cut a trace in two, to tune on one part and to report on the other.

    Parameters
    ----------
    name
        A bundled trace, or a file.
    first
        Where to write the first part.
    second
        Where to write the second part, whose time starts at 0.
    share
        The first part's share of the requests (default: 0.5, unless --at-s is given).
    at_s
        Cut at this time instead.
    by_session
        Deal out whole sessions (requests, where there are none) at random; times stay.
    seed
        Of --by-session.
    """
    from kvasir.core.errors import ConfigError
    from kvasir.traces.slices import cut_share, cut_time, dealt

    if at_s is not None and (share is not None or by_session):
        raise ConfigError("--at-s cuts by time alone", next_step="leave the other flags out")
    trace = _read(name, None, None, 4.0, 0, None)
    if by_session:
        parts = dealt(trace, share or HALF, seed)
    elif at_s is not None:
        parts = cut_time(trace, at_s)
    else:
        parts = cut_share(trace, share or HALF)
    for path, part in zip((first, second), parts, strict=True):
        _write(path, part)
        _say_notes(part)


# --- files ----------------------------------------------------------------------------------------


def _read(
    name: str, limit: int | None, tokenizer: str | None, rate: float, seed: int,
    key_file: Path | None,
) -> Trace:  # fmt: skip
    """A trace of any kind. A recording's key is never shown."""
    from kvasir.traces.formats import BUNDLED, load

    if name in BUNDLED or not Path(name).is_dir():
        return load(name, limit, tokens=_tokens(tokenizer), rate=rate, seed=seed)
    from kvasir.runtime.recorded import recorded

    return recorded(Path(name), _key(key_file), limit)


def _key(path: Path | None) -> bytes:
    """What the file holds, or a new key that nobody keeps."""
    import secrets

    from kvasir.core.errors import ConfigError

    if path is None:
        return secrets.token_bytes(KEY_BYTES)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"no key can be read: {error.strerror}", where=str(path)) from None


def _tokens(tokenizer: str | None) -> Tokens | None:
    """Counts a text's tokens. Raises ModelError for a folder without a usable tokenizer.json."""
    if tokenizer is None:
        return None
    if tokenizer == BYTES:
        return lambda text: len(text.encode())
    from tokenizers import Tokenizer

    from kvasir.core.errors import ModelError

    path = Path(tokenizer) / "tokenizer.json"
    try:
        encode = Tokenizer.from_file(str(path)).encode
    except Exception as error:  # the library raises nothing finer
        what = f"no tokenizer can be read: {error}"
        raise ModelError(what, where=str(path), next_step="--tokenizer bytes") from None
    return lambda text: len(encode(text, add_special_tokens=False).ids)


def _write(path: Path, trace: Trace) -> None:
    """Packed files hold no time, so the same trace gives the same bytes."""
    import gzip
    import io

    from kvasir.cli.output import write
    from kvasir.traces.mooncake import write_mooncake

    buffer = io.BytesIO()
    write_mooncake(trace, buffer)
    content = buffer.getvalue()
    write(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    blocks = f", blocks of {trace.block_size} tokens" if trace.block_size else ""
    print(f"{path}: {len(trace.arrivals)} requests in {trace.duration_s:.1f} s{blocks}")


# --- what is printed ------------------------------------------------------------------------------


def _say_notes(trace: Trace) -> None:
    for note in trace.notes:
        print(f"* {note}")


def _rates(trace: Trace) -> Iterator[str]:
    from kvasir.traces.statistics import gap_variation

    count, seconds = len(trace.arrivals), trace.duration_s or 1.0
    into, out = trace.input_tokens / seconds, trace.output_tokens / seconds
    yield f"{trace.name}: {count} requests in {seconds:.1f} s, {count / seconds:.2f} per s"
    yield f"tokens per s: {into:.0f} in, {out:.0f} out"
    variation = gap_variation(trace)
    if variation is not None:
        yield f"gaps between arrivals: coefficient of variation {variation:.2f} (Poisson: 1)"
    sessions = {a.session for a in trace.arrivals if a.session is not None}
    if sessions:
        yield f"sessions: {len(sessions)}, {count / len(sessions):.1f} requests each"


def _lengths(trace: Trace) -> Iterator[str]:
    heads = "".join(f"{f'p{p}' if p < 100 else 'max':>10}" for p in PERCENTILES)
    yield f"{'tokens':<10}{'mean':>10}{heads}"
    yield _length_row("input", [a.input_tokens for a in trace.arrivals])
    yield _length_row("output", [a.output_tokens for a in trace.arrivals])


def _length_row(label: str, values: Sequence[int]) -> str:
    from kvasir.measure.distribution import interpolated

    ordered = sorted(values) or [0]
    at = [interpolated(ordered.__getitem__, len(ordered), p) for p in PERCENTILES]
    cells = (sum(ordered) / len(ordered), *at)
    return f"{label:<10}" + "".join(f"{cell:>10.0f}" for cell in cells)


def _hits(trace: Trace) -> Iterator[str]:
    from kvasir.traces.statistics import hit_table

    if trace.block_size is None:
        return
    yield f"prefix hits of one LRU cache, in blocks of {trace.block_size} tokens:"
    yield f"{'cache':<10}{'blocks':>10}{'tokens':>10}"
    for row in hit_table(trace, CAPACITIES):
        label = "endless" if row.capacity_blocks is None else f"{row.capacity_blocks}"
        yield f"{label:<10}{row.block_ratio:>10.2%}{row.token_ratio:>10.2%}"
