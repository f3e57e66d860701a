"""Layer 2: sans-I/O state machines, `handle(now, event) -> list[Effect]`, the same in both worlds.

No clock, no socket, no thread, no randomness: time comes in with each event, everything to be done
goes out as an effect. A node replayed on the same inputs gives the same effects, byte for byte.
"""

from __future__ import annotations

from typing import Protocol

from kvasir.core.effects import AnyEffect
from kvasir.core.messages import AnyMessage


class Node(Protocol):
    """`now` never decreases. Effects are performed in order, after `handle` has returned."""

    def handle(self, now: float, event: AnyMessage) -> list[AnyEffect]: ...

    def check(self) -> None:
        """Assert the node's invariants."""
        ...
