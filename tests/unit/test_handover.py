"""When KV leaves, and when it is taken: tables of cases."""

import pytest

from kvasir.core.specs import Deployment, ModelSpec, PolicySpec, PoolSpec, RouteSpec, TransportSpec
from kvasir.core.specs.deployment import TransferMode
from kvasir.policy.handover import pulls, streams


@pytest.mark.parametrize(
    ("mode", "serial_tokens", "prompt_tokens", "expected"),
    [
        ("streamed", 0, 1, True),
        ("streamed", 512, 511, False),
        ("streamed", 512, 512, True),
        ("serial", 0, 4096, False),
        ("pull", 0, 4096, False),
    ],
)
def test_streams(
    mode: TransferMode, serial_tokens: int, prompt_tokens: int, expected: bool
) -> None:
    assert streams(mode, serial_tokens, prompt_tokens) is expected


@pytest.mark.parametrize(
    ("waiting", "count", "expected"),
    [(0, 1, True), (0, 1000, True), (49, 1000, True), (50, 1000, False), (1, 19, False)],
)
def test_pulls_while_less_than_a_twentieth_waits(waiting: int, count: int, expected: bool) -> None:
    assert pulls(waiting, count) is expected


@pytest.mark.parametrize("choice", ["arrival", "prefill_end"])
def test_pull_needs_a_decode_worker_that_is_chosen_after_prefill(choice: str) -> None:
    def made() -> Deployment:
        return Deployment(
            models=(ModelSpec(name="m"),),
            pools=(PoolSpec(name="w", role="mixed", count=1),),
            policy=PolicySpec(route=RouteSpec.model_validate({"decode_choice": choice})),
            transport=TransportSpec(mode="pull"),
        )

    if choice == "prefill_end":
        assert made().transport.mode == "pull"
    else:
        with pytest.raises(ValueError, match="needs decode_choice: prefill_end"):
            made()
