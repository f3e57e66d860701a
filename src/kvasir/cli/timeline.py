"""`kvasir timeline`: a recording as Chrome trace JSON."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

app = App(name="timeline")


@app.default
def timeline(directory: Path, file: Path, /) -> None:
    """Write a timeline that Perfetto and chrome://tracing open.

    Parameters
    ----------
    directory
        What --record wrote.
    file
        Where to write the JSON.
    """
    from kvasir.cli.output import write
    from kvasir.runtime.timeline import timeline as drawn

    write(file, drawn(directory))
