"""Re-run the nodes of a recording on their recorded inputs, and compare every decision.

What differs is a change of the code, or a decision that depended on something that is not an input:
both are worth knowing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvasir.core.effects import AnyEffect
from kvasir.runtime.replay import build, header_of, journals
from kvasir.world import journal
from kvasir.world.journal import Entry

SHOWN_CHARS = 300


class NodeVerdict(NamedTuple):
    """`inputs` handled; `difference` is empty when every decision was the same."""

    node: str
    kind: str
    inputs: int
    difference: tuple[str, ...] = ()


class Verdict(NamedTuple):
    nodes: tuple[NodeVerdict, ...]

    @property
    def ok(self) -> bool:
        return not any(n.difference for n in self.nodes)

    @property
    def lines(self) -> list[str]:
        """One line a node; the earliest difference of each that has one."""
        found = []
        for node in self.nodes:
            word = "differs" if node.difference else "same decisions"
            found.append(f"{node.node} ({node.kind}): {node.inputs} inputs, {word}")
            found += [f"  {line}" for line in node.difference]
        return found


def verify_dir(directory: Path) -> Verdict:
    """All journals in a folder. Raises ConfigError when there are none, or one cannot be read."""
    return Verdict(tuple(verify_journal(path) for path in journals(directory)))


def verify_journal(path: Path) -> NodeVerdict:
    """Stops at the first input whose decisions differ: after it the two histories are two."""
    header = header_of(path)
    node = build(header)
    count = 0
    with path.open("rb") as lines:
        for entry in journal.read(lines, str(path))[1]:
            count += 1
            try:
                effects = node.handle(entry.now, entry.event)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                return NodeVerdict(header.node, header.kind, count, _difference(entry, said))
            if journal.digest(effects) != entry.digest:
                return NodeVerdict(
                    header.node, header.kind, count, _difference(entry, _text(effects))
                )
    return NodeVerdict(header.node, header.kind, count)


def _difference(entry: Entry, now: str) -> tuple[str, ...]:
    kind = type(entry.event).__name__
    return (
        f"first difference at input {entry.seq}, {kind}, time {entry.now!r}",
        f"input:    {_short(msgspec.json.encode(entry.event).decode())}",
        f"recorded: {_short(', '.join(entry.effects) or 'nothing')} (digest {entry.digest})",
        f"now:      {_short(now)}",
    )


def _text(effects: Sequence[AnyEffect]) -> str:
    names = ", ".join(journal.kinds(effects)) or "nothing"
    return f"{names} {msgspec.json.encode(journal.decisions(effects)).decode()}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
