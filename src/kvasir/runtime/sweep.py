"""Many simulations at once: here, in a process a core, or on a Ray cluster. One list of cases and
one function that runs a case; decides nothing about them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Final, NamedTuple

import msgspec

from kvasir import __version__
from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment
from kvasir.runtime.policies import ready
from kvasir.traces.workload import Part, part_of, workload
from kvasir.world.sim.run import Result, simulate

CONNECT_S_MAX: Final = 5.0
CLUSTER: Final = "ray start --head --port 6379, then --ray HOST:6379"


class Case(NamedTuple):
    """`label` names it in results; the deployment's own workload says what arrives, `part` which
    share of that."""

    label: str
    deployment: Deployment
    seed: int
    part: Part = Part()


class Done(NamedTuple):
    """The case at place `at` of the list is over."""

    at: int
    result: Result


def run_case(case: Case) -> Result:
    """One simulation, a pure function of the case. Single requests' outcomes are left out: a sweep
    of a thousand runs would hold millions."""
    d = case.deployment
    ready(d.policy.route)  # a process of its own has imported nothing yet
    trace = part_of(workload(d.workload, d.block_size, case.seed), case.part)
    return msgspec.structs.replace(simulate(d, trace, seed=case.seed), outcomes=())


def sweep(
    cases: Sequence[Case],
    *,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Result]:
    """Results in the order of `cases`, the same wherever they ran.

    `jobs` processes, by default one a core; 1: in this one. `ray`: the address of a cluster whose
    machines have this version of Kvasir; `jobs` does not count then. Raises whatever a case raises;
    ConfigError when Ray is not installed or no cluster answers.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(cases))
    if ray is not None:
        over = _on_ray(cases, ray)
    elif jobs > 1:
        over = _in_processes(cases, jobs)
    else:
        over = (Done(at, run_case(case)) for at, case in enumerate(cases))
    results: dict[int, Result] = {}
    for done in over:
        results[done.at] = done.result
        if progress is not None:
            progress(len(results) / len(cases))
    return [results[at] for at in range(len(cases))]


def _in_processes(cases: Sequence[Case], jobs: int) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(run_case, case): at for at, case in enumerate(cases)}
        for future in as_completed(futures):
            yield Done(futures[future], future.result())


# --- Ray ------------------------------------------------------------------------------------------


def _on_ray(cases: Sequence[Case], address: str) -> Iterator[Done]:
    """One task a case, a core each. A task whose machine dies is run again elsewhere (Ray's own
    default), which a pure function allows."""
    ray = _ray(address)
    task = ray.remote(_run_there)
    try:
        pending = {task.remote(case, __version__): at for at, case in enumerate(cases)}
        while pending:
            (over,), _ = ray.wait(list(pending), num_returns=1)
            yield Done(pending.pop(over), ray.get(over))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        ray.shutdown()


def _run_there(case: Case, version: str) -> Result:
    if version != __version__:
        raise ConfigError(
            f"a machine of the Ray cluster has kvasir {__version__}, the sweep is of {version}",
            next_step="install the same version on each",
        )
    return run_case(case)


def _ray(address: str) -> Any:
    """The module, connected to the cluster at `address` (host:port, or ray://host:port)."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--ray {address}: an address is HOST:PORT", next_step=CLUSTER)
    if host in ("127.0.0.1", "localhost"):
        # Else Ray replaces a loopback address by an outer one; it looks when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--ray: Ray is not installed", next_step="pip install 'kvasir-llm[ray]'"
        ) from None
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host, int(port)), timeout=CONNECT_S_MAX).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"--ray {address}: no cluster answers ({said[:80]})", next_step=CLUSTER
        ) from None
    return ray
