"""docs/netkv.md's tables and charts from bench/results/netkv.json, beside what the paper printed.

Knows figures by table, row, policy and replicate. Runs nothing. Prose is written by hand: only what
stands between the markers of a table is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from kvasir.measure import svg
from kvasir.measure.intervals import interval, paired
from kvasir.measure.svg import Chart, Series

DOCS: Final = Path(__file__).parent.parent / "docs"
BASE: Final = "cache_load"
READERS: Final = ("netkv_path", "netkv_joint")
Arms = dict[str, dict[str, list[Any]]]  # of one row: by policy and figure, one value a replicate

# TTFT ms, TBT ms, SLO, transfer ms (section "Results" of the paper; RAG).
PUBLISHED_MAIN: Final = {
    "100 %": {"round robin": "1969 / 12.74 / .907 / 993", BASE: "1812 / 12.71 / .923 / 835",
              "netkv": "1598 / 12.94 / .944 / 620"},
    "200 %": {"round robin": "2171 / 13.01 / .887 / 1194", BASE: "1995 / 12.88 / .906 / 1018",
              "netkv": "1710 / 13.29 / .933 / 733"},
    "250 %": {"round robin": "2224 / 13.13 / .882 / 1246", BASE: "2068 / 12.97 / .899 / 1091",
              "netkv": "1793 / 13.42 / .925 / 816"},
}  # fmt: skip
PUBLISHED_CONTEXTS: Final = {
    "1K": "-9.1 / -2.2", "2K": "", "4K": "-13.3 / -3.2", "8K": "-15.2 / -10.2",
    "16K": "-20.2 / -17.6", "32K": "-6.7 / -4.3", "64K": "0.0 / +0.2",
}  # fmt: skip
PUBLISHED_ABLATION: Final = {
    "chatbot": ("629", "-4.9 %", "-5.2 %", "-5.4 %"),
    "rag": ("1812", "-10.2 %", "-11.9 %", "-12.1 %"),
    "long": ("7121", "-11.2 %", "-13.6 %", "-13.5 %"),
}  # fmt: skip
PUBLISHED_HEAT: Final = {
    "chatbot": {"0": (1.3, 2.5, 4.6, 7.8), "0.4": (2.2, 4.0, 7.1, 11.2)},
    "rag": {"0": (3.7, 6.6, 10.5, 14.3), "0.4": (5.6, 9.3, 13.7, 15.9)},
    "long": {"0": (4.0, 6.6, 11.1, 14.3), "0.4": (5.8, 9.9, 14.8, 11.2)},
}
PUBLISHED_SCALE: Final = {"64": "-11.0 %", "128": "-13.6 %", "256": "-13.6 %", "512": "-13.6 %"}


# --- one figure -----------------------------------------------------------------------------------


def ms(values: Sequence[float], digits: int = 0) -> str:
    """Mean with its 95 % interval."""
    found = interval([1e3 * v for v in values])
    half = f" ± {found.half:.{digits}f}" if found.half is not None else ""
    return f"{found.mean:.{digits}f}{half}"


def against(arms: Arms, name: str, base: str = BASE, figure: str = "ttft_s") -> str:
    """Paired difference from the base, in per cent of its mean."""
    values, others = arms[name][figure], arms[base][figure]
    found, whole = paired(values, others), fmean(others)
    half = f" ± {100 * found.half / whole:.1f}" if found.half is not None else ""
    return f"{100 * found.mean / whole:+.1f}{half} %"


def share(values: Sequence[Sequence[float]], tier: int) -> str:
    return f"{100 * fmean(v[tier] for v in values):.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- A --------------------------------------------------------------------------------------------


def main_table(found: dict[str, Any]) -> str:
    rows = []
    for rate, arms in found["main"].items():
        for name, f in arms.items():
            rows.append(
                (rate, name, ms(f["ttft_s"]), "" if name == BASE else against(arms, name),
                 ms(f["ttft_p99_s"]), ms(f["tpot_s"], 2), f"{fmean(f['attained']):.3f}",
                 ms(f["transfer_s"]), share(f["tiers"], 3),
                 PUBLISHED_MAIN.get(rate, {}).get(name, ""))
            )  # fmt: skip
    head = ("rate", "decode worker chosen by", "TTFT ms", "against cache_load", "P99 ms", "TBT ms",
            "SLO", "transfer ms", "across pods", "paper: TTFT / TBT / SLO / transfer")  # fmt: skip
    return table(head, rows)


def tier_table(found: dict[str, Any]) -> str:
    arms = found["main"]["200 %"]
    published = {BASE: ("0 %", "32.0 %", "68.0 %"), "netkv": ("0 %", "68.9 %", "31.1 %")}
    rows = [
        (name, share(arms[name]["tiers"], 2), share(arms[name]["tiers"], 3),
         *published.get(name, ("", "", ""))[1:])
        for name in ("round robin", BASE, "netkv_static", "netkv", "tiers shuffled")
    ]  # fmt: skip
    return table(("", "in the pod", "across pods", "paper: in the pod", "across pods"), rows)


def ablation_table(found: dict[str, Any]) -> str:
    rows = []
    for profile, arms in found["ablation"].items():
        first, *published = PUBLISHED_ABLATION[profile]
        cells = [against(arms, n) for n in ("netkv_static", "netkv_self", "netkv", "netkv_path")]
        kept = _part_kept(arms)
        rows.append((profile, ms(arms[BASE]["ttft_s"]), *cells, kept, first, *published))
    head = ("profile", "cache_load ms", "static tiers", "+ own transfers", "+ readings",
            "links instead of tiers", "static part of the gain", "paper: cache_load ms",
            "static tiers", "+ own transfers", "+ readings")  # fmt: skip
    return table(head, rows)


def _part_kept(arms: Arms) -> str:
    base, static, full = (
        fmean(arms[n]["ttft_s"]) for n in (BASE, "netkv_static", "netkv")
    )
    return f"{100 * (base - static) / (base - full):.0f} %" if base > full else "no gain"


def context_table(found: dict[str, Any]) -> str:
    rows = []
    for tokens, arms in found["contexts"].items():
        f = arms["netkv"]
        slo = fmean(f["attained"]) - fmean(arms[BASE]["attained"])
        rows.append(
            (tokens, ms(arms[BASE]["ttft_s"]), against(arms, "netkv", "round robin"),
             against(arms, "netkv"), against(arms, "netkv_path"), f"{slo:+.3f}",
             PUBLISHED_CONTEXTS[tokens])
        )  # fmt: skip
    head = ("prompt", "cache_load ms", "netkv against round robin", "netkv against cache_load",
            "netkv_path against cache_load", "SLO", "paper: % against both")  # fmt: skip
    return table(head, rows)


def heat_table(found: dict[str, Any]) -> str:
    rows = []
    for profile, published in PUBLISHED_HEAT.items():
        for load, theirs in published.items():
            keys = [f"{profile} {ratio}:1 {load}" for ratio in (1, 2, 4, 8)]
            ours = [against(found["heat"][k], "netkv") for k in keys]
            rows.append(
                (profile, f"{100 * float(load):g} %", *ours,
                 " / ".join(f"-{value}" for value in theirs))
            )  # fmt: skip
    head = ("profile", "background", "1:1", "2:1", "4:1", "8:1", "paper, %")
    return table(head, rows)


def staleness_table(found: dict[str, Any]) -> str:
    base = found["staleness"]["any"]
    rows = []
    for period, arms in found["staleness"].items():
        if period != "any":
            both = arms | base
            f = arms["netkv"]
            rows.append((period, ms(f["ttft_s"]), against(both, "netkv"), ms(f["ttft_p99_s"]),
                         ms(f["tpot_s"], 2), f"{fmean(f['attained']):.3f}"))  # fmt: skip
    head = ("readings each", "netkv TTFT ms", "against cache_load", "P99 ms", "TBT ms", "SLO")
    return table(head, rows)


def gain_table(found: dict[str, Any], key: str, head: str, published: dict[str, str]) -> str:
    rows = [
        (row, ms(arms[BASE]["ttft_s"]), ms(arms["netkv"]["ttft_s"]), against(arms, "netkv"),
         f"{ms(arms[BASE]['transfer_s'])} / {ms(arms['netkv']['transfer_s'])}",
         published.get(row, ""))
        for row, arms in found[key].items()
    ]  # fmt: skip
    heads = (head, "cache_load ms", "netkv ms", "difference", "transfer ms", "paper")
    return table(heads, rows)


def sharing_table(found: dict[str, Any]) -> str:
    return gain_table(found, "sharing", "share with a common prefix", {})


def scale_table(found: dict[str, Any]) -> str:
    return gain_table(found, "scale", "GPUs", PUBLISHED_SCALE)


def tuning_table(found: dict[str, Any]) -> str:
    weights = list(found["tuning"]["paper"])
    rows = [
        (name, *(f"{1e3 * ttft_s[w]:.0f}" for w in weights), f"{found['load_weight'][name]:g}")
        for name, ttft_s in found["tuning"].items()
    ]
    return table(("mean TTFT ms by load weight", *weights, "chosen"), rows)


# --- B --------------------------------------------------------------------------------------------


def closed(arms: Arms, name: str, base: str, bound: str) -> str:
    """How much of the gap in mean TTFT between `base` and `bound` a policy closes."""
    gap = paired(arms[base]["ttft_s"], arms[bound]["ttft_s"])
    if not gap.apart or gap.mean <= 0:
        return "no gap"
    return f"{100 * paired(arms[base]['ttft_s'], arms[name]['ttft_s']).mean / gap.mean:.0f} %"


def honest_table(found: dict[str, Any], key: str) -> str:
    rows = []
    for row, arms in found[key].items():
        for name, f in arms.items():
            rows.append(
                (row, name, ms(f["ttft_s"]), "" if name == BASE else against(arms, name),
                 closed(arms, name, BASE, "clairvoyant"), ms(f["ttft_p99_s"]),
                 ms(f["tpot_s"], 2), f"{fmean(f['goodput']):.2f}", ms(f["transfer_s"]),
                 ms(f["second_token_s"]), _tiers(f["tiers"]))
            )  # fmt: skip
    head = ("", "policy", "TTFT ms", "against cache_load", "of the gap to clairvoyant", "P99 ms",
            "TBT ms", "goodput /s", "transfer ms", "2nd token ms", "tiers 0/1/2/3 %")  # fmt: skip
    return table(head, rows)


def _tiers(values: Sequence[Sequence[float]]) -> str:
    return "/".join(f"{100 * fmean(v[t] for v in values):.0f}" for t in range(4))


def readings_table(found: dict[str, Any]) -> str:
    still = found["swing"][_honest_row(found)]
    rows = []
    for row, arms in found["readings"].items():
        cells = []
        for name in READERS:
            both = {name: arms[name], BASE: still[BASE], "clairvoyant": still["clairvoyant"]}
            f = arms[name]
            cells += [ms(f["ttft_s"]), ms(f["ttft_p99_s"]), f"{fmean(f['goodput']):.2f}",
                      closed(both, name, BASE, "clairvoyant")]  # fmt: skip
        rows.append((row, *cells))
    each = ("TTFT ms", "P99 ms", "goodput /s", "gap closed")
    return table(("readings each", *(f"{n}: {e}" for n in READERS for e in each)), rows)


def _honest_row(found: dict[str, Any]) -> str:
    return max(found["swing"], key=lambda row: len(found["swing"][row]))


def packets_table(found: dict[str, Any]) -> str:
    by_policy = next(iter(found["packets"].values()))
    models = [m for m in next(iter(by_policy.values())) if m != "transfers"]
    rows = []
    for ratio, policies in found["packets"].items():
        for name, f in policies.items():
            cells = [f"{1e3 * f[m][0]:.1f}" for m in models]
            moved = [f"{100 * f[m][1]:.1f} %" for m in models[1:]]
            rows.append((ratio, name, str(f["transfers"]), *cells, *moved))
    head = ("pods", "decode worker chosen by", "transfers", *(f"{m}, mean ms" for m in models),
            *(f"{m}: a transfer moves by" for m in models[1:]))  # fmt: skip
    return table(head, rows)


TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "tuning": tuning_table, "main": main_table, "tiers": tier_table, "ablation": ablation_table,
    "contexts": context_table, "heat": heat_table, "staleness": staleness_table,
    "sharing": sharing_table, "scale": scale_table, "readings": readings_table,
    "packets": packets_table, "swing": lambda f: honest_table(f, "swing"),
    "calm": lambda f: honest_table(f, "calm"), "second": lambda f: honest_table(f, "second"),
    "streamed": lambda f: honest_table(f, "streamed"),
}  # fmt: skip


# --- charts ---------------------------------------------------------------------------------------


def charts(found: dict[str, Any]) -> list[Chart]:
    still = found["swing"][_honest_row(found)]
    return [
        _parts("netkv-paper", "As in the paper, 250 %: where time to first token goes",
               found["main"]["250 %"]),
        _parts("netkv-honest", "Swinging congestion: where time to first token goes", still),
        _refresh(found),
    ]  # fmt: skip


def _parts(name: str, title: str, arms: Arms) -> Chart:
    """The transfer and all else of the mean TTFT, by policy."""
    rows = []
    for arm, f in arms.items():
        transfer_s = fmean(f["transfer_s"])
        rows.append((_fits(arm), (fmean(f["ttft_s"]) - transfer_s, transfer_s)))
    return Chart(
        name, title, "Mean time to first token by policy; NetKV's share is the transfer.",
        svg.stack_height(len(rows)), svg.stack(rows, ("all else", "transfer")),
        ("policy", "all else", "transfer"),
        tuple((arm, f"{1e3 * a:.0f} ms", f"{1e3 * b:.0f} ms") for arm, (a, b) in rows),
    )  # fmt: skip


def _fits(label: str) -> str:
    return label.replace(", decode only", " (D)")


def _refresh(found: dict[str, Any]) -> Chart:
    """Mean TTFT by how often the switches are read."""
    rows = {k: v for k, v in found["readings"].items() if k.endswith(" s")}
    xs = [float(k.removesuffix(" s")) for k in rows]
    series = [
        Series(n.removeprefix("netkv_"), [fmean(r[n]["ttft_s"]) for r in rows.values()])
        for n in READERS
    ]
    return Chart(
        "netkv-staleness", "Swinging congestion: time to first token by age of readings",
        "Mean time to first token (s) by the seconds between two readings of the switches.",
        svg.plot_height(), svg.lines(xs, series, "s", max(xs)), ("readings each", *READERS),
        tuple((f"{x:g} s", *(f"{s.values[i]:.3f} s" for s in series)) for i, x in enumerate(xs)),
    )  # fmt: skip


def filled(text: str, found: dict[str, Any]) -> str:
    """The page with every table anew. Raises KeyError for a marker that names none."""

    def anew(mark: re.Match[str]) -> str:
        name = mark["name"]
        return f"<!-- table: {name} -->\n{TABLES[name](found)}\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->", anew, text, flags=re.DOTALL)


def write_docs(found: dict[str, Any]) -> None:
    page = DOCS / "netkv.md"
    page.write_text(filled(page.read_text("utf-8"), found), "utf-8")
    for chart in charts(found):
        (DOCS / f"{chart.name}.svg").write_text(chart.document(), "utf-8")
