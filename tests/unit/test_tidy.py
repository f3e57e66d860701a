"""The shape of the source, enforced: layers, purity below layer 3, sizes, no unsafe loading.

Each rule is a function from a source tree to a list of offences, so that the rules run both on
`src/kvasir` and on toy trees that break them on purpose. It parses source and imports none of it.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import indent

import pytest

SRC = Path(__file__).parents[2] / "src" / "kvasir"

# DESIGN section 2. A package may import its own layer's named neighbours and everything below.
LAYERS: dict[str, int] = {
    "core": 0,
    "policy": 1, "kv": 1, "net": 1, "cost": 1,
    "node": 2,
    "engine": 3, "backends": 3, "transfer": 3, "store": 3,
    "observe": 3, "measure": 3, "traces": 3,
    "world": 4, "world.live": 4, "world.sim": 4,
    "runtime": 5,
    "cli": 6, "gateway": 6, "plan": 6, "console": 6,
}  # fmt: skip

# The only imports between two packages of one layer. `cli` may import anything.
SIDEWAYS: dict[str, set[str]] = {
    "policy": {"kv", "net", "cost"},
    "measure": {"observe", "engine"},
    "observe": {"measure"},
    "world.live": {"world"},
    "world.sim": {"world"},
}

FIRST_IMPURE_LAYER = 3
IMPURE_MODULES = {
    "asyncio", "io", "multiprocessing", "os", "pathlib", "random", "secrets", "shutil", "signal",
    "socket", "subprocess", "tempfile", "threading", "time", "torch", "uuid", "zmq",
}  # fmt: skip
IMPURE_CALLS = {"open", "print", "input"}
NUMPY_BELOW = {"net", "cost"}

UNSAFE_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"eval", "exec"}
UNSAFE_ATTRIBUTES = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load"}

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
HANDLE_LINES_MAX = 200  # a state machine's `handle` may be long if it reads top to bottom

IMPORT_CALLS = {"import_module", "importlib.import_module", "__import__"}

# "node/worker.py" or "node/worker.py::Worker.step" -> why it is better long than split.
LONG_FOR_A_REASON: dict[str, str] = {
    "node/conductor.py": "one state machine that reads top to bottom; its parts share every field",
    "node/worker.py": "as the conductor; what can stand alone is in steps, tiers, outbound, ...",
    "core/messages.py": "all that nodes say to one another, on one page",
}

MACHINE_PATH = re.compile(r"(?<![\w.:/)\]}])[/](?:work|root|home|Users)[/'\"\s]")
UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME")))


@dataclass(frozen=True)
class Import:
    target: str  # absolute dotted name; `from a import b` gives a.b
    line: int


@dataclass(frozen=True)
class Module:
    root: Path
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @property
    def package(self) -> str:
        """Its place in LAYERS, e.g. `world.sim`; empty for the root's own files."""
        return package_of(self.path.relative_to(self.root).with_suffix("").parts)

    @property
    def layer(self) -> int | None:
        return LAYERS.get(self.package)

    @cached_property
    def imports(self) -> list[Import]:
        return [found for node in ast.walk(self.tree) for found in self._imports_of(node)]

    def _imports_of(self, node: ast.AST) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = self._absolute(node)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and called(node) in IMPORT_CALLS:
            yield from (Import(str(arg.value), node.lineno) for arg in node.args[:1]
                        if isinstance(arg, ast.Constant))  # fmt: skip

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = ["kvasir", *self.path.relative_to(self.root).parent.parts]
        up = here[: len(here) - (node.level - 1)]
        return ".".join([*up, node.module] if node.module else up)


def package_of(parts: tuple[str, ...]) -> str:
    """The longest prefix of a dotted path that LAYERS names; else its first part."""
    if len(parts) == 1 and parts[0] in {"__init__", "__main__"}:
        return ""
    pair = ".".join(parts[:2])
    return pair if pair in LAYERS else parts[0]


def called(node: ast.Call) -> str:
    """`f` or `a.f` for a call by name; empty for anything else."""
    match node.func:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return f"{owner}.{name}"
    return ""


def modules(root: Path) -> list[Module]:
    return [Module(root, path) for path in sorted(root.rglob("*.py"))]


def pure_modules(root: Path) -> list[Module]:
    return [m for m in modules(root) if m.layer is not None and m.layer < FIRST_IMPURE_LAYER]


