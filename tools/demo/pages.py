"""Sphinx HTML to plain blocks of text. Knows Sphinx's mark-up; must not know chats or training.

A page becomes a flat list of blocks in reading order: headings, paragraphs, list items, code, and
the signatures of what is documented.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Final, Literal, NamedTuple

Kind = Literal["heading", "prose", "item", "code", "entry", "term"]

VOID: Final = {"br", "hr", "img", "input", "meta", "link", "col", "source", "wbr"}
SKIPPED_TAGS: Final = {"table", "nav", "script", "style", "aside", "svg"}
SKIPPED_CLASSES: Final = {
    "headerlink", "section-number", "contents", "topic", "audit-hook", "versionadded",
    "versionchanged", "deprecated", "deprecated-removed", "admonition-title", "availability",
    "sphinxsidebar", "toctree-wrapper", "footnote", "citation", "seealso", "math", "sig-return",
}  # fmt: skip
ENTRY_KINDS: Final = {"function", "method", "class", "exception", "attribute", "data", "decorator"}
ASCII: Final = str.maketrans({
    "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\xa0": " ",
    "−": "-", "×": "x", "→": "->", "•": "-", "≤": "<=", "≥": ">=", "¶": None,
})  # fmt: skip


class Block(NamedTuple):
    """`name` and `role` are set for entries: `shutil.copyfile` and `function`. A term's `text` is
    its name; a heading's `level` is 1 to 6."""

    kind: Kind
    text: str
    name: str = ""
    role: str = ""
    level: int = 0


@dataclass(slots=True)
class Node:
    tag: str
    classes: frozenset[str] = frozenset()
    id: str = ""
    children: list[Node | str] = field(default_factory=list)

    def skipped(self) -> bool:
        return self.tag in SKIPPED_TAGS or not SKIPPED_CLASSES.isdisjoint(self.classes)


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("")
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        node = Node(tag, frozenset((given.get("class") or "").split()), given.get("id") or "")
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        depth = next((i for i in range(len(self._open) - 1, 0, -1) if self._open[i].tag == tag), 0)
        if depth:
            del self._open[depth:]

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def blocks(html: str) -> list[Block]:
    """The page's body, without navigation, tables, version notes and footnotes."""
    tree = _Tree()
    tree.feed(html)
    body = next(_find(tree.root, "body"), tree.root)
    return list(_blocks(body))


def plain(text: str) -> str:
    """ASCII on one line."""
    text = " ".join(text.translate(ASCII).split())
    return text.encode("ascii", "ignore").decode("ascii").strip()


def _find(node: Node, name: str) -> Iterator[Node]:
    for child in node.children:
        if isinstance(child, Node):
            if name in child.classes:
                yield child
            else:
                yield from _find(child, name)


def _text(node: Node) -> str:
    parts = (c if isinstance(c, str) else "" if c.skipped() else _text(c) for c in node.children)
    return "".join(parts)


def _blocks(node: Node) -> Iterator[Block]:
    for child in node.children:
        if not isinstance(child, Node) or child.skipped():
            continue
        if re.fullmatch("h[1-6]", child.tag):
            yield Block("heading", plain(_text(child)), level=int(child.tag[1]))
        elif child.tag == "p":
            if text := _paragraph(child):
                yield Block("prose", text)
        elif child.tag == "pre":
            yield Block("code", _code(_text(child)))
        elif child.tag in ("ul", "ol"):
            yield from _items(child)
        elif child.tag == "dl":
            yield from _entries(child)
        else:
            yield from _blocks(child)


def _paragraph(node: Node) -> str:
    text = re.sub(r"\s*\(Contributed by .*?\)", "", plain(_text(node)))
    return "" if text.startswith(("Source code:", "See also")) else text


def _code(text: str) -> str:
    lines = text.translate(ASCII).encode("ascii", "ignore").decode("ascii").splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _items(node: Node) -> Iterator[Block]:
    for item in node.children:
        if isinstance(item, Node) and item.tag == "li":
            for block in _blocks(item):
                yield block._replace(kind="item") if block.kind == "prose" else block


def _entries(node: Node) -> Iterator[Block]:
    role = next(iter(ENTRY_KINDS & node.classes), "") if "py" in node.classes else ""
    for child in node.children:
        if not isinstance(child, Node):
            continue
        if child.tag == "dt" and role:
            yield _entry(child, role)
        elif child.tag == "dt" and "glossary" in node.classes:
            yield Block("term", plain(_text(child)))
        elif child.tag == "dt":
            yield Block("prose", plain(_text(child)) + ":")
        elif child.tag == "dd":
            yield from _blocks(child)


def _entry(node: Node, role: str) -> Block:
    name = child_text(node, "descclassname") + child_text(node, "descname")
    signature = re.sub(r"^(class|exception|abstractmethod|classmethod|staticmethod|async|property"
                       r"|final) ", "", plain(_text(node)))  # fmt: skip
    return Block("entry", signature, name=node.id or name, role=role)


def child_text(node: Node, name: str) -> str:
    found = next(_find(node, name), None)
    return plain(_text(found)) if found else ""
