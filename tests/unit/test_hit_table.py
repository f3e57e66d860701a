"""The block pool against published figures: the prefix hits of the Mooncake trace, to each digit.

The expected figures come from a plain ordered dictionary, written down with the trace; here the
pool and the eviction policy of the workers have to give the same ones.
"""

from decimal import ROUND_HALF_UP, Decimal

import pytest

from kvasir.traces.formats import load
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.statistics import hit_table

TABLE = {  # capacity: blocks hit, tokens hit, and the published percentages of both
    None: (105_710, 54_098_411, "36.64", "37.36"),
    1_000: (12_847, 6_575_459, "4.5", "4.5"),
    2_000: (15_665, 8_016_630, "5.4", "5.5"),
    5_000: (32_260, 16_505_817, "11.2", "11.4"),
    10_000: (61_046, 31_238_981, "21.2", "21.6"),
    20_000: (83_035, 42_493_406, "28.8", "29.4"),
    50_000: (102_290, 52_347_371, "35.5", "36.2"),
    100_000: (104_924, 53_695_979, "36.4", "37.1"),
}


def published(ratio: float, like: str) -> str:
    """As the table prints it: four digits, of which the LRU rows show three, half up."""
    percent = Decimal(f"{100 * ratio:.2f}")
    return str(percent.quantize(Decimal(like), ROUND_HALF_UP))


def test_mooncake_with_endless_and_lru_caches() -> None:
    for row in hit_table(load("mooncake-conversation"), TABLE):
        blocks, tokens, block_percent, token_percent = TABLE[row.capacity_blocks]
        assert (row.hit_blocks, row.blocks) == (blocks, 288_500)
        assert (row.hit_tokens, row.tokens) == (tokens, 144_793_823)
        assert published(row.block_ratio, block_percent) == block_percent
        assert published(row.token_ratio, token_percent) == token_percent


def test_a_partial_block_counts_its_tokens() -> None:
    twice = (Arrival(0.0, 13, 1, (1, 2)), Arrival(1.0, 13, 1, (1, 2)))
    (row,) = hit_table(Trace("t", 10, twice), [None])
    assert (row.hit_blocks, row.blocks, row.hit_tokens, row.tokens) == (2, 4, 13, 26)


def test_only_leading_blocks_hit() -> None:
    rows = (Arrival(0.0, 20, 1, (1, 2)), Arrival(1.0, 20, 1, (3, 2)))
    (row,) = hit_table(Trace("t", 10, rows), [None])
    assert row.hit_blocks == 0


def test_a_chain_loses_its_tail_before_its_head() -> None:
    chain, other = Arrival(0.0, 30, 1, (1, 2, 3)), Arrival(0.0, 10, 1, (9,))
    (row,) = hit_table(Trace("t", 10, (chain, other, chain)), [3])
    assert row.hit_blocks == 2


def test_a_request_longer_than_the_cache_keeps_its_first_blocks() -> None:
    long = Arrival(0.0, 50, 1, (1, 2, 3, 4, 5))
    (row,) = hit_table(Trace("t", 10, (long, long)), [2])
    assert row.hit_blocks == 2


def test_no_block_ids_no_hits() -> None:
    (row,) = hit_table(Trace("t", None, (Arrival(0.0, 5, 1),)), [100])
    assert (row.block_ratio, row.token_ratio) == (0.0, 0.0)


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(KeyError):
        hit_table(Trace("t", None, ()), [1], evict="nothing")
