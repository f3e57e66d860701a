"""The highest rate at which a cluster keeps its SLO, by bisection over simulated runs.

Knows cells (a model, lengths, an SLO, GPUs), contenders for them, and how a run is judged early.
Must not know which cells are compared, or what is printed.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np

from kvasir.cli.files import load_deployment
from kvasir.cli.overrides import changed
from kvasir.core.specs import Deployment, LengthSpec, ModelSpec, PoolSpec, SloSpec, WorkloadSpec
from kvasir.cost.pools import step_model
from kvasir.cost.profile import TwoPhases
from kvasir.cost.published import Coefficients
from kvasir.cost.step import DecodeLine, Row, StepModel
from kvasir.measure.calibration import load_tables
from kvasir.measure.summary import RequestOutcome, good
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival
from kvasir.world.sim.world import SimWorld

HERE: Final = Path(__file__).parent
DATA: Final = HERE.parent / "tests" / "data"
NODES: Final = 2
ATTAINED: Final = 0.9
STEP: Final = 0.03  # a maximum is known to this share of itself
RATE_MIN: Final = 1e-3
SLACK_S: Final = 1e-6  # sums of seconds differ in their last bits
WARM: Final = 0.2  # requests of the first fifth of a run load the cluster and are not judged
LOOKS: Final = 25  # how often a run is looked at while requests come
PREFILL_TOKENS: Final = 2048  # of a step of a prefill worker
REQUESTS_MAX: Final = 20_000


# --- what is compared -----------------------------------------------------------------------------


class Shape(NamedTuple):
    """Lengths in tokens: pairs that were served, or a law for prompts and one for answers."""

    input: LengthSpec | None = None
    output: LengthSpec | None = None
    pairs: str = ""


SHAPES: Final = {
    "chat": Shape(pairs="profiles/distserve_run.csv"),  # ShareGPT, 300 as DistServe served them
    "code": Shape(LengthSpec(mean=171, sigma=0.5, min=16, max=1024),
                  LengthSpec(mean=98, sigma=0.7, min=2, max=512)),
    "summary": Shape(LengthSpec(mean=1738, sigma=0.4, min=128, max=1940),
                     LengthSpec(mean=91, sigma=0.8, min=2, max=512)),
    "arxiv": Shape(pairs="lengths/arxiv.csv"),
    "reasoning": Shape(LengthSpec(mean=200, sigma=0.8, min=16, max=2000),
                       LengthSpec(mean=1500, sigma=0.6, min=100, max=6000)),
}  # fmt: skip


class Setting(NamedTuple):
    """Hardware and network. `kv_tokens` of an instance by (model, tp): DistServe's; else from
    memory."""

    hardware: str
    cost: str
    topology: Mapping[str, object]
    kv_tokens: Mapping[tuple[str, int], int] = {}


SETTINGS: Final = {
    "a100": Setting(
        "a100", "distserve", {"rails": 1, "nic_bandwidth": 3.125e9, "nvlink_bandwidth": 300e9},
        {("opt-13b", 1): 66_144, ("opt-13b", 2): 163_008, ("opt-66b", 4): 78_496},
    ),
    "h100": Setting(
        "h100", "measured", {"rails": None, "nic_bandwidth": 50e9, "nvlink_bandwidth": 450e9}
    ),
}  # fmt: skip


class Contender(NamedTuple):
    """`prefill` of a cell's instances only prefill and the others decode; 0: all do both.

    `chunk`: tokens of a step where sequences decode. `prefill_tp`: that of prefill instances, two
    of the cell's made into one when it is twice as much. `route` and the three after it are the
    policy's. `vllm_2023`: step times that DistServe fitted to vLLM, prompts in steps of their own.
    """

    prefill: int
    chunk: int
    route: str = "netkv_joint"
    stay_weight: float = 0.1
    stay_tokens: int = 0
    prefill_tp: int = 0
    vllm_2023: bool = False


ALL: Final = Contender(0, 8192)  # every worker does both, prompts uncut


class Cell(NamedTuple):
    """One comparison. Arrivals last `window_s`; `near`: each node has its share of both roles, else
    prefill fills the first node. `guess`: requests per second and GPU, where searches start.
    `curves`: attainment over rates is wanted too."""

    name: str
    setting: str
    model: str
    tp: int
    instances: int
    shape: str
    slo: SloSpec
    window_s: float
    contenders: Mapping[str, Contender]
    guess: float = 1.0
    near: bool = True
    curves: bool = False

    @property
    def gpus(self) -> int:
        return self.tp * self.instances


# --- clusters and arrivals ------------------------------------------------------------------------


@cache
def base() -> Deployment:
    return load_deployment(HERE / "disaggregate.yaml")


def deployment(cell: Cell, who: Contender) -> Deployment:
    """The contender's cluster, of the cell's GPUs."""
    setting = SETTINGS[cell.setting]
    per_node = cell.gpus // NODES
    changes = {
        "name": cell.name, "models": (served_model(cell),), "slo": cell.slo,
        "pools": tuple(pools(cell, who)),
        "policy.route.name": who.route, "policy.route.local_prefill_tokens": who.stay_tokens,
        "policy.route.stay_weight": who.stay_weight,
        "topology.gpus_per_node": per_node,
    }  # fmt: skip
    network = {f"topology.{key}": value for key, value in setting.topology.items()}
    return changed(base(), changes | network, cell.name)


def served_model(cell: Cell) -> ModelSpec:
    return ModelSpec(name=cell.model, shape=cell.model, max_context=8192)


def pools(cell: Cell, who: Contender) -> Iterator[PoolSpec]:
    """A pool for each role on each node; mixed instances may stand on any."""
    if not who.prefill:
        yield _pool(cell, "mixed", None, cell.instances, cell.tp, who.chunk)
        return
    wide, room = who.prefill_tp or cell.tp, cell.instances // NODES
    for node, count in enumerate(shares(who.prefill, room * cell.tp // wide, cell.near)):
        others = room - count * wide // cell.tp
        if count:
            yield _pool(cell, "prefill", node, count, wide, PREFILL_TOKENS)
        if others:
            yield _pool(cell, "decode", node, others, cell.tp, who.chunk)


def shares(count: int, room: int, near: bool) -> tuple[int, int]:
    """Of `count` instances, how many stand on each of two nodes that have `room`: as equally as can
    be, or the first node full first."""
    first = min(-(-count // NODES) if near else count, room)
    assert count - first <= room, f"{count} instances on two nodes for {room} each"
    return first, count - first


def _pool(cell: Cell, role: Any, node: int | None, count: int, tp: int, tokens: int) -> PoolSpec:
    setting = SETTINGS[cell.setting]
    kv_tokens = setting.kv_tokens.get((cell.model, tp))
    return PoolSpec(
        name=role if node is None else f"{role}-{node}",
        role=role,
        count=count,
        hardware=setting.hardware,
        tp=tp,
        nodes=None if node is None else (f"node-{node}",),
        batch_tokens_max=tokens,
        kv_blocks=kv_tokens // base().block_size if kv_tokens else None,
        cost=setting.cost,  # type: ignore[arg-type]  # by name, as in a file
    )


class InTurn(StepModel):
    """A batch of both phases as two steps: its prompts, then its decoding sequences."""

    def __init__(self, inner: StepModel) -> None:
        super().__init__()
        self._inner = inner

    def batch(self, rows: Sequence[Row]) -> float:
        """As `StepModel.batch`."""
        phases = [r for r in rows if r[0] > 1], [r for r in rows if r[0] == 1]
        return sum(self._inner.batch(phase) for phase in phases if phase)

    def _line(self, batch_size: int) -> DecodeLine:
        return self._inner.decode_line(batch_size)


@cache
def vllm_2023(setting: str, model: str, tp: int) -> StepModel:
    """DistServe's fit of the vLLM that it compared with, on the one setting that it had."""
    fits = json.loads((DATA / "profiles" / f"distserve_{setting}_vllm.json").read_text())
    fit = fits[f"facebook/{model}"][str(tp)]
    phases = [tuple(fit[key]) for key in ("prefill", "decoding_smallbs", "decoding_largebs")]
    return InTurn(TwoPhases(Coefficients(*phases, fit["decoding_large_small_bs_threshold"])))


