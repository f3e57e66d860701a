"""Text to tokens and back, for one model folder. Knows the `tokenizers` library; no HTTP, no desk.

`tokenizer.json` is the tokenizer; chat template and end-of-sequence ids come from the files beside
it. Stop strings are matched here too, on text, because a token's edge is no place for them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from kvasir.core.errors import ModelError
from kvasir.core.request import Grammar
from kvasir.gateway.structured import GrammarChecker
from kvasir.gateway.template import CHATML, ChatTemplate, template_source

INLINE_CHARS_MAX: Final = 4096  # about 2 ms of encoding; longer text goes to a thread
BROKEN: Final = "\ufffd"
BROKEN_TAIL_MAX: Final = 3
WINDOW_TOKENS_MAX: Final = 32
CONTEXT_TOKENS: Final = 8
FALLBACK: Final = re.compile("<0x[0-9A-F]{2}>")


class TextModel:
    """Tokenizer, chat template and end-of-sequence ids of one model. Immutable after loading."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, eos_ids: Iterable[int] = ()
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._eos_ids = tuple(sorted(set(eos_ids)))
        self._vocab = tokenizer.get_vocab_size(with_added_tokens=True)
        self._bytes = TokenBytes(tokenizer)
        self._checker = GrammarChecker()

    @classmethod
    def load(cls, folder: str | Path) -> TextModel:
        """Read a HuggingFace folder. Raises ModelError naming the file that is missing or wrong."""
        folder = Path(folder)
        tokenizer = _load_tokenizer(folder / "tokenizer.json")
        config = _load_json(folder / "tokenizer_config.json")
        names = dict(_named_tokens(config))
        source = template_source(folder, config) or CHATML
        template = ChatTemplate(source, names, where=str(folder))
        return cls(tokenizer, template, _eos_ids(folder, names, tokenizer))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def vocab(self) -> int:
        return self._vocab

    async def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Token ids of `text`; long text is encoded in a thread, so no loop waits for it."""
        if len(text) <= INLINE_CHARS_MAX:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        return await asyncio.to_thread(self._encode_apart, text, special)

    def _encode_apart(self, text: str, special: bool) -> tuple[int, ...]:
        # Only the batch call lets go of the interpreter's lock while it works.
        return tuple(self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    def render(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        """The chat template's text, to be encoded with `special=False`. Raises RequestError."""
        return self._template.render(messages, **extra)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` at once; special tokens have none."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        return Detokenizer(self._tokenizer, skip_special=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; of special tokens their name. Empty for an unknown one."""
        return self._bytes.of(token)

    async def fault(self, grammar: Grammar) -> str:
        """What is wrong with a grammar, in a line; empty: it can be served. Raises Overloaded."""
        return await self._checker.fault(grammar)


class Detokenizer:
    """Text of a growing token list, never half a character.

        ids:   [ context .. read | read .. end ]        text = decode(ids)
        text:  [ shown ................ | held ]        held: U+FFFD at the end, at most three

    New tokens are decoded with the ones before them: some decoders drop the space before their
    first token. A character has at most four bytes, so at most three trailing U+FFFD may still
    become one; those are held back, any earlier one is really in the text.
    """

    __slots__ = ("_decode", "_ids", "_read", "_shown")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._read = 0
        self._shown = 0  # characters

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is still in parts."""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = _broken_tail(text)
        end = len(text) - held
        new = text[self._shown : end]
        if held:
            self._shown = max(self._shown, end)
            if len(self._ids) > WINDOW_TOKENS_MAX:
                self._forget(len(self._ids) - CONTEXT_TOKENS, held)
        elif new:
            self._forget(self._read, 0)
        else:
            del self._ids[self._read :]  # invisible; as context it would hide the real one
        return new

    def finish(self) -> str:
        """What is still held back, whatever it is."""
        text = self._decode(self._ids)
        new, self._shown = text[self._shown :], len(text)
        return new

    def _forget(self, count: int, held: int) -> None:
        """Drop the first `count` tokens; of what the others say, all but `held` is shown."""
        del self._ids[:count]
        self._read = len(self._ids)
        self._shown = max(0, len(self._decode(self._ids)) - held)


def _broken_tail(text: str) -> int:
    if not text.endswith(BROKEN):
        return 0
    return min(len(text) - len(text.rstrip(BROKEN)), BROKEN_TAIL_MAX)


class TokenBytes:
    """The bytes behind single tokens, which a decoder hides. Vocabularies write them in one of two
    ways: a character for each byte (GPT-2), or text with `▁` for a space and `<0x..>` for bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: one.content for i, one in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        kind = decoder.__getstate__() if decoder is not None else b""
        self._byte_of = _bytes_of_characters() if b'"ByteLevel"' in kind else None

    def of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[char] for char in name if char in self._byte_of)
        if FALLBACK.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        return name.replace("▁", " ").encode()


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the rest for U+0100 and following."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b if b in plain else 0x100 + others.index(b)): b for b in range(256)}


class StopMatcher:
    """Cuts text at the first of several stop strings, holding back what may become one. With
    `include` the text keeps the stop string."""

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert stops and all(stops), "stop strings are not empty"
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """What of the text so far is safe to show. Nothing after a match."""
        if self.matched:
            return ""
        text = self._held + text
        ends = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.matched, self._held = True, ""
            at, stop = min(ends)  # of two that begin there, the shorter was complete first
            return text[: at + len(stop)] if self._include else text[:at]
        keep = len(text) - max(overlap(text, stop) for stop in self._stops)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The held text: it became no stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


# --- reading a folder -----------------------------------------------------------------------------


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(
            "the model folder has no tokenizer.json",
            where=str(path.parent),
            next_step="save the tokenizer in the fast format: tokenizer.save_pretrained(folder)",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"tokenizer.json is not readable: {error}", where=str(path)) from error


def _load_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path.name} is no JSON: {error}", where=str(path)) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is no JSON object", where=str(path))
    return found


def _named_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`bos_token`, `eos_token`, ...: given as text, or as an object with its `content`."""
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def _eos_ids(folder: Path, names: Mapping[str, str], tokenizer: Tokenizer) -> set[int]:
    """What ends an answer: generation_config.json and the tokenizer's eos, else config.json."""
    ids = set(_ids_in(_load_json(folder / "generation_config.json")))
    named = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else None
    if named is not None:
        ids.add(named)
    return ids or set(_ids_in(_load_json(folder / "config.json")))


def _ids_in(config: Mapping[str, Any]) -> list[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return [i for i in ids if isinstance(i, int)]
