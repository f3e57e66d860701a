"""The typed core as a compiled extension (mypyc), beside the pure-Python one, never in its place.

    python tools/compile.py [FOLDER]          # default .compiled; needs a C compiler, some minutes
    PYTHONPATH=.compiled kvasir simulate ...

Copies the package into FOLDER and compiles the modules that simulations spend their time in. The
sources are the same; results are the same to the byte. The pure-Python package is what is tested
and released; this is for long sweeps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# kv/runs stays out: a compiled msgspec.Struct loses its class keywords (eq, gc).
MODULES = (
    "kv/pool", "kv/prefix", "kv/tiers", "node/work", "node/cohort", "node/blocks", "node/prefixes",
    "node/outbound", "node/steps", "node/tiers", "node/window", "node/worker", "node/request",
    "node/conductor", "node/placement", "node/admission", "policy/batch", "policy/admit",
    "policy/route/*", "net/maxmin", "net/own", "net/oracle", "cost/step", "cost/curve",
    "world/sim/executor", "world/sim/transfers", "world/sim/network", "world/sim/record",
    "measure/itl",
)  # fmt: skip
SETUP = """
from setuptools import setup
from mypyc.build import mypycify
setup(name="kvasir-core", ext_modules=mypycify({args!r}, opt_level="3", debug_level="0"))
"""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".compiled").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "src" / "kvasir", folder / "kvasir", ignore=ignored)
    modules = sorted(
        str(path.relative_to(folder))
        for pattern in MODULES
        for path in (folder / "kvasir").glob(f"{pattern}.py")
    )
    with tempfile.TemporaryDirectory() as scratch:
        setup = Path(scratch) / "setup.py"
        config = str(ROOT / "pyproject.toml")
        setup.write_text(SETUP.format(args=["--strict", "--config-file", config, *modules]))
        command = [sys.executable, str(setup), "build_ext", "--inplace", "--build-temp", scratch]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": ""},
        )  # fmt: skip
    if done.returncode:
        print("\n".join((done.stdout + done.stderr).splitlines()[-5:]), file=sys.stderr)
        raise SystemExit(f"{len(modules)} modules were not compiled")
    print(f"{len(modules)} modules compiled; PYTHONPATH={os.path.relpath(folder)} uses them")


if __name__ == "__main__":
    main()
