"""Where the text comes from: Python's documentation and docstrings. Reads it; must not judge it.

The documentation is Debian's package, fetched with apt where there is one; else the help texts and
docstrings of the interpreter that runs this.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

from .pages import Block, blocks, plain

PACKAGE: Final = "python3.11-doc"
PARTS: Final = ("tutorial", "library", "faq", "howto", "reference", "using", "whatsnew")
LEFT_OUT: Final = {
    "changelog", "superseded", "token", "symbol", "unix", "windows", "index", "2.0", "2.1", "2.2",
    "2.3", "2.4", "2.5", "2.6", "2.7", "3.0", "3.1", "3.2", "3.3", "3.4", "turtle", "msilib",
    "audit_events", "distutils", "tkinter.tix", "xdrlib", "winreg", "ossaudiodev", "2to3", "test",
    "clinic", "isolating-extensions", "curses", "nis", "sunau", "aifc", "chunk", "imghdr", "sndhdr",
    "pyexpat", "xml.dom.minidom", "xml.sax.handler", "xml.sax.reader", "asynchat", "smtpd", "imp",
    "nntplib", "telnetlib", "uu", "msvcrt", "syslog", "pipes", "crypt", "spwd", "mailcap", "cgitb",
}  # fmt: skip
TREES_LEFT_OUT: Final = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "encodings",
    "ensurepip", "__pycache__", "distutils", "tkinter", "ctypes", "xml", "curses", "msilib",
}  # fmt: skip
# Never trained on: what these modules' pages and docstrings say measures what was learned.
HELD_OUT: Final = {"asyncore", "code", "dis", "filecmp", "fractions", "heapq", "pickle", "readline",
                   "textwrap", "zipfile"}  # fmt: skip

MARKS: Final = re.compile(r"``|\*\*|(?<!\w)[*`](?=\w)|(?<=\w)[*`](?!\w)")  # of reStructuredText


class Document(NamedTuple):
    """`key` names the module that the text is about; its page and its docstrings share it."""

    key: str
    title: str
    blocks: list[Block]
    docstrings: bool = False

    @property
    def held_out(self) -> bool:
        part, _, module = self.key.partition("/")
        return part == "library" and module in HELD_OUT


def documents(scratch: Path, *, offline: bool = False) -> list[Document]:
    """Everything there is, in a fixed order."""
    html = None if offline else documentation(scratch)
    pages = list(_pages(html)) if html else list(_topics())
    return [*pages, *_builtins(), *docstrings(Path(sysconfig.get_path("stdlib")))]


def documentation(scratch: Path) -> Path | None:
    """The folder of HTML inside Debian's package; None where apt cannot give it."""
    unpacked = scratch / PACKAGE
    if not unpacked.is_dir() and not _apt(scratch):
        print(f"{PACKAGE} is not at hand: help texts and docstrings alone", file=sys.stderr)
        return None
    return next(iter(sorted(unpacked.glob("usr/share/doc/*/html/library"))), unpacked).parent


def _apt(scratch: Path) -> bool:
    """Whether the package was fetched and unpacked."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return False
    scratch.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=False).returncode:
        return False
    deb = next(scratch.glob(f"{PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", deb, scratch / PACKAGE], check=True)
    return True


def _pages(html: Path) -> Iterator[Document]:
    for path in [html / "glossary.html", *(p for part in PARTS for p in _html(html / part))]:
        found = blocks(path.read_text(encoding="utf-8"))
        title = next((b.text for b in found if b.kind == "heading"), path.stem)
        yield Document(f"{path.parent.name}/{path.stem.split('.')[0]}", title, found)


def _html(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.html")) if path.stem not in LEFT_OUT]


def _topics() -> Iterator[Document]:
    """The texts of `help("topic")`: much of the language reference."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        title, _, rest = text.partition("\n")
        yield Document(f"reference/{name}", plain(title), list(_paragraphs(rest)))


def _builtins() -> Iterator[Document]:
    for name in sorted(sys.builtin_module_names):
        if name.startswith("_"):
            continue
        module = import_module(name)
        found = [block for part in sorted(vars(module)) for block in _object(module, part)]
        yield Document(f"library/{name}", name, found, docstrings=True)


def _object(module: object, name: str) -> Iterator[Block]:
    value = getattr(module, name)
    doc = inspect.getdoc(value) if callable(value) and not name.startswith("_") else None
    if doc:
        role = "class" if isinstance(value, type) else "function"
        where = getattr(module, "__name__", "")
        full = name if where == "builtins" else f"{where}.{name}"
        yield Block("entry", f"{full}()", name=full, role=role)
        yield from _paragraphs(doc)


def docstrings(root: Path) -> Iterator[Document]:
    """Of every public module under `root`, read as text."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names = [part for part in parts if part != "__init__"]
        left_out = TREES_LEFT_OUT | LEFT_OUT
        if not left_out.isdisjoint(names) or any(name.startswith("_") for name in names):
            continue
        if found := list(_module(path, ".".join(names))):
            yield Document(f"library/{parts[0]}", ".".join(names), found, docstrings=True)


def _module(path: Path, name: str) -> Iterator[Block]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    if doc := ast.get_docstring(tree):
        yield Block("entry", name, name=name, role="module")
        yield from _paragraphs(doc)
    yield from _members(tree, name)


def _members(tree: ast.Module | ast.ClassDef, where: str) -> Iterator[Block]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        doc = ast.get_docstring(node)
        if doc and not node.name.startswith("_"):
            role = "class" if isinstance(node, ast.ClassDef) else "function"
            full = f"{where}.{node.name}"
            yield Block("entry", _signature(node, full), name=full, role=role)
            yield from _paragraphs(doc)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _members(node, f"{where}.{node.name}")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, full: str) -> str:
    if isinstance(node, ast.ClassDef):
        return full
    names = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
    return f"{full}({', '.join(n for n in names if n not in ('self', 'cls'))})"


def _paragraphs(doc: str) -> Iterator[Block]:
    """Blank lines part paragraphs; what is indented or prompts is code; underlines are dropped."""
    for part in re.split(r"\n\s*\n", inspect.cleandoc(doc).replace("\t", "    ")):
        lines = [x.rstrip() for x in part.splitlines() if not re.fullmatch(r"[-=*~^ ]+", x)]
        if not lines:
            continue
        code = all(line.startswith("  ") for line in lines) or ">>>" in part
        text = "\n".join(lines).encode("ascii", "ignore").decode("ascii")
        if code:
            yield Block("code", inspect.cleandoc(text))
        else:
            yield Block("prose", plain(re.sub(MARKS, "", text)))
