"""One thread, one selector, and the ways in from other threads. Knows sockets, not transfers.

Everything that touches a connection or cache memory runs on this thread, so "after that callback
nothing is read or written" needs no lock: the callback and the copying take turns.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Final, TypeVar

log = logging.getLogger("kvasir.transfer")

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE
TIMERS_LEAST: Final = 128  # not swept below twice as many

_T = TypeVar("_T")
Task = Callable[[], None]
Ready = Callable[[int], None]  # called with the READ | WRITE bits that are ready


class Timer:
    """A task that is due later. Cancelled, it lets go of the task."""

    __slots__ = ("_task",)

    def __init__(self, task: Task) -> None:
        self._task: Task | None = task

    @property
    def cancelled(self) -> bool:
        return self._task is None

    def cancel(self) -> None:
        self._task = None

    def fire(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task()


class Loop:
    """`on_exit` runs last on the thread, when `close` was asked for."""

    def __init__(self, name: str, on_exit: Task) -> None:
        self._on_exit = on_exit
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._watched: set[socket.socket] = set()
        self.watch(self._wake_in, READ, self._woken)
        self._tasks: deque[Task] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = itertools.count()
        self._timers_swept = TIMERS_LEAST
        self._lock = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    # --- from any thread ---

    def call(self, task: Task) -> bool:
        """Run `task` on the thread, in the order of calls. False once closed: it will not run."""
        with self._lock:
            if not self._open:
                return False
            self._tasks.append(task)
            if len(self._tasks) == 1:  # else a wake-up is already on its way
                self._wake_out.send(b"\0")
            return True

    def ask(self, question: Callable[[], _T]) -> Future[_T]:
        """Run `question` on the thread; its answer or exception goes to the future."""
        future: Future[_T] = Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)

        if not self.call(answer):
            future.cancel()
        return future

    def close(self) -> None:
        """Run what is queued, then `on_exit`; returns when the thread is gone. May be repeated."""
        assert threading.current_thread() is not self._thread, "close from a callback"
        with self._lock:
            if self._open:
                self._open = False
                self._wake_out.send(b"\0")
        self._thread.join()

    # --- on the thread only ---

    def at(self, when_s: float, task: Task) -> Timer:
        """Run `task` at `time.monotonic() >= when_s`."""
        timer = Timer(task)
        if len(self._timers) >= 2 * self._timers_swept:
            self._sweep_timers()
        heapq.heappush(self._timers, (when_s, next(self._timer_ids), timer))
        return timer

    def _sweep_timers(self) -> None:
        """Forget cancelled ones: deadlines are minutes away, and most transfers take none."""
        self._timers = [entry for entry in self._timers if not entry[2].cancelled]
        heapq.heapify(self._timers)
        self._timers_swept = max(TIMERS_LEAST, len(self._timers))

    def watch(self, sock: socket.socket, events: int, ready: Ready) -> None:
        self._selector.register(sock, events, ready)
        self._watched.add(sock)

    def rewatch(self, sock: socket.socket, events: int) -> None:
        key = self._selector.get_key(sock)
        if key.events != events:
            self._selector.modify(sock, events, key.data)

    def unwatch(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._watched.discard(sock)

    # --- the thread ---

    def _run(self) -> None:
        try:
            while self._open or self._tasks:
                ready = self._selector.select(self._timeout())
                self._run_tasks()
                self._run_timers()
                for key, events in ready:
                    # A task or an earlier socket of this round may have closed this one.
                    if key.fileobj in self._watched:
                        _guarded(partial(key.data, events))
        finally:
            _guarded(self._on_exit)
            self._selector.close()
            with self._lock:  # `close` may be about to wake the thread
                self._wake_in.close()
                self._wake_out.close()

    def _timeout(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _woken(self, _events: int) -> None:
        """Nothing to do: `_run_tasks` eats the byte, ahead of what is ready."""

    def _run_tasks(self) -> None:
        if not self._tasks:
            return
        with self._lock:
            tasks, self._tasks = self._tasks, deque()
            self._wake_in.recv(64)  # sent under the lock with the first task: it is there
        for task in tasks:
            _guarded(task)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _guarded(heapq.heappop(self._timers)[2].fire)


def _guarded(task: Task) -> None:
    """A defect in one task must not end the transfers of all others."""
    try:
        task()
    except Exception:
        log.exception("a transfer task failed")
