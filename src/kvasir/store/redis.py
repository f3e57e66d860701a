"""A Redis server as a cluster tier's store (extra `redis`).

Knows names and values; must not know what they mean. Memory, eviction and persistence are the
server's own settings: without `maxmemory` and a policy that evicts, it fills until it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvasir.store.base import StoreError

T = TypeVar("T")
READ_BYTES: Final = 1024 * 1024  # asked of the socket at once


class RedisStore:
    """`store.cluster.Client`. Raises StoreError when the server cannot be reached."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._redis = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
            socket_read_size=READ_BYTES, retry=Retry(NoBackoff(), 0), decode_responses=False,
        )  # fmt: skip
        self._try(self._redis.ping)

    def put(self, names: Sequence[str], values: Sequence[bytes]) -> None:
        self._try(lambda: self._redis.mset(dict(zip(names, values, strict=True))))

    def get(self, names: Sequence[str]) -> Sequence[bytes | None]:
        return cast(Sequence[bytes | None], self._try(lambda: self._redis.mget(names)))

    def held(self, names: Sequence[str]) -> Sequence[bool]:
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.exists(name)
        return [bool(count) for count in self._try(pipe.execute)]

    def close(self) -> None:
        self._redis.close()

    def _try(self, call: Callable[[], T]) -> T:
        """A server that answers with rubbish makes the client stumble in many ways."""
        try:
            return call()
        except (redis.RedisError, OSError, ValueError) as error:
            raise StoreError(f"redis: {error}") from None
