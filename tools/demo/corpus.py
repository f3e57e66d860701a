"""Text files of a corpus, and the tokenizer made of them. Knows files; must not know models.

    prose.txt, prose.held.txt    documents, parted by END_OF_TEXT
    chats.txt, chats.held.txt    chats as the chat template writes them, one after the other
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from kvasir.engine.tiny import END_OF_TEXT, SPECIALS, TURN_END, TURN_START

from .chats import Chat, chats_of
from .pages import Block
from .sources import Document, documents

TALK: Final = Path(__file__).with_name("talk.txt")
TEXT_CHARS_MIN: Final = 200  # of a document; shorter ones teach nothing


def write_corpus(folder: Path, scratch: Path, seed: int, *, offline: bool) -> None:
    """All four files; the same sources and seed give the same bytes."""
    found = documents(scratch, offline=offline)
    chats = chats_of(found, TALK, Random(seed))
    kept = list(_once(found))
    for name, held in (("", False), (".held", True)):
        prose = [text for d, text in kept if d.held_out is held and len(text) >= TEXT_CHARS_MIN]
        _write(folder / f"prose{name}.txt", END_OF_TEXT.join(prose) + END_OF_TEXT)
        said = [chat_text(chat) for chat in chats if chat.held_out is held]
        _write(folder / f"chats{name}.txt", "".join(said))


def chat_text(chat: Chat) -> str:
    """As the chat template renders it, each turn with its end. See kvasir.engine.tiny."""
    said = [("system", chat.system)] if chat.system else []
    for turn in chat.turns:
        said += [("user", turn.question), ("assistant", turn.answer)]
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in said)


def train_tokenizer(folder: Path, vocab: int) -> Tokenizer:
    """Byte-level BPE on what is trained on. Special tokens have the first ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), show_progress=False, min_frequency=2,
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )  # fmt: skip
    texts = (path.read_text("utf-8") for path in (folder / "prose.txt", folder / "chats.txt"))
    pieces = (piece for text in texts for piece in text.split(TURN_START))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _once(found: Iterable[Document]) -> Iterator[tuple[Document, str]]:
    """Documents as text, each paragraph where it first stands. Those held out come last, so what
    they share with others is not held out."""
    seen: set[str] = set()
    for document in sorted(found, key=lambda d: d.held_out):
        yield document, _text(document, seen)


def _text(document: Document, seen: set[str]) -> str:
    parts = [] if document.blocks[:1] and document.blocks[0].level else [f"# {document.title}"]
    for block in document.blocks:
        if block.kind in ("prose", "item", "code") and len(block.text) > 40:
            if block.text in seen:
                continue
            seen.add(block.text)
        parts.append(_shown(block))
    return "\n\n".join(parts).strip()


def _shown(block: Block) -> str:
    match block.kind:
        case "heading":
            return "#" * block.level + " " + block.text
        case "code":
            return f"```python\n{block.text}\n```"
        case "item":
            return f"- {block.text}"
        case "entry" | "term":
            return f"{block.text}:"
        case _:
            return block.text
