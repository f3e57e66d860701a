"""What all tests share: one Hypothesis profile, free of wall-clock deadlines.

No test finds a compiled kernel that somebody built here, so that it means the same everywhere;
`tests/native.py` builds its own.
"""

import os

from hypothesis import settings

os.environ["KVASIR_CACHE"] = os.path.join(os.path.dirname(__file__), "no-such-cache")

# A deadline in milliseconds fails on a busy machine, not on a bug; pytest-timeout bounds each test.
settings.register_profile("kvasir", settings.get_profile("default"), deadline=None)
settings.load_profile("kvasir")
