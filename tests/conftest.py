"""What all tests share: one Hypothesis profile, free of wall-clock deadlines."""

from hypothesis import settings

# A deadline in milliseconds fails on a busy machine, not on a bug; pytest-timeout bounds each test.
settings.register_profile("kvasir", settings.get_profile("default"), deadline=None)
settings.load_profile("kvasir")
