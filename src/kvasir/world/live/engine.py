"""One thread owns the runner: steps and everything else that touches it go through a queue.

Knows the runner's contract and how to call back on the event loop. Must not know nodes or sockets.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvasir.core.effects import Step
from kvasir.core.ids import RequestId
from kvasir.core.messages import StepDone
from kvasir.engine.base import Runner, Sampled


class Stream(NamedTuple):
    """Blocks whose layers leave while a step computes them."""

    request_id: RequestId
    attempt: int
    first_block: int
    blocks: tuple[int, ...]
    codec: str = ""


Push = Callable[[Stream, int], None]


class EngineThread:
    """`on_tokens` and `on_step` are called on the loop, in order; `push` on the engine thread."""

    def __init__(
        self, runner: Runner, loop: asyncio.AbstractEventLoop, *, push: Push,
        on_tokens: Callable[[Sequence[Sampled]], None], on_step: Callable[[StepDone], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self.runner = runner
        self._loop = loop
        self._push = push
        self._on_tokens, self._on_step, self._on_failure = on_tokens, on_step, on_failure
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._cut_step = 0
        self._layers = len(runner.spec.layers)
        self._lock = threading.Lock()  # guards the three below
        self._running: _Hooks | None = None
        self._begun = 0  # the last step that began; step ids grow
        self._waiting: dict[int, list[Stream]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def do(self, action: Callable[[], None]) -> None:
        """Run `action` on the engine thread, after what was asked before."""
        self._queue.put(action)

    def step(self, step: Step) -> None:
        self._queue.put(lambda: self._step(step))

    def stream(self, step_id: int, stream: Stream) -> None:
        """Push `stream`'s layers as that step completes them; those that it has completed, now."""
        with self._lock:
            running = self._running
            if step_id > self._begun:
                self._waiting.setdefault(step_id, []).append(stream)
                return
            done = self._layers
            if running is not None and running.step.id == step_id:
                running.streams.append(stream)
                done = running.layers_done
        for layer in range(done):
            self._push(stream, layer)

    def cut(self, step_id: int) -> None:
        """End that step after its current iteration; too late for one that is over."""
        self._cut_step = step_id

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
            except Exception as error:
                self._call(lambda error=error: self._on_failure(error))  # type: ignore[misc]
                return

    def _step(self, step: Step) -> None:
        with self._lock:
            hooks = _Hooks(self, step, self._waiting.pop(step.id, []))
            self._running, self._begun = hooks, step.id
        began = time.monotonic()
        result = self.runner.step(step, hooks)
        with self._lock:
            self._running = None
        first_s = (hooks.first_at or time.monotonic()) - began
        done = StepDone(step.id, result.steps_done, result.rows, first_s)
        self._call(lambda: self._on_step(done))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed: the process is going down
            return


class _Hooks:
    """`engine.base.StepHooks` of one step."""

    def __init__(self, engine: EngineThread, step: Step, streams: list[Stream]) -> None:
        self._engine, self.step, self.streams = engine, step, streams
        self.layers_done = 0
        self.first_at: float | None = None  # when the first iteration ended

    def layer_done(self, layer: int) -> None:
        with self._engine._lock:
            self.layers_done = layer + 1
            streams = list(self.streams)
        for stream in streams:
            self._engine._push(stream, layer)

    def sampled(self, batch: Sequence[Sampled]) -> None:
        if self.first_at is None:
            self.first_at = time.monotonic()
        if batch:
            tokens = list(batch)
            self._engine._call(lambda: self._engine._on_tokens(tokens))

    def cut(self) -> bool:
        return self._engine._cut_step == self.step.id
