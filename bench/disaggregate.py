"""When do separate prefill and decode workers pay? Goodput of both, over rates, at equal GPUs.

    python bench/disaggregate.py [--jobs 2] [--seeds 3] [--only a100] [--plots docs/disaggregate]
    python bench/disaggregate.py --quick       one cell, two seeds, seconds

Goodput is the highest rate at which 90 % of the requests meet TTFT and TPOT jointly, per GPU, found
by bisection for each seed; contenders share a seed's arrivals, so ratios are paired. Mixed workers
with chunked prefill, prefill and decode workers, and those with a choice for each request
(`netkv_joint`) run on the scheduler that serves. DistServe's SLOs and, on A100, its fitted times.
`docs/when-to-disaggregate.md` discusses the result. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

from kvasir.cli.files import load_deployment
from kvasir.cli.overrides import changed
from kvasir.core.specs import Deployment, LengthSpec, ModelSpec, PoolSpec, SloSpec, WorkloadSpec
from kvasir.cost.pools import step_model
from kvasir.cost.profile import TwoPhases
from kvasir.cost.published import Coefficients
from kvasir.cost.step import DecodeLine, Row, StepModel
from kvasir.measure import svg
from kvasir.measure.calibration import load_tables
from kvasir.measure.intervals import Interval, interval
from kvasir.measure.summary import RequestOutcome, good
from kvasir.measure.svg import Chart, Series
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival
from kvasir.world.sim.world import SimWorld

HERE: Final = Path(__file__).parent
DATA: Final = HERE.parent / "tests" / "data"
NODES: Final = 2
ATTAINED: Final = 0.9
STEP: Final = 0.02  # a maximum is known to this share of itself
RATE_MIN: Final = 1e-3
WARM: Final = 0.2  # requests of the first fifth of a run load the cluster and are not judged
LOOKS: Final = 25  # a run is looked at so often
PREFILL_TOKENS: Final = 2048  # of a step of a prefill worker
REQUESTS_MAX: Final = 20_000
GRID: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)


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


def mixed(chunk: int) -> Contender:
    return Contender(0, chunk)


def split(prefill: int) -> Contender:
    return Contender(prefill, PREFILL_TOKENS, "netkv")


def joint(prefill: int, stay_weight: float) -> Contender:
    return Contender(prefill, 512, stay_weight=stay_weight)


class Cell(NamedTuple):
    """One comparison. Arrivals last `window_s`; `near`: each node has its share of both roles, else
    prefill fills the first node."""

    name: str
    setting: str
    model: str
    tp: int
    instances: int
    shape: str
    slo: SloSpec
    window_s: float
    contenders: Mapping[str, Contender]
    near: bool = True

    @property
    def gpus(self) -> int:
        return self.tp * self.instances


VLLM: Final = {"vLLM 2023": Contender(0, 8192, "round_robin", vllm_2023=True)}
MIXED: Final = {"mixed 512": mixed(512), "mixed 2048": mixed(2048), "mixed whole": mixed(8192)}
FOUR: Final = MIXED | {
    "1P:3D": split(1), "2P:2D": split(2), "3P:1D": split(3),
    "1P:3D stay": split(1)._replace(chunk=512, stay_tokens=256),
    "1P:3D joint 1": joint(1, 1), "1P:3D joint 0.01": joint(1, 0.01),
    "2P:2D joint 0.01": joint(2, 0.01),
}  # fmt: skip
EIGHT: Final = MIXED | {
    "2P:6D": split(2), "3P:5D": split(3), "4P:4D": split(4), "5P:3D": split(5),
    "2P(tp 2):4D": split(2)._replace(prefill_tp=2),
    "3P:5D stay": split(3)._replace(chunk=512, stay_tokens=256),
    "3P:5D joint 1": joint(3, 1), "3P:5D joint 0.01": joint(3, 0.01),
    "4P:4D joint 0.01": joint(4, 0.01),
}  # fmt: skip
TWO: Final = MIXED | {
    "1P:1D": split(1), "1P:1D stay": split(1)._replace(chunk=512, stay_tokens=256),
    "1P:1D joint 1": joint(1, 1), "1P:1D joint 0.01": joint(1, 0.01),
}  # fmt: skip


def slo(ttft_s: float, tpot_s: float) -> SloSpec:
    return SloSpec(ttft_s=ttft_s, tpot_s=tpot_s)


LLAMA: Final = "llama-3.1-70b"
CELLS: Final = (
    Cell("a100 chat", "a100", "opt-13b", 1, 8, "chat", slo(0.25, 0.1), 30, EIGHT | VLLM),
    Cell("a100 code", "a100", "opt-66b", 4, 4, "code", slo(0.125, 0.2), 30, FOUR | VLLM),
    Cell("a100 summary", "a100", "opt-66b", 4, 4, "summary", slo(15, 0.15), 120, FOUR | VLLM),
    Cell("h100 chat", "h100", LLAMA, 4, 4, "chat", slo(0.4, 0.1), 30, FOUR),
    Cell("h100 code", "h100", LLAMA, 4, 4, "code", slo(0.125, 0.2), 20, FOUR),
    Cell("h100 summary", "h100", LLAMA, 4, 4, "arxiv", slo(15, 0.15), 120, FOUR),
    Cell("h100 chat, TPOT 30 ms", "h100", LLAMA, 4, 4, "chat", slo(0.4, 0.03), 30, FOUR),
    Cell("h100 chat, two instances", "h100", LLAMA, 4, 2, "chat", slo(0.4, 0.1), 40, TWO),
    Cell("h100 reasoning", "h100", LLAMA, 4, 4, "reasoning", slo(0.4, 0.05), 100, FOUR),
    Cell("a100 summary, apart", "a100", "opt-66b", 4, 4, "summary", slo(15, 0.15), 120, FOUR,
         near=False),
)  # fmt: skip


# --- clusters and arrivals ------------------------------------------------------------------------


@cache
def base() -> Deployment:
    return load_deployment(HERE / "disaggregate.yaml")


def deployment(cell: Cell, who: Contender) -> Deployment:
    """The contender's cluster, of the cell's GPUs."""
    setting = SETTINGS[cell.setting]
    per_node = cell.gpus // NODES
    model = ModelSpec(name=cell.model, shape=cell.model, max_context=8192)
    changes = {
        "name": cell.name, "models": (model,), "slo": cell.slo, "pools": tuple(pools(cell, who)),
        "policy.route.name": who.route, "policy.route.local_prefill_tokens": who.stay_tokens,
        "policy.route.stay_weight": who.stay_weight,
        "topology.gpus_per_node": per_node,
    }  # fmt: skip
    network = {f"topology.{key}": value for key, value in setting.topology.items()}
    return changed(base(), changes | network, cell.name)


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
def vllm_2023(model: str, tp: int) -> StepModel:
    """DistServe's fit of the vLLM that it compared with."""
    fits = json.loads((DATA / "profiles" / "distserve_a100_vllm.json").read_text())
    fit = fits[f"facebook/{model}"][str(tp)]
    phases = [tuple(fit[key]) for key in ("prefill", "decoding_smallbs", "decoding_largebs")]
    return InTurn(TwoPhases(Coefficients(*phases, fit["decoding_large_small_bs_threshold"])))


