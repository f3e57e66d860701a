"""`kvasir measure`: what an engine costs, as the constants that a pool's `cost:` takes.

Knows flags and files; what is timed and fitted is `kvasir.measure`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from kvasir.measure.engine_probe import Extent, Probed
    from kvasir.measure.fit import Choice, Errors, Fit
    from kvasir.measure.loadgen import Target

app = App(name="measure")
AtLeast2 = Annotated[int, Parameter(validator=Number(gte=2))]
Count = Annotated[int, Parameter(validator=Number(gte=1))]
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]

HOLD_OUT: Final = 4  # of a recording's steps, every so many are not fitted
STEPS_MIN: Final = 50  # of a recording: fewer say nothing
UNSTEADY: Final = 1.25  # slowest over fastest round of one step: the machine was not quiet


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """What to time, and how long.

    Parameters
    ----------
    dtype
        Of weights and KV, for a folder.
    threads
        Of torch, for a folder; one, unless the cores are its alone.
    base_url
        Probe this server instead of a folder, without /v1.
    model
        Name of the server's model (default: the first that it lists).
    endpoint
        Which endpoint of the server; chat takes text, so that lengths are only near those asked.
    recording
        Fit the steps that a recording (`kvasir serve --record`) holds, instead of timing any.
    tokens_max
        The longest prompt, or prompt chunk, to time.
    batch_max
        The most sequences to decode at once.
    context_max
        The longest context of a sequence.
    rounds
        How often each step is timed; its time is the median.
    seconds
        No new round after so long.
    seed
        Of prompts and of the steps that check the fit.
    yaml
        File for the cost.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Count = 1
    base_url: str | None = None
    model: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    recording: Path | None = None
    tokens_max: AtLeast2 = 512
    batch_max: AtLeast2 = 16
    context_max: AtLeast2 = 1024
    rounds: Count = 7
    seconds: Seconds = 120.0
    seed: int = 0
    yaml: Path | None = None


DEFAULTS: Final = Flags()


@app.command
def engine(folder: str | None = None, /, *, flags: Flags = DEFAULTS) -> None:
    """Time an engine's steps and fit a pool's cost to them: of a model folder, of any OpenAI server
    (--base-url), or of what was served (--recording).

    Parameters
    ----------
    folder
        HuggingFace folder, or the name of the bundled model (default: tiny).
    """
    from kvasir.measure.fit import choose

    probed, what = _probed(folder, flags)
    choice = choose(probed.samples, probed.held_out)
    told = _told(what, probed, choice)
    print("\n".join(told))
    text = _yaml(choice.best, [what, *_found(choice)])
    if flags.yaml is None:
        print(f"\n{text}", end="")
        return
    from kvasir.cli.output import write

    write(flags.yaml, text.encode())
    print(f"written: {flags.yaml} (its `cost:` belongs into a pool of kvasir.yaml)")


# --- three ways to samples ------------------------------------------------------------------------


def _probed(folder: str | None, flags: Flags) -> tuple[Probed, str]:
    """Samples and where they are from. Raises KvasirError."""
    from kvasir.core.errors import ConfigError

    ways = {"a folder": folder, "--base-url": flags.base_url, "--recording": flags.recording}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other", next_step="give one")
    if flags.base_url is not None:
        return _server(flags.base_url, flags)
    if flags.recording is not None:
        return _recording(flags.recording)
    return _folder(folder or "tiny", flags)


def _folder(name: str, flags: Flags) -> tuple[Probed, str]:
    from kvasir.cli.files import load_deployment
    from kvasir.cli.models import model_folder, with_model
    from kvasir.cli.output import progress
    from kvasir.cli.serve import need_torch
    from kvasir.measure.engine_probe import probe, room

    need_torch()
    extent, folder = _extent(flags), model_folder(name)
    with_model(load_deployment("local"), folder)  # what is wrong with it, before torch is loaded
    from kvasir.engine.torch_runner import TorchRunner

    runner = TorchRunner(
        folder, blocks_count=room(extent, BLOCK), block_size=BLOCK, dtype=flags.dtype,
        threads=flags.threads,
    )  # fmt: skip
    alone = flags.threads == 1
    with progress(name) as report:
        probed = probe(
            runner, extent, rounds=flags.rounds, seconds_max=flags.seconds, seed=flags.seed,
            stopwatch=time.thread_time if alone else None, progress=report,
        )  # fmt: skip
    clock = "CPU time of one thread" if alone else f"wall time with {flags.threads} threads"
    by = ", attention by the compiled kernel" if runner.kernel is not None else ""
    return probed, f"{Path(name).name}, {flags.dtype}, {clock}{by}"