@cache
def step_times(setting: str, model: str, tp: int) -> StepModel:
    """Made once and not in every run: they remember what they worked out."""
    alone = Cell("", setting, model, tp, 1, "", SloSpec(), 0, {})
    d = changed(base(), {"models": (served_model(alone),), "pools": tuple(pools(alone, ALL))}, "")
    return step_model(d, d.pools[0], load_tables)


def models(cell: Cell, who: Contender, d: Deployment) -> dict[str, StepModel]:
    """Step times by pool."""
    times = partial(vllm_2023 if who.vllm_2023 else step_times, cell.setting, cell.model)
    return {pool.name: times(pool.tp) for pool in d.pools}


@cache
def arrivals(shape: str, seed: int) -> tuple[Arrival, ...]:
    """One a second on average. Every rate takes a beginning of these, so that runs of a seed differ
    in nothing but the rate."""
    law = SHAPES[shape]
    spec = WorkloadSpec(rate=1, requests=REQUESTS_MAX)
    if law.input is not None and law.output is not None:
        spec = spec.model_copy(update={"input": law.input, "output": law.output})
    drawn = generate(spec, base().block_size, seed).arrivals
    if not law.pairs:
        return drawn
    random, pairs = Random(f"{seed}:pairs"), served(law.pairs)
    lengths = (pairs[int(random.random() * len(pairs))] for _ in drawn)
    return tuple(Arrival(a.at_s, *pair) for a, pair in zip(drawn, lengths, strict=True))


