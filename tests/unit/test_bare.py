"""What a node, and so a journal, may see of a message that carries text or tokens."""

import msgspec

from kvasir.core.messages import Drawn, Logprobs, Prompt, Tokens, bare
from kvasir.core.request import Grammar, Sampling, Steering


def test_nothing_of_a_text_is_left() -> None:
    steering = Steering(((7, -100.0),), Grammar("regex", "secret"))
    assert bare(Prompt("r", 1, 1, b"abcd", steering)) == Prompt("r", 1, 1)
    drawn = Drawn("r", 1, 3, 1, b"abcd", "failed", (Logprobs(-0.5, ((65, -0.5),)),))
    assert bare(Tokens((drawn,))) == Tokens((Drawn("r", 1, 3, 1, b"", "failed"),))


def test_what_is_not_asked_for_takes_no_room_on_the_wire() -> None:
    encode = msgspec.msgpack.encode
    assert encode(Sampling()) == encode({})
    assert b"steering" not in encode(Prompt("r", 1, 1, b"abcd"))
    plain = Drawn("r", 1, 3, 1, b"abcd")
    assert len(encode(plain)) == len(encode(["r", 1, 3, 1, b"abcd", ""])) + 1


def test_an_older_worker_is_understood() -> None:
    """It knows nothing of log-probabilities and steering."""
    old = msgspec.msgpack.encode(["r", 1, 3, 1, b"abcd", "stop"])
    assert msgspec.msgpack.decode(old, type=Drawn) == Drawn("r", 1, 3, 1, b"abcd", "stop")
