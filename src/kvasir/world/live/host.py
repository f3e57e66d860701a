"""A node in a live process: inputs in order, journaled, effects performed. Knows no kind of node.

Inputs are handled one at a time on the event loop's thread. What performing an effect brings about
at once (a message to a node in the same process) waits its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from kvasir.core import effects as fx
from kvasir.core.events import AnyEvent
from kvasir.core.ids import NodeId
from kvasir.core.messages import Alarm, AnyMessage, bare
from kvasir.node import Node
from kvasir.world.journal import Journal
from kvasir.world.live.wire import Envelope, Wire

Perform = Callable[[Any], None]


class Bus:
    """Where messages go: to a host of this process, or over the wire."""

    def __init__(self) -> None:
        self.hosts: dict[NodeId, Host] = {}
        self.wire: Wire | None = None
        self.observe: Callable[[AnyEvent], None] | None = None

    def tell(self, src: NodeId, dst: NodeId, message: AnyMessage) -> None:
        host = self.hosts.get(dst)
        if host is not None:
            host.feed(message)
        elif self.wire is not None:
            self.wire.send(src, dst, (message,))

    def deliver(self, envelope: Envelope) -> None:
        """What came over the wire. Events go to the observer, whoever they are addressed to."""
        if self.observe is not None:
            for event in envelope.events:
                self.observe(event)
        host = self.hosts.get(envelope.dst)
        if host is not None:
            for message in envelope.messages:
                host.feed(message)


class Host:
    """`perform` adds to or replaces how effects are performed; `arriving` sees a message whole,
    before the node gets it without token ids. False: the node does not get it; it is fed later."""

    def __init__(
        self, node_id: NodeId, node: Node, bus: Bus, journal: Journal | None,
        perform: Mapping[type[fx.Effect], Perform],
        arriving: Callable[[AnyMessage], bool] | None = None,
    ) -> None:  # fmt: skip
        self.id = node_id
        self.node = node
        self.failed: BaseException | None = None
        self._bus = bus
        self._journal = journal
        self._arriving = arriving
        self._loop = asyncio.get_running_loop()
        self._queue: deque[AnyMessage] = deque()
        self._busy = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._perform: dict[type[fx.Effect], Perform] = {
            fx.Tell: self._tell, fx.Timer: self._timer, **perform,
        }  # fmt: skip
        bus.hosts[node_id] = self

    def feed(self, message: AnyMessage) -> None:
        """Handle a message now, or after those that came before it."""
        self._queue.append(message)
        if self._busy:
            return
        self._busy = True
        try:
            while self._queue:
                self._handle(self._queue.popleft())
        finally:
            self._busy = False

    def _handle(self, message: AnyMessage) -> None:
        if self._arriving is not None and not self._arriving(message):
            return
        event = bare(message)
        now = time.monotonic()
        effects = self.node.handle(now, event)
        if self._journal is not None:
            self._journal.add(now, event, effects)
        for effect in effects:
            self._perform[type(effect)](effect)

    def _tell(self, effect: fx.Tell) -> None:
        self._bus.tell(self.id, effect.to, effect.message)

    def _timer(self, effect: fx.Timer) -> None:
        old = self._timers.pop(effect.name, None)
        if old is not None:
            old.cancel()
        delay = max(0.0, effect.at - time.monotonic())
        self._timers[effect.name] = self._loop.call_later(delay, self._due, effect.name)

    def _due(self, name: str) -> None:
        self._timers.pop(name, None)
        self.feed(Alarm(name))

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._bus.hosts.pop(self.id, None)
