"""Workers that are killed and clients that hang up: no token lost or doubled, and nothing leaks.

Real processes on loopback with the fake engine, whose tokens depend on every KV byte before them: a
block that was lost, damaged or mixed up on the way shows in the answer.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvasir.node.conductor import Conductor
from kvasir.node.request import Requests
from kvasir.node.worker import Worker
from kvasir.runtime.verify import build, verify_dir
from kvasir.world import journal
from tests.live.served import (
    Raw,
    Server,
    Stream,
    deployment,
    eventually,
    good,
    prompt_of,
    written,
)

pytestmark = pytest.mark.timeout(90)

LONG = 2000  # prompt tokens: about two seconds of prefill
LEASED = 400  # prompt tokens whose KV travels for over two seconds under the cap


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Prefill is slow, decode takes about 10 ms a token."""
    folder = tmp_path_factory.mktemp("death")
    slow = {"cost": {"overhead_s": 0.002, "per_token_s": 1e-3}}
    yield from recorded(folder, deployment(prefill=slow))


@pytest.fixture(scope="module")
def dripping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """KV crawls from prefill to decode, and a decode worker is full with one long request."""
    folder = tmp_path_factory.mktemp("hang-up")
    config = deployment(
        prefill={"cost": {"overhead_s": 0.002, "per_token_s": 2e-3}},
        decode={"kv_blocks": 128},
        transport={"bytes_per_s_max": 5000},
        policy={"route": {"output_reserve_tokens": 1800}},
    )
    yield from recorded(folder, config)


def recorded(folder: Path, config: dict[str, object]) -> Iterator[Server]:
    """A server with a recording. In the end its nodes hold nothing, by their own journals."""
    with Server(written(folder, config), "--record", folder / "record") as server:
        yield server
        assert server.process.poll() is None, server.stderr
        assert server.interrupt() == 0
        assert "Traceback" not in server.stderr
    nothing_left(folder / "record")


def nothing_left(record: Path) -> None:
    """Each node's last incarnation, rebuilt from what it handled, is empty and sound."""
    verdict = verify_dir(record)
    assert verdict.ok, verdict.lines
    for path in record.glob("*.jsonl"):
        with path.open("rb") as lines:
            header, entries = journal.read(lines, str(path))
            node = build(header)
            for entry in entries:
                node.handle(entry.now, entry.event)
        if isinstance(node, Conductor):
            assert not node.placements
            assert not any(member.holds for member in node.members.values())
        elif isinstance(node, Requests):
            assert not node.lives
        elif isinstance(node, Worker) and is_last(path, record):
            assert not node.works
            assert not node.quarantine
            assert node.pool.held == 0
        node.check()


def is_last(path: Path, record: Path) -> bool:
    """Whether no later incarnation of the worker has a journal: this one was not killed."""
    name = path.stem.partition(".")[0]
    return path == max(record.glob(f"{name}*.jsonl"), key=lambda p: (len(p.stem), p.stem))


# --- deaths ---------------------------------------------------------------------------------------


def test_a_decode_worker_killed_mid_stream_loses_no_token_and_doubles_none(server: Server) -> None:
    server.at_rest()
    streams = [Stream(server, prompt_of(40 + 7 * i, i), 400) for i in range(8)]
    eventually(lambda: all(len(s.tokens) >= 10 for s in streams), "ten tokens of each")
    eventually(lambda: server.gauge("kvasir_kv_blocks_held", "decode-0"), "blocks in decode-0")
    assert all(s.running for s in streams)
    server.kill("decode-0")

    eventually(lambda: not server.healthy(), "503 from /health")
    answers = [s.check() for s in streams]
    moved = [a for a in answers if a.attempts > 1]
    assert moved, "decode-0 served none of them"
    assert len(moved) < len(answers), "decode-1 served none of them"
    recomputed = server.metrics()['kvasir_kv_recomputed_tokens_total{reason="lost"}']
    assert recomputed >= sum(40 + 10 for _ in moved)
    server.at_rest()
    assert {"decode-0.2", "decode-1.1"} <= set(server.workers())


def test_a_worker_that_came_back_serves(server: Server) -> None:
    server.at_rest()
    streams = [Stream(server, prompt_of(30, 50 + i), 40) for i in range(6)]
    answers = [s.check() for s in streams]
    assert {a.workers["decode"] for a in answers} == {"decode-0", "decode-1"}
    assert {a.attempts for a in answers} == {1}


