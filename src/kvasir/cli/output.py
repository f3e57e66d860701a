"""What verbs print and write: progress on stderr, results on stdout or in a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvasir import __version__
from kvasir.core.errors import ConfigError

STDOUT = "-"
LINES_EVERY = 0.25  # of the work, when stderr is not a terminal


@contextmanager
def progress(label: str) -> Iterator[Callable[[float], None]]:
    """A function to call with the share done (0 to 1): a bar on a terminal, else a few lines."""
    if not sys.stderr.isatty():
        yield _lines(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn(label), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    console = Console(stderr=True)
    with Progress(*parts, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _lines(label: str) -> Callable[[float], None]:
    said = 0.0

    def report(share: float) -> None:
        nonlocal said
        if share - said >= LINES_EVERY:
            said = share - share % LINES_EVERY
            print(f"{label}: {said:.0%}", file=sys.stderr)

    return report


def say(text: str, json_to: str | None) -> None:
    """Print for people; on stderr when stdout carries the JSON."""
    print(text, file=sys.stderr if json_to == STDOUT else sys.stdout)


def write_json(target: str | None, content: bytes) -> None:
    """To a file, with a `.meta.json` beside it (command, version, time), or to stdout for `-`."""
    if target is None:
        return
    if target == STDOUT:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    meta = {
        "command": ["kvasir", *sys.argv[1:]],
        "version": __version__,
        "python": sys.version.split()[0],
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    path = Path(target)
    write(path, content)
    write(path.with_suffix(".meta.json"), json.dumps(meta, indent=2).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(path)) from None


def unique(notes: Iterable[str]) -> tuple[str, ...]:
    """Each note once, in order."""
    return tuple(dict.fromkeys(notes))
