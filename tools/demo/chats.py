"""Short chats out of documentation. Knows blocks of text and English verbs; no tokens, no training.

An entry "shutil.copyfile(src, dst)", "Copy the contents of ..." becomes "What does shutil.copyfile
do?", "The function shutil.copyfile() copies the contents of ...", and the like for modules, terms
of the glossary, questions of the FAQ and sections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from .pages import Block
from .sources import Document

ANSWER_CHARS_MIN, ANSWER_CHARS_MAX = 40, 420
POPULAR: Final = frozenset({
    "functions", "stdtypes", "exceptions", "constants", "string", "re", "datetime",
    "collections", "math", "random", "itertools", "os", "functools", "os.path", "pathlib",
    "sys", "json", "csv", "time", "subprocess", "argparse", "logging", "threading",
    "asyncio-task", "unittest", "typing", "dataclasses", "copy", "shutil", "glob", "tempfile",
    "statistics", "decimal", "enum", "contextlib", "io", "urllib.request", "sqlite3", "queue",
    "multiprocessing", "pprint", "operator", "hashlib", "base64", "uuid", "inspect",
    "datastructures", "controlflow", "inputoutput", "classes", "errors", "modules",
    "introduction", "stdlib", "glossary",
})  # fmt: skip
CODE_CHARS_MAX: Final = 320
SIGNATURE_CHARS_MAX: Final = 60
QUESTION_WORDS_MAX: Final = 12
VERBS: Final = frozenset({
    "accept", "acquire", "add", "adjust", "advance", "allow", "append", "apply", "assert",
    "assign", "attach", "begin", "bind", "block", "break", "build", "calculate", "call",
    "cancel", "change", "check", "choose", "clear", "close", "collect", "combine", "compare",
    "compile", "compress", "compute", "concatenate", "configure", "connect", "construct",
    "convert", "copy", "count", "create", "decode", "decompress", "decorate", "define",
    "delete", "determine", "disable", "discard", "display", "divide", "draw", "dump", "emit",
    "empty", "enable", "encode", "encrypt", "end", "enter", "escape", "evaluate", "execute",
    "exit", "expand", "export", "extend", "extract", "fetch", "fill", "filter", "find",
    "finish", "flush", "force", "format", "generate", "get", "give", "handle", "hash", "help",
    "ignore", "import", "indicate", "initialize", "insert", "install", "instruct", "interpret",
    "invoke", "iterate", "join", "keep", "kill", "launch", "let", "list", "listen", "load",
    "locate", "lock", "log", "look", "lookup", "make", "map", "mark", "match", "merge",
    "modify", "move", "multiply", "normalize", "notify", "obtain", "open", "override", "pack",
    "parse", "partition", "perform", "place", "pop", "prepare", "prevent", "print", "process",
    "produce", "provide", "push", "put", "query", "quit", "raise", "randomize", "read",
    "rebind", "receive", "record", "redirect", "reduce", "refresh", "register", "release",
    "reload", "remove", "rename", "render", "reorder", "repeat", "replace", "report", "request",
    "reset", "resize", "resolve", "restore", "retrieve", "return", "reverse", "rotate", "round",
    "run", "save", "scan", "schedule", "search", "seek", "select", "send", "serialize", "serve",
    "set", "show", "shuffle", "shut", "shutdown", "simulate", "skip", "sleep", "sort",
    "specify", "split", "start", "stop", "store", "strip", "submit", "subtract", "suspend",
    "swap", "switch", "take", "tell", "terminate", "test", "transform", "translate", "truncate",
    "try", "turn", "unpack", "unregister", "update", "upload", "use", "validate", "verify",
    "wait", "walk", "wrap", "write", "yield",
})  # fmt: skip

# How a described thing's text begins, and what follows its name instead.
BEGINNINGS: Final = {
    "Raised ": "is raised ", "True if ": "is true if ", "Base exception ": "is a base exception ",
    "Exception raised ": "is an exception raised ", "Exception that ": "is an exception that ",
    "A ": "is a ", "An ": "is an ", "The ": "is the ", "Same as ": "is the same as ",
    "Returns ": "returns ", "Like ": "is like ", "This function ": "", "This method ": "",
    "Alias for ": "is an alias for ", "Equivalent to ": "is equivalent to ",
    "Class ": "is a class ", "Base class ": "is a base class ", "Subclass of ": "is a subclass of ",
    "ABC ": "is an abstract base class ", "Abstract base class ": "is an abstract base class ",
    "Context manager ": "is a context manager ", "Decorator ": "is a decorator ",
    "Number of ": "is the number of ",
}  # fmt: skip
ASKED_WHAT: Final = (
    "What does {0} do?", "What is {0}?", "what does {0} do?", "Explain {0}.", "What does {0} do in "
    "Python?", "Can you explain {0}?", "what is {0}", "Tell me about {0}.", "What is {0} for?",
)  # fmt: skip
ASKED_TERM: Final = (
    "What is {1}{0}?", "What is {1}{0} in Python?", "what is {1}{0}?", "Explain {0}.",
    "What does {0} mean?", "Can you explain what {1}{0} is?", "Define {0}.", "Tell me about {0}.",
    "what is {1}{0}", "What is {1}{0} in Python?",
)  # fmt: skip
ASKED_MODULE: Final = (
    "What is the {0} module?", "What is the {0} module for?", "What does the {0} module do?",
    "what is {0}?", "When would I use the {0} module?", "Tell me about the {0} module.",
    "What is {0} in Python?", "Explain the {0} module.",
)  # fmt: skip
ASKED_HOW: Final = (
    "How do I {0}?", "How can I {0}?", "how do I {0}?", "How do I {0} in Python?", "How to {0}?",
    "Which function can {0}?",
)  # fmt: skip
ASKED_SECTION: Final = (
    "Tell me about {0}.", "Explain {0}.", "What should I know about {0}?", "{0}",
    "Can you tell me about {0}?",
)  # fmt: skip
SYSTEMS: Final = (
    "You are a helpful assistant.", "You are Kvasir's demo model.", "Answer briefly.",
    "You are a helpful assistant that answers questions about Python.",
)  # fmt: skip


class Turn(NamedTuple):
    question: str
    answer: str


class Chat(NamedTuple):
    """`held_out`: made of a document that is never trained on."""

    turns: tuple[Turn, ...]
    system: str = ""
    held_out: bool = False


def chats_of(documents: Iterable[Document], talk: Path, rng: Random) -> list[Chat]:
    """All chats, in a fixed order for one `rng`. A name is asked about with what is said first."""
    seen: set[str] = set()
    found = [chat for document in documents for chat in _of_document(document, seen, rng)]
    return [*found, *_written(talk, rng)]


def _of_document(document: Document, seen: set[str], rng: Random) -> Iterator[Chat]:
    facts = []
    for fact in _facts(document):
        if fact.about not in seen and len(fact.answer) >= ANSWER_CHARS_MIN:
            seen.add(fact.about)
            facts.append(fact)
    more = _weight(document)
    turns = [turn for fact in facts for turn in _asked(fact, more, rng)]
    rng.shuffle(turns)
    at = 0
    while at < len(turns):
        size = rng.choice((1, 1, 1, 2, 3))
        system = rng.choice(SYSTEMS) if rng.random() < 0.1 else ""
        yield Chat(tuple(turns[at : at + size]), system, document.held_out)
        at += size


def _weight(document: Document) -> int:
    """How often a document's facts are asked about: what everybody uses, the rest, docstrings."""
    if document.docstrings:
        return 1
    return 3 if document.key.partition("/")[2] in POPULAR else 2


