"""When KV leaves the prefill worker, and when the decode worker takes it.

Knows counts of tokens and blocks. Must not know requests, transports or time.
"""

from __future__ import annotations

from typing import Final

from kvasir.core.specs.deployment import TransferMode

PULL_WAITING_SHARE: Final = 0.05  # DistServe (OSDI'24), the artifact's decode stage


def streams(mode: TransferMode, serial_tokens: int, prompt_tokens: int) -> bool:
    """Whether KV goes layer by layer while prefill computes; else in one go when it is over.

    Splitwise (ISCA'24, section 4.3) serialises prompts of less than a threshold, 512 tokens on
    H100: there is little to hide, and a copy per layer costs interference.
    """
    return mode == "streamed" and prompt_tokens >= serial_tokens


def pulls(blocks_waiting: int, blocks_count: int) -> bool:
    """Whether a decode worker with room for it takes the oldest prefilled prompt (DistServe).

    `blocks_waiting`: those of sequences that it has taken and does not run yet; they are to be less
    than 5 % of its `blocks_count`. Until then the KV stays where it was made, under its lease.
    """
    return blocks_waiting < PULL_WAITING_SHARE * blocks_count