@cache
def served(name: str) -> tuple[tuple[int, int], ...]:
    """Prompt and output tokens of a file under `tests/data`."""
    columns = ("prompt_tokens", "output_tokens")
    with (DATA / name).open() as lines:
        return tuple((int(r[columns[0]]), int(r[columns[1]])) for r in csv.DictReader(lines))


def at_rate(cell: Cell, seed: int, rate: float) -> list[Arrival]:
    """`cell.window_s` seconds at `rate` requests a second."""
    found = []
    for a in arrivals(cell.shape, seed):
        if a.at_s >= rate * cell.window_s:
            return found
        found.append(Arrival(a.at_s / rate, a.input_tokens, a.output_tokens))
    raise ValueError(f"{cell.name}: {rate:g} requests a second are more than {REQUESTS_MAX}")


# --- one run --------------------------------------------------------------------------------------


class Tally(NamedTuple):
    """Of `total` judged requests, how many are known to be good, and how many not to be."""

    good: int
    missed: int
    total: int

    @property
    def met(self) -> bool | None:
        """Whether enough are good; None: that is still open."""
        needed = math.ceil(ATTAINED * self.total - 1e-9)
        if self.good >= needed:
            return True
        return False if self.total - self.missed < needed else None


def run(
    cell: Cell, who: Contender, seed: int, rate: float, *, whole: bool = False
) -> tuple[Tally, list[RequestOutcome]]:
    """Until it is known whether enough requests are good; `whole`: to the end. The outcomes so far
    are those of requests that came after the first fifth."""
    d, came = deployment(cell, who), at_rate(cell, seed, rate)
    warm_s = WARM * cell.window_s
    due = sorted(latest_s(cell.slo, a.at_s, a.output_tokens) for a in came if a.at_s >= warm_s)
    world = SimWorld(d, came, models=models(cell, who, d))
    seen, judged, until = 0, list[RequestOutcome](), 0.0
    tally = Tally(0, 0, len(due))
    while seen < len(came) and (whole or tally.met is None):
        until += cell.window_s / LOOKS
        world.run(until=until)
        judged += (o for o in world.recorder.outcomes[seen:] if (o.start_s or 0.0) >= warm_s)
        seen = len(world.recorder.outcomes)
        tally = tallied(cell.slo, judged, due, until)
    return tally, judged


