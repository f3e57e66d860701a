"""Thinking is told apart wherever the text is cut; nothing is lost but the tags."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.reasoning import Splitter, begins_inside


def split(pieces: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = Splitter(inside=inside)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.finish()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>why</think>so", False, "why", "so"),
        ("\n <think>\nwhy\n</think>\n\nso", False, "\nwhy\n", "\n\nso"),
        ("why</think>so", True, "why", "so"),
        ("why", True, "why", ""),
        ("<think>why</thin", False, "why</thin", ""),
        ("so", False, "", "so"),
        ("  so <think>not</think>", False, "", "  so <think>not</think>"),
        ("<think></think>so", False, "", "so"),
        ("<thin", False, "", "<thin"),
        ("<thinker>", False, "", "<thinker>"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<think>a < b</think>é", False, "a < b", "é"),
        ("", False, "", ""),
    ],
)
def test_parts(text: str, inside: bool, reasoning: str, content: str) -> None:
    assert split([text], inside=inside) == (reasoning, content)
    assert split(list(text), inside=inside) == (reasoning, content)


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "a", "é", " ", "\n", "<thi"])
)


@given(PIECES, st.booleans(), st.data())
def test_the_cuts_do_not_matter(pieces: list[str], inside: bool, data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    cut = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split([text], inside=inside)
    assert split(cut, inside=inside) == whole
    assert len("".join(whole)) >= len(text.strip()) - len("<think></think>")


def test_text_is_shown_as_soon_as_it_can_be_no_tag() -> None:
    splitter = Splitter(inside=False)
    assert splitter.push("<think>") == ("", "")
    assert splitter.inside
    assert splitter.push("a<") == ("a", "")
    assert splitter.push("b") == ("<b", "")
    assert splitter.push("</think") == ("", "")
    assert splitter.push("> c") == ("", " c")
    assert splitter.push("<think>") == ("", "<think>")


def test_a_prompt_may_have_begun() -> None:
    assert begins_inside("<|im_start|>assistant\n<think>\n")
    assert not begins_inside("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not begins_inside("<|im_start|>assistant\n")
