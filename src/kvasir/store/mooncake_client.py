"""A process that speaks to a Mooncake Store for a worker:
`python -m kvasir.store.mooncake_client SOCKET SETUP`. It ends with the worker, or when told.

Knows the store's calls; decides nothing.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
from typing import Any, Final

import msgspec

from kvasir.store.frames import receive, send
from kvasir.store.mooncake import Call, Done, Setup

PR_SET_PDEATHSIG: Final = 1
TRANSFER_FAILED: Final = -800  # memory that a dead client lent: until the master knows, not stored


def main(argv: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    setup = msgspec.json.decode(argv[2], type=Setup)
    with socket.socket(fileno=int(argv[1])) as stream:
        from mooncake.store import MooncakeDistributedStore

        store = MooncakeDistributedStore()
        code = store.setup(
            setup.local, "P2PHANDSHAKE", setup.lend_bytes, setup.buffer_bytes, setup.protocol,
            setup.device, setup.master,
        )  # fmt: skip
        _tell(stream, Done(_fault("setup", code)))
        try:
            while True:
                _tell(stream, _done(store, msgspec.msgpack.decode(receive(stream), type=Call)))
        except ConnectionError:
            store.close()
            return 0


def _done(store: Any, call: Call) -> Done:
    names = list(call.names)
    if call.what == "get":
        return Done(values=store.get_batch(names))
    if call.what == "held":
        there = store.batch_is_exist(names)
        return Done(_fault("ask", min(there)), held=[found == 1 for found in there])
    for name, value in zip(names, call.values, strict=True):
        code = store.put(name, value)
        if code and code != TRANSFER_FAILED:
            return Done(_fault("put", code))
    return Done()


def _fault(what: str, code: int) -> str:
    return f"{what} failed with {code}" if code < 0 else ""


def _tell(stream: socket.socket, done: Done) -> None:
    send(stream, msgspec.msgpack.encode(done))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
