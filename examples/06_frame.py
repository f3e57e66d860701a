"""A run as a pandas frame. It needs the extra: `pip install 'kvasir-llm[frames]'`.

`python examples/06_frame.py` prints what each prefill worker did.
"""

from kvasir.cli.files import load_deployment
from kvasir.cli.simulate import workload_of
from kvasir.world.sim.run import simulate

deployment = load_deployment("mooncake-64")
result = simulate(deployment, workload_of(deployment, None, 300, seed=0))
frame = result.to_pandas()  # one row a request; seconds and tokens

by_worker = frame.groupby("prefill_worker").agg(
    requests=("ttft_s", "size"),
    ttft_s_mean=("ttft_s", "mean"),
    hit_ratio=("cached_tokens", "sum"),
    good=("good", "mean"),
)
by_worker["hit_ratio"] /= frame.groupby("prefill_worker")["prompt_tokens"].sum()
print(by_worker.round(3).to_string())
print(f"correlation of TTFT with prompt length: {frame.ttft_s.corr(frame.prompt_tokens):.2f}")