# --- facts ----------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """`templates` take `about` and its article; `how` is what one would ask how to do, or empty."""

    about: str
    answer: str
    templates: Sequence[str]
    times: int = 1
    article: str = ""
    how: str = ""
    use: str = ""


def _facts(document: Document) -> Iterator[Fact]:
    blocks = document.blocks
    for at, block in enumerate(blocks):
        text = blocks[at + 1].text if blocks[at + 1 : at + 2] else ""
        code = _example(blocks[at + 1 : at + 4])
        if not text or blocks[at + 1].kind != "prose" or (text.endswith(":") and not code):
            continue
        if block.kind == "entry" and block.role == "module":
            yield Fact(block.name, f"The {block.name} module: {_short(text)}", ASKED_MODULE)
        elif block.kind == "entry":
            yield _entry(block, text, code)
        elif block.kind == "term":
            yield Fact(block.text, _term(block.text, text), ASKED_TERM, 4, _article(block.text))
        elif block.kind == "heading":
            answer = _answer(blocks[at + 1 : at + 4])
            yield _section(block, answer if code else re.sub(":$", ".", answer), code)


def _section(block: Block, answer: str, code: str) -> Fact:
    module = re.match(r"([a-z_][\w.]*) - (.+)", block.text)
    if module and block.level == 1:
        name, what = module.groups()
        if name not in answer[:60]:
            answer = f"The {name} module is about {_lower(what)}. {answer}"
        return Fact(name, answer, ASKED_MODULE, 3)
    if block.text.endswith("?"):
        return Fact(block.text, answer + code, (block.text,), 1)
    return Fact(_lower(block.text), answer + code, ASKED_SECTION, 1)