def latest_s(slo: SloSpec, at_s: float, output_tokens: int) -> float:
    """When a good request that came at `at_s` has ended at the latest."""
    return at_s + slo.ttft_s + slo.tpot_s * (output_tokens - 1)


def tallied(
    slo: SloSpec, judged: Sequence[RequestOutcome], due: Sequence[float], now: float
) -> Tally:
    """By the outcomes so far, and by what should have ended by `now` and has not: an overloaded
    cluster ends little, so its outcomes alone would tell late."""
    well = sum(o.ok and good(o, slo) for o in judged)
    failed = sum(not o.ok for o in judged)
    ends = [latest_s(slo, o.start_s or 0.0, o.output_tokens) for o in judged if o.ok]
    late = bisect_left(due, now - SLACK_S) - sum(end <= now for end in ends) - failed
    return Tally(well, len(judged) - well + max(late, 0), len(due))


def highest(meets: Callable[[float], bool], guess: float) -> float:
    """The highest rate that `meets`, to a share `STEP` below; 0 if none from RATE_MIN on does.

    From `guess` in growing strides until it is between two rates, then by halves of their ratio.
    """
    stride, low, high = 1.1, 0.0, math.inf
    rate = guess
    while low == 0.0 or high == math.inf:
        if rate < RATE_MIN:
            return 0.0
        if meets(rate):
            low, rate = rate, rate * stride
        else:
            high, rate = rate, rate / stride
        stride *= stride
    while high > low * (1 + STEP):
        rate = math.sqrt(low * high)
        low, high = (rate, high) if meets(rate) else (low, rate)
    return low


# --- jobs -----------------------------------------------------------------------------------------


class Search(NamedTuple):
    """A job: the highest rate of one contender for each seed."""

    cell: Cell
    name: str
    seeds: int


class Point(NamedTuple):
    """A job: one run to its end."""

    cell: Cell
    name: str
    rate: float


class Seen(NamedTuple):
    """What a point gave: share of good requests, and 90th percentiles in seconds."""

    attained: float
    ttft_s_p90: float
    tpot_s_p90: float


def search(job: Search) -> list[float]:
    """Requests per second, by seed. Each seed starts from what the one before found."""
    who, found = job.cell.contenders[job.name], list[float]()
    for seed in range(job.seeds):

        def meets(rate: float, seed: int = seed) -> bool:
            return run(job.cell, who, seed, rate)[0].met is True

        guess = next((rate for rate in reversed(found) if rate), job.cell.guess * job.cell.gpus)
        found.append(highest(meets, guess))
    return found


def point(job: Point) -> Seen:
    who = job.cell.contenders[job.name]
    tally, judged = run(job.cell, who, 0, job.rate, whole=True)
    ended = [o for o in judged if o.ok]
    tpots = [(o.e2e_s - o.ttft_s) / (o.output_tokens - 1) for o in ended if o.output_tokens > 1]
    return Seen(
        tally.good / tally.total,
        float(np.quantile([o.ttft_s for o in ended], 0.9)),
        float(np.quantile(tpots, 0.9)),
    )


def each(job: Callable[[Any], Any], cases: Sequence[Any], jobs: int) -> list[Any]:
    """In the order of `cases`, wherever they ran; how many are over goes to stderr."""
    if jobs == 1:
        return [job(case) for case in cases]
    context, found = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for result in pool.map(job, cases):
            found.append(result)
            print(f"{job.__name__}: {len(found)} of {len(cases)}", end="\r", file=sys.stderr)
    return found
