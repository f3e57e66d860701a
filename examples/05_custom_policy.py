"""A route policy of one's own, simulated beside ours: `python examples/05_custom_policy.py`.

A package makes it known to `serve`, `simulate --policy` and `compare` by an entry point:

    [project.entry-points."kvasir.policies"]
    warmest = "my_package.policies:warmest"
"""

from kvasir.cli.files import load_deployment
from kvasir.cli.overrides import with_policy
from kvasir.cli.simulate import workload_of
from kvasir.policy.route import ROUTES, Choice, RouteMemory, RouteView
from kvasir.world.sim.run import simulate


def warmest(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Most of the prompt cached; then the fewest requests. A pure function of what it is shown."""
    best = min(view.candidates, key=lambda w: (-view.hits.get(w.id, 0), w.requests, w.id))
    return Choice(best.id, f"{view.hits.get(best.id, 0)} blocks cached"), memory


ROUTES["warmest"] = warmest

deployment = load_deployment("mooncake-64")
arrivals = workload_of(deployment, None, 200, seed=0)
for name in ("round_robin", "warmest", "netkv"):
    figures = simulate(with_policy(deployment, name), arrivals).summary
    print(f"{name:12} TTFT mean {figures.ttft.mean_s:.3f} s   goodput {figures.goodput:.2f}/s")
