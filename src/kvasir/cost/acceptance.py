"""How many guessed tokens come true where no model says: in the simulator and the fake engine.

Knows one probability. Each guess is right with it, whatever came before (Leviathan et al., arXiv
2211.17192, section 3.1, take the same for their analysis), so that the number of right ones in a
row is geometric. Drawn from a hash, so that the same request has the same luck in every run.
"""

from __future__ import annotations

import hashlib
import math

from kvasir.core.ids import RequestId


def accepted_tokens(request_id: RequestId, index: int, draft: int, acceptance: float) -> int:
    """How many of `draft` guesses are right, 0 to `draft`, when output token `index` is next."""
    if acceptance >= 1:
        return draft
    if acceptance <= 0:
        return 0
    digest = hashlib.blake2b(f"{request_id}:{index}".encode(), digest_size=8).digest()
    luck = (int.from_bytes(digest, "little") + 1) * 2.0**-64  # in (0, 1]
    return min(draft, int(math.log(luck) / math.log(acceptance)))
