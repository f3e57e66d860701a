"""The KV really moves, and every byte of it is accounted for: counters, order, leases, failures."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")

from kvasir.core.events import Retried, Shipped, TransferFailed  # noqa: E402
from kvasir.core.messages import KvWant  # noqa: E402
from kvasir.engine.fake import KV_TOKEN_BYTES, fake_tokens  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from kvasir.node.work import Stage  # noqa: E402
from kvasir.transfer.frames import HEADER_BYTES  # noqa: E402
from kvasir.transfer.inline import InlineInlet  # noqa: E402
from kvasir.transfer.medium import Inlet  # noqa: E402
from kvasir.transfer.memory import Memory, Piece  # noqa: E402
from kvasir.transfer.shm import MappedInlet  # noqa: E402
from tests.live.cluster import SIZE, Answer, Cluster, cluster, deployment_of, run  # noqa: E402

TORCH_TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head dim, float32
TRANSPORT = pytest.mark.parametrize("transport", ["shm", "tcp"])
FIRST = pytest.mark.parametrize("first", ["prefill", "decode"])
N = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{seed}:{length}")
    return [rng.randrange(256) for _ in range(length)]


def bytes_of(blocks: int, token_bytes: int = KV_TOKEN_BYTES) -> int:
    return blocks * SIZE * token_bytes


def metric(c: Cluster, name: str, **labels: str) -> float:
    """The sum of a counter's samples that have these labels, as Prometheus would read it."""
    text = c.platform.metrics.render().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def counted(c: Cluster, transport: str) -> int:
    """Bytes so far, the same from events and from the metric."""
    shipped = c.events(Shipped)
    assert {event.transport for event in shipped} <= {transport}
    total = sum(event.bytes for event in shipped)
    assert metric(c, "kvasir_kv_transfer_bytes_total", transport=transport) == total
    assert metric(c, "kvasir_kv_transfer_bytes_total") == total
    return total


# --- counters -------------------------------------------------------------------------------------


