"""Compiles the kernel where it runs, and finds what was compiled. Knows a compiler and a folder of
the user's; must not know tensors.

Nothing is compiled unless `build` is called. What is built is named by everything that it depends
on, so a new source or another processor finds nothing rather than the wrong thing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvasir.core.errors import ModelError

SOURCE: Final = Path(__file__).with_name("attention.cpp")
HEADERS: Final = tuple(sorted(SOURCE.parent.glob("*.h")))
# No fast-math: infinities and the order of sums mean something here.
FLAGS: Final = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
NATIVE: Final = ("-mcpu=native",) if platform.machine() == "aarch64" else ("-march=native",)
COMMAND: Final = "python -m kvasir.engine.native"
LIMIT_S: Final = 300


def folder() -> Path:
    """Where built kernels are kept: KVASIR_CACHE, else below the user's cache folder."""
    own = os.environ.get("KVASIR_CACHE")
    if own:
        return Path(own) / "native"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvasir" / "native"


def library(machine: Sequence[str] = NATIVE, into: Path | None = None) -> Path:
    """Where this source, for this processor and with these flags, is kept once it is built."""
    parts = [one.read_bytes() for one in (SOURCE, *HEADERS)]
    parts += [" ".join((*FLAGS, *machine)).encode(), _processor().encode()]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    return (into or folder()) / f"attention-{name}.so"


def compiler_found() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(machine: Sequence[str] = NATIVE, into: Path | None = None) -> Path:
    """Compile, unless that was done before. `machine`: which instructions may be used; `into`: in
    the place of `folder()`.

    Raises ModelError without a compiler, or when it fails.
    """
    path = library(machine, into)
    if path.exists():
        return path
    compiler = compiler_found()
    if compiler is None:
        raise ModelError(
            "the native kernel needs a C++ compiler, and neither g++ nor clang++ is on PATH",
            next_step="install g++, or name one in CXX; the engine runs without the kernel too",
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        out = Path(work) / path.name
        command = [compiler, *FLAGS, *machine, str(SOURCE), "-o", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if done.returncode:
            raise ModelError(
                f"{Path(compiler).name} could not compile the native kernel: {_first(done.stderr)}",
                where=str(SOURCE),
                next_step="name another compiler in CXX; the engine runs without the kernel too",
            )
        out.replace(path)  # whole or not at all, for a process that looks meanwhile
    return path


def _first(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return (errors or text.splitlines() or ["no word why"])[0]


def _processor() -> str:
    """What it can do, where Linux tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return " ".join((sys.platform, platform.machine(), *flags[:1]))
