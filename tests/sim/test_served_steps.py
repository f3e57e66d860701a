"""A cost fitted to the steps of a recording is the cost that made them."""

from pathlib import Path

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.specs.deployment import FittedCost
from kvasir.cost.step import Fitted
from kvasir.measure.fit import choose
from kvasir.runtime.served import served_steps
from kvasir.world.sim.run import simulate
from tests.sims import cluster, trace

COST = FittedCost(overhead_s=3e-3, per_token_s=4e-5, per_context_s=1e-6, per_attention_s=2e-8)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    simulate(cluster(cost=COST), trace(120), record=folder)
    return folder


def test_steps_take_what_they_took(recording: Path) -> None:
    steps, model = served_steps(recording), Fitted(COST)
    assert len(steps) > 200
    kinds = {(len(s.rows) > 1, s.rows[0][0] > 1) for s in steps}
    assert kinds >= {(False, True), (True, False)}  # prompts, and decodes of several at once
    for step in steps:  # the mean of a run of decode steps may lie half a token beside its middle
        assert step.seconds == pytest.approx(model.batch(step.rows), rel=1e-3), step.rows


def test_the_fit_is_the_cost(recording: Path) -> None:
    steps = served_steps(recording)
    choice = choose(steps[::2], steps[1::2])
    assert not choice.curved and choice.errors.worst < 0.005


def test_steps_are_whole_when_sequences_are_preempted_and_workers_mixed(tmp_path: Path) -> None:
    """Rows that go on unnamed, leave for want of blocks and come back are in the steps they ran."""
    crowded = cluster("mixed", cost=COST, pool={"kv_blocks": 60, "batch_max": 8})
    result = simulate(crowded, trace(60), record=tmp_path)
    assert result.counts.get("Preempted", 0) > 0
    model = Fitted(COST)
    for step in served_steps(tmp_path):
        assert step.seconds == pytest.approx(model.batch(step.rows), rel=1e-3), step.rows


def test_another_schedulers_recording_is_refused(recording: Path, tmp_path: Path) -> None:
    """Steps of nodes that decide otherwise now would be paired with times that are not theirs."""
    text = (recording / "prefill-0.jsonl").read_text()
    other = text.replace('"chunk_tokens":8192', '"chunk_tokens":64')
    assert other != text
    (tmp_path / "prefill-0.jsonl").write_text(other)
    with pytest.raises(ConfigError, match="decides otherwise") as raised:
        served_steps(tmp_path)
    assert "kvasir verify" in str(raised.value)
