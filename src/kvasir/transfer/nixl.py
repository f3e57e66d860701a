"""NIXL as a mover: UCX picks RDMA, shared memory or TCP by itself. Knows addresses, not blocks.

The wheel nixl-cu12 is imported by its own name: the package `nixl` would bring that of CUDA 13 too.
UCX reads its settings from the environment, UCX_TLS and UCX_NET_DEVICES before all.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvasir.core.errors import ConfigError
from kvasir.transfer.base import Kind

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes
    from kvasir.transfer.onesided import Move


class NixlMover:
    """One agent with the UCX backend. `progress`: a thread of its own moves the bytes along;
    without it, asking the flight does, which is faster where cores are few. Raises ConfigError
    where NIXL is missing or does not work."""

    def __init__(self, *, progress: bool = True) -> None:
        try:
            from nixl_cu12._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise ConfigError(
                f"transport nixl is not installed: {error}",
                next_step="pip install 'kvasir-llm[nixl]'",
            ) from None
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it prints a line for each agent
        name = f"kvasir-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._agent: Any = nixl_agent(name, nixl_agent_config(progress, backends=["UCX"]))
        except Exception as error:  # its own classes, and RuntimeError
            raise ConfigError(f"NIXL does not start: {error!r}") from error

    @property
    def kind(self) -> Kind:
        return "nixl"

    def register(self, planes: Sequence[Bytes]) -> None:
        places = [(plane.ctypes.data, plane.nbytes, 0, "") for plane in planes]
        try:
            self._agent.register_memory(places, "DRAM")
        except Exception as error:
            raise ConfigError(f"NIXL cannot register the cache: {error!r}") from error

    def card(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def meet(self, card: bytes) -> str:
        try:
            found = self._agent.add_remote_agent(card)
        except Exception as error:
            raise ConnectionError(f"NIXL does not reach the peer: {error!r}") from error
        return found.decode() if isinstance(found, bytes) else str(found)

    def write(self, peer: str, moves: Sequence[Move]) -> Callable[[], bool]:
        agent = self._agent
        try:
            here = agent.get_xfer_descs([(m.here, m.size, 0) for m in moves], "DRAM")
            there = agent.get_xfer_descs([(m.there, m.size, 0) for m in moves], "DRAM")
            handle = agent.initialize_xfer("WRITE", here, there, peer, b"")
            agent.transfer(handle)
        except Exception as error:
            raise ConnectionError(f"NIXL cannot write: {error!r}") from error

        def over() -> bool:
            try:
                state = agent.check_xfer_state(handle)
            except Exception as error:
                raise ConnectionError(f"NIXL lost the peer: {error!r}") from error
            if state == "PROC":
                return False
            agent.release_xfer_handle(handle)
            if state != "DONE":
                raise ConnectionError(f"NIXL says {state}")
            return True

        return over
