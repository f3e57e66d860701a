"""What is cut and what is not: which models, and which heads of a cache are a rank's.

Knows configs and caches; must not know processes.

    cache of a layer, all ranks  | head 0 | head 1 | head 2 | head 3 |   one token, in one memory
    of rank 1 of 2                                 [ head 2 | head 3 ]   a view of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kvasir.core.errors import ModelError
from kvasir.core.specs.model import ModelShape
from kvasir.engine.families import FUSED, FUSED_ACTIVATIONS

if TYPE_CHECKING:
    from kvasir.engine.attention import LatentCache, LayerCache

C = TypeVar("C", bound="LayerCache | LatentCache")

RANKS_MAX: Final = 16  # all of them on one host


def check(config: Mapping[str, Any], tp: int, where: str) -> None:
    """Raises ModelError if a model of `config`, a whole config.json, cannot be cut for `tp` ranks.
    Reads no weights."""
    name = (config.get("architectures") or ["none"])[0]
    activation = config.get("hidden_act", FUSED_ACTIVATIONS[0])
    if name not in FUSED or activation not in FUSED_ACTIVATIONS:
        what = name if name not in FUSED else f"{name} with hidden_act {activation}"
        raise ModelError(
            f"tensor parallel is not supported for {what}",
            where=where,
            nearest=", ".join(FUSED),
            next_step="set tp to 1, or serve it with another engine behind the worker protocol",
        )
    shape = ModelShape.from_hf(config, where=where)
    possible = [n for n in range(1, RANKS_MAX + 1) if not shape.kv_heads % n]
    if tp not in possible:
        raise ModelError(
            f"tp {tp} does not divide {shape.kv_heads} KV heads into equal parts",
            where=where,
            nearest=str(max(n for n in possible if n < tp)),
            next_step=f"tp can be {', '.join(map(str, possible))}; heads are not replicated",
        )


def heads_of(caches: Sequence[C], rank: int, size: int) -> list[C]:
    """Views of the heads that are the rank's; `size` divides their number."""

    def own(plane: Any) -> Any:
        return plane.tensor_split(size, dim=1)[rank]

    return [type(cache)(*map(own, cache)) for cache in caches]
