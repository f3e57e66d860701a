"""The transfer thread's timers: they fire in order, and cancelled ones do not pile up."""

import threading
import time
from functools import partial

from kvasir.transfer.loop import TIMERS_LEAST, Loop


def test_cancelled_timers_are_forgotten_and_others_fire_in_order() -> None:
    fired, done = list[int](), threading.Event()
    loop = Loop("test", lambda: None)
    loop.start()

    def begin() -> None:
        now = time.monotonic()
        for i in range(20 * TIMERS_LEAST):
            timer = loop.at(now + 600.0, lambda: fired.append(-1))
            if i % TIMERS_LEAST == 0:
                loop.at(now + 0.02 - i * 1e-6, partial(fired.append, i))
            timer.cancel()
        loop.at(now + 0.03, done.set)

    try:
        loop.call(begin)
        assert done.wait(10)
        kept = loop.ask(lambda: len(loop._timers)).result(10)
    finally:
        loop.close()
    assert fired == sorted(fired, reverse=True) and len(fired) == 20
    assert kept <= 2 * TIMERS_LEAST