@TRANSPORT
@FIRST
@pytest.mark.parametrize("engine", ["torch", "fake"])
def test_bytes_are_whole_blocks_less_hits(
    folder: Path, transport: str, first: str, engine: str
) -> None:
    """Cold: every block of the prompt. Again: what the decode worker holds stays where it is."""
    token_bytes = TORCH_TOKEN_BYTES if engine == "torch" else KV_TOKEN_BYTES

    async def main() -> None:
        deployment = deployment_of(folder, engine=engine, transport=transport, first_token=first)
        async with cluster(deployment) as c:
            total = 0
            for length in (1, 15, 16, 17, 32, 47, 48, 49, 100):
                prompt = prompt_of(length)
                blocks = -(-length // SIZE)
                # Under `decode` the last prompt token is run there: its block cannot be a hit.
                hits = (length if first == "prefill" else length - 1) // SIZE
                for lacking in (blocks, blocks - hits):
                    expected = bytes_of(lacking, token_bytes)
                    answer = await c.ask(prompt, N)
                    assert answer.report.transfer_bytes == expected, f"{length} tokens of prompt"
                    assert answer.report.transport == transport
                    total += expected
            await c.at_rest()
            assert counted(c, transport) == total

    run(main())


@TRANSPORT
def test_bytes_of_a_shared_prefix(folder: Path, transport: str) -> None:
    """Two decode workers: only the one that has the prefix is spared it."""

    async def main() -> None:
        deployment = deployment_of(
            folder, engine="fake", transport=transport, decode=2, route={"name": "round_robin"}
        )
        async with cluster(deployment) as c:
            head = prompt_of(64)
            warm = await c.ask(head, N)
            answers = [await c.ask(head + prompt_of(20, seed), N) for seed in (1, 2)]
            where = {a.report.decode_worker: a.report.transfer_bytes for a in answers}
            assert len(where) == 2
            for worker, found in where.items():
                spared = 4 if worker == warm.report.decode_worker else 0
                assert found == bytes_of(6 - spared)
            await c.at_rest()
            assert counted(c, transport) == bytes_of(4) + sum(where.values())

    run(main())


@TRANSPORT
@pytest.mark.parametrize("chunk", [7, 16, 40])
def test_bytes_that_leave_chunk_by_chunk(folder: Path, transport: str, chunk: int) -> None:
    """Parts that leave while later chunks are computed add up to the whole, each block once."""

    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", transport=transport, chunk=chunk)
        async with cluster(deployment) as c:
            prompt = prompt_of(100)
            answer = await asked_for_early(c, prompt)
            assert answer.tokens == fake_tokens(prompt, N)
            assert answer.report.transfer_bytes == bytes_of(7)
            await c.at_rest()
            timeline = c.workers["prefill-0"].sender.timeline(answer.request_id, 1)
            assert timeline is not None and timeline.bytes == bytes_of(7)

    run(main())


def test_nothing_travels_when_one_worker_does_both(folder: Path) -> None:
    async def main() -> None:
        async with cluster(deployment_of(folder, engine="fake", mixed=2)) as c:
            answer = await c.ask(prompt_of(100), N)
            assert (answer.path, answer.report.transfer_bytes) == ("aggregated", 0)
            await c.at_rest()
            assert c.events(Shipped) == [] and metric(c, "kvasir_kv_transfer_bytes_total") == 0

    run(main())


async def asked_for_early(c: Cluster, prompt: list[int]) -> Answer:
    """The answer of a request whose decode worker asks for its KV before its prefill begins."""
    gate = c.gates["prefill-0"]
    gate.shut()
    _, pieces = c.submit(prompt_of(8, seed=99), 1)
    await c.until(lambda: gate.stopped)
    asked = asyncio.create_task(c.ask(prompt, N, name="early"))
    await c.until(lambda: "early" in c.works("prefill-0"))
    work = c.works("prefill-0")["early"]
    await c.until(lambda: work.want is not None and work.stage is Stage.QUEUE)
    gate.open()
    answer = await asked
    await pieces.aclose()
    return answer


# --- layer by layer -------------------------------------------------------------------------------

LAYERS, RATE = 8, 20e6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 KiB of KV a token: a prompt's KV takes longer to send at 20 MB/s than to compute."""
    return make_tiny(
        tmp_path_factory.mktemp("deep"), layers=LAYERS, hidden=256, heads=8, kv_heads=8,
        head_dim=32, intermediate=768,
    )  # fmt: skip


def test_the_first_frame_leaves_before_the_last_layer_is_computed(deep: Path) -> None:
    """Over TCP at 20 MB/s, one prefill step for the whole prompt."""

    async def main() -> None:
        deployment = deployment_of(deep, transport="tcp", bytes_per_s_max=RATE, chunk=1024)
        async with cluster(deployment) as c:
            answer = await asked_for_early(c, prompt_of(1024))
            nbytes = answer.report.transfer_bytes
            assert nbytes == 1024 * LAYERS * 2 * 8 * 32 * 4
            ends = {
                layer: at for worker, step, layer, at in c.threads.layers
                if worker == "prefill-0" and step.rows[0].request_id == "early"
            }  # fmt: skip
            timeline = c.workers["prefill-0"].sender.timeline("early", 1)
            assert timeline is not None and sorted(ends) == list(range(LAYERS))
            first, last = timeline.first_frame_s, timeline.last_frame_s
            assert first is not None and last is not None
            assert ends[0] <= first < ends[LAYERS - 1]
            assert last - first > 0.9 * nbytes / RATE, "faster than the cap"
            assert answer.report.transfer_s > 0.9 * nbytes / RATE
            await c.at_rest()

    run(main())


@TRANSPORT
@pytest.mark.parametrize("layers", [1, 2])
def test_the_decode_side_asks_in_the_middle_of_a_step(
    folder: Path, transport: str, layers: int
) -> None:
    """What is computed leaves now, and the rest as it is computed; nothing twice."""
    late: list[KvWant] = []

    def hold(src: str, dst: str, message: Any) -> bool:
        if isinstance(message, KvWant):
            late.append(message)
        return not isinstance(message, KvWant)

    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", transport=transport)
        async with cluster(deployment) as c:
            gate, prompt = c.gates["prefill-0"], prompt_of(100)
            c.tap("decode-0", hold)
            gate.shut()
            gate.let(layers)  # of two: inside the step, or at the end of it
            asked = asyncio.create_task(c.ask(prompt, N, name="a"))
            await c.until(lambda: late and len(c.threads.layers) == layers)
            c.workers["prefill-0"].host.feed(late[0])
            await c.until(lambda: left_already(c, "a"))
            gate.open()
            answer = await asked
            assert answer.tokens == fake_tokens(prompt, N)
            assert answer.report.transfer_bytes == bytes_of(7)
            await c.at_rest()
            assert counted(c, transport) == bytes_of(7)

    run(main())


def left_already(c: Cluster, request_id: str) -> bool:
    timeline = c.workers["prefill-0"].sender.timeline(request_id, 1)
    return timeline is not None and timeline.first_frame_s is not None


# --- leases ---------------------------------------------------------------------------------------


@TRANSPORT
def test_a_lease_ends_when_nobody_asks(folder: Path, transport: str) -> None:
    """The decode side's question is lost: the blocks are free again at lease end, not before, and
    the next attempt serves."""
    lost: list[KvWant] = []

    def lose_the_first(src: str, dst: str, message: Any) -> bool:
        if isinstance(message, KvWant) and not lost:
            lost.append(message)
            return False
        return True

    async def main() -> None:
        lease_s = 0.5
        deployment = deployment_of(
            folder, engine="fake", transport=transport, limits={"lease_s": lease_s}
        )
        async with cluster(deployment) as c:
            c.tap("decode-0", lose_the_first)
            prompt = prompt_of(100)
            asked = asyncio.create_task(c.ask(prompt, N, name="a"))
            await c.until(lambda: "a" in c.works("prefill-0"))
            held = c.works("prefill-0")["a"]
            await c.until(lambda: held.stage is Stage.HOLD)
            began = held.lease_until - lease_s
            assert c.node("prefill-0").pool.held == 7
            await c.until(lambda: held.dead)
            assert time.monotonic() - began > lease_s
            answer = await asked
            assert answer.tokens == fake_tokens(prompt, N)
            (retried,) = c.events(Retried)
            assert retried.reason == "prefill-0: its lease ended"
            await c.at_rest()
            assert counted(c, transport) == bytes_of(7)

    run(main())


@TRANSPORT
def test_nobody_ever_asks(folder: Path, transport: str) -> None:
    """Attempts have their limit, and nothing is left of them."""

    async def main() -> None:
        deployment = deployment_of(
            folder, engine="fake", transport=transport,
            limits={"lease_s": 0.1, "attempts_max": 3},
        )  # fmt: skip
        async with cluster(deployment) as c:
            c.tap("decode-0", lambda src, dst, message: not isinstance(message, KvWant))
            answer = await c.ask(prompt_of(100), N)
            assert answer.fail is not None and answer.fail.status == 503
            assert "3 attempts" in answer.fail.reason and "lease" in answer.fail.reason
            await c.at_rest()
            assert counted(c, transport) == 0

    run(main())


# --- failures -------------------------------------------------------------------------------------


def damaging_inline(recv_into: Callable[..., int], left: list[int]) -> Callable[..., int]:
    """One bit of what comes off the socket, once."""

    def damaged(self: Inlet, buffer: memoryview) -> int:
        count = recv_into(self, buffer)
        if left[0] and len(buffer) > HEADER_BYTES:
            buffer[count // 2] ^= 0x40
            left[0] -= 1
        return count

    return damaged


def damaging_mapped(bring: Callable[..., int], left: list[int]) -> Callable[..., int]:
    """One bit of what the sender shows, as the receiver reads it, once."""

    def damaged(self: MappedInlet, memory: Memory, piece: Piece, payload: bytes) -> int:
        found = bring(self, memory, piece, payload)
        if left[0]:
            left[0] -= 1
            memory.planes[piece.plane][piece.ids[0]][17] ^= 0x40
            found = memory.checksum(piece)
        return found

    return damaged


@TRANSPORT
@FIRST
def test_damage_on_the_way(
    folder: Path, transport: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum was made at the source: the receiver sees it, and the KV is made again."""
    left = [1]
    monkeypatch.setattr(InlineInlet, "recv_into", damaging_inline(InlineInlet.recv_into, left))
    monkeypatch.setattr(MappedInlet, "recv_into", damaging_inline(MappedInlet.recv_into, left))
    monkeypatch.setattr(MappedInlet, "bring", damaging_mapped(MappedInlet.bring, left))

    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", transport=transport, first_token=first)
        async with cluster(deployment) as c:
            prompt = prompt_of(100)
            answer = await c.ask(prompt, N)
            assert answer.tokens == fake_tokens(prompt, N)
            (failed,) = c.events(TransferFailed)
            assert failed.worker == "decode-0" and "checksum" in failed.reason
            assert metric(c, "kvasir_kv_transfer_failures_total") == 1
            assert len(c.events(Retried)) == 1
            await c.at_rest()
            # The second attempt counts what was emitted as prompt: 100 or 101 tokens, 7 blocks.
            assert answer.report.transfer_bytes == bytes_of(7) == counted(c, transport)

    run(main())


@TRANSPORT
@FIRST
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_transfer_breaks_off(folder: Path, transport: str, first: str, side: str) -> None:
    """Half of it is there when it ends. Neither side keeps a block; the next attempt serves."""

    async def main() -> None:
        deployment = deployment_of(
            folder, engine="fake", transport=transport, first_token=first, bytes_per_s_max=20e3
        )
        async with cluster(deployment) as c:
            prompt = prompt_of(640)
            asked = asyncio.create_task(c.ask(prompt, N, name="a"))
            sender, receiver = c.workers["prefill-0"].sender, c.workers["decode-0"].receiver

            def half() -> bool:
                timeline = sender.timeline("a", 1)
                return timeline is not None and timeline.bytes > bytes_of(10)

            await c.until(half)
            if side == "sender":
                sender.stop("a", 1, "cable pulled")
            else:
                receiver.forget("a", 1, "cable pulled")
            answer = await asked
            assert answer.tokens == fake_tokens(prompt, N)
            assert len(c.events(Retried)) == 1
            if side == "receiver":
                (failed,) = c.events(TransferFailed)
                assert "cable pulled" in failed.reason
            await c.at_rest()

    run(main())