def _entry(block: Block, text: str, code: str) -> Fact:
    call = block.role in ("function", "method", "decorator")
    name = f"{block.name}()" if call else block.name
    short = _short(text)
    first, _, rest = short.partition(" ")
    verb = THIRDS.get(first.lower(), first.lower())
    if verb in VERBS and call:
        says = f"{_third(verb)} {_agreeing(rest)}"
        return Fact(block.name, f"{name} {says}{code}", ASKED_WHAT, how=_goal(verb, rest),
                    use=f"Use {_called(block, name)}. It {says}{code}")  # fmt: skip
    return Fact(block.name, _described(name, block.role, short) + code, ASKED_WHAT)


def _agreeing(text: str) -> str:
    """Verbs after "and" in the third person too: "and return the" becomes "and returns the"."""
    parts = re.split(r"\b(and|or) ([a-z]+) (?=(?:the|a|an|it|its|all|true|false|none)\b)", text,
                     flags=re.IGNORECASE)  # fmt: skip
    for at in range(1, len(parts), 3):
        verb = parts[at + 1]
        parts[at] += f" {_third(verb) if verb in VERBS else verb} "
        parts[at + 1] = ""
    return "".join(parts)


def _called(block: Block, name: str) -> str:
    """The signature with the whole name, or the name alone if that is too long."""
    own, _, arguments = block.text.partition("(")
    whole = f"{block.name}({arguments}" if arguments and block.name.endswith(own) else name
    return whole if len(whole) <= SIGNATURE_CHARS_MAX else name


def _described(name: str, role: str, short: str) -> str:
    """A sentence that begins with the name, if the text's first words allow one."""
    for words, becomes in BEGINNINGS.items():
        if short.startswith(words):
            return f"{name} {becomes}{short[len(words) :]}"
    return f"{name}: {short}" if role != "class" else f"The class {name}: {short}"


def _goal(verb: str, rest: str) -> str:
    """What a reader wants who asks for this: "get the absolute value of a number"."""
    clause = re.split(r"[.,;:(]| if | which | that | whose | using ", rest)[0].strip()
    words = [("get" if verb == "return" else verb), *clause.split()]
    return " ".join(words) if 3 <= len(words) <= QUESTION_WORDS_MAX else ""


def _term(name: str, text: str) -> str:
    first = text.split(" ", 1)[0]
    if first in ("A", "An", "The", "Any", "One", "Another"):
        article = _article(name)
        subject = f"{article}{name}" if name.lower() == name else name
        return f"{subject[0].upper()}{subject[1:]} is {_lower(_short(text))}"
    return _short(text)


