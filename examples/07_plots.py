"""A run drawn: charts as SVG files, a report, and a timeline for Perfetto. Needs no extra package.

`python examples/07_plots.py` writes into ./plots. A notebook shows `result.plot("ttft")` by itself.
"""

from pathlib import Path

from kvasir.cli.files import load_deployment
from kvasir.cli.simulate import workload_of
from kvasir.measure.html import page
from kvasir.runtime.timeline import Timeline
from kvasir.world.sim.run import simulate

deployment = load_deployment("mooncake-64")
timeline = Timeline()
result = simulate(
    deployment,
    workload_of(deployment, None, 300, seed=0),
    detail=True,  # samples link heat and the distribution of inter-token latency
    listen=timeline.listen,
)
for path in result.plot().save("plots"):
    print(path)

folder = Path("plots")
report = page(deployment.name, result.summary, result.outcomes, result.notes, result.detail)
(folder / "report.html").write_text(report, encoding="utf-8")
(folder / "timeline.json").write_bytes(timeline.json())  # open at ui.perfetto.dev
print(folder / "report.html", folder / "timeline.json")
