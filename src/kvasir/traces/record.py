"""One request of a trace, and a trace. Pure data: opens no file and draws no number."""

from __future__ import annotations

import hashlib

import msgspec

from kvasir.core.ids import BlockKey
from kvasir.core.keys import trace_keys


class Arrival(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """`input_tokens` arrive `at_s` seconds after the start and want `output_tokens`, both >= 1.

    `hash_ids` name the prompt's blocks in order, one id for a block *and all before it*; the last
    block may be partial. Empty when the trace says nothing about prefixes. The same ids under
    another `adapter` are other blocks. `tenant`: who asks; none: anybody.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session: str | None = None
    adapter: str | None = None
    tenant: str | None = None

    def keys(self, block_size: int) -> tuple[BlockKey, ...]:
        """Keys of the prompt's full blocks; a partial last block has none."""
        return trace_keys(self.hash_ids[: self.input_tokens // block_size], self.adapter)


class Trace(msgspec.Struct, frozen=True):
    """Arrivals in order of time. `block_size` is None when no arrival has `hash_ids`.

    Whatever prints figures of a trace prints its `notes` too: they say what was done to it.
    """

    name: str
    block_size: int | None
    arrivals: tuple[Arrival, ...]
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival."""
        return self.arrivals[-1].at_s if self.arrivals else 0.0

    def digest(self) -> str:
        """32 hex digits over all arrivals: equal iff the workload is."""
        data = msgspec.msgpack.encode(self.arrivals)
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    @property
    def input_tokens(self) -> int:
        return sum(a.input_tokens for a in self.arrivals)

    @property
    def output_tokens(self) -> int:
        return sum(a.output_tokens for a in self.arrivals)
