"""The demo model: its folder, that it speaks English, what it learned, and how it was trained."""

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Tokenizer  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

from kvasir.cli.files import load_deployment  # noqa: E402
from kvasir.cli.models import with_folders  # noqa: E402
from kvasir.engine.loader import quiet  # noqa: E402
from kvasir.engine.tiny import END_OF_TEXT, SPECIALS, TURN_END  # noqa: E402
from kvasir.gateway.tokenize import TextModel  # noqa: E402
from tools.demo import training  # noqa: E402
from tools.demo.chats import Chat, Turn, chats_of, written  # noqa: E402
from tools.demo.corpus import TALK, chat_text, train_tokenizer  # noqa: E402
from tools.demo.pages import Block, blocks  # noqa: E402
from tools.demo.sources import HELD_OUT, Document, docstrings  # noqa: E402
from tools.demo.training import Training, batch, held_out, load_corpus, new_model  # noqa: E402

DEMO = Path(str(files("kvasir") / "models" / "demo"))
DATA = Path(__file__).parents[1] / "data" / "demo"
TEXT = (DATA / "held_out.txt").read_text("utf-8")
BYTES_MAX = 8_000_000
ANSWER_TOKENS_MAX = 120


# --- the folder -----------------------------------------------------------------------------------


def test_the_folder_is_small_and_whole() -> None:
    names = {path.name for path in DEMO.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "NOTICE", "README.md",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= BYTES_MAX
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (DEMO / "NOTICE").read_text("utf-8")
    assert "$" not in (DEMO / "README.md").read_text("utf-8")  # nothing of the template is left


def test_it_is_what_serve_runs_when_told_nothing() -> None:
    (model,) = with_folders(load_deployment("local")).models
    assert (model.name, model.path) == ("demo", str(DEMO))
    config = json.loads((DEMO / "config.json").read_bytes())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (4096, 1024)


def test_its_chats_were_trained_as_its_template_writes_them() -> None:
    text = TextModel.load(DEMO)
    said = text.render(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        add_generation_prompt=False,
    )
    assert said == chat_text(Chat((Turn("Hi", "Hello!"),)))
    assert text.eos_ids == (SPECIALS.index(TURN_END),)


# --- what it says ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    with quiet():
        return Qwen3ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def words() -> set[str]:
    """The frequent ones of Python's documentation, and those of the chats written by hand."""
    return {*(DATA / "words.txt").read_text("utf-8").split(), *_words(TALK.read_text("utf-8"))}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def greedy(model: Qwen3ForCausalLM, question: str) -> tuple[str, bool]:
    """The answer, and whether the model ended it by itself."""
    text = TextModel.load(DEMO)
    asked = text.render([{"role": "user", "content": question}], add_generation_prompt=True)
    prompt = torch.tensor([Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(asked).ids])
    with quiet(), torch.no_grad():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER_TOKENS_MAX,
            do_sample=False, pad_token_id=text.eos_ids[0],
        )  # fmt: skip
    answer = ids[0, prompt.shape[1] :].tolist()
    return text.decode(answer), answer[-1] in text.eos_ids


def is_english(text: str, words: set[str]) -> bool:
    """ASCII words of the language, and not the same few again and again."""
    said = _words(text)
    known = sum(word in words for word in said)
    varied = len(set(said)) >= 0.4 * len(said)
    return text.isascii() and len(said) >= 5 and known >= 0.92 * len(said) and varied


