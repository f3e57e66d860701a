"""The wire between processes, both ends on one loop: what arrives, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from kvasir.core.messages import Alarm
from kvasir.world.live.wire import Deliver, Envelope, Wire

pytestmark = pytest.mark.timeout(30)

BYTES_MAX = 1000


@contextlib.asynccontextmanager
async def wires(run_dir: Path, deliver: Deliver) -> AsyncIterator[tuple[Wire, Wire]]:
    """One that sends to b, and b, whose messages go to `deliver`."""

    def address_of(node: str) -> str:
        return f"ipc://{run_dir}/{node}.ipc"

    a = Wire(address_of("a"), lambda envelope: None, address_of, BYTES_MAX)
    b = Wire(address_of("b"), deliver, address_of, BYTES_MAX)
    try:
        yield a, b
    finally:
        a.close()
        b.close()


def test_one_message_that_cannot_be_handled_stops_no_other(tmp_path: Path) -> None:
    """The socket tells of what waits only once: who does not read on then is deaf for ever."""
    seen: list[str] = []
    wrong: list[BaseException] = []

    def deliver(envelope: Envelope) -> None:
        (alarm,) = envelope.messages
        assert isinstance(alarm, Alarm)
        if alarm.name == "bad":
            raise ValueError(alarm.name)
        seen.append(alarm.name)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: wrong.append(context["exception"]))
        async with wires(tmp_path, deliver) as (a, _):
            names = ["bad" if i % 3 == 0 else str(i) for i in range(30)]
            for name in names:
                a.send("a", "b", (Alarm(name),))
            while len(seen) < 20:
                await asyncio.sleep(0.001)
            assert seen == [name for name in names if name != "bad"]
            assert [str(error) for error in wrong] == ["bad"] * 10

    uvloop.run(main())


def test_what_is_too_large_is_counted_and_not_sent(tmp_path: Path) -> None:
    seen: list[Envelope] = []

    async def main() -> None:
        async with wires(tmp_path, seen.append) as (a, _):
            a.send("a", "b", (Alarm("x" * BYTES_MAX),))
            a.send("a", "b", (Alarm("next"),))
            while not seen:
                await asyncio.sleep(0.001)
            assert a.unreadable == 1
            assert seen[0].messages == (Alarm("next"),)

    uvloop.run(main())
