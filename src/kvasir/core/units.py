"""Units at the edges. Inside the code seconds are float, bytes and tokens are int."""

from __future__ import annotations

import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
GB: Final = 1_000_000_000

_BYTES: Final = {
    "": 1, "B": 1,
    "KB": 1_000, "MB": 1_000_000, "GB": GB, "TB": 1_000 * GB,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1024 * GIB,
}  # fmt: skip
_SECONDS: Final = {"": 1.0, "S": 1.0, "MS": 1e-3, "US": 1e-6, "M": 60.0, "MIN": 60.0, "H": 3600.0}
_NUMBER: Final = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*$")
_BITS: Final = re.compile(r"^\s*([0-9.eE+-]+)\s*([kKMGT]?)b(?:it)?(?:/s|ps)\s*$")
_PER_SECOND: Final = re.compile(r"\s*(?:/\s*s|ps)\s*$")


def parse_bytes(text: str | int | float) -> int:
    """`"12.5 GB"` -> 12_500_000_000. Decimal and binary suffixes. Raises ValueError."""
    return round(_parse(text, _BYTES, "bytes"))


def parse_rate(text: str | int | float) -> float:
    """Bytes per second: `"12.5 GB/s"` -> 12.5e9, `"100 Gb/s"` (bits) too. Raises ValueError."""
    bits = _BITS.match(str(text))
    if bits:
        return parse_bytes(f"{bits.group(1)}{bits.group(2)}B") / 8
    return float(parse_bytes(_PER_SECOND.sub("", str(text))))


def parse_seconds(text: str | int | float) -> float:
    """`"10us"` -> 1e-5. Raises ValueError."""
    return _parse(text, _SECONDS, "seconds")


def show_seconds(seconds: float) -> str:
    """`0.01234` -> `"12.3 ms"`, `1.234` -> `"1.23 s"`."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _parse(text: str | int | float, units: dict[str, float] | dict[str, int], what: str) -> float:
    if isinstance(text, (int, float)):
        return float(text)
    found = _NUMBER.match(text)
    unit = found.group(2).upper() if found else ""
    if found is None or unit not in units:
        known = ", ".join(u for u in units if u)
        raise ValueError(f"{text!r} is not a number of {what} (units: {known})")
    return float(found.group(1)) * units[unit]


def show_bytes(count: int) -> str:
    """`1_500_000` -> `"1.5 MB"`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
