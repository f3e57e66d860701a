"""Mooncake's transfer engine as a mover, peers found by handshake. Knows addresses, not blocks.

`MC_MS_AUTO_DISC` and the like are its own settings; the protocol here is TCP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvasir.core.errors import ConfigError
from kvasir.transfer.base import Kind

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes
    from kvasir.transfer.onesided import Move

PENDING: Final = 0
DONE: Final = 1


class MooncakeMover:
    """`host`: where peers reach this one. Raises ConfigError where the engine is missing or does
    not start."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise ConfigError(
                f"transport mooncake is not installed: {error}",
                next_step="pip install 'kvasir-llm[mooncake]', apt install libibverbs1 librdmacm1",
            ) from None
        self._engine: Any = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
            raise ConfigError(f"Mooncake's transfer engine does not start on {host}")
        self._name = f"{host}:{self._engine.get_rpc_port()}"

    @property
    def kind(self) -> Kind:
        return "mooncake"

    def register(self, planes: Sequence[Bytes]) -> None:
        for plane in planes:
            if self._engine.register_memory(plane.ctypes.data, plane.nbytes):
                raise ConfigError(f"Mooncake cannot register {plane.nbytes} bytes of the cache")

    def card(self) -> bytes:
        return self._name.encode()

    def meet(self, card: bytes) -> str:
        return card.decode(errors="replace")

    def write(self, peer: str, moves: Sequence[Move]) -> Callable[[], bool]:
        waiting = []
        for move in moves:
            batch = self._engine.transfer_submit_write(peer, move.here, move.there, move.size)
            if batch in (0, -1) or batch == 2**64 - 1:
                raise ConnectionError(f"Mooncake cannot write to {peer}")
            waiting.append(batch)

        def over() -> bool:
            while waiting:
                status = self._engine.transfer_check_status(waiting[-1])
                if status == PENDING:
                    return False
                if status != DONE:
                    raise ConnectionError(f"Mooncake lost {peer}: status {status}")
                waiting.pop()
            return True

        return over