def _answer(blocks: Sequence[Block]) -> str:
    """The first paragraphs of a section, as far as they fit."""
    texts = []
    for block in blocks:
        fits = sum(map(len, texts)) + len(block.text) <= ANSWER_CHARS_MAX
        if block.kind not in ("prose", "item") or not fits:
            break
        texts.append(f"- {block.text}" if block.kind == "item" else block.text)
    return "\n\n".join(texts) if texts else _short(blocks[0].text)


def _example(blocks: Sequence[Block]) -> str:
    """Code that follows at once, or after one paragraph that leads to it."""
    for before, block in pairwise(blocks):
        if before.kind == "prose" and block.kind == "code" and len(block.text) <= CODE_CHARS_MAX:
            lead = "" if before.text.endswith(":") else "\n\nFor example:"
            return f"{lead}\n\n```python\n{block.text}\n```"
    return ""


def _short(text: str) -> str:
    """Whole sentences up to the limit; one at least, with a full stop."""
    sentences = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) +(?=[A-Z(])", text)
    taken = sentences[0]
    for sentence in sentences[1:4]:
        if len(taken) + len(sentence) > ANSWER_CHARS_MAX:
            break
        taken += " " + sentence
    return taken if taken.endswith((".", "!", "?", ")")) else taken.rstrip(":;, ") + "."


def _third(verb: str) -> str:
    """The third person: copies, searches, returns."""
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def _article(name: str) -> str:
    if name.lower() != name or name.endswith("s") or "." in name or "_" in name:
        return ""
    return "an " if name[0] in "aeiou" else "a "


def _lower(text: str) -> str:
    """The first letter made small, but not that of a name or an abbreviation."""
    return text[0].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


THIRDS: Final = {_third(verb): verb for verb in VERBS}


# --- questions ------------------------------------------------------------------------------------


def _asked(fact: Fact, more: int, rng: Random) -> Iterator[Turn]:
    for template in rng.sample(fact.templates, min(fact.times * more, len(fact.templates))):
        shown = f"{fact.about}()" if fact.use and rng.random() < 0.4 else fact.about
        yield Turn(template.format(shown, fact.article), fact.answer)
    if len(fact.templates) == 1:
        asked = fact.templates[0]
        yield from (Turn(t, fact.answer) for t in (asked, asked[:-1].lower(), asked.lower()))
    if fact.how:
        yield Turn(rng.choice(ASKED_HOW).format(fact.how), fact.use)


def _written(path: Path, rng: Random) -> Iterator[Chat]:
    """Chats of a file: lines of questions, the answer after `>`, two blank lines. Each question
    counts `WRITTEN_TIMES` times, some with another question of the file after it."""
    pairs = list(written(path))
    turns = [Turn(q, answer) for questions, answer in pairs for q in _spelled(questions)]
    for _ in range(WRITTEN_TIMES):
        for turn in rng.sample(turns, len(turns)):
            more = (rng.choice(turns),) if rng.random() < 0.3 else ()
            system = rng.choice(SYSTEMS) if rng.random() < 0.2 else ""
            yield Chat((turn, *more), system)


WRITTEN_TIMES: Final = 8


def written(path: Path) -> Iterator[tuple[list[str], str]]:
    """Each entry's questions and answer."""
    for part in path.read_text(encoding="utf-8").split("\n\n\n"):
        lines = part.strip().splitlines()
        at = next((i for i, line in enumerate(lines) if line.startswith("> ")), 0)
        if at:
            yield lines[:at], "\n".join(line.removeprefix(">")[1:] for line in lines[at:])


def _spelled(questions: Sequence[str]) -> Iterator[str]:
    """As written, and as one types in a hurry."""
    for question in questions:
        yield question
        yield question.lower().rstrip("?.!")
