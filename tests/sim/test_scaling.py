"""Twice the requests cost about twice the time: nothing looks at all that went before."""

import time

from kvasir.cli.files import load_deployment
from kvasir.traces.record import Trace
from kvasir.traces.workload import workload
from kvasir.world.sim.run import simulate

WORST = 2.3


def cpu_s(trace: Trace) -> float:
    began = time.process_time()
    simulate(load_deployment("reference-64"), trace)
    return time.process_time() - began


def test_doubling_the_requests_doubles_the_time() -> None:
    """In turns, and the best of each: what the machine does beside adds, it never takes away."""
    d = load_deployment("reference-64")
    once, twice = (
        workload(d.workload.model_copy(update={"requests": n}), d.block_size, d.seed)
        for n in (1500, 3000)
    )
    times = [(cpu_s(once), cpu_s(twice)) for _ in range(3)]
    ratio = min(t for _, t in times) / min(t for t, _ in times)
    assert ratio < WORST, times
