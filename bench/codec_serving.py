"""Requests through the whole simulator with and without a codec, by the link's rate.

Llama 3 8B, one prefill and one decode worker, prompts that follow one another; the same nodes as
live, the codec's catalogued ratios and rates of one core. The first transfer of a link is chosen by
what the topology says, later ones by what was measured.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvasir.core.events import AnyEvent, Closed, KvCoded, Shipped
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec, TopologySpec, TransportSpec
from kvasir.core.specs.codec import CodecSpec
from kvasir.traces.record import Arrival
from kvasir.world.sim.world import SimWorld

LINKS_GBIT_S = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
KINDS = ("off", "lossless", "int8", "cachegen")
APART_S = 300.0  # nothing shares a link


def deployment(kind: str, gbit_s: float, level_max: int) -> Deployment:
    return Deployment(
        models=(ModelSpec(name="m", shape="llama-3-8b"),),
        topology=TopologySpec(preset="fabric", gpus_per_node=1, nic_bandwidth=gbit_s * 1.25e8),
        pools=tuple(PoolSpec(name=r, role=r, count=1) for r in ("prefill", "decode")),
        transport=TransportSpec(kind="tcp", codec=CodecSpec(kind=kind, level_max=level_max)),
    )  # fmt: skip


def run(d: Deployment, tokens: int, count: int) -> list[AnyEvent]:
    """What the nodes said."""
    world = SimWorld(d, [Arrival(i * APART_S, tokens, 8) for i in range(count)])
    noted: list[AnyEvent] = []
    told = world.recorder.event

    def listen(now: float, event: AnyEvent) -> None:
        noted.append(event)
        told(now, event)

    world.recorder.event = listen  # type: ignore[method-assign]
    world.run()
    return noted


def serving(tokens: int, count: int, level_max: int) -> dict[str, Any]:
    print(f"{count} prompts of {tokens:,} tokens of 128 KiB, levels up to {level_max}; "
          "seconds from the first to the second token, MB on the wire, forms chosen")  # fmt: skip
    row = "{:>8}{:>10}{:>10}{:>10}{:>8}  {}"
    print(row.format("Gb/s", "codec", "seconds", "MB", "gain", "chosen"))
    found: dict[str, Any] = {}
    for gbit_s in LINKS_GBIT_S:
        raw_s = 0.0
        for kind in KINDS:
            noted = run(deployment(kind, gbit_s, level_max), tokens, count)
            delays = [e.second_token_delay_s or 0.0 for e in noted if isinstance(e, Closed)]
            wire = sum(e.wire_bytes or e.bytes for e in noted if isinstance(e, Shipped)) / count
            chosen = Counter(e.codec for e in noted if isinstance(e, KvCoded))
            seconds = sum(delays) / len(delays)
            raw_s = raw_s or seconds
            said = ", ".join(f"{name} {n}" for name, n in chosen.most_common()) or "-"
            print(row.format(gbit_s, kind, f"{seconds:.4f}", f"{wire / 1e6:.1f}",
                             f"{raw_s / seconds:.2f}", said))  # fmt: skip
            found[f"{gbit_s:g} {kind}"] = {
                "seconds": seconds, "wire_bytes": wire, "chosen": dict(chosen),
            }  # fmt: skip
    return found
