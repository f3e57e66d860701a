"""Nodes rebuilt from journals and run again on their recorded inputs.

A journal keeps digests of decisions, not decisions; running the node again brings them back.
Verify, explain and timeline all read recordings this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from pydantic import ValidationError

from kvasir import __version__
from kvasir.core.effects import AnyEffect
from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment, LimitsSpec
from kvasir.measure.calibration import models_of
from kvasir.node import Node
from kvasir.node.conductor import Conductor
from kvasir.node.config import WorkerConfig
from kvasir.node.request import Requests
from kvasir.node.worker import Worker
from kvasir.runtime.policies import ready
from kvasir.world import journal
from kvasir.world.journal import Entry, Header

WHAT_CHARS = 200


class Turn(NamedTuple):
    """One input and what the node decides now; `same` as recorded, byte for byte."""

    entry: Entry
    effects: list[AnyEffect]
    same: bool


def journals(directory: Path) -> list[Path]:
    """The journals of a recording. Raises ConfigError when there are none."""
    paths = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise ConfigError(
            "no journals here",
            where=str(directory),
            next_step="record with `kvasir serve --record DIR` or `kvasir simulate --record DIR`",
        )
    return paths


def header_of(path: Path) -> Header:
    with path.open("rb") as lines:
        return journal.read(lines, str(path))[0]


def turns(path: Path, node: Node | None = None) -> Iterator[Turn]:
    """Run a journal's node from its start. `node` replaces the one built from the header."""
    with path.open("rb") as lines:
        header, entries = journal.read(lines, str(path))
        node = node or build(header)
        for entry in entries:
            effects = node.handle(entry.now, entry.event)
            yield Turn(entry, effects, journal.digest(effects) == entry.digest)


def build(header: Header) -> Node:
    """The node that a journal's header describes.

    Raises ConfigError for an unknown kind, or a configuration that this version does not know.
    """
    try:
        return _node(header)
    except (ValidationError, msgspec.ValidationError) as error:
        what = " ".join(str(error).split())[:WHAT_CHARS]
        raise ConfigError(
            f"a configuration that version {__version__} does not know: {what}",
            where=f"{header.node}, recorded by version {header.version}",
            next_step="read it with the version that recorded it",
        ) from None


def _node(header: Header) -> Node:
    config: dict[str, Any] = header.config
    if header.kind == "conductor":
        deployment = Deployment.model_validate(config)
        ready(deployment.policy.route)
        return Conductor(deployment, models_of(deployment))
    if header.kind == "worker":
        return Worker(msgspec.convert(config, WorkerConfig))
    if header.kind == "gateway":
        limits = LimitsSpec.model_validate(config["limits"])
        return Requests(
            config["gateway"],
            1,
            beat_s=limits.beat_s,
            grace_s=limits.grace_s,
            attempts_max=limits.attempts_max,
            deaths_max=limits.deaths_max,
        )
    raise ConfigError(f"a journal of a {header.kind!r}", nearest="conductor, worker, gateway")