@cache
def models(d: Deployment, vllm: bool) -> dict[str, StepModel]:
    """Step times by pool, so that they are made once and not in every run."""
    if vllm:
        return {pool.name: vllm_2023(d.models[0].name, pool.tp) for pool in d.pools}
    return {pool.name: step_model(d, pool, load_tables) for pool in d.pools}


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
    with (DATA / name).open() as lines:
        return tuple((int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(lines))


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
    total = sum(a.at_s >= warm_s for a in came)
    world = SimWorld(d, came, models=models(d, who.vllm_2023))
    seen, judged, until = 0, list[RequestOutcome](), 0.0
    tally = Tally(0, 0, total)
    while seen < len(came) and (whole or tally.met is None):
        until += cell.window_s / LOOKS
        world.run(until=until)
        new = [o for o in world.recorder.outcomes[seen:] if (o.start_s or 0.0) >= warm_s]
        seen = len(world.recorder.outcomes)
        well = sum(o.ok and good(o, cell.slo) for o in new)
        tally = Tally(tally.good + well, tally.missed + len(new) - well, total)
        judged += new
    return tally, judged


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


# --- all runs -------------------------------------------------------------------------------------


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

        guess = next((rate for rate in reversed(found) if rate), GUESS * job.cell.gpus)
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
    """In the order of `cases`, wherever they ran."""
    if jobs == 1:
        return [job(case) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(job, cases))


# --- what came out --------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of a cell: requests per second and GPU by contender and seed; the best of each family; and
    attainment over rates per GPU of these."""

    cell: Cell
    goodput: dict[str, list[float]]
    best: dict[str, str]
    rates: tuple[float, ...]
    seen: dict[str, list[Seen]]


FAMILIES: Final = {"mixed": "every worker does both", "split": "prefill and decode workers",
                   "choice": "prefill and decode workers, a choice for each request"}  # fmt: skip


def family(who: Contender) -> str:
    """Which of FAMILIES; empty for what is shown for comparison only."""
    if who.vllm_2023:
        return ""
    if not who.prefill:
        return "mixed"
    return "choice" if who.stay_tokens or who.route == "netkv_joint" else "split"


def best_of(cell: Cell, goodput: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The contender with the highest mean in each family."""
    return {
        kind: max(
            (n for n, who in cell.contenders.items() if family(who) == kind),
            key=lambda n: fmean(goodput[n]),
        )
        for kind in FAMILIES
    }


def ratio(samples: Sequence[float], base: Sequence[float]) -> Interval | None:
    """Of samples that share their seeds; None where the base served nothing."""
    return interval([a / b for a, b in zip(samples, base, strict=True)]) if all(base) else None


def explore(cells: Sequence[Cell], seeds: int, jobs: int) -> list[Found]:
    """Highest rates first; then, over multiples of the best mixed one, how the best of each family
    attain."""
    searches = [Search(cell, name, seeds) for cell in cells for name in cell.contenders]
    rates = dict(zip(searches, each(search, searches, jobs), strict=True))
