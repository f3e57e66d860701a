"""Whether a grammar can be served, found out in a process that can be killed. Knows limits and what
was found before; no tokenizer, no body.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from typing import Final

import msgspec

from kvasir.core.errors import Overloaded
from kvasir.core.request import Grammar

GRAMMAR_BYTES_MAX: Final = 128 << 10
CHECK_S_MAX: Final = 5.0
AT_ONCE_MAX: Final = 2
WAITING_MAX: Final = 32
KNOWN_MAX: Final = 1024


class GrammarChecker:
    """Remembers what it found. At most AT_ONCE_MAX processes, CHECK_S_MAX seconds each."""

    def __init__(self) -> None:
        self._known: OrderedDict[Grammar, str] = OrderedDict()
        self._slots = asyncio.Semaphore(AT_ONCE_MAX)
        self._waiting = 0

    async def fault(self, grammar: Grammar) -> str:
        """What is wrong with it, in a line; empty: nothing. Raises Overloaded."""
        found = self._known.get(grammar)
        if found is not None:
            return found
        if len(grammar.text.encode()) > GRAMMAR_BYTES_MAX:
            return f"it is over the limit of {GRAMMAR_BYTES_MAX >> 10} KiB"
        if self._waiting >= WAITING_MAX:
            raise Overloaded("too many new grammars at once", next_step="try again in some seconds")
        self._waiting += 1
        try:
            async with self._slots:
                found = await asyncio.to_thread(_checked, grammar, CHECK_S_MAX)
        finally:
            self._waiting -= 1
        self._known[grammar] = found
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return found


def _checked(grammar: Grammar, limit_s: float) -> str:
    if find_spec("llguidance") is None:
        return "structured output is not installed: pip install 'kvasir-llm[engine]'"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvasir.engine.grammar"], input=msgspec.json.encode(grammar),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it takes longer than {limit_s:g} s to compile"
    if done.returncode != 0:
        return "it takes too much memory to compile"
    return done.stdout.decode(errors="replace").strip()
