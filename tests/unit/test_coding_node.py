"""A worker that may code KV, by hand: what it knows of its links, and a choice for each chunk."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvasir.core.codec import CodecRules, Coded, Offer, Sent, pieces_of
from kvasir.core.effects import Send
from kvasir.core.errors import ConfigError
from kvasir.core.events import KvCoded, Shipped
from kvasir.core.messages import KvWant, Location, Prompt, Received, SendOver, TransferReport
from kvasir.core.specs import ModelShape, ModelSpec, PoolSpec
from kvasir.core.specs.deployment import Deployment, TransportSpec
from kvasir.cost.codec import KNOWN, ratio_of
from kvasir.node.build import worker_config
from kvasir.node.worker import Worker
from kvasir.policy.codec import CHUNK_BYTES, chunk_bytes
from tests.nodes import CAPACITY, Driven, dispatch, request
from tests.sims import cluster
from tests.unit.test_worker_node import CONFIG, over

HALF = Offer("half", 0.0, 0.5, 1e12, 1e12)  # coding takes no time
TOKEN_BYTES = CHUNK_BYTES // 4  # a block of 4 tokens is a chunk
LINK = 1e6


def worker(rules: CodecRules | None = None, **more: Any) -> Driven[Worker]:
    capacity = msgspec.structs.replace(CAPACITY, kv_token_bytes=TOKEN_BYTES)
    rules = rules or CodecRules((HALF,))
    return Driven(
        Worker(msgspec.structs.replace(CONFIG, capacity=capacity, codec=rules, **more))
    )


def want(link: float = LINK) -> KvWant:
    return KvWant("r", 1, "d", 0, link_bytes_s=link)


def left(first_block: int, wire: int, seconds: float, link_bytes: int | None = None) -> Sent:
    return Sent("r", 1, first_block, wire, wire if link_bytes is None else link_bytes, seconds)


def parts(effects: Any) -> list[tuple[int, int, str, bool]]:
    return [(s.first_block, len(s.blocks), s.codec, s.last) for s in effects.of(Send)]


def held(w: Driven[Worker], tokens: int = 17) -> None:
    """Prefilled; nobody asked yet. 17 tokens are 5 blocks."""
    w(dispatch(request(tokens=tokens), "prefill"))
    step = w(Prompt("r", 1, tokens))[-1]
    w(over(step))  # type: ignore[arg-type]


def test_a_transfer_leaves_in_chunks_each_with_a_choice_of_its_own() -> None:
    w = worker()
    held(w)
    first = w(want())
    assert parts(first) == [(0, 1, "half", False), (1, 1, "half", False)], "two ahead, no more"
    told = first.noted(KvCoded)
    assert [t.bytes for t in told] == [5 * CHUNK_BYTES, 4 * CHUNK_BYTES], "of what is left"
    assert {(t.codec, t.link_bytes_s) for t in told} == {("half", LINK)}
    assert told[0].seconds == pytest.approx(5 * CHUNK_BYTES / 2 / LINK, rel=1e-3)
    second = w(left(0, CHUNK_BYTES // 2, 1.0))
    assert parts(second) == [(2, 1, "half", False)]
    assert second.noted(KvCoded)[0].link_bytes_s == CHUNK_BYTES // 2, "what it was measured to give"
    w(left(1, CHUNK_BYTES // 2, 1.0))
    last = w(left(2, CHUNK_BYTES // 2, 1.0))
    assert parts(last) == [(4, 1, "half", True)]
    assert last.one(Send).report is not None
    w(left(3, CHUNK_BYTES // 2, 1.0))
    w(left(4, CHUNK_BYTES // 2, 1.0))
    w(SendOver("r", 1, True))
    assert w.node.pool.held == 0 and not w.node.steps.outbound.coding.going  # type: ignore[union-attr]


def test_a_link_that_gets_faster_carries_the_rest_as_it_is_and_at_once() -> None:
    slow_coder = Offer("half", 0.0, 0.5, 50e6, 50e6)
    w = worker(CodecRules((slow_coder,)))
    held(w)
    assert parts(w(want()))[0][2] == "half"
    rest = w(left(0, CHUNK_BYTES // 2, 1e-4))
    assert parts(rest) == [(2, 3, "raw", True)]


def test_on_an_unknown_link_bytes_go_as_they_are() -> None:
    w = worker()
    held(w)
    assert parts(w(want(link=0.0))) == [(0, 5, "raw", True)]


def test_a_cap_of_this_worker_is_known_though_the_network_is_fast() -> None:
    w = worker(CodecRules((HALF,), bytes_per_s_max=LINK))
    held(w)
    assert w(want(link=1e12)).noted(KvCoded)[0].link_bytes_s == LINK


def test_what_a_form_makes_of_this_kv_is_learned() -> None:
    """Hardly smaller than the bytes themselves: not used again."""
    w = worker()
    held(w)
    w(want())
    w(left(0, CHUNK_BYTES - 100, 16.0))
    after = w(left(1, CHUNK_BYTES - 100, 16.0))
    assert after.noted(KvCoded)[0].codec == "raw"


def test_a_closing_part_follows_chunks_that_are_still_on_their_way() -> None:
    """All blocks left with the step that made them; then nothing is left to wait for."""
    w = worker(chunk_tokens=8)
    w(dispatch(request(tokens=8), "prefill"))
    step = w(Prompt("r", 1, 8))[-1]
    sent = w(want())
    assert parts(sent) == [(0, 1, "half", False), (1, 1, "half", False)]
    assert {s.step for s in sent.of(Send)} == {step.id}  # type: ignore[union-attr]
    assert parts(w(over(step))) == [(2, 0, "", True)]  # type: ignore[arg-type]


def test_what_waited_leaves_with_the_same_step_when_there_is_room() -> None:
    w = worker(chunk_tokens=64)
    w(dispatch(request(tokens=17), "prefill"))
    step = w(Prompt("r", 1, 17))[-1]
    w(want())
    more = w(left(0, CHUNK_BYTES // 2, 1.0))
    assert [(s.first_block, s.step) for s in more.of(Send)] == [(2, step.id)]  # type: ignore[union-attr]


def test_a_dead_attempt_sends_no_more() -> None:
    w = worker()
    held(w)
    w(want())
    w(SendOver("r", 1, False))
    assert not w(left(0, CHUNK_BYTES // 2, 1.0)).of(Send)
    assert not w.node.steps.outbound.coding.going  # type: ignore[union-attr]


def test_the_receiver_says_in_which_forms_it_came_and_in_how_many_bytes() -> None:
    w = worker()
    w(dispatch(request(tokens=8), "decode", link_bytes_s=5.0))
    assert w.heard.told(KvWant).one().link_bytes_s == 5.0
    done = w(Received("r", 1, True, 1000, 2.0, "tcp", coded=Coded("half+raw", 600)))
    assert done.told(TransferReport).one().bytes == 600, "the oracle learns of the wire"
    (shipped,) = done.noted(Shipped)
    assert (shipped.bytes, shipped.wire_bytes, shipped.codec) == (1000, 600, "half+raw")


# --- rules ----------------------------------------------------------------------------------------


def of(kind: str, **more: Any) -> CodecRules | None:
    spec = {"kind": kind, **more}
    d = cluster(count=1, shape="llama-3-8b", transport=TransportSpec(kind="tcp", codec=spec))
    return worker_config(d, "prefill-0", 1, Location()).codec


def test_a_deployment_allows_what_loses_no_more_than_it_names() -> None:
    assert of("off") is None
    found = of("int8")
    assert found is not None and [o.name for o in found.offers] == ["lossless", "int8"]
    assert found.offers[0].ratio == KNOWN["lossless"].ratio
    deep = of("cachegen", level_max=5)
    assert deep is not None and "cachegen-5" in {o.name for o in deep.offers}


def test_rates_measured_here_stand_in_for_the_catalogue() -> None:
    d = cluster(count=1, transport=TransportSpec(kind="tcp", codec={"kind": "int8"}))
    mine = (Offer("raw", 0.0), Offer("int8", 0.1, 0.5, 1.0, 2.0), Offer("int4", 0.2))
    rules = worker_config(d, "prefill-0", 1, Location(), offers=mine).codec
    assert rules is not None and rules.offers == mine[1:2]


def test_kv_of_one_byte_has_no_coded_form() -> None:
    shape = ModelShape(layers=2, hidden=64, heads=2, kv_heads=2, head_dim=32, intermediate=64,
                       vocab=256, dtype="int8")  # fmt: skip
    d = Deployment(
        models=(ModelSpec(name="m", shape=shape),),
        pools=(PoolSpec(name="mixed", role="mixed", count=1, kv_blocks=10),),
        transport=TransportSpec(kind="tcp", codec={"kind": "lossless"}),
    )
    with pytest.raises(ConfigError, match="no codec for KV of int8"):
        worker_config(d, "mixed-0", 1, Location())


@pytest.mark.parametrize(
    ("name", "dtype", "ratio"),
    [
        ("int8", "bfloat16", 0.531), ("int8", "float32", 0.531 / 2),
        ("lossless", "bfloat16", 0.644), ("lossless", "float32", 1 - 0.356 / 2),
    ],
)  # fmt: skip
def test_what_a_form_makes_of_a_wider_value(name: str, dtype: str, ratio: float) -> None:
    assert ratio_of(name, dtype) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("kind", ["shm", "nixl", "mooncake"])
def test_a_codec_needs_a_stream(kind: str) -> None:
    with pytest.raises(ValueError, match="a codec needs kind tcp or auto"):
        TransportSpec(kind=kind, codec={"kind": "lossless"})  # type: ignore[arg-type]
    assert TransportSpec(kind=kind).codec.kind == "off"  # type: ignore[arg-type]


def test_how_much_goes_on_one_choice() -> None:
    assert pieces_of(1) == 1 and pieces_of(CHUNK_BYTES) == 4 and pieces_of(CHUNK_BYTES + 1) == 5
    assert chunk_bytes(1e6) == CHUNK_BYTES and chunk_bytes(1e9) == int(0.5e9)


def test_what_is_on_its_way_already_counts_against_a_budget() -> None:
    """Two transfers of 10 s each (20 with the reserve) to one worker. The second one waits for 4 s
    of the first one's, and has to take the form that loses more."""
    exact, lossy = Offer("exact", 0.0, 0.5), Offer("lossy", 0.1, 0.1)
    link = 5 * CHUNK_BYTES / 20.0
    w = worker(CodecRules((exact, lossy), ttft_s=22.0))
    chosen = []
    for name in ("r", "s"):
        of = request(name, tokens=17)
        w(dispatch(of, "prefill", first_token="decode"))
        w(over(w(Prompt(name, 1, 17))[-1]))  # type: ignore[arg-type]
        effects = w(KvWant(name, 1, "d", 0, link_bytes_s=link))
        chosen.append(effects.noted(KvCoded)[0].codec)
    assert chosen == ["exact", "lossy"]