BLOCK: Final = 16  # tokens of a KV block, as served by default


def _server(base_url: str, flags: Flags) -> tuple[Probed, str]:
    import asyncio

    from kvasir.cli.bench import served_models
    from kvasir.measure.loadgen import Target

    served = served_models(base_url, needed=flags.model is None)
    target = Target(
        base_url=base_url, model=flags.model or served[0], endpoint=flags.endpoint,
        timeout_s=flags.seconds,
    )  # fmt: skip
    probed = asyncio.run(_ask(target, flags))
    return probed, f"{target.model} at {base_url}, from outside"


async def _ask(target: Target, flags: Flags) -> Probed:
    from kvasir.cli.output import progress
    from kvasir.measure.server_probe import probe_server

    with progress(target.model) as report:
        return await probe_server(
            target, _extent(flags), rounds=flags.rounds, seconds_max=flags.seconds,
            seed=flags.seed, progress=report,
        )  # fmt: skip


def _recording(directory: Path) -> tuple[Probed, str]:
    from kvasir.core.errors import ConfigError
    from kvasir.measure.engine_probe import Probed
    from kvasir.runtime.served import served_steps

    steps = served_steps(directory)
    if len(steps) < STEPS_MIN:
        raise ConfigError(
            f"the recording holds {len(steps)} steps; {STEPS_MIN} is the least to fit",
            where=str(directory),
            next_step="record for longer, or measure a folder",
        )
    held_out = steps[::HOLD_OUT]
    fitted = tuple(s for i, s in enumerate(steps) if i % HOLD_OUT)
    return Probed(fitted, tuple(held_out), 1, None), f"recording {directory.name}"


def _extent(flags: Flags) -> Extent:
    from kvasir.measure.engine_probe import Extent

    return Extent(flags.tokens_max, flags.batch_max, flags.context_max)


# --- what is said ---------------------------------------------------------------------------------


def _told(what: str, probed: Probed, choice: Choice) -> list[str]:
    """The measurement, its quietness, both forms' errors and the form taken."""
    times = "once each" if probed.rounds == 1 else f"{probed.rounds} times each"
    fitted, held_out = len(probed.samples), len(probed.held_out)
    lines = [f"{what}: {fitted} steps to fit, {held_out} held out, {times}"]
    if probed.steady is not None:
        low, high = probed.steady
        lines.append(f"the same step over the rounds: {low * 1e3:.2f} to {high * 1e3:.2f} ms")
        if high > UNSTEADY * low:
            lines.append("* the machine was not quiet: times are medians, and less sure")
    return [*lines, *_found(choice)]


def _found(choice: Choice) -> list[str]:
    from kvasir.measure.fit import LINE_ERROR_MAX

    if choice.curved:
        taken = f"the curve (the line's p90 is over {LINE_ERROR_MAX:.0%})"
    elif choice.line_errors.p90 > LINE_ERROR_MAX:
        taken = "the line (the curve is no better)"
    else:
        taken = f"the line (its p90 is within {LINE_ERROR_MAX:.0%})"
    return [
        f"line in tokens:  held-out error {_words(choice.line_errors)}",
        f"curve in tokens: held-out error {_words(choice.curve_errors)}",
        f"taken: {taken}",
    ]


def _words(errors: Errors) -> str:
    return f"median {errors.median:.1%}, p90 {errors.p90:.1%}, worst {errors.worst:.1%}"


def _yaml(fit: Fit, notes: Sequence[str]) -> str:
    """`cost:` of a pool, and `host:` of the deployment where requests were timed."""
    first, *more = notes
    lines = [f"# kvasir measure engine: {first}", *(f"#   {note}" for note in more), "cost:"]
    values = fit.cost.model_dump()
    curve = values.pop("curve")
    lines += [f"  {name}: {value:g}" for name, value in values.items()]
    if curve:
        lines.append("  curve: # new tokens of a step, seconds")
        lines += [f"    - [{tokens}, {seconds:g}]" for tokens, seconds in curve]
    if fit.request_s:
        lines += ["host:", f"  request_s: {fit.request_s:g}"]
    return "\n".join(lines) + "\n"
