"""Which transport a pair of workers uses, and what is said when it is not the one wanted."""

import pytest

from kvasir.transfer import KINDS, Timeline
from kvasir.transfer.choice import ASIDE_S, ORDER, PROBE_BYTES, Seen, choose, measured
from kvasir.world.live.ways import Ways

BIG, SMALL, NOW = PROBE_BYTES, PROBE_BYTES - 1, 1000.0
FAILED = Seen(None, NOW - 1.0, "connection lost: reset")
ADDRESSES = ("nixl://h:1", "tcp://h:2")


def test_the_order_names_every_kind() -> None:
    assert ORDER == KINDS


@pytest.mark.parametrize(
    ("able", "seen", "nbytes", "kind", "wanted"),
    [
        (("tcp", "shm"), {}, SMALL, "shm", "shm"),
        (("tcp", "nixl"), {}, BIG, "nixl", "nixl"),
        (("tcp",), {}, BIG, "tcp", "tcp"),
        # each carries one big transfer, then the fastest goes
        (("shm", "tcp"), {"shm": Seen(9e9)}, BIG, "tcp", "tcp"),
        (("shm", "tcp"), {"shm": Seen(9e9)}, SMALL, "shm", "shm"),
        (("nixl", "tcp"), {"nixl": Seen(1e9), "tcp": Seen(2e9)}, BIG, "tcp", "tcp"),
        (("nixl", "tcp"), {"nixl": Seen(3e9), "tcp": Seen(2e9)}, SMALL, "nixl", "nixl"),
        # what failed stands aside for a while, unless there is nothing else
        (("nixl", "tcp"), {"nixl": FAILED}, BIG, "tcp", "nixl"),
        (("nixl", "tcp"), {"nixl": Seen(9e9, NOW - 1, "x"), "tcp": Seen(1e9)}, BIG, "tcp", "nixl"),
        (("nixl", "tcp"), {"nixl": Seen(None, NOW - ASIDE_S, "x")}, BIG, "nixl", "nixl"),
        (("nixl", "tcp"), {"nixl": FAILED, "tcp": FAILED}, BIG, "nixl", "nixl"),
        (("tcp",), {"tcp": FAILED}, BIG, "tcp", "tcp"),
    ],
)
def test_choice(
    able: tuple[str, ...], seen: dict[str, Seen], nbytes: int, kind: str, wanted: str
) -> None:
    way = choose(able, seen, nbytes, NOW)
    assert way is not None and (way.kind, way.wanted) == (kind, wanted)
    assert kind == wanted or way.why.startswith(f"{wanted} failed: ")


def test_nothing_in_common() -> None:
    assert choose((), {}, BIG, NOW) is None


def test_a_rate_follows_what_is_measured_and_a_success_forgives() -> None:
    assert measured(Seen(), SMALL, 1.0) == Seen()
    first = measured(FAILED, 4 * BIG, 2.0)
    assert first == Seen(2.0 * BIG)
    assert measured(first, 4 * BIG, 1.0) == Seen(3.0 * BIG)


def test_a_way_that_breaks_is_left_and_said_once() -> None:
    ways = Ways("prefill-0", ["nixl", "tcp"])
    ways.learn("decode-0", ADDRESSES)
    assert ways.open(("a", 1), "decode-0", BIG, False) == ("nixl://h:1", None)
    ways.over(("a", 1), False, "checksum of layer 0 does not match", None)
    assert ways.open(("a", 2), "decode-0", BIG, False) == ("nixl://h:1", None)
    ways.over(("a", 2), False, "connection lost: NIXL says ERR", None)
    address, said = ways.open(("a", 3), "decode-0", BIG, False)
    assert address == "tcp://h:2" and said is not None
    assert (said.source, said.target, said.wanted, said.used) == (
        "prefill-0", "decode-0", "nixl", "tcp"
    )  # fmt: skip
    assert "NIXL says ERR" in said.reason
    assert ways.open(("b", 1), "decode-0", BIG, False) == ("tcp://h:2", None)
    ways.learn("decode-0", ("nixl://h:3", "tcp://h:4"))  # it was started anew
    assert ways.open(("c", 1), "decode-0", BIG, False) == ("nixl://h:3", None)


def test_only_what_was_whole_is_timed() -> None:
    ways = Ways("prefill-0", ["nixl", "tcp"])
    ways.learn("decode-0", ADDRESSES)
    for number, whole in enumerate((False, True)):
        address, _ = ways.open((f"r{number}", 1), "decode-0", BIG, whole)
        assert address == "nixl://h:1"
        ways.over((f"r{number}", 1), True, "", Timeline(0.0, 0.1, 0.5, 1.1, BIG))
    assert ways.open(("next", 1), "decode-0", BIG, True)[0] == "tcp://h:2"


def test_who_was_never_heard_of_has_no_address() -> None:
    ways = Ways("prefill-0", ["tcp"])
    assert ways.open(("a", 1), "decode-9", BIG, True) == ("", None)
    ways.learn("decode-9", ("shm:///run/x",))
    assert ways.open(("a", 1), "decode-9", BIG, True) == ("", None)
    ways.over(("a", 1), False, "cannot connect: ", None)
