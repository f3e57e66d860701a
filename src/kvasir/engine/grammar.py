"""Grammars compiled for one tokenizer, and what may follow under them. Knows llguidance; must not
know logits, rows or HTTP.

As a program (`python -m kvasir.engine.grammar`) it checks one grammar: JSON of a `Grammar` on
stdin, one line that says what is wrong with it on stdout. In a process of its own, because some
grammars take unbounded time and memory to compile, and native code can only be killed.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kvasir.core.messages import TextEnd
from kvasir.core.request import Grammar

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

COMPILED_MAX: Final = 64  # grammars kept compiled, the least lately used dropped first
MEMORY_BYTES_MAX: Final = 2 << 30  # of a checking process, address space
SAID_CHARS_MAX: Final = 200
# Models separate what they like; without a bound some separate for ever.
JSON_OPTIONS: Final = {"whitespace_pattern": r"[ \n\t]{0,32}"}


class Matcher:
    """Follows one text through a grammar. Never raises: a text that cannot go on has failed, and so
    has every text of a grammar that could not be compiled (`inner` None)."""

    def __init__(self, inner: LLMatcher | None, vocab: int) -> None:
        self._inner, self._vocab = inner, vocab

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [vocab]; none when nothing can."""
        import numpy as np

        bits = self._inner.compute_bitmask() if self._inner is not None else b""
        if self.end() == "failed":  # the mask would let a text end that is not complete
            return np.zeros(self._vocab, dtype=np.bool_)
        packed = np.frombuffer(bits, dtype=np.uint8)
        return np.unpackbits(packed, count=self._vocab, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        if self._inner is not None:
            self._inner.consume_token(token)

    def end(self) -> TextEnd:
        """`stop`: complete, and nothing may follow. `failed`: incomplete, and nothing can."""
        if self._inner is None or self._inner.is_error():
            return "failed"
        return "stop" if self._inner.is_stopped() else ""


class Grammars:
    """Compiles on a thread of its own; other methods are for one thread. `tokenizer`: a
    `tokenizer.json`; `vocab`: width of the masks. Without `eos_token_ids` only the grammar's own
    end ends a text."""

    def __init__(self, tokenizer: Path, vocab: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab = vocab
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer = self._thread.submit(_tokenizer, tokenizer, vocab, tuple(eos_token_ids))
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()

    def prepare(self, grammar: Grammar) -> Future[LLMatcher]:
        """Begin to compile, so that a later `matcher` need not wait."""
        found = self._compiled.get(grammar)
        if found is None:
            found = self._thread.submit(lambda: compiled(grammar, self._tokenizer.result()))
            self._compiled[grammar] = found
            if len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return found

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of a text. Waits for the compiler."""
        try:
            inner = self.prepare(grammar).result().deep_copy()
        except (ImportError, OSError, RuntimeError, ValueError):  # grammar, tokenizer, library
            inner = None
        return Matcher(inner, self._vocab)


def compiled(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher, in its error state when the grammar is wrong."""
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, _llguidance(grammar), log_level=0)


def _llguidance(grammar: Grammar) -> str:
    """llguidance's own form. Raises ValueError for what has no such form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    found: str
    if grammar.kind == "json":
        found = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
    elif grammar.kind == "regex":
        found = LLMatcher.grammar_from_regex(grammar.text)
    else:
        try:
            lark = any_to_lark(grammar.text)
        except Exception as error:  # the converter raises plain Exception
            raise ValueError(str(error)) from error
        found = LLMatcher.grammar_from_lark(lark)
    return found


def _tokenizer(path: Path, vocab: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer

    text = path.read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab, eos_token=list(eos_token_ids) or None)


# --- checking -------------------------------------------------------------------------------------


class _Bytes:
    """A vocabulary of single bytes, and an end: enough to see what a grammar is."""

    tokens: Final = (*(bytes([byte]) for byte in range(256)), b"</s>")
    eos_token_id: Final = 256
    bos_token_id: Final = None
    special_token_ids: Final = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def fault(grammar: Grammar) -> str:
    """What is wrong with a grammar, in one line; empty if nothing is. Unbounded time and memory."""
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        inner = compiled(grammar, LLTokenizer(TokenizerWrapper(_Bytes())))
    except ValueError as error:
        return _line(str(error))
    matcher = Matcher(inner, len(_Bytes.tokens))
    if inner.is_error():
        return _line(inner.get_error())
    return "" if matcher.allowed().any() else "no text matches it"


def _line(said: str) -> str:
    """One line of what the compiler says: the one that names the error, else the first."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = (line for line in lines if line.startswith("error:"))
    return next(named, lines[0] if lines else "it is not valid")[:SAID_CHARS_MAX]


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    grammar = msgspec.json.decode(sys.stdin.buffer.read(), type=Grammar)
    print(fault(grammar))


if __name__ == "__main__":
    main()
