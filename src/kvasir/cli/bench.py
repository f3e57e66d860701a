"""`kvasir bench`: load on a running server, with the flags and the table of `vllm bench serve`.

Knows flags and files; what is sent and how it is measured is `kvasir.measure`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from kvasir.cli.simulate import JsonTo, Positive

if TYPE_CHECKING:
    from kvasir.core.request import Slo
    from kvasir.measure.loadgen import Load, Target
    from kvasir.measure.shots import Shot

app = App(name="bench")

Count = Annotated[int, Parameter(validator=Number(gte=1))]
Rate = Annotated[float, Parameter(validator=Number(gt=0))]
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
Flag = Annotated[bool, Parameter(negative=())]

ALL_VOCABULARIES: Final = range(10, 250)  # ids that every vocabulary has, even one of bytes
NO_LIMIT_S: Final = 1e6
MODELS_WAIT_S: Final = 10.0
MODELS_BYTES_MAX: Final = 1024 * 1024


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """What to send, how fast, and what to report.

    Parameters
    ----------
    base_url
        The server, without /v1.
    model
        Name of the model (default: the first that the server lists).
    backend
        Which endpoint: /v1/completions, or /v1/chat/completions for openai-chat.
    dataset_name
        Where prompts come from.
    random_input_len
        Tokens of each prompt, without the common prefix.
    random_output_len
        Tokens to ask for.
    random_range_ratio
        Lengths are uniform within this share of those given.
    random_prefix_len
        Tokens of a prefix common to all prompts.
    num_prompts
        Number of requests.
    request_rate
        Requests per second; inf sends all at once.
    burstiness
        Shape of the gamma distribution of gaps: 1 is Poisson, less comes in bursts, inf is even.
    max_concurrency
        At most so many requests at a time.
    goodput
        Limits in ms, such as ttft:200 tpot:30; also itl, for each request's p99.
    percentile_metrics
        Which latencies to print, separated by commas: ttft, tpot, itl, e2el.
    metric_percentiles
        Which percentiles, separated by commas.
    save_result
        Write a JSON file into --result-dir.
    result_dir
        Folder for --save-result.
    json
        File for the result, or - for stdout.
    seed
        Of prompts, lengths and gaps.
    ignore_eos
        Ask for the full output length.
    timing
        Ask a Kvasir server for the parts of each latency.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    backend: Literal["vllm", "openai", "openai-chat"] = "openai"
    dataset_name: Literal["random"] = "random"
    random_input_len: Count = 1024
    random_output_len: Count = 128
    random_range_ratio: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.0
    random_prefix_len: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    num_prompts: Count = 1000
    request_rate: Rate = math.inf
    burstiness: Rate = 1.0
    max_concurrency: Positive = None
    goodput: Words = ()
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    save_result: Flag = False
    result_dir: str = "."
    json: JsonTo = None
    seed: int = 0
    ignore_eos: Flag = False
    timing: Flag = False


DEFAULTS: Final = Flags()


@app.default
def bench(*, flags: Flags = DEFAULTS) -> int:
    """Send load to a server and print what came back. Exit 1 when no request succeeds."""
    import asyncio

    from kvasir.cli.output import say, write_json
    from kvasir.measure.loadgen import Target
    from kvasir.measure.results import canonical, result
    from kvasir.measure.tables import table

    slo, percentiles = slo_of(flags.goodput), _percentiles(flags.metric_percentiles)
    shown = _metrics(flags.percentile_metrics)
    served = served_models(flags.base_url, needed=flags.model is None)
    target = Target(
        base_url=flags.base_url,
        model=flags.model or served[0],
        endpoint="chat" if flags.backend == "openai-chat" else "completions",
        ignore_eos=flags.ignore_eos,
        timing=flags.timing,
    )
    load = asyncio.run(_fire(target, _shots(flags), flags.max_concurrency))
    summary = load.summary(
        slo,
        percentiles=percentiles,
        request_rate=flags.request_rate,
        max_concurrency=flags.max_concurrency,
    )
    say(only(table(summary), shown), flags.json)
    content = canonical(result(summary))
    write_json(flags.json, content)
    if flags.save_result:
        write_json(f"{flags.result_dir}/{_file_name(target.model, flags.request_rate)}", content)
    return 0 if summary.completed else 1


