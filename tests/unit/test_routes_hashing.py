"""Consistent hashing: affinity by the first blocks, little movement, and a bound on load."""

from dataclasses import replace

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, FakeWorker, choose, counts, workers

POOL = workers(a={}, b={}, c={}, d={})


def view(*keys: bytes, pool=POOL, **fields) -> FakeView:
    return FakeView(pool, keys=keys, **fields)


def test_the_first_blocks_decide() -> None:
    """Keys are chained, so the fourth names all four."""
    head = (b"1", b"2", b"3", b"4")
    found = {choose("consistent_hash", view(*head, bytes([i]))).worker for i in range(50)}
    assert len(found) == 1
    others = {choose("consistent_hash", view(*head[:3], bytes([i]))).worker for i in range(50)}
    assert others == {"a", "b", "c", "d"}
    longer = RouteSpec(hash_blocks=5)
    found = {
        choose("consistent_hash", view(*head, bytes([i]), spec=longer)).worker for i in range(50)
    }
    assert len(found) > 1


def test_names_are_spread() -> None:
    found = counts("consistent_hash", [view(i.to_bytes(4, "big")) for i in range(4000)])
    assert all(850 < count < 1150 for count in found.values()), found


def test_a_worker_that_leaves_moves_only_its_own_names() -> None:
    names = [i.to_bytes(4, "big") for i in range(400)]
    before = [choose("consistent_hash", view(n)).worker for n in names]
    after = [choose("consistent_hash", view(n, pool=POOL[:3])).worker for n in names]
    moved = [(b, a) for b, a in zip(before, after, strict=True) if a != b]
    assert moved and all(b == "d" for b, _ in moved)
    assert {a for _, a in moved} == {"a", "b", "c"}


def test_order_of_candidates_does_not_matter() -> None:
    for i in range(50):
        one, other = view(bytes([i])), view(bytes([i]), pool=POOL[::-1])
        assert choose("consistent_hash", one).worker == choose("consistent_hash", other).worker


def test_no_worker_gets_more_than_the_bound() -> None:
    """All requests name one prompt; 100 on four workers at 1.25 times the mean: 32 at most."""
    pool: dict[str, FakeWorker] = {w.id: w for w in POOL}
    for _ in range(100):
        chosen = choose("consistent_hash", view(b"hot", pool=tuple(pool.values()))).worker
        pool[chosen] = replace(pool[chosen], requests=pool[chosen].requests + 1)
    assert max(w.requests for w in pool.values()) == 32
    assert sum(w.requests for w in pool.values()) == 100


def test_a_prompt_without_a_full_block_is_its_own_name() -> None:
    found = counts("consistent_hash", [view(request_id=f"r{i}") for i in range(100)])
    assert set(found) == {"a", "b", "c", "d"}
