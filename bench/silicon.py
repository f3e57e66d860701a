"""Measured whole servers as simulations: what each row of the silicon file ran, and its load.

Knows the columns and the two campaigns behind them. Must not know measured times: only `truth_*` of
a `Case` holds them, and nothing here reads those.

Two campaigns show in the ids. One (`..._epnone_...`) sends prompts of one length, the other
(InferenceMAX, whose scripts are public) draws lengths uniformly from 80 % of the nominal ones up,
sends ten requests a user, and gives vLLM a budget of 8,192 tokens a step. Both keep a fixed number
of users waiting for answers, who start together. vLLM's rows run under its own batching.
"""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path
from typing import Final, NamedTuple

from kvasir.core.specs import Deployment, ModelSpec, PoolSpec, TopologySpec
from kvasir.core.specs.deployment import BatchSpec, MeasuredCost, PolicySpec
from kvasir.measure.calibration import table_systems

SHAPES: Final = {
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2.5",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "moonshotai/Kimi-K2.5": "kimi-k2",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-v3",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "nvidia/Qwen3-32B-NVFP4": "qwen3-32b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
LATENT: Final = {"deepseek-v3", "kimi-k2"}
# Systems without tables, and the measured one that is most alike.
STANDS_IN: Final = {"gb200": "b200_sxm", "gb300": "b200_sxm", "b300_sxm": "b200_sxm"}
LENGTH_MIN_SHARE: Final = 0.8
# Lengths of one nominal length differ a little all the same: texts are cut into tokens anew.
NOMINAL_MIN_SHARE: Final = 0.97
WAVES: Final = 10  # requests a user sends
NOMINAL_WAVES: Final = 20  # ... in the other campaign, which does not say; chosen on its rows
ROOM: Final = TopologySpec(pods=16)
BATCH_TOKENS: Final = 8192  # vLLM's default for its own server with 70 GB or more
EMBEDDED_BATCH_TOKENS: Final = 2048  # ... and where another program embeds its engine
BATCH_MAX: Final = 1024


NEWEST: Final = 99  # of a version that is not said


class Group(NamedTuple):
    """What is held out together."""

    system: str
    model: str


class Case(NamedTuple):
    """One row: a deployment under a closed loop of `users`, and what was measured there."""

    id: str
    group: Group
    backend: str
    mode: str
    coverage: str
    deployment: Deployment
    users: int
    input_tokens: int
    output_tokens: int
    length_min_share: float
    waves: int
    truth_ttft_s: float
    truth_tpot_s: float

    @property
    def load(self) -> tuple[object, ...]:
        """Equal for rows that are the same simulation."""
        return (self.deployment.model_dump_json(), self.users, self.input_tokens,
                self.output_tokens, self.length_min_share, self.waves)  # fmt: skip

    def batched(self, policy: str) -> Case:
        """The same under another batch policy."""
        batch = PolicySpec(batch=BatchSpec(name=policy))
        return self._replace(deployment=self.deployment.model_copy(update={"policy": batch}))


class Skipped(NamedTuple):
    """A row that says too little to be simulated."""

    id: str
    why: str


Row = dict[str, str]


def read(path: Path) -> tuple[list[Case], list[Skipped]]:
    """Every row of a file in the shape of `silicon_sample.csv.gz`."""
    cases: list[Case] = []
    skipped: list[Skipped] = []
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            why = _missing(row)
            if why:
                skipped.append(Skipped(row["id"], why))
            else:
                cases.append(case(row))
    return cases, skipped


def _missing(row: Row) -> str:
    if row["model_path"] not in SHAPES:
        return f"no shape of {row['model_path']}"
    if row["mode"] == "disagg" and not row["prefill_num_workers"]:
        return "counts of workers not given"
    return ""


def case(row: Row) -> Case:
    """The simulation of one row. Raises KeyError for a model without a shape."""
    nominal = "epnone" in row["id"]
    share = NOMINAL_MIN_SHARE if nominal else LENGTH_MIN_SHARE
    stretch = 2 / (1 + share) if nominal else 1.0  # so that the mean is the nominal length
    pools, users = _aggregated(row) if row["mode"] == "agg" else _disaggregated(row)
    batch = "vllm_v1" if row["backend"] == "vllm" else "token_budget"
    shape = SHAPES[row["model_path"]]
    return Case(
        id=row["id"],
        group=Group(row["system"], row["model_path"].rpartition("/")[2]),
        backend=row["backend"],
        mode=row["mode"],
        coverage=coverage(row),
        deployment=Deployment(
            models=(ModelSpec(name=shape, max_context=1 << 20),), pools=pools, topology=ROOM,
            policy=PolicySpec(batch=BatchSpec(name=batch)),
        ),
        users=users,
        input_tokens=round(int(row["isl"]) * stretch),
        output_tokens=round(int(row["osl"]) * stretch),
        length_min_share=share,
        waves=NOMINAL_WAVES if nominal else WAVES,
        truth_ttft_s=float(row["silicon_ttft_ms"]) / 1e3,
        truth_tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
    )


def coverage(row: Row) -> str:
    """`headline`: system, backend, precision and attention have tables; else what lacks first."""
    if row["system"] not in table_systems():
        return f"system {row['system']}: tables of {STANDS_IN[row['system']]}"
    if SHAPES[row["model_path"]] in LATENT:
        return "latent attention: roofline"
    if row["backend"] != "vllm":
        return f"{row['backend']}: tables of vllm"
    return "headline"


def _aggregated(row: Row) -> tuple[tuple[PoolSpec, ...], int]:
    layout = _layout(row, "")
    users = int(row["batch_size"]) * max(1, int(row["attention_dp_size"] or 1))
    return (_pool(row, "serve", "mixed", 1, layout),), users


def _disaggregated(row: Row) -> tuple[tuple[PoolSpec, ...], int]:
    prefill, decode = _layout(row, "prefill_"), _layout(row, "decode_")
    workers = int(row["decode_num_workers"])
    in_id = re.search(r"_c(\d+)_", row["id"])
    copies = int(row["decode_attention_dp_size"] or 1)
    users = int(in_id[1]) if in_id else int(row["decode_batch_size"]) * workers * copies
    return (
        _pool(row, "prefill", "prefill", int(row["prefill_num_workers"]), prefill),
        _pool(row, "decode", "decode", workers, decode),
    ), users


class Layout(NamedTuple):
    gpus: int
    pp: int
    dp: int
    ep: int


def _layout(row: Row, prefix: str) -> Layout:
    """How an instance is divided. Some rows give the accelerators as `tp` and count them again
    in `dp` and `ep` (tp 4, dp 4, ep 16 on four); the ids and the nodes' size tell."""

    def number(name: str) -> int:
        return max(1, int(row[f"{prefix}{name}"] or 1))

    tp, dp, ep = number("tp_size"), number("attention_dp_size"), number("moe_ep_size")
    together = number("moe_tp_size") * ep
    if dp > 1 and tp > 1 and together == tp * dp:
        return Layout(tp, number("pp_size"), min(dp, tp), tp)
    if not row[f"{prefix}attention_dp_size"] and together > tp:
        return Layout(together, number("pp_size"), together // tp, ep)
    return Layout(tp * dp, number("pp_size"), dp, min(ep, tp * dp))


def _pool(row: Row, name: str, role: str, count: int, layout: Layout) -> PoolSpec:
    system = STANDS_IN.get(row["system"], row["system"])
    embedded = row["backend"] == "vllm" and "epnone" in row["id"]
    return PoolSpec(
        name=name,
        role=role,  # type: ignore[arg-type]
        count=count,
        hardware=system.removesuffix("_sxm"),
        tp=layout.gpus,
        pp=layout.pp,
        batch_max=BATCH_MAX * layout.dp,
        batch_tokens_max=(EMBEDDED_BATCH_TOKENS if embedded else BATCH_TOKENS) * layout.dp,
        cost=_cost(row, layout, system),
    )


def _cost(row: Row, layout: Layout, system: str) -> MeasuredCost:
    """Formats as the checkpoints and the engines' recipes have them.

    FP8 checkpoints of Llama come with an fp8 cache; gpt-oss keeps attention in bfloat16 and its
    experts in mxfp4 (with mxfp8 activations on Blackwell, where recipes also ask for an fp8 cache).
    MiniMax and Qwen3-MoE scale fp8 in blocks. Before vLLM 0.14 the host's work was not
    overlapped with the accelerator's.
    """
    model = row["model_path"]
    gemm, moe = row["gemm_quant_mode"] or "bfloat16", row["moe_quant_mode"]
    blackwell = system.startswith("b")
    fp8_cache = "Llama" in model
    if "gpt-oss" in model:
        gemm, moe = "bfloat16", "w4a8_mxfp4_mxfp8" if blackwell else "w4a16_mxfp4"
        fp8_cache = blackwell
    elif gemm == "fp8" and ("MiniMax" in model or "Qwen3-235B" in model):
        gemm = moe = "fp8_block"
        fp8_cache = blackwell and row["backend_version"] >= "0.19"
    elif gemm == "fp8" and "Llama" not in model and "Qwen3-32B" not in model:
        gemm = moe = "fp8_block"
    elif gemm == "int4_wo":
        gemm = "bfloat16"  # only the experts are
    found = re.match(r"0\.(\d+)\.", row["backend_version"]) if row["backend"] == "vllm" else None
    version = int(found[1]) if found is not None else NEWEST
    return MeasuredCost(
        system=system, gemm=gemm, moe=moe or gemm, kv="fp8" if fp8_cache else "bfloat16",
        ep=layout.ep, dp=layout.dp, asynchronous=version >= 14,
    )  # fmt: skip
