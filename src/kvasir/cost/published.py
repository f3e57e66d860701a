"""Profiles of whole iterations as their authors published them: times, not how they are used.

Knows what was measured or fitted, for which model on which hardware. Must not know deployments.

Splitwise (ISCA 2024): Mutinifni/splitwise-sim, commit 8f99e7d, `data/perf_model.csv`; MIT,
Copyright (c) 2024 Pratyush Patel. Medians in ms: of prompt time over the prompt tokens of a batch,
of token time over its sequences. Not taken: what TP 2 gives for 64 prompts of 512 tokens, less than
for 8 of them. The capped H100 is the H100 at half its power.
DistServe (OSDI 2024): LLMServe/DistServe, commit 82831f1,
`simdistserve/estimators/profile_data/profiler-a100-80g.distserve.json`; Apache-2.0. Coefficients
for ms on A100-80G SXM.
"""

from __future__ import annotations

from typing import Final, NamedTuple

Points = tuple[tuple[int, float], ...]
Key = tuple[str, str, int]  # bundled shape, hardware, tp


class Sweep(NamedTuple):
    """Milliseconds over the new tokens of a batch of prompts, and over decoding sequences."""

    prefill_ms: Points
    decode_ms: Points


class Coefficients(NamedTuple):
    """Milliseconds, DistServe's fits: prefill (1, tokens, sum of squared prompt lengths), decode
    (1, total context, sequences), the second one from `large_from` sequences on."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    decode_large: tuple[float, float, float]
    large_from: int = 95


CAPPED_PROMPTS: Final = 1.3  # prompt time of an H100 capped at half its power; decode as uncapped


def _sweep(prefill_ms: tuple[float, ...], decode_ms: tuple[float, ...]) -> Sweep:
    """Of the grid that was measured: 128 tokens and on, 1 sequence and on, each doubled."""
    return Sweep(
        tuple((128 << i, ms) for i, ms in enumerate(prefill_ms)),
        tuple((1 << i, ms) for i, ms in enumerate(decode_ms)),
    )


_MEASURED: Final[dict[Key, Sweep]] = {
    ("llama-2-70b", "a100", 2): _sweep(
        (81.076, 112.932, 195.48, 397.295, 765.94, 1537.108, 3111.851, 6632.633),
        (55.869, 59.924, 60.521, 61.692, 65.462, 72.19),
    ),
    ("llama-2-70b", "a100", 4): _sweep(
        (63.654, 78.571, 126.971, 247.384, 427.393, 1069.113, 2620.059, 5131.726, 10947.82),
        (44.614, 45.005, 45.085, 45.799, 48.518, 52.345, 72.947),
    ),
    ("llama-2-70b", "a100", 8): _sweep(
        (65.347, 66.757, 93.016, 160.86, 282.71, 708.355, 1780.967, 3524.541, 7553.993),
        (45.039, 44.559, 45.792, 46.465, 50.435, 53.017, 71.605),
    ),
    ("llama-2-70b", "h100", 2): _sweep(
        (48.331, 51.849, 83.827, 157.21, 300.285, 622.459, 1266.306, 2397.774),
        (37.294, 37.389, 39.982, 40.405, 41.972, 52.296),
    ),
    ("llama-2-70b", "h100", 4): _sweep(
        (49.086, 50.977, 59.717, 104.631, 200.45, 456.702, 924.948, 1726.054, 3520.473),
        (29.468, 29.98, 29.921, 31.436, 32.843, 36.885, 52.356),
    ),
    ("llama-2-70b", "h100", 8): _sweep(
        (58.185, 51.659, 53.858, 77.684, 134.423, 376.216, 831.486, 1551.726, 2936.33),
        (30.378, 30.262, 31.786, 32.504, 34.166, 38.619, 50.161),
    ),
    ("bloom-176b", "a100", 8): _sweep(
        (79.668, 99.164, 174.382, 287.467, 536.055, 1332.643, 3591.468, 5782.003, 11251.828),
        (49.277, 49.991, 51.004, 52.953, 57.341, 65.38, 96.583),
    ),
    ("bloom-176b", "h100", 8): _sweep(
        (48.284, 51.179, 76.142, 132.217, 251.964, 649.598, 1411.575, 2521.909, 4996.451),
        (36.149, 36.912, 38.058, 38.142, 40.64, 45.842, 63.821),
    ),
}


def _capped(sweep: Sweep) -> Sweep:
    return Sweep(tuple((x, ms * CAPPED_PROMPTS) for x, ms in sweep.prefill_ms), sweep.decode_ms)


SPLITWISE: Final[dict[Key, Sweep]] = _MEASURED | {
    (shape, "h100-capped", tp): _capped(sweep)
    for (shape, hardware, tp), sweep in _MEASURED.items()
    if hardware == "h100"
}

DISTSERVE: Final[dict[Key, Coefficients]] = {
    ("opt-13b", "a100", 1): Coefficients(
        (18.10254647486372, 0.1019122572698738, 7.122264314252114e-06),
        (19.934702624895458, 0.0006269356524350583, 0.03850697740828398),
        (7.1661889468253595, 0.0005798000403396046, 0.15831096191764046),
    ),
    ("opt-13b", "a100", 2): Coefficients(
        (14.742973695171262, 0.06857720739764, 2.4495727400243586e-06),
        (13.294796350285385, 0.00034109219700723494, 0.06296393225243659),
        (10.638741913126715, 0.00031183369638295723, 0.08562913604102729),
    ),
    ("opt-13b", "a100", 4): Coefficients(
        (12.062297033449054, 0.03808140082550695, 5.226249731787869e-07),
        (10.256231678259395, 0.00018786702316166354, 0.03269273629225551),
        (10.483514938375274, 0.00017120888562939117, 0.04566648525887034),
    ),
    ("opt-66b", "a100", 2): Coefficients(
        (43.05881348288936, 0.2742292870458432, 2.2478042467169447e-05),
        (48.288015489286245, 0.0009424343535737985, 0.12755020094383188),
        (28.727693993711597, 0.00047448475459061987, 0.29617792360743994),
    ),
    ("opt-66b", "a100", 3): Coefficients(
        (32.998230028437035, 0.19568256864690514, 1.2205248980953765e-05),
        (35.8015439512012, 0.0005845004786127403, 0.0952669764890301),
        (22.653861586978355, 0.0005358489190129727, 0.208514444037787),
    ),
    ("opt-66b", "a100", 4): Coefficients(
        (29.441636037717455, 0.151352180625198, 8.317450765979451e-06),
        (30.760284619429587, 0.000451947603788462, 0.063284195750671),
        (27.47082137429487, 0.0004046845541646486, 0.12480667738300383),
    ),
    ("opt-66b", "a100", 8): Coefficients(
        (25.490662375045222, 0.10659177664763161, 3.3910502518615973e-06),
        (23.15511135047022, 0.00022691488497826264, 0.04800638397272423),
        (21.71772781576609, 0.0003758089655762475, 0.08978614175851013),
    ),
}
