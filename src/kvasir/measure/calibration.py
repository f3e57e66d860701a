"""What step times stand on: the measured tables that come with the package, and how much of a
run's times they gave.

Knows where tables lie, pools and a run's mean load. Must not know what tables mean
(`cost/tables.py`), or single requests.
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

import msgspec

from kvasir.core.specs import Deployment, PoolSpec
from kvasir.cost.measured import Measured
from kvasir.cost.pools import step_model
from kvasir.cost.step import Roofline, Row, StepModel
from kvasir.cost.tables import Packed, Shares, SystemTables
from kvasir.measure.summary import Summary

SUFFIX = ".msgpack.gz"


def table_systems() -> tuple[str, ...]:
    """Names of the systems that have tables."""
    folder = files("kvasir.cost") / "data"
    names = (f.name for f in folder.iterdir())
    return tuple(sorted(n.removesuffix(SUFFIX) for n in names if n.endswith(SUFFIX)))


@cache
def load_tables(system: str) -> SystemTables | None:
    """The tables of `system` (`h100_sxm`), or of hardware so named (`h100`); None without any."""
    for name in (system, f"{system}_sxm"):
        if name in table_systems():
            packed = (files("kvasir.cost") / "data" / f"{name}{SUFFIX}").read_bytes()
            return SystemTables(msgspec.msgpack.decode(gzip.decompress(packed), type=Packed))
    return None


def models_of(deployment: Deployment) -> dict[str, StepModel]:
    """The step model of each pool, tables included: the one that simulates and that predicts."""
    return {pool.name: step_model(deployment, pool, load_tables) for pool in deployment.pools}


class PoolCalibration(msgspec.Struct, frozen=True):
    """How a pool's step times were found, as shares of the time of a run's mean iterations.

    `cost` is `measured`, `roofline`, or the pool's own `fitted` or `profile`, whose shares are not
    known. A phase that the pool does not run has none.
    """

    pool: str
    cost: str
    prefill: Shares | None
    decode: Shares | None


def calibration_of(deployment: Deployment, summary: Summary) -> tuple[PoolCalibration, ...]:
    """By pool: shares at the mean prompt, and at the mean decode batch and context of the run."""
    models = models_of(deployment)
    return tuple(_calibrated(p, models[p.name], deployment, summary) for p in deployment.pools)


def _calibrated(
    pool: PoolSpec, model: StepModel, deployment: Deployment, summary: Summary
) -> PoolCalibration:
    mean = _mean_load(deployment, summary)
    chunk = min(mean.prompt_tokens, pool.batch_tokens_max)
    prefill = ((chunk, mean.prompt_tokens - chunk),)
    batch = max(1, min(pool.batch_max, round(mean.decoding)))
    decode = ((1, mean.context),) * batch
    return PoolCalibration(
        pool.name, _cost_name(pool, model),
        _shares(model, prefill) if pool.role != "decode" else None,
        _shares(model, decode) if pool.role != "prefill" else None,
    )  # fmt: skip


def _cost_name(pool: PoolSpec, model: StepModel) -> str:
    if isinstance(model, Roofline):
        return "roofline"
    return "measured" if isinstance(model, Measured) else getattr(pool.cost, "kind", "fitted")


def _shares(model: StepModel, rows: tuple[Row, ...]) -> Shares | None:
    if isinstance(model, Measured):
        return model.shares(rows)
    return Shares(0.0, 0.0, 0.0, 1.0) if isinstance(model, Roofline) else None


class _Load(msgspec.Struct, frozen=True):
    prompt_tokens: int  # of the mean prompt
    context: int  # of a decode row, on average
    decoding: float  # rows on a worker that decodes, on average (Little's law)


def _mean_load(deployment: Deployment, summary: Summary) -> _Load:
    done = max(1, summary.completed)
    prompt, output = summary.input_tokens / done, summary.output_tokens / done
    workers = sum(p.count for p in deployment.pools if p.role != "prefill")
    busy_s = summary.tpot.mean_s * summary.output_tokens
    decoding = summary.per_second(busy_s) / max(1, workers)
    return _Load(max(2, round(prompt)), max(1, round(prompt + output / 2)), decoding)


def notes_of(calibrations: tuple[PoolCalibration, ...]) -> tuple[str, ...]:
    """A line for people, one for each kind of answer."""
    pools: dict[str, list[str]] = {}
    for c in calibrations:
        pools.setdefault(_said(c), []).append(c.pool)
    return tuple(f"step times of {', '.join(names)}: {text}" for text, names in pools.items())


def _said(c: PoolCalibration) -> str:
    if c.cost != "measured":
        return "from data sheets (roofline), not measured" if c.cost == "roofline" else c.cost
    phases = (("prefill", c.prefill), ("decode", c.decode))
    return "; ".join(f"{name} {_percent(shares)}" for name, shares in phases if shares)


def _percent(shares: Shares) -> str:
    named = (("measured", shares.measured), ("interpolated", shares.interpolated),
             ("outside the measured range", shares.outside),
             ("roofline", shares.roofline))  # fmt: skip
    return ", ".join(f"{share:.0%} {name}" for name, share in named if share >= 0.005)
