"""`kvasir drain`: let one worker of a running server go."""

from __future__ import annotations

from typing import Final

from cyclopts import App

app = App(name="drain")
WAIT_S: Final = 10.0
ANSWER_BYTES_MAX: Final = 1 << 16


@app.default
def drain(
    worker: str, /, *, within_s: float = 30.0, base_url: str = "http://127.0.0.1:8000"
) -> None:
    """Let a worker finish what it serves, hand on what only it has cached, and leave.

    Parameters
    ----------
    worker
        Its name, as /health lists it.
    within_s
        Seconds after which what still runs there goes on elsewhere.
    base_url
        Where the server is. SIGTERM to the worker's process does the same without it.
    """
    print(asked(base_url, worker, within_s))


def asked(base_url: str, worker: str, within_s: float) -> str:
    """A line for people. Raises ConfigError when nothing answers, or the server refuses."""
    import json
    from urllib.error import HTTPError
    from urllib.parse import quote
    from urllib.request import Request, urlopen

    from kvasir.core.errors import ConfigError
    from kvasir.measure.client import parse_base_url

    parse_base_url(base_url)
    url = f"{base_url.rstrip('/')}/v1/workers/{quote(worker, safe='')}/drain"
    body = json.dumps({"within_s": within_s}).encode()
    try:
        with urlopen(Request(url, body, method="POST"), timeout=WAIT_S):
            return f"{worker} takes nothing new, and leaves within {within_s:g} s"
    except HTTPError as error:
        with error:
            what = _said(error.read(ANSWER_BYTES_MAX)) or f"status {error.code}"
        raise ConfigError(what, where=base_url) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        what = f"no server answers: {getattr(reason, 'strerror', None) or reason}"
        raise ConfigError(what, where=base_url, next_step="kvasir serve, or --base-url") from None


def _said(answer: bytes) -> str:
    """The first line of an error's message."""
    import json

    try:
        return str(json.loads(answer)["error"]["message"]).splitlines()[0]
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
