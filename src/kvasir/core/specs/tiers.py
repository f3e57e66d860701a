"""A pool's tiers: where KV goes when the device has no room for it, and how it comes back.

Sizes, rules and a path. Must not know how bytes are kept, nor what a policy makes of the numbers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvasir.core.specs.base import Spec, wrong


class HostTier(Spec):
    """Memory of the host. Its size by `blocks` or by `bytes`, of each worker.

    `evict`: which blocks go first (`policy/evict.py`). `write`: `always` when a block is full,
    `reused` when it is used a second time, `never`. `bytes_per_s`: what the simulator takes, and
    live what is assumed until it was measured (None: what the hardware's data sheet says).
    """

    blocks: int | None = Field(default=None, gt=0)
    bytes: int | None = Field(default=None, gt=0)
    evict: Literal["lru", "lfu", "length", "cost"] = "lru"
    write: Literal["always", "reused", "never"] = "always"
    bytes_per_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_size(self) -> HostTier:
        if (self.blocks is None) == (self.bytes is None):
            raise wrong("give its size, either as blocks or as bytes", "bytes")
        return self

    def blocks_of(self, block_bytes: int) -> int:
        """How many blocks of that size it holds; 0 when not even one."""
        return self.blocks if self.blocks is not None else (self.bytes or 0) // block_bytes


class DiskTier(HostTier):
    """A file in the folder `path` for each worker (`serve` needs one; `simulate` does not). It
    survives a restart of the worker."""

    path: str | None = None


class TiersSpec(Spec):
    """`load`: `auto` takes from a tier what is predicted to come sooner than it is computed;
    `always` takes all that there is. `wait_s`: how much longer than computing a load may take
    before it is given up."""

    host: HostTier | None = None
    disk: DiskTier | None = None
    load: Literal["auto", "always"] = "auto"
    wait_s: float = Field(default=0.1, ge=0)
