"""What all messages have in common, and the words that they share. Knows nothing of any of them."""

from __future__ import annotations

from typing import Literal

import msgspec

# Of a worker's KV, fastest first; what is in `cluster` all workers share.
Tier = Literal["device", "host", "disk", "cluster"]


class Message(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Base of all; the tag on the wire is the class name."""
