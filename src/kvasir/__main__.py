"""`python -m kvasir`: the command without its script."""

import sys

from kvasir.cli import main

if __name__ == "__main__":
    sys.exit(main())
