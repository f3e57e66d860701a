"""Every error a user can meet, with its HTTP status and whether trying again is safe.

    KvasirError
    |- ConfigError             a file or a flag is wrong                      400
    |  `- UnsupportedEffect    this world or backend cannot do what is asked  400
    |- TraceError              a row of a trace is wrong                      400
    |- ModelError              a model folder is missing or not usable        400
    |- RequestError            a client's request is wrong                    400
    |  |- Unauthorised         no tenant has this API key                    401
    |  |- Forbidden            the deployment does not allow it               403
    |  |- NotFound             no such model or path                          404
    |  `- TooLarge             body or prompt over a limit                    413
    |- Overloaded              declined early, try later                      429  retry
    |- Unavailable             no worker can serve it now                     503  retry
    |- TransferError           KV bytes did not arrive, or arrived damaged    502  retry
    |- WireError               a message that cannot be read or is too big    400
    `- Diverged                a recording does not replay                    500

Programmer errors are assertions, not members of this tree.
A message says what, where, the nearest valid thing, and the next step, in at most five lines.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

LINES_MAX = 5


class KvasirError(Exception):
    """`what` is one sentence; the other parts are optional and printed one a line."""

    status: ClassVar[int] = 500
    retry: ClassVar[bool] = False
    kind: ClassVar[str] = "internal_error"

    def __init__(
        self, what: str, *, where: str = "", nearest: str = "", next_step: str = ""
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.nearest, self.next_step = what, where, nearest, next_step

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.nearest:
            lines.append(f"  nearest: {self.nearest}")
        if self.next_step:
            lines.append(f"  try: {self.next_step}")
        return "\n".join("\n".join(lines).splitlines()[:LINES_MAX])


class ConfigError(KvasirError):
    status = 400
    kind = "invalid_config"


class UnsupportedEffect(ConfigError):
    kind = "unsupported_effect"


class TraceError(KvasirError):
    status = 400
    kind = "invalid_trace"


class ModelError(KvasirError):
    status = 400
    kind = "invalid_model"


class RequestError(KvasirError):
    status = 400
    kind = "invalid_request_error"


class Unauthorised(RequestError):
    status = 401
    kind = "authentication_error"


class Forbidden(RequestError):
    status = 403
    kind = "permission_error"


class NotFound(RequestError):
    status = 404
    kind = "not_found_error"


class TooLarge(RequestError):
    status = 413
    kind = "request_too_large"


class Overloaded(KvasirError):
    status = 429
    retry = True
    kind = "overloaded_error"


class Unavailable(KvasirError):
    status = 503
    retry = True
    kind = "service_unavailable"


class TransferError(KvasirError):
    status = 502
    retry = True
    kind = "transfer_error"


class WireError(KvasirError):
    status = 400
    kind = "wire_error"


class Diverged(KvasirError):
    kind = "diverged"


def nearest(name: str, known: Iterable[str]) -> str:
    """The closest known name, or the whole (short) list when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else ", ".join(names[:12])
