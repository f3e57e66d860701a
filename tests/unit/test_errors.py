"""What a user sees of an error: status, whether to try again, and a message of a few lines."""

import pytest

from kvasir.core import errors
from kvasir.core.errors import LINES_MAX, ConfigError, KvasirError, nearest

TREE: dict[type[KvasirError], tuple[int, bool, type[Exception]]] = {
    errors.KvasirError: (500, False, Exception),
    errors.ConfigError: (400, False, KvasirError),
    errors.UnsupportedEffect: (400, False, ConfigError),
    errors.TraceError: (400, False, KvasirError),
    errors.ModelError: (400, False, KvasirError),
    errors.RequestError: (400, False, KvasirError),
    errors.Unauthorised: (401, False, errors.RequestError),
    errors.Forbidden: (403, False, errors.RequestError),
    errors.NotFound: (404, False, errors.RequestError),
    errors.TooLarge: (413, False, errors.RequestError),
    errors.Overloaded: (429, True, KvasirError),
    errors.Unavailable: (503, True, KvasirError),
    errors.TransferError: (502, True, KvasirError),
    errors.WireError: (400, False, KvasirError),
    errors.Diverged: (500, False, KvasirError),
}


def everything(root: type[KvasirError]) -> set[type[KvasirError]]:
    return {root}.union(*(everything(sub) for sub in root.__subclasses__()))


def test_the_tree_is_the_documented_one() -> None:
    own = {e for e in everything(KvasirError) if e.__module__ == errors.__name__}
    assert own == set(TREE)
    for error, (status, retry, parent) in TREE.items():
        assert (error.status, error.retry, error.__base__) == (status, retry, parent), error
        drawn = next(x for x in (errors.__doc__ or "").splitlines() if error.__name__ in x)
        if error is not KvasirError:
            assert str(status) in drawn or status == 500
            assert ("retry" in drawn) == retry


def test_kinds_tell_errors_apart() -> None:
    kinds = [error.kind for error in TREE]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("error", TREE, ids=lambda e: e.__name__)
def test_a_message_has_what_where_nearest_and_next(error: type[KvasirError]) -> None:
    made = error("no such pool", where="a.yaml:3", nearest="decode", next_step="see config")
    assert str(made).splitlines() == [
        "no such pool", "  at: a.yaml:3", "  nearest: decode", "  try: see config",
    ]  # fmt: skip
    assert str(error("short")) == "short"


@pytest.mark.parametrize("lines", [1, 4, 5, 50])
def test_a_message_never_has_more_than_five_lines(lines: int) -> None:
    text = "\n".join(f"line {i}" for i in range(lines))
    shown = str(KvasirError(text, where="here", nearest=text, next_step=text)).splitlines()
    assert len(shown) <= LINES_MAX == 5
    assert shown[0] == "line 0"


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("netkw", ["netkv", "round_robin"], "netkv"),
        ("lest_loaded", ["netkv", "least_loaded"], "least_loaded"),
        ("zzz", ["b", "a"], "a, b"),
        ("zzz", [f"{i:02}" for i in range(30)], ", ".join(f"{i:02}" for i in range(12))),
        ("x", [], ""),
    ],
)
def test_nearest(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known) == expected
