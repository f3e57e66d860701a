"""Names of the blocks that answers fill, as far as a trace tells them: by the session's next turn.

A session's next prompt begins with its last one and the answer, so its ids name both. Of an
answer that nothing follows, nobody will ask.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.ids import BlockKey
from kvasir.traces.record import Arrival


def answer_keys(
    arrivals: Sequence[Arrival], block_size: int
) -> tuple[tuple[BlockKey, ...], ...]:
    """For each arrival, in order: keys of the blocks after its prompt's full ones that its answer
    completes; none where the session's next prompt does not begin with this one."""
    following: dict[str, Arrival] = {}
    found: list[tuple[BlockKey, ...]] = []
    for arrival in reversed(arrivals):
        if arrival.session is None:
            found.append(())
            continue
        later, following[arrival.session] = following.get(arrival.session), arrival
        found.append(_answer(arrival, later, block_size) if later is not None else ())
    return tuple(reversed(found))


def _answer(arrival: Arrival, later: Arrival, block_size: int) -> tuple[BlockKey, ...]:
    own, all_keys = arrival.keys(block_size), later.keys(block_size)
    if all_keys[: len(own)] != own:
        return ()
    return all_keys[len(own) : (arrival.input_tokens + arrival.output_tokens) // block_size]
