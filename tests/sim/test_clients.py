"""What a request takes before and after the gateway is in what clients see, and in nothing else."""

import pytest

from kvasir.core.specs import Deployment
from kvasir.core.specs.deployment import HostSpec
from kvasir.world.sim.run import simulate
from tests.sims import cluster, trace


def far(seconds: float) -> Deployment:
    return cluster().model_copy(update={"host": HostSpec(request_s=seconds)})


def test_first_tokens_are_late_by_it_and_later_ones_no_later_still() -> None:
    near = sorted(simulate(far(0.0), trace(30)).outcomes, key=lambda o: o.start_s or 0)
    late = sorted(simulate(far(0.25), trace(30)).outcomes, key=lambda o: o.start_s or 0)
    assert [o.ttft_s for o in late] == pytest.approx([o.ttft_s + 0.25 for o in near])
    assert [o.e2e_s for o in late] == pytest.approx([o.e2e_s + 0.25 for o in near])
    assert [o.tpot_s for o in late] == pytest.approx([o.tpot_s for o in near])
    assert [o.start_s for o in late] == pytest.approx([o.start_s for o in near])


def test_the_same_deployment_without_it_gives_the_same_bytes() -> None:
    t = trace(30)
    assert simulate(far(0.0), t).to_json() == simulate(cluster(), t).to_json()


def test_an_slo_counts_what_clients_see() -> None:
    goods = [simulate(far(s), trace(30)).summary.slo for s in (0.0, 5.0)]
    assert goods[0] is not None and goods[0].ttft_met == 30
    assert goods[1] is not None and goods[1].ttft_met == 0
