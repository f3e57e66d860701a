"""Examples in README.md and docs/ run, and print what they say they print.

A fenced block whose info string is `console test` holds commands (`$ kvasir ...`), each followed by
the lines that its output must hold, in that order; a line `...` stands for anything.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
SECONDS_MAX = 25


class Example(NamedTuple):
    where: str
    body: str


class Command(NamedTuple):
    line: str
    expected: list[str]


def examples(name: str, text: str) -> Iterator[Example]:
    """Blocks to run. A `console` block with any other word is a slip, not a block to leave out."""
    for found in FENCE.finditer(text):
        where = f"{name}:{text.count(chr(10), 0, found.start()) + 1}"
        words = found["info"].split()
        if words == ["console", "test"]:
            yield Example(where, found["body"])
        else:
            assert words[:1] != ["console"] or words == ["console"], f"{where}: {found['info']!r}"


def commands(example: Example) -> list[Command]:
    found: list[Command] = []
    for line in example.body.splitlines():
        if line.startswith("$ "):
            assert line.startswith("$ kvasir "), f"{example.where}: only kvasir is run: {line}"
            found.append(Command(line.removeprefix("$ "), []))
        elif line.strip():
            assert found, f"{example.where}: output before any command: {line}"
            found[-1].expected.append(line.strip())
    assert found, f"{example.where}: no command"
    return found


def missing(expected: list[str], printed: str) -> str | None:
    """The first expected line that does not come after the ones before it."""
    lines = iter([line.strip() for line in printed.splitlines()])
    return next((e for e in expected if e != "..." and e not in lines), None)


def run(example: Example, folder: Path) -> None:
    """Every command in turn, in one folder. An exit status other than 0 is a failure."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("KVASIR_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line, expected in commands(example):
        done = subprocess.run(
            line, shell=True, cwd=folder, env=inherited | {"PATH": path, "NO_COLOR": "1"},
            capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
        )  # fmt: skip
        said = f"{example.where}: {line}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, said
        assert missing(expected, done.stdout) is None, f"{missing(expected, done.stdout)!r}: {said}"


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    example
    for path in DOCUMENTS
    for example in examples(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.where)
def test_example_in_the_docs(example: Example, tmp_path: Path) -> None:
    run(example, tmp_path)


# --- the check sees what it should -------------------------------------------------------------

FIRST = """# A

```console test
$ kvasir config show local > x.yaml
$ kvasir config validate x.yaml
"""


def only(text: str) -> Example:
    (example,) = examples("a.md", text)
    return example


def test_a_good_example_passes(tmp_path: Path) -> None:
    example = only(FIRST + "x.yaml: valid (local: 1 prefill, 2 decode; 3 accelerators)\n```\n")
    assert example.where == "a.md:3"
    run(example, tmp_path)


@pytest.mark.parametrize(
    "rest", ["x.yaml: valid (another output)\n", "$ kvasir config validate y.yaml\n", "$ ls\n"]
)
def test_a_wrong_example_fails(rest: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"a\.md:3"):
        run(only(FIRST + rest + "```\n"), tmp_path)


@pytest.mark.parametrize("body", ["", "output\n"])
def test_a_block_without_a_command_fails(body: str) -> None:
    with pytest.raises(AssertionError, match=r"a\.md:1"):
        commands(only(f"```console test\n{body}```\n"))


def test_a_slip_in_the_info_string_fails() -> None:
    with pytest.raises(AssertionError, match="console tset"):
        list(examples("a.md", "```console tset\n$ kvasir --help\n```\n"))


def test_other_blocks_are_left_alone() -> None:
    assert not list(examples("a.md", "```console\n$ kvasir serve\n```\n\n```python\nx\n```\n"))


def test_lines_must_come_in_order() -> None:
    assert missing(["a", "...", "c"], "a\nb\nc\n") is None
    assert missing(["c", "a"], "a\nb\nc\n") == "a"
