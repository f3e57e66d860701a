"""Re-run the nodes of a recording on their recorded inputs, and compare every decision.

Conductor, workers and gateway are rebuilt from the journals' headers alone. What differs is a
change of the code, or a decision that depended on something that is not an input: both are worth
knowing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvasir.core.effects import AnyEffect
from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment, LimitsSpec
from kvasir.node import Node
from kvasir.node.conductor import Conductor
from kvasir.node.config import WorkerConfig
from kvasir.node.request import Requests
from kvasir.node.worker import Worker
from kvasir.world import journal
from kvasir.world.journal import Entry, Header

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
    paths = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise ConfigError(
            "no journals here", where=str(directory),
            next_step="record with `kvasir serve --record DIR` or `kvasir simulate --record DIR`",
        )  # fmt: skip
    return Verdict(tuple(verify_journal(path) for path in paths))


def verify_journal(path: Path) -> NodeVerdict:
    """Stops at the first input whose decisions differ: after it the two histories are two."""
    with path.open("rb") as lines:
        header, entries = journal.read(lines, str(path))
        node = build(header)
        count = 0
        for entry in entries:
            count += 1
            difference = _compare(node, entry)
            if difference:
                return NodeVerdict(header.node, header.kind, count, difference)
    return NodeVerdict(header.node, header.kind, count)


def _compare(node: Node, entry: Entry) -> tuple[str, ...]:
    try:
        effects = node.handle(entry.now, entry.event)
    except Exception as error:
        return _difference(entry, f"{type(error).__name__}: {error}")
    if journal.digest(effects) == entry.digest:
        return ()
    now = ", ".join(journal.kinds(effects)) or "nothing"
    return _difference(entry, f"{now} {_text(effects)}")


def _difference(entry: Entry, now: str) -> tuple[str, ...]:
    kind = type(entry.event).__name__
    return (
        f"first difference at input {entry.seq}, {kind}, time {entry.now!r}",
        f"input:    {_short(msgspec.json.encode(entry.event).decode())}",
        f"recorded: {_short(', '.join(entry.effects) or 'nothing')} (digest {entry.digest})",
        f"now:      {_short(now)}",
    )


def _text(effects: list[AnyEffect]) -> str:
    return msgspec.json.encode(journal.decisions(effects)).decode()


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def build(header: Header) -> Node:
    """The node that a journal's header describes. Raises ConfigError for an unknown kind."""
    config: dict[str, Any] = header.config
    if header.kind == "conductor":
        return Conductor(Deployment.model_validate(config), epoch=1)
    if header.kind == "worker":
        return Worker(msgspec.convert(config, WorkerConfig))
    if header.kind == "gateway":
        limits = LimitsSpec.model_validate(config["limits"])
        return Requests(
            config["gateway"], 1, beat_s=limits.beat_s, grace_s=limits.grace_s,
            attempts_max=limits.attempts_max, deaths_max=limits.deaths_max,
        )  # fmt: skip
    raise ConfigError(f"a journal of a {header.kind!r}", nearest="conductor, worker, gateway")
