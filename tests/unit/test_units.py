"""Sizes and times as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.units import parse_bytes, parse_seconds, show_bytes

BYTES = [
    ("0", 0),
    ("1", 1),
    ("1 B", 1),
    ("12.5 GB", 12_500_000_000),
    ("12.5gb", 12_500_000_000),
    ("1.5KB", 1_500),
    ("3 MB", 3_000_000),
    ("2 TB", 2_000_000_000_000),
    ("1 KiB", 1024),
    ("1.5 MiB", 1_572_864),
    ("80 GiB", 85_899_345_920),
    ("1 TiB", 1_099_511_627_776),
    ("1e3 KB", 1_000_000),
    ("  7 mb  ", 7_000_000),
    (".5 KB", 500),
    (4096, 4096),
    (12.5e9, 12_500_000_000),
]
SECONDS = [
    ("1", 1.0),
    ("2 s", 2.0),
    ("50 ms", 0.05),
    ("10us", 1e-5),
    ("1.5 min", 90.0),
    ("2m", 120.0),
    ("1 H", 3600.0),
    ("1e-3", 1e-3),
    (5, 5.0),
    (0.25, 0.25),
]
WRONG = ["", " ", "GB", "1 XB", "1 2", "-1", "one", "1,5 GB", "1..2", "1 GB/s", "nan", "inf", "0x1"]


@pytest.mark.parametrize(("text", "expected"), BYTES)
def test_bytes(text: str | int | float, expected: int) -> None:
    found = parse_bytes(text)
    assert found == expected
    assert type(found) is int


@pytest.mark.parametrize(("text", "expected"), SECONDS)
def test_seconds(text: str | int | float, expected: float) -> None:
    found = parse_seconds(text)
    assert found == pytest.approx(expected, rel=1e-12)
    assert type(found) is float


@pytest.mark.parametrize("text", WRONG)
def test_what_is_neither_is_said_with_the_units_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number of bytes \(units: .*GB.*GIB"):
        parse_bytes(text)
    with pytest.raises(ValueError, match=r"is not a number of seconds \(units: .*MS"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["1 GB", "1 KiB"])
def test_a_size_is_not_a_time(text: str) -> None:
    with pytest.raises(ValueError, match="seconds"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (-2_000, "-2.0 kB"),
        (3_900_000_000, "3.9 GB"),
        (450_000_000_000_000, "450.0 TB"),
    ],
)
def test_show_bytes(count: int, shown: str) -> None:
    assert show_bytes(count) == shown


@given(st.integers(0, 10**16))
def test_what_is_shown_reads_back_to_two_digits(count: int) -> None:
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=0.05, abs=0.5)
