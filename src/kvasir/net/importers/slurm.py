"""Slurm's `topology.conf` (plugin topology/tree): switches, their nodes and the switches below.

Format: https://slurm.schedmd.com/topology.conf.html and its hostlist ranges, `tux[0-3,8]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.units import parse_rate
from kvasir.net.importers.tree import Imported, Options, Uplink, explicit

HOSTS_MAX: Final = 100_000
KEYS: Final = ("SwitchName", "Nodes", "Switches", "LinkSpeed")
_KEY: Final = {key.lower(): key for key in KEYS}
_RANGE: Final = re.compile(r"\[([^\[\]]*)\]")


class _Switch(NamedTuple):
    line: int
    nodes: list[str]
    switches: list[str]
    bandwidth: float | None


def from_slurm(text: str, where: str, options: Options) -> Imported:
    """An explicit topology. Raises ConfigError that names the line."""
    switches: dict[str, _Switch] = {}
    for line, content in _lines(text):
        name, switch = _switch(content, f"{where}:{line}", line)
        if name in switches:
            what = f"switch {name!r} is there twice, first on line {switches[name].line}"
            raise ConfigError(what, where=f"{where}:{line}")
        switches[name] = switch
    if not switches:
        raise ConfigError(
            "no switch in it", where=where, next_step="lines like: SwitchName=s0 Nodes=n[0-7]"
        )
    uplinks: list[Uplink] = []
    for name, switch in switches.items():
        for below in switch.switches:
            if below not in switches:
                raise ConfigError(
                    f"no switch {below!r} under {name!r}",
                    where=f"{where}:{switch.line}",
                    nearest=nearest(below, switches),
                )
        uplinks += [Uplink(below, name, switch.bandwidth) for below in _members(switch)]
    nodes = dict.fromkeys(node for switch in switches.values() for node in switch.nodes)
    gpus = dict.fromkeys(nodes, options.gpus_per_node)
    notes = [f"{len(gpus)} nodes of {options.gpus_per_node} accelerators (topology.conf has none)"]
    if any(switch.bandwidth for switch in switches.values()):
        notes.append("LinkSpeed is of the links on its line; a number without a unit is Gb/s")
    return Imported(explicit(gpus, uplinks, options, where), tuple(notes))


def _members(switch: _Switch) -> list[str]:
    return [*dict.fromkeys((*switch.switches, *switch.nodes))]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments, each with its number; a backslash joins the next one."""
    held, first = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        content = raw.split("#", 1)[0].rstrip()
        first = first or number
        if content.endswith("\\"):
            held += content[:-1] + " "
            continue
        if (held + content).strip():
            yield first, (held + content).strip()
        held, first = "", 0
    if held.strip():
        yield first, held.strip()


def _switch(content: str, where: str, line: int) -> tuple[str, _Switch]:
    values: dict[str, str] = {}
    for part in content.split():
        key, sign, value = part.partition("=")
        known = _KEY.get(key.lower())
        if not sign or known is None:
            raise ConfigError(
                f"{part!r} is not a key of topology/tree",
                where=where,
                nearest=nearest(key, KEYS),
                next_step="SwitchName=s0 Nodes=n[0-7] | SwitchName=top Switches=s[0-3]",
            )
        values[known] = value
    if not values.get("SwitchName"):
        raise ConfigError("a line without SwitchName", where=where)
    nodes = list(_hosts(values.get("Nodes", ""), where))
    switches = list(_hosts(values.get("Switches", ""), where))
    if not nodes and not switches:
        what = f"switch {values['SwitchName']!r} has neither Nodes nor Switches"
        raise ConfigError(what, where=where)
    speed = values.get("LinkSpeed")
    bandwidth = None if speed is None else _speed(speed, where)
    return values["SwitchName"], _Switch(line, nodes, switches, bandwidth)


def _speed(text: str, where: str) -> float:
    """Bytes per second. Slurm says that the unit is arbitrary; without one it is Gb/s here."""
    try:
        rate = parse_rate(f"{text} Gb/s" if text.replace(".", "", 1).isdecimal() else text)
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ConfigError(
            f"LinkSpeed {text!r} is not a rate",
            where=where,
            next_step="LinkSpeed=400, or with a unit: LinkSpeed=400Gb/s",
        )
    return rate


def _hosts(text: str, where: str) -> Iterator[str]:
    """The names of a hostlist, in order."""
    count = 0
    for part in _split(text):
        for name in _expanded(part, where):
            count += 1
            if count > HOSTS_MAX:
                raise ConfigError(f"more than {HOSTS_MAX} names on one line", where=where)
            yield name


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part]


def _expanded(part: str, where: str) -> Iterator[str]:
    found = _RANGE.search(part)
    if found is None:
        if "[" in part or "]" in part:
            raise ConfigError(f"{part!r}: a bracket is not closed", where=where)
        yield part
        return
    before, after = part[: found.start()], part[found.end() :]
    for piece in found[1].split(","):
        low, _, high = piece.partition("-")
        high = high or low
        if not low.isdecimal() or not high.isdecimal() or int(low) > int(high):
            raise ConfigError(
                f"{part!r}: {piece!r} is not a range of numbers", where=where,
                next_step="tux[0-3,8,10-12]",
            )  # fmt: skip
        if int(high) - int(low) >= HOSTS_MAX:
            raise ConfigError(f"{part!r} names more than {HOSTS_MAX} hosts", where=where)
        for number in range(int(low), int(high) + 1):
            yield from _expanded(f"{before}{number:0{len(low)}}{after}", where)