async def _fire(target: Target, shots: Sequence[Shot], max_concurrency: int | None) -> Load:
    from kvasir.cli.output import progress
    from kvasir.measure.loadgen import fire

    ended = 0
    with progress(f"{target.model} at {target.base_url}") as report:

        def on_end() -> None:
            nonlocal ended
            ended += 1
            report(ended / len(shots))

        return await fire(target, shots, max_concurrency=max_concurrency, on_end=on_end)


def _shots(flags: Flags) -> list[Shot]:
    from kvasir.measure.shots import random_shots

    return random_shots(
        flags.num_prompts,
        input_tokens=flags.random_input_len,
        output_tokens=flags.random_output_len,
        rate=flags.request_rate,
        burstiness=flags.burstiness,
        range_ratio=flags.random_range_ratio,
        prefix_tokens=flags.random_prefix_len,
        vocab=ALL_VOCABULARIES,
        text=flags.backend == "openai-chat",
        seed=flags.seed,
    )


# --- flags -------------------------------------------------------------------------------------


def slo_of(goodput: Sequence[str]) -> Slo | None:
    """`("ttft:200", "tpot:30")` in milliseconds. Raises ConfigError."""
    from kvasir.core.errors import ConfigError, nearest
    from kvasir.core.request import Slo

    limits: dict[str, float] = {}
    for word in goodput:
        name, _, text = word.partition(":")
        if name not in ("ttft", "tpot", "itl"):
            near = nearest(name, ("ttft", "tpot", "itl"))
            raise ConfigError(f"--goodput: no latency {name!r}", nearest=near)
        limits[name] = _number(text, f"--goodput {word}", "ttft:200 (milliseconds)") / 1e3
    if not limits:
        return None
    ttft_s, tpot_s = (limits.get(name, NO_LIMIT_S) for name in ("ttft", "tpot"))
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s, itl_p99_s=limits.get("itl"))


def _percentiles(text: str) -> tuple[float, ...]:
    values = tuple(_number(p, "--metric-percentiles", "50,90,99") for p in text.split(","))
    if max(values) <= 100:
        return values
    from kvasir.core.errors import ConfigError

    raise ConfigError(f"--metric-percentiles: {max(values):g} is over 100", next_step="50,90,99")


def _number(text: str, flag: str, example: str) -> float:
    """Positive and finite, else ConfigError."""
    from kvasir.core.errors import ConfigError

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf:
        return value
    raise ConfigError(f"{flag}: {text!r} is not a positive number", next_step=example)


def _metrics(text: str) -> frozenset[str]:
    from kvasir.core.errors import ConfigError, nearest
    from kvasir.measure.tables import LATENCIES

    known = [attribute for attribute, _, _ in LATENCIES]
    for name in text.split(","):
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(f"--percentile-metrics: no latency {name!r}", nearest=near)
    return frozenset(text.split(","))


def only(table: str, metrics: frozenset[str]) -> str:
    """The table without the sections of latencies that are not in `metrics`."""
    from kvasir.measure.tables import LATENCIES

    hidden = {title for attribute, _, title in LATENCIES if attribute not in metrics}
    lines, keep = [], True
    for line in table.splitlines():
        if line.startswith(("-", "=")):
            keep = line.strip("-") not in hidden
        if keep:
            lines.append(line)
    return "\n".join(lines)


# --- server and file ---------------------------------------------------------------------------


def served_models(base_url: str, *, needed: bool) -> list[str]:
    """What the server lists: also a first look whether anything answers there.

    Raises ConfigError when nothing does, or when a name is `needed` and none can be had.
    """
    import json
    from urllib.error import HTTPError
    from urllib.request import urlopen

    from kvasir.core.errors import ConfigError
    from kvasir.measure.client import parse_base_url

    parse_base_url(base_url)
    try:
        with urlopen(f"{base_url.rstrip('/')}/v1/models", timeout=MODELS_WAIT_S) as response:
            names = [str(m["id"]) for m in json.loads(response.read(MODELS_BYTES_MAX))["data"]]
    except HTTPError as error:
        error.close()
        names = []
    except OSError as error:
        reason = getattr(error, "reason", error)
        what = f"no server answers: {getattr(reason, 'strerror', None) or reason}"
        raise ConfigError(what, where=base_url, next_step="kvasir serve, or --base-url") from None
    except (ValueError, KeyError, TypeError):
        names = []
    if needed and not names:
        raise ConfigError("the server lists no model", where=base_url, next_step="--model NAME")
    return names


def _file_name(model: str, rate: float) -> str:
    import time

    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in model)
    return f"kvasir-{rate:g}qps-{safe}-{time.strftime('%Y%m%d-%H%M%S')}.json"
