"""`kvasir verify`: a recording re-run by the same nodes, and the first decision that differs."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

app = App(name="verify")


@app.default
def verify(directory: Path, /) -> int:
    """Re-run a recording's journals and compare every decision. Exit 1 when one differs.

    Parameters
    ----------
    directory
        What --record wrote.
    """
    from kvasir.core.errors import ConfigError

    if not directory.is_dir():
        raise ConfigError(
            "no recording is there",
            where=str(directory),
            next_step="kvasir simulate --record DIR (writes one)",
        )
    from kvasir.runtime.verify import verify_dir

    verdict = verify_dir(directory)
    for line in verdict.lines:
        print(line)
    return 0 if verdict.ok else 1
