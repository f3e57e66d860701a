"""A chat answer's thinking told apart from the rest, while the text grows. Knows the two tags; no
tokens, no protocol.

    "<think>" reasoning "</think>" content        or content alone
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvasir.gateway.tokenize import overlap

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class Part(NamedTuple):
    """New text of either kind; nothing is lost but the tags and white space before the first."""

    reasoning: str = ""
    content: str = ""


class Splitter:
    """`inside`: the prompt's end has opened the tag already. Holds back what may become a tag."""

    __slots__ = ("_decided", "_held", "inside")

    def __init__(self, *, inside: bool) -> None:
        self.inside = inside
        self._decided = inside  # whether the answer begins with thinking is known
        self._held = ""

    def push(self, text: str) -> Part:
        text, self._held = self._held + text, ""
        if not self._decided:
            begun = text.lstrip()
            if begun.startswith(OPEN):
                self.inside, text = True, begun.removeprefix(OPEN)
            elif OPEN.startswith(begun):
                self._held = text
                return Part()
            self._decided = True
        if not self.inside:
            return Part(content=text)
        reasoning, tag, content = text.partition(CLOSE)
        if tag:
            self.inside = False
            return Part(reasoning, content)
        keep = len(text) - overlap(text, CLOSE)
        self._held = text[keep:]
        return Part(text[:keep])

    def finish(self) -> Part:
        """The held text: it became no tag."""
        held, self._held = self._held, ""
        return Part(reasoning=held) if self.inside else Part(content=held)


def begins_inside(prompt: str) -> bool:
    """Whether a rendered chat prompt leaves the tag open."""
    return prompt.rstrip().endswith(OPEN)
