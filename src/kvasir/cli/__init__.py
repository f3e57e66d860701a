"""The `kvasir` command. Imports nothing heavy: verbs load when they are named.

A fault is at most five lines on stderr, never a traceback: exit 2 for what the user can correct, 1
for a failed check or a defect of ours (KVASIR_DEBUG=1 shows where), 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); the exit status."""
    from kvasir.core.errors import KvasirError

    try:
        from kvasir.cli.app import run

        status = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a closed pipe must show here, not while the interpreter ends
        return status
    except KvasirError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe left: nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("KVASIR_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"internal error: {what}\n  try: KVASIR_DEBUG=1 for the traceback", 1)


def _fail(text: str, status: int) -> int:
    sys.stdout.flush()
    print(text, file=sys.stderr)
    return status
