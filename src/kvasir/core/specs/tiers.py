"""A pool's tiers: where KV goes when the device has no room for it, and how it comes back.

Sizes, rules and a path. Must not know how bytes are kept, nor what a policy makes of the numbers.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from kvasir.core.specs.base import Spec, wrong

STORES: Final = ("redis", "rediss", "unix", "mooncake")


class SizedTier(Spec):
    """A tier's size, by `blocks` or by `bytes`, and its rate.

    `write`: `always` when a block is full, `reused` when it is used a second time, `never`.
    `bytes_per_s`: what the simulator takes, and live what is assumed until it was measured (None:
    what the hardware's data sheet says).
    """

    blocks: int | None = Field(default=None, gt=0)
    bytes: int | None = Field(default=None, gt=0)
    write: Literal["always", "reused", "never"] = "always"
    bytes_per_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_size(self) -> SizedTier:
        if (self.blocks is None) == (self.bytes is None):
            raise wrong("give its size, either as blocks or as bytes", "bytes")
        return self

    def blocks_of(self, block_bytes: int) -> int:
        """How many blocks of that size it holds; 0 when not even one."""
        return self.blocks if self.blocks is not None else (self.bytes or 0) // block_bytes


class HostTier(SizedTier):
    """Memory of the host, of each worker. `evict`: which blocks go first (`policy/evict.py`)."""

    evict: Literal["lru", "lfu", "length", "cost"] = "lru"


class DiskTier(HostTier):
    """A file in the folder `path` for each worker (`serve` needs one; `simulate` does not). It
    survives a restart of the worker."""

    path: str | None = None


class ClusterTier(SizedTier):
    """A store that all workers share: what one has stored any may load, also after a restart.

    `url`: `redis://[user:password@]host:port/db` (also `rediss://`, `unix://`) or
    `mooncake://host:port` of a Mooncake master, with `?protocol=rdma&device=...` for RDMA (`serve`
    needs one; `simulate` does not). `blocks` or `bytes`: of the whole store, which evicts by its
    own rule, the longest unused first when simulated. `lend_bytes`: memory of each worker that a
    Mooncake Store may use. `timeout_s`: a store that takes longer to answer is switched off for a
    while. `latency_s`: what asking it takes, as `bytes_per_s` is meant.
    """

    url: str | None = None
    lend_bytes: int = Field(default=0, ge=0)
    timeout_s: float = Field(default=2.0, gt=0)
    latency_s: float = Field(default=1e-3, gt=0)

    @field_validator("url")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value.partition("://")[0] not in STORES:
            raise ValueError(f"an address of a store begins with one of {', '.join(STORES)}, each "
                             "followed by ://")  # fmt: skip
        return value


class TiersSpec(Spec):
    """`load`: `auto` takes from a tier what is predicted to come sooner than it is computed;
    `always` takes all that there is. `wait_s`: how much longer than computing a load may take
    before it is given up."""

    host: HostTier | None = None
    disk: DiskTier | None = None
    cluster: ClusterTier | None = None
    load: Literal["auto", "always"] = "auto"
    wait_s: float = Field(default=0.1, ge=0)