def test_the_prefill_worker_killed_in_a_long_prefill(server: Server) -> None:
    server.at_rest()
    streams = [Stream(server, prompt_of(LONG, 10 + i), 30) for i in range(2)]
    eventually(lambda: server.gauge("kvasir_kv_blocks_held", "prefill-0"), "prefill")
    assert not any(s.tokens for s in streams)
    server.kill("prefill-0")

    assert all(s.check().attempts > 1 for s in streams)
    server.at_rest()


def test_the_last_decode_worker_killed_mid_stream(server: Server) -> None:
    """Nobody but the prefill worker is left: it goes on with what there is."""
    server.at_rest()
    streams = [Stream(server, prompt_of(60, 20 + i), 400) for i in range(4)]
    eventually(lambda: all(len(s.tokens) >= 5 for s in streams), "five tokens of each")
    server.kill("decode-0", "decode-1")

    assert [s.check().attempts > 1 for s in streams] == [True] * 4
    server.at_rest()


def test_a_decode_worker_killed_while_its_kv_travels(dripping: Server) -> None:
    dripping.at_rest()
    stream = Stream(dripping, prompt_of(LEASED, 30), 20)
    eventually(lambda: dripping.gauge("kvasir_leases", "prefill-0"), "a lease")
    (target,) = (w for w in ("decode-0", "decode-1")
                 if dripping.gauge("kvasir_reservations", w))  # fmt: skip
    dripping.kill(target)

    answer = stream.check()
    assert answer.attempts > 1
    dripping.at_rest()


# --- hang-ups -------------------------------------------------------------------------------------


def test_hang_up_before_a_place_is_found(dripping: Server) -> None:
    before = ended(dripping)
    fillers = [Raw(dripping, prompt_of(20, 40 + i), 1800) for i in range(2)]
    eventually(lambda: dripping.gauge("kvasir_reservations", "decode-0")
               and dripping.gauge("kvasir_reservations", "decode-1"), "full workers")  # fmt: skip
    third = Raw(dripping, prompt_of(20, 42), 1800)
    eventually(lambda: dripping.total("kvasir_requests_queued") == 1, "a request in the queue")
    third.hang_up()
    eventually(lambda: dripping.total("kvasir_requests_queued") == 0, "an empty queue")
    assert dripping.total("kvasir_requests_running") == 2
    for filler in fillers:
        filler.hang_up()
    all_cancelled(dripping, before, 3)


def test_hang_up_in_prefill(dripping: Server) -> None:
    before = ended(dripping)
    client = Raw(dripping, prompt_of(LONG, 50), 10)
    eventually(lambda: dripping.gauge("kvasir_kv_blocks_held", "prefill-0"), "prefill")
    assert dripping.gauge("kvasir_leases", "prefill-0") == 0
    client.hang_up()
    all_cancelled(dripping, before, 1)


def test_hang_up_while_kv_travels(dripping: Server) -> None:
    before = ended(dripping)
    client = Raw(dripping, prompt_of(LEASED, 51), 10)
    eventually(lambda: dripping.gauge("kvasir_leases", "prefill-0"), "a lease")
    client.hang_up()
    all_cancelled(dripping, before, 1)


def test_hang_up_in_decode(dripping: Server) -> None:
    before = ended(dripping)
    client = Raw(dripping, prompt_of(30, 52), 1800)
    client.read_events(20)
    eventually(lambda: dripping.gauge("kvasir_kv_blocks_held", "decode-0")
               + dripping.gauge("kvasir_kv_blocks_held", "decode-1"), "decode")  # fmt: skip
    client.hang_up()
    all_cancelled(dripping, before, 1)


def ended(server: Server) -> dict[str, float]:
    """Requests that ended so far, by how; nothing runs."""
    server.at_rest()
    counts: dict[str, float] = {}
    for name, value in server.metrics().items():
        if found := re.fullmatch(r'kvasir_requests_total{.*outcome="(\w+)".*}', name):
            counts[found[1]] = counts.get(found[1], 0) + value
    return counts


def all_cancelled(server: Server, before: dict[str, float], count: int) -> None:
    """None of those that hung up ran to its end, nothing is held, and the server goes on."""
    after = ended(server)
    new = {how: after[how] - before.get(how, 0) for how in after}
    assert {how: n for how, n in new.items() if n} == {"cancelled": count}
    good(server)
    server.at_rest()
