"""The prompts that came last, as chains of keys: what may be asked for again. Knows no worker.

Bounded in blocks and in prompts; the least recent go first. Of a session only the longest stays, as
each turn begins with the one before.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from kvasir.core.ids import BlockKey
from kvasir.core.request import Request

Name = str | BlockKey


class Recent:
    """Requests by session, or by their last key where they have none."""

    def __init__(self, blocks_max: int, prompts_max: int) -> None:
        assert blocks_max > 0 and prompts_max > 0
        self._blocks_max, self._prompts_max = blocks_max, prompts_max
        self._all: OrderedDict[Name, Request] = OrderedDict()
        self._blocks = 0

    def __len__(self) -> int:
        return len(self._all)

    def keep(self, request: Request, answer: tuple[BlockKey, ...] = ()) -> None:
        """Its prompt was sent, or has been answered by what `answer` names."""
        if not request.keys:
            return
        if answer:
            self._drop(request.keys[-1])
            request = msgspec.structs.replace(request, keys=request.keys + answer)
        name = request.keys[-1] if request.session is None else request.session
        self._drop(name)
        if len(request.keys) > self._blocks_max:
            return
        self._all[name] = request
        self._blocks += len(request.keys)
        while self._blocks > self._blocks_max or len(self._all) > self._prompts_max:
            self._drop(next(iter(self._all)))

    def of(self, session: str) -> Request | None:
        """The session's last prompt, with its answer once that is known."""
        return self._all.get(session)

    def latest_first(self) -> list[Request]:
        return list(reversed(self._all.values()))

    def _drop(self, name: Name) -> None:
        old = self._all.pop(name, None)
        if old is not None:
            self._blocks -= len(old.keys)

    def check(self) -> None:
        assert self._blocks == sum(len(r.keys) for r in self._all.values()) <= self._blocks_max
        assert len(self._all) <= self._prompts_max
