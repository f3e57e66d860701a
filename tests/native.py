"""The compiled kernel for tests: built once a run, beside the user's own."""

from __future__ import annotations

import platform
import tempfile
from functools import cache
from pathlib import Path

import pytest

from kvasir.engine.native.build import NATIVE, build, compiler_found
from kvasir.engine.native.kernel import Kernel

X86 = platform.machine() in ("x86_64", "AMD64")
# By name: with all that this processor can, and with what most of the last ten years' can.
MACHINES = {"native": NATIVE, **({"avx2": ("-march=x86-64-v3",)} if X86 else {})}

_folder = tempfile.TemporaryDirectory(prefix="kvasir-native-")


@cache
def kernel(name: str = "native") -> Kernel:
    """Skips the test where there is no compiler."""
    if compiler_found() is None:
        pytest.skip("no C++ compiler here")
    return Kernel(build(MACHINES[name], into=Path(_folder.name)))
