"""`kvasir explain`: candidates and score terms of a recorded request."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

app = App(name="explain")


@app.default
def explain(directory: Path, request_id: str, /) -> None:
    """Show every candidate of each placement of a request, with its score terms.

    Parameters
    ----------
    directory
        What --record wrote.
    request_id
        The request's id (`x-request-id` and its suffix, or r0, r1, ... in a simulation).
    """
    from kvasir.runtime.explain import explain as explained
    from kvasir.runtime.explain import lines

    for line in lines(explained(directory, request_id)):
        print(line)