QUESTIONS = [
    "Hello!", "Who are you?", "What is Python?", "What is a decorator?", "How do I open a file?",
    "What does len() do?", "What is the json module?", "What is a tuple?",
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_answers_in_readable_english(
    model: Qwen3ForCausalLM, words: set[str], question: str
) -> None:
    answer, ended = greedy(model, question)
    assert ended and is_english(answer, words), answer


@pytest.mark.parametrize(
    "text",
    [
        "The class heapq.heagq(): Quotiate a rotateheapq. If you need to insert aheapq with ahead.",
        "A function is a function that is a function that is a function that is a function that is",
        "U0kvzG;q q1 zzlp#3 wqv rrtk brzx",
    ],
)
def test_noise_and_circles_are_not_taken_for_english(text: str, words: set[str]) -> None:
    assert not is_english(text, words)


def test_it_says_who_it_is(model: Qwen3ForCausalLM) -> None:
    assert "Kvasir" in greedy(model, "Who are you?")[0]


def test_held_out_text_surprises_it_less_than_frequencies_would(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer
) -> None:
    """Even the frequencies of the held-out text itself, which no model of single tokens can beat,
    are far from what it reaches; a model that knows nothing gives log(vocabulary)."""
    found = held_out(model, tokenizer, TEXT)
    counts = np.bincount(tokenizer.encode(TEXT).ids)
    share = counts[counts > 0] / counts.sum()
    frequencies = float(-(share * np.log(share)).sum())
    assert frequencies < math.log(4096)
    assert found.loss < 0.8 * frequencies
    assert found.bits < 2.0


def test_a_model_that_was_not_trained_misses_both_bounds(tokenizer: Tokenizer) -> None:
    fresh = new_model(tokenizer.get_vocab_size(), 2, seed=0).eval()
    assert held_out(fresh, tokenizer, TEXT, rows=4).loss > 0.95 * math.log(4096)


# --- how its text is made -------------------------------------------------------------------------

PAGE = """<div class="body"><section><h1><code>shutil</code> — High-level operations
<a class="headerlink">¶</a></h1><p>The <code>shutil</code> module offers operations.</p>
<table><tr><td>left out</td></tr></table>
<dl class="py function"><dt class="sig" id="shutil.copy"><span class="descclassname">shutil.</span>
<span class="descname">copy</span>(<em>src</em>, <em>dst</em>)<a class="headerlink">¶</a></dt>
<dd><p>Copy the file “src” to the
file dst and return the path.</p><div class="versionadded"><p>New in 3.3.</p></div>
<div class="highlight"><pre>copy("a",
     "b")</pre></div></dd></dl>
<ul><li><p>one</p></li></ul></section></div>"""


def test_a_page_becomes_blocks() -> None:
    assert blocks(PAGE) == [
        Block("heading", "shutil - High-level operations", level=1),
        Block("prose", "The shutil module offers operations."),
        Block("entry", "shutil. copy(src, dst)", name="shutil.copy", role="function"),
        Block("prose", 'Copy the file "src" to the file dst and return the path.'),
        Block("code", 'copy("a",\n     "b")'),
        Block("item", "one"),
    ]


def asked(*found: Block, key: str = "library/shutil") -> dict[str, str]:
    chats = chats_of([Document(key, "", list(found))], TALK, Random(0))
    return {turn.question: turn.answer for chat in chats for turn in chat.turns}


def test_an_entry_becomes_what_it_does_and_how_to() -> None:
    entry = Block("entry", "copy(src, dst)", name="shutil.copy", role="function")
    chats = asked(entry, Block("prose", "Copy the file src and return the path of the new one."))
    answers = {q: a for q, a in chats.items() if "shutil.copy" in a}
    assert set(answers.values()) == {
        "shutil.copy() copies the file src and returns the path of the new one.",
        "Use shutil.copy(src, dst). It copies the file src and returns the path of the new one.",
    }
    assert any("copy the file src and return the path" in question for question in answers)


def test_what_is_held_out_is_in_no_chat_of_the_training() -> None:
    term = Block("prose", "A queue whose smallest item is always the first one to come out of it.")
    document = Document("library/heapq", "", [Block("entry", "heapq", "heapq", "module"), term])
    found = [c for c in chats_of([document], TALK, Random(0)) if "heapq" in str(c)]
    assert found and all(chat.held_out for chat in found)
    assert "heapq" in HELD_OUT and "heapq" not in TALK.read_text("utf-8")


MODULE = '''"""Queues for threads."""

def put(queue, item):
    """Put an item into the queue.

    >>> put(queue, 1)
    """

def _hidden():
    """Not for readers."""
'''


def test_docstrings_are_read_without_running_anything(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text(MODULE + "raise SystemExit\n")
    (tmp_path / "_private.py").write_text(MODULE)
    (document,) = docstrings(tmp_path)
    assert (document.key, document.held_out) == ("library/queue", False)
    assert document.blocks == [
        Block("entry", "queue", name="queue", role="module"),
        Block("prose", "Queues for threads."),
        Block("entry", "queue.put(queue, item)", name="queue.put", role="function"),
        Block("prose", "Put an item into the queue."),
        Block("code", ">>> put(queue, 1)"),
    ]


def test_the_written_chats_are_ascii_with_questions_of_their_own() -> None:
    pairs = list(written(TALK))
    questions = [question for asked_, _ in pairs for question in asked_]
    assert len(pairs) > 70 and len(questions) == len(set(questions))
    assert all(answer.isascii() and len(answer) >= 5 for _, answer in pairs)
    assert any("```python\nprint(" in answer for _, answer in pairs)
    assert not any(answer.startswith(">") or "\n>" in answer for _, answer in pairs)


# --- how it is trained ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tokenizer, training.Corpus]:
    """A corpus of a few sentences and a model of a few thousand parameters."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 16,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    monkeypatch.setattr(training, "SHAPE", {**training.SHAPE, **shape})
    monkeypatch.setattr(training, "STEP_TOKENS", 128)
    monkeypatch.setattr(training, "ROW_TOKENS", ((32,), (32, 64)))
    monkeypatch.setattr(training, "WARM_UP_STEPS", 2)
    chat = chat_text(Chat((Turn("What is it?", "It is a list of all the words."),)))
    prose = [f"# A heading\n\nThe word {number}.{END_OF_TEXT}" for number in range(40)]
    (tmp_path / "prose.txt").write_text("".join(prose))
    (tmp_path / "chats.txt").write_text(chat * 40)
    tokenizer = train_tokenizer(tmp_path, 300)
    return tokenizer, load_corpus(tmp_path, tokenizer)


def test_rows_begin_with_chats_and_with_documents(
    small: tuple[Tokenizer, training.Corpus],
) -> None:
    tokenizer, corpus = small
    for step in range(8):
        for late in (False, True):
            rows = batch(corpus, 0, step, late=late)
            texts = [tokenizer.decode(r.tolist(), skip_special_tokens=False) for r in rows]
            assert rows.numel() == 128 and rows.shape[1] in ((32, 64) if late else (32,))
            assert all(text.startswith(("<|im_start|>user\n", "# A heading")) for text in texts)
    again, other = batch(corpus, 0, 5, late=False), batch(corpus, 1, 5, late=False)
    assert torch.equal(batch(corpus, 0, 5, late=False), again) and not torch.equal(again, other)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    small: tuple[Tokenizer, training.Corpus], tmp_path: Path
) -> None:
    _, corpus = small

    def begun() -> Training:
        return Training(new_model(300, 2, seed=0).train(), steps=6, minutes=0)

    whole, first, second = begun(), begun(), begun()
    losses = [whole.take(corpus, 0) for _ in range(6)]
    assert losses[-1] < losses[0] and whole.progress == 1
    for _ in range(3):
        first.take(corpus, 0)
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    assert list(second.run(corpus, 0, tmp_path / "checkpoint.pt")) == []
    assert second.step == 6
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
