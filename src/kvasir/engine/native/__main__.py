"""`python -m kvasir.engine.native`: compile the kernel for this processor.

Knows the build alone.
"""

from __future__ import annotations

import sys

from kvasir.core.errors import KvasirError
from kvasir.engine.native.build import build, library


def main() -> int:
    known = library().exists()
    try:
        path = build()
    except KvasirError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'was built before' if known else 'built'}: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