def calls(module: Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield called(node), node.lineno


# --- rules: a source tree in, offences out ---------------------------------------------------


def in_a_layer(root: Path) -> list[str]:
    """Every module belongs to a package that has a layer."""
    return [
        f"{m.name}: package {m.package!r} has no layer in LAYERS"
        for m in modules(root)
        if m.package and m.layer is None
    ]


def imports_point_down(root: Path) -> list[str]:
    """A module imports its own package, lower layers, and the neighbours that SIDEWAYS names."""
    return [
        f"{m.name}:{found.line}: {m.package or 'kvasir'} imports {found.target}"
        for m in modules(root)
        for found in m.imports
        if not may_import(m.package, found.target)
    ]


def may_import(importer: str, target: str) -> bool:
    parts = tuple(target.split("."))
    if parts[0] != "kvasir" or importer == "cli":
        return True
    imported = package_of(parts[1:]) if len(parts) > 1 else ""
    if imported not in LAYERS or imported == importer:
        return True  # kvasir.__version__ and the like; a package without a layer is reported above
    if importer not in LAYERS:
        return importer != "" or target.startswith("kvasir.cli")  # __main__ starts the command
    if LAYERS[imported] == LAYERS[importer]:
        return imported in SIDEWAYS.get(importer, ())
    return LAYERS[imported] < LAYERS[importer]


def pure_below_mechanisms(root: Path) -> list[str]:
    """Below layer 3: no clock, randomness, I/O, concurrency or torch; numpy in net and cost."""
    offences = []
    for m in pure_modules(root):
        for found in m.imports:
            top = found.target.split(".")[0]
            if top in IMPURE_MODULES or (top == "numpy" and m.package not in NUMPY_BELOW):
                offences.append(f"{m.name}:{found.line}: imports {top}")
        offences += [f"{m.name}:{at}: calls {name}()" for name, at in calls(m)
                     if name in IMPURE_CALLS]  # fmt: skip
    return offences


def short_enough(root: Path) -> list[str]:
    """Functions and files keep their limits, or stand in LONG_FOR_A_REASON."""
    return [f"{where}: {size} lines, limit {limit}" for where, size, limit in over_limit(root)
            if where not in LONG_FOR_A_REASON]  # fmt: skip


def over_limit(root: Path) -> Iterator[tuple[str, int, int]]:
    for m in modules(root):
        size = len(m.text.splitlines())
        if size > FILE_LINES_MAX:
            yield m.name, size, FILE_LINES_MAX
        for qualname, node in functions(m.tree):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = HANDLE_LINES_MAX if node.name == "handle" else FUNCTION_LINES_MAX
            if size > limit:
                yield f"{m.name}::{qualname}", size, limit


def functions(
    node: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
        yield from functions(child, inner)


def no_machine_paths(root: Path) -> list[str]:
    """No absolute path of one machine, in code or in prose."""
    return matching_lines(root, MACHINE_PATH)


def nothing_unfinished(root: Path) -> list[str]:
    """No note to a later self: it is done, or it is an issue."""
    return matching_lines(root, UNFINISHED)


def matching_lines(root: Path, pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{m.name}:{at}: {line.strip()}"
        for m in modules(root)
        for at, line in enumerate(m.text.splitlines(keepends=True), start=1)
        if pattern.search(line)
    ]


def nothing_unsafe(root: Path) -> list[str]:
    """No pickle, no unsafe YAML or torch loading, no eval or exec."""
    offences = []
    for m in modules(root):
        offences += [f"{m.name}:{i.line}: imports {i.target}" for i in m.imports
                     if i.target.split(".")[0] in UNSAFE_MODULES]  # fmt: skip
        offences += [f"{m.name}:{at}: calls {name}()" for name, at in calls(m)
                     if name in UNSAFE_CALLS | UNSAFE_ATTRIBUTES]  # fmt: skip
        offences += [f"{m.name}:{i.line}: imports {i.target}" for i in m.imports
                     if i.target in UNSAFE_ATTRIBUTES]  # fmt: skip
    return offences


def documented(root: Path) -> list[str]:
    """Every module opens with what it knows and must not know."""
    silent = (m for m in modules(root) if not ast.get_docstring(m.tree))
    return [f"{m.name}: no module docstring" for m in silent]


RULES: list[Callable[[Path], list[str]]] = [
    in_a_layer,
    imports_point_down,
    pure_below_mechanisms,
    short_enough,
    no_machine_paths,
    nothing_unfinished,
    nothing_unsafe,
    documented,
]


# --- the source keeps the rules --------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Callable[[Path], list[str]]) -> None:
    offences = rule(SRC)
    assert not offences, f"{rule.__doc__}\n" + "\n".join(offences)


def test_source_is_found() -> None:
    assert any(m.package == "core" for m in modules(SRC))


def test_every_exception_is_still_needed() -> None:
    unneeded = LONG_FOR_A_REASON.keys() - {where for where, _, _ in over_limit(SRC)}
    assert not unneeded, f"shorter than the limit now, drop from LONG_FOR_A_REASON: {unneeded}"


# --- the rules see what they forbid ----------------------------------------------------------


def toy(root: Path, path: str, body: str, docstring: str = '"""Toy."""\n') -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(docstring + body, encoding="utf-8")
    return root


def function_of(lines: int, name: str = "f") -> str:
    return f"def {name}():\n" + "    x = 1\n" * (lines - 1)


def method_of(lines: int) -> str:
    return indent("async " + function_of(lines, "g"), "    ")


BROKEN = [
    (in_a_layer, "strays/a.py", "x = 1\n", "strays/a.py"),
    (in_a_layer, "stray.py", "x = 1\n", "stray.py"),
    (imports_point_down, "core/a.py", "from kvasir.kv.pool import Pool\n", "core/a.py:2"),
    (imports_point_down, "core/a.py", "import kvasir.node.worker\n", "kvasir.node.worker"),
    (imports_point_down, "core/specs/a.py", "from ...kv import pool\n", "kvasir.kv.pool"),
    (imports_point_down, "node/a.py", "from kvasir import engine\n", "kvasir.engine"),
    (imports_point_down, "node/a.py", "def f():\n    from kvasir.world.sim import x\n", "a.py:3"),
    (imports_point_down, "kv/a.py", "if TYPE_CHECKING:\n    import kvasir.policy\n", "a.py:3"),
    (imports_point_down, "net/a.py", "from kvasir.cost import step\n", "kvasir.cost"),
    (imports_point_down, "store/a.py", "from kvasir.transfer import shm\n", "kvasir.transfer"),
    (imports_point_down, "world/live/a.py", "from kvasir.world.sim import heap\n", "world.sim"),
    (imports_point_down, "world/sim/a.py", "from ..live import wire\n", "world.live"),
    (imports_point_down, "world/sim/a.py", "from kvasir.world import live\n", "world.live"),
    (imports_point_down, "world/__init__.py", "from kvasir.world import live\n", "world.live"),
    (imports_point_down, "runtime/a.py", "import_module('kvasir.gateway.app')\n", "kvasir.gateway"),
    (imports_point_down, "gateway/a.py", "from kvasir.console import x\n", "kvasir.console"),
    (imports_point_down, "plan/a.py", "from kvasir.cli import main\n", "kvasir.cli"),
    (imports_point_down, "__init__.py", "from kvasir.core import ids\n", "kvasir.core"),
    *[(pure_below_mechanisms, "node/a.py", f"import {name}\n", name)
      for name in sorted(IMPURE_MODULES)],
    (pure_below_mechanisms, "core/a.py", "from os import path\n", "imports os"),
    (pure_below_mechanisms, "policy/a.py", "import numpy as np\n", "imports numpy"),
    *[(pure_below_mechanisms, "kv/a.py", f"x = {call}(1)\n", call)
      for call in sorted(IMPURE_CALLS)],
    (short_enough, "core/a.py", function_of(71), "core/a.py::f: 71"),
    (short_enough, "core/a.py", "class C:\n" + method_of(71), "core/a.py::C.g: 71"),
    (short_enough, "node/a.py", function_of(201, "handle"), "node/a.py::handle: 201"),
    (short_enough, "core/a.py", "x = 1\n" * 500, "core/a.py: 501"),
    *[(no_machine_paths, "cli/a.py", f"x = '{'/'}{top}/x'\n", "a.py:2")
      for top in ("work", "root", "home")],
    (nothing_unfinished, "cli/a.py", "# TO" "DO later\n", "a.py:2"),
    (nothing_unfinished, "cli/a.py", "# FIX" "ME\n", "a.py:2"),
    *[(nothing_unsafe, "transfer/a.py", f"import {name}\n", name)
      for name in sorted(UNSAFE_MODULES)],
    *[(nothing_unsafe, "transfer/a.py", f"x = {name}(1)\n", name)
      for name in sorted(UNSAFE_CALLS | UNSAFE_ATTRIBUTES)],
    (nothing_unsafe, "cli/a.py", "from yaml import load\n", "yaml.load"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "body", "said"), BROKEN)
def test_rule_sees(
    rule: Callable[[Path], list[str]], path: str, body: str, said: str, tmp_path: Path
) -> None:
    (offence,) = rule(toy(tmp_path, path, body))
    assert said in offence


def test_rule_sees_a_missing_docstring(tmp_path: Path) -> None:
    assert documented(toy(tmp_path, "core/a.py", "x = 1\n", docstring="")) == [
        "core/a.py: no module docstring"
    ]


def test_a_tidy_tree_passes_every_rule(tmp_path: Path) -> None:
    toy(tmp_path, "__init__.py", '__version__ = "0"\n')
    toy(tmp_path, "__main__.py", "from kvasir.cli import main\n")
    toy(tmp_path, "policy/route/load.py", "from kvasir.kv import x\nfrom ...core import ids\n")
    toy(tmp_path, "net/maxmin.py", "import numpy as np\n")
    toy(tmp_path, "node/worker.py", "from kvasir.policy import x\n" + function_of(200, "handle"))
    toy(tmp_path, "measure/slo.py", "import time\nfrom kvasir.observe import feed\n")
    toy(tmp_path, "engine/runner.py", "import torch\nmodel.eval()\nopen('x')\nyaml.safe_load('')\n")
    toy(tmp_path, "world/sim/heap.py", "from kvasir.world import base\nfrom kvasir.node import x\n")
    toy(tmp_path, "gateway/app.py", "from kvasir.runtime import local\nfrom kvasir import a\n")
    toy(tmp_path, "cli/serve.py", "from kvasir.gateway import app\nurl = 'http://x/worker/home'\n")
    toy(tmp_path, "core/ids.py", function_of(70) + "x = 1  # either/or: /worker, {a}/root\n")
    offences = [offence for rule in RULES for offence in rule(tmp_path)]
    assert offences == []
