"""Errors as OpenAI clients read them: a status and one JSON object. Knows no route and no desk."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from kvasir.core.errors import KvasirError, NotFound, Overloaded, Unavailable
from kvasir.gateway.port import EndPiece, FailPiece
from kvasir.gateway.schema import BadField

KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: Overloaded.kind,
    502: "transfer_error",
    503: Unavailable.kind,
    504: "deadline_exceeded",
}
RETRY: Final = {429, 503}
Header = tuple[bytes, bytes]


class HttpError(msgspec.Struct, frozen=True):
    """What goes to the client. `message` has at most five lines and never a traceback."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[Header]:
        """`retry-after` in whole seconds, at least 1, where trying again is safe."""
        if self.retry_after_s is None and self.status not in RETRY:
            return []
        seconds = max(1, math.ceil(self.retry_after_s or 0))
        return [(b"retry-after", b"%d" % seconds)]


class Refused(Exception):
    """An answer that cannot be given (any further); carries what the client is told."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.message)
        self.error = error


def of_status(status: int, message: str, *, retry_after_s: float | None = None) -> HttpError:
    kind = KINDS.get(status, "internal_error" if status >= 500 else "invalid_request_error")
    return HttpError(status, message, kind, retry_after_s=retry_after_s)


def of_error(error: KvasirError) -> HttpError:
    param: str | None = None
    code: str | None = None
    if isinstance(error, BadField):
        param, code = error.param, error.code
    elif isinstance(error, NotFound):
        param, code = "model", "model_not_found"
    return HttpError(error.status, str(error), error.kind, param, code)


def of_bug(request_id: str) -> HttpError:
    return of_status(500, f"internal error; the server's log has it under request {request_id}")


def of_fail(piece: FailPiece) -> HttpError:
    return of_status(piece.status, piece.reason, retry_after_s=piece.retry_after_s)


def of_end(piece: EndPiece) -> HttpError:
    """An end that is no answer: the deadline passed, or all attempts were used up."""
    if piece.reason == "deadline":
        return of_status(504, "the request's deadline passed before its answer was complete")
    return of_status(503, f"the request ended early: {piece.reason}")
