"""Worker processes, started from here, watched, started again when they die.

A worker may have a command before its own, that becomes it (`endpoints`). Knows processes. Must not
know requests: a death is told to the conductor, which does the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from kvasir.core.errors import ConfigError
from kvasir.core.ids import WorkerId
from kvasir.core.messages import WorkerGone
from kvasir.core.specs import Deployment
from kvasir.runtime.plan import LEFT, UNUSABLE, StartFile

RESTARTS_MAX = 5  # in a row, without having lived for STABLE_S
STABLE_S = 30.0
BACKOFF_S = 0.2
STOP_S = 5.0


class Fleet:
    """All workers of a deployment. `on_gone` hears of each death, `on_lost` of one given up, with
    the fault that no restart can mend, if there is one; `on_left` of those that left on purpose."""

    def __init__(
        self, deployment: Deployment, run_dir: str, record: Path | None, *,
        on_gone: Callable[[WorkerGone], None], on_lost: Callable[[WorkerId, str], None],
        on_left: Callable[[WorkerId], None] = lambda worker: None,
    ) -> None:  # fmt: skip
        self._deployment = deployment
        self._json = deployment.model_dump_json()
        self._run_dir, self._record = run_dir, record
        self._on_gone, self._on_lost, self._on_left = on_gone, on_lost, on_left
        self._processes: dict[WorkerId, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self) -> None:
        for worker in self._deployment.worker_ids():
            self._tasks.append(asyncio.create_task(self._keep(worker)))

    def pid(self, worker: WorkerId) -> int | None:
        process = self._processes.get(worker)
        return process.pid if process is not None and process.returncode is None else None

    async def _keep(self, worker: WorkerId) -> None:
        """Start, wait for its end, start again."""
        loop = asyncio.get_running_loop()
        incarnation = failures = 0
        while not self._stopping:
            incarnation += 1
            began = loop.time()
            start = StartFile(
                self._json, worker, incarnation, self._run_dir,
                str(self._record) if self._record is not None else None,
            )  # fmt: skip
            try:
                process = await self._spawn(start)
            except OSError as error:
                self._on_lost(worker, self._not_run(worker, error))
                return
            status = await process.wait()
            if self._stopping:
                return
            if status == UNUSABLE:
                self._on_lost(worker, start.fault.read_text())
                return
            self._on_gone(WorkerGone(worker, incarnation, _words(status)))
            if status == LEFT:
                self._on_left(worker)
                return
            failures = 0 if loop.time() - began > STABLE_S else failures + 1
            if failures > RESTARTS_MAX:
                self._on_lost(worker, "")
                return
            await asyncio.sleep(BACKOFF_S * 2**failures)

    async def _spawn(self, start: StartFile) -> asyncio.subprocess.Process:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        own = (sys.executable, "-m", "kvasir.runtime.worker", str(start.save()))
        process = await asyncio.create_subprocess_exec(
            *self._command(start.worker), *own,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._processes[start.worker] = process
        return process

    def _command(self, worker: WorkerId) -> tuple[str, ...]:
        endpoint = self._deployment.endpoints.get(worker)
        return endpoint.command if endpoint is not None else ()

    def _not_run(self, worker: WorkerId, error: OSError) -> str:
        (name, *_) = (*self._command(worker), sys.executable)
        return str(ConfigError(
            f"{name!r} cannot be run: {error.strerror}", where=f"endpoints.{worker}.command"
        ))  # fmt: skip

    async def stop(self) -> None:
        """End every process that was started here, by its own id."""
        self._stopping = True
        living = [p for p in self._processes.values() if p.returncode is None]
        for process in living:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGHUP)  # SIGTERM would ask it to leave in good order
        _, late = await asyncio.wait(
            [asyncio.create_task(p.wait()) for p in living], timeout=STOP_S
        ) if living else (set(), set())
        for process in living if late else []:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *late, return_exceptions=True)


def _words(status: int) -> str:
    if status == LEFT:
        return "left"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
