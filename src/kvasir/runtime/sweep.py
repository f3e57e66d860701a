"""Many simulations at once, one process a core. Decides nothing about them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

from kvasir.core.specs import Deployment
from kvasir.runtime.policies import ready
from kvasir.traces.workload import workload
from kvasir.world.sim.run import Result, simulate


class Case(NamedTuple):
    """`label` names it in results; the deployment's own workload says what arrives."""

    label: str
    deployment: Deployment
    seed: int


def run_case(case: Case) -> Result:
    """One simulation, a pure function of the case."""
    d = case.deployment
    ready(d.policy.route)  # a process of its own has imported nothing yet
    return simulate(d, workload(d.workload, d.block_size, case.seed), seed=case.seed)


def sweep(
    cases: Sequence[Case],
    *,
    jobs: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Result]:
    """Results in the order of `cases`. `jobs` processes, by default one a core; 1: in this one.

    Raises whatever a case raises.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(cases))
    if jobs <= 1:
        return [_counted(i, case, len(cases), progress) for i, case in enumerate(cases)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(run_case, case) for case in cases]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if progress is not None:
                progress(done / len(cases))
        return [future.result() for future in futures]


def _counted(
    index: int, case: Case, total: int, progress: Callable[[float], None] | None
) -> Result:
    result = run_case(case)
    if progress is not None:
        progress((index + 1) / total)
    return result
