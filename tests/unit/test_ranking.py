"""NetKV's costs by hand, what every ranking of workers must obey, staying, and eviction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.specs import RouteSpec
from kvasir.policy.evict import EVICTS
from kvasir.policy.route import ROUTES, RouteMemory
from kvasir.policy.route.stay import stays
from tests.route_views import FakeView, FakeWorker, choose, workers

# --- NetKV by hand --------------------------------------------------------------------------------

# An iteration takes 10 ms, 1 ms a sequence and 1 us a token of context; prefill 1 ms a token.
# Prompts have 1000 tokens in blocks of 100. The oracle says 0.5 s.


def decode_view(worker: FakeWorker, transfer_s: float, **more: Any) -> FakeView:
    transfers = {("p", worker.id): transfer_s}
    return FakeView([worker], "decode", source="p", transfers=transfers, **more)


def cost_of(worker: FakeWorker, transfer_s: float, **more: Any) -> float:
    """What NetKV says that a decode worker costs, to four digits."""
    choice = choose("netkv", decode_view(worker, transfer_s, **more))
    assert choice.estimate_s == transfer_s
    return float(choice.why.split()[1])


def four(**fields: Any) -> FakeWorker:
    return FakeWorker("d", batch_max=4, **fields)


NETKV = {
    "idle": (four(), 0.5 + 0.010 + 0.001 + 0.001),
    # 3 of 4: a slot is free. The first step has 4 sequences and 3000 + 1000 tokens.
    "a slot free": (four(decoding=3, context_tokens=3000), 0.5 + 0.010 + 0.004 + 0.004),
    # 4 of 4: one departure from a batch of 4, 256 iterations of 20 ms.
    "full": (four(decoding=4, context_tokens=3000, iteration_s=0.020), 0.5 + 1.28 + 0.018),
    # 6 for 4 slots: this one waits for the third departure.
    "over": (four(decoding=6, context_tokens=3000, iteration_s=0.020), 0.5 + 3 * 1.28 + 0.018),
    # Nothing measured: the iteration of the full batch is predicted, 10 + 4 + 3 ms.
    "unmeasured": (four(decoding=4, context_tokens=3000), 0.5 + 256 * 0.017 / 4 + 0.018),
}


@pytest.mark.parametrize(("worker", "expected"), NETKV.values(), ids=NETKV)
def test_netkv_adds_transfer_queue_and_first_step(worker: FakeWorker, expected: float) -> None:
    assert cost_of(worker, 0.5) == pytest.approx(expected, rel=1e-3)


COMBINED = [
    ("serial", 0.5, 0.0, 0.5 + 1.28 + 0.018),
    ("serial", 0.5, 9.0, 0.5 + 1.28 + 0.018),  # nothing is hidden
    ("overlap", 0.5, 0.0, 1.28 + 0.018),
    ("overlap", 2.0, 1.9, 2.0 + 0.018),
    ("streamed", 2.0, 0.0, 2.0 + 0.018),
    ("streamed", 2.0, 0.5, 2.0 - 0.5 * 63 / 64 + 0.018),  # the last of 64 layers is never hidden
    ("streamed", 2.0, 1.0, 1.28 + 0.018),
    ("streamed", 2.0, 9.0, 1.28 + 0.018),
]


@pytest.mark.parametrize(("cost", "transfer_s", "ahead_s", "expected"), COMBINED)
def test_netkv_combines_as_the_deployment_says(
    cost: Any, transfer_s: float, ahead_s: float, expected: float
) -> None:
    full = four(decoding=4, context_tokens=3000, iteration_s=0.020)
    found = cost_of(full, transfer_s, spec=RouteSpec(cost=cost), prefill_ahead_s=ahead_s)
    assert found == pytest.approx(expected, rel=1e-3)


def test_netkv_prefill_is_queue_plus_what_is_not_cached() -> None:
    pool = workers(a={"prefill_s": 0.2})
    choice = choose("netkv", FakeView(pool, hits={"a": 3}))
    assert "0.9 s" in choice.why and "hit 3" in choice.why


def test_the_last_prompt_token_is_computed_even_when_all_is_cached() -> None:
    """Both hold the whole prompt, or say so: each has one token left, and the queue decides."""
    pool = workers(a={"prefill_s": 0.0005}, b={})
    choice = choose("netkv", FakeView(pool, hits={"a": 11, "b": 10}))
    assert choice.worker == "b" and "0.001 s" in choice.why


TIES = [
    (workers(a={"blocks_reserved": 2}, b={"blocks_reserved": 1}, c={"blocks_reserved": 1}), "b"),
    (workers(a={}, b={}), "a"),
    (workers(a={"blocks_reserved": 2, "blocks_total": 10}, b={"blocks_reserved": 3}), "b"),
]


@pytest.mark.parametrize(("pool", "expected"), TIES)
def test_netkv_breaks_ties_by_load_then_by_id(
    pool: Sequence[FakeWorker], expected: str
) -> None:
    for order in (pool, pool[::-1]):
        assert choose("netkv", FakeView(order, "decode", source="p")).worker == expected


# --- what every ranking must obey -----------------------------------------------------------------

# A worker, its prefix hit, and the seconds of a transfer to it.
Row = tuple[float, int, int, int, float | None, int, float]
rows_of_workers = st.tuples(
    st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 6), st.sampled_from([0, 1000, 50_000]),
    st.integers(0, 100), st.sampled_from([None, 0.01, 0.05]), st.integers(0, 10),
    st.sampled_from([0.0, 0.1, 0.5]),
)  # fmt: skip
stages = st.sampled_from(["prefill", "decode"])
costs = st.sampled_from(["serial", "overlap", "streamed"])


def view_of(stage: Literal["prefill", "decode"], rows: Sequence[Row], cost: Any) -> FakeView:
    found, hits, transfers = [], {}, {}
    for i, (prefill_s, decoding, context, reserved, iteration_s, hit, seconds) in enumerate(rows):
        found.append(
            FakeWorker(
                f"w{i}", prefill_s=prefill_s, decoding=decoding, batch_max=4, requests=decoding,
                context_tokens=context, blocks_reserved=reserved, iteration_s=iteration_s,
            )
        )  # fmt: skip
        hits[f"w{i}"], transfers["p", f"w{i}"] = hit, seconds
    return FakeView(found, stage, hits, source="p", prefill_ahead_s=0.2, transfers=transfers,
                    spec=RouteSpec(cost=cost))  # fmt: skip


@given(stages, st.lists(rows_of_workers, min_size=1, max_size=5), costs, st.randoms())
@pytest.mark.parametrize("name", ["least_loaded", "cache_load", "netkv"])
def test_the_order_of_candidates_does_not_matter(
    name: str, stage: Any, rows: list[Row], cost: str, random: Any
) -> None:
    view = view_of(stage, rows, cost)
    shuffled = list(view.candidates)
    random.shuffle(shuffled)
    assert choose(name, replace(view, candidates=shuffled)) == choose(name, view)


WORSE = ["prefill_s", "decoding", "context_tokens", "blocks_reserved", "hit", "transfer"]


@given(stages, st.lists(rows_of_workers, min_size=1, max_size=4), costs, st.integers(0, 3),
       st.sampled_from(WORSE))  # fmt: skip
@pytest.mark.parametrize("name", ["least_loaded", "netkv"])
def test_a_dominated_candidate_changes_nothing(
    name: str, stage: Any, rows: list[Row], cost: str, at: int, worse: str
) -> None:
    """One more candidate, like another but worse in one respect."""
    view = view_of(stage, rows, cost)
    model = view.candidates[at % len(rows)]
    hit, seconds = view.hits[model.id], view.transfers["p", model.id]
    more = replace(model, id="z")
    if worse == "hit":
        hit = max(0, hit - 5)
    elif worse == "transfer":
        seconds += 0.05
    else:
        more = replace(more, **{worse: getattr(more, worse) + 1})
    larger = replace(
        view, candidates=[more, *view.candidates], hits=view.hits | {"z": hit},
        transfers={**view.transfers, ("p", "z"): seconds},
    )  # fmt: skip
    assert choose(name, larger) == choose(name, view)


@given(stages, rows_of_workers, costs, st.integers(0, 10), st.floats(0, 0.5))
def test_a_longer_hit_never_raises_a_workers_cost(
    stage: Any, row: Row, cost: str, more: int, saved: float
) -> None:
    """A hit shortens what is to be prefilled, or shipped."""
    *rest, hit, transfer_s = row
    seconds = []
    for longer, shorter_s in ((hit, transfer_s), (hit + more, max(0.0, transfer_s - saved))):
        why = choose("netkv", view_of(stage, [(*rest, longer, shorter_s)], cost)).why
        seconds.append(float(why.split()[2 if stage == "prefill" else 1]))
    assert seconds[1] <= seconds[0]


@given(st.lists(rows_of_workers, min_size=2, max_size=5), costs)
def test_netkv_picks_the_cheapest(rows: list[Row], cost: str) -> None:
    view = view_of("decode", rows, cost)
    alone = {w.id: choose("netkv", replace(view, candidates=[w])).why for w in view.candidates}
    cost_by_id = {worker: float(why.split()[1]) for worker, why in alone.items()}
    assert cost_by_id[choose("netkv", view).worker] == min(cost_by_id.values())


@pytest.mark.parametrize("name", ["least_loaded", "cache_load", "netkv"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_ranking_remembers_nothing(name: str, stage: Any) -> None:
    memory = RouteMemory(3, 4)
    assert ROUTES[name](FakeView(workers(a={}, b={}), stage), memory)[1] == memory


# --- staying, evicting ----------------------------------------------------------------------------

STAYS = {
    "off": (0, {"a": 9}, 1000, None),
    "the rest is short": (150, {"a": 9}, 1000, "a"),
    "too long": (150, {"a": 8}, 1000, None),
    "exactly at the limit": (100, {"a": 9}, 1000, "a"),
    "the longest hit": (150, {"a": 9, "b": 10}, 1050, "b"),
    "a short prompt anywhere": (150, {}, 150, "b"),  # b decodes least
    "all is cached": (1, {"a": 10}, 1000, "a"),  # the last token is computed
}


@pytest.mark.parametrize(("limit", "hits", "tokens", "expected"), STAYS.values(), ids=STAYS)
def test_a_request_stays_when_little_is_left_to_prefill(
    limit: int, hits: dict[str, int], tokens: int, expected: str | None
) -> None:
    pool = workers(a={"decoding": 2}, b={"decoding": 1})
    spec = RouteSpec(local_prefill_tokens=limit)
    for order in (pool, pool[::-1]):
        choice = stays(FakeView(order, "decode", hits, input_tokens=tokens, spec=spec))
        assert (choice.worker if choice else None) == expected


class Released:
    """Blocks in the order of their release."""

    def __init__(self, *blocks: int) -> None:
        self.in_order = lambda: iter(blocks)


@pytest.mark.parametrize(("blocks", "victims"), [((3,), [3]), ((7, 1, 2), [7, 1])])
def test_lru_takes_the_blocks_released_longest_ago(
    blocks: tuple[int, ...], victims: list[int]
) -> None:
    assert EVICTS["lru"](Released(*blocks), len(victims)) == victims
