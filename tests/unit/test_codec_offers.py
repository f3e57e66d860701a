"""What the codec offers to the policy, and CacheGen's adaptation through that policy."""

import itertools
import math

import numpy as np
import pytest

from bench import codec_adapt
from kvasir.core.codec import RAW
from kvasir.cost.codec import KNOWN
from kvasir.policy.codec import allowed
from kvasir.transfer.codec import NUMPY, Chunk, Coding, Tensor
from kvasir.transfer.codec.levels import LEVELS
from kvasir.transfer.codec.offers import CODINGS, Rate, measure, offers_of


def test_rates_are_bytes_of_kv_by_the_given_clock() -> None:
    chunk = Chunk("float32", 1, [Tensor(0, 0, np.zeros((8, 64), np.uint8))])
    ticks = itertools.accumulate(itertools.cycle([0.0, 2.0, 4.0]))  # between rounds none passes
    (rate,) = measure(chunk, [Coding("int8")], NUMPY, lambda: next(ticks), repeats=3)
    assert (rate.encode_bytes_s, rate.decode_bytes_s) == (512 / 2, 512 / 4)


def test_every_coding_is_an_offer_beside_raw() -> None:
    offers = offers_of([Rate(coding, 1.0, 100.0, 200.0) for coding in CODINGS], cores=4)
    assert [o.name for o in offers] == [RAW, *map(str, CODINGS)]
    assert {(o.encode_bytes_s, o.decode_bytes_s) for o in offers[1:]} == {(400.0, 800.0)}
    for form in ("cachegen", "cachegen_delta"):
        levels = [KNOWN[f"{form}-{level}"] for level in LEVELS]
        assert [k.loss for k in levels] == sorted(k.loss for k in levels)
        assert [k.ratio for k in levels] == sorted((k.ratio for k in levels), reverse=True)
    assert {o.name for o in allowed(offers, "int8", 0)} == {RAW, "lossless", "int8"}


@pytest.mark.parametrize(("drawn", "at_most"), [("chunk", 0.12), ("context", 0.25)])
def test_adaptation_keeps_slos_that_eight_bits_miss(drawn: str, at_most: float) -> None:
    """CacheGen reports 81 to 8 % of misses, on a random link of 0.1 to 10 Gb/s with an SLO of 1 s.
    On a link that is slow for a whole context nothing helps: less falls there."""
    links = list(codec_adapt.links_of(300, 0, drawn))
    arms = {arm.name: arm for arm in codec_adapt.arms(math.inf)}

    def misses(name: str) -> float:
        runs = [codec_adapt.run_of(arms[name], link, 1.0) for link in links]
        return float(np.mean([run.seconds > 1 for run in runs]))

    adapted = misses("adapt, rate known, recompute too")
    assert adapted <= at_most < misses("always int8") / 1.5
    assert adapted <= misses("always cachegen-5"), "no level that is always the same does better"
