"""Text to tokens and back: never half a character, never half a stop string."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvasir.core.errors import ModelError, RequestError
from kvasir.gateway.template import CHATML, ChatTemplate
from kvasir.gateway.tokenize import (
    CONTEXT_TOKENS,
    INLINE_CHARS_MAX,
    WINDOW_TOKENS_MAX,
    Detokenizer,
    StopMatcher,
    TextModel,
)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """One token a byte, and three special ones."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def spaced() -> Tokenizer:
    """Llama's way: a word carries its space as a mark, unknown bytes fall back to <0x..>."""
    words = ["<unk>", "<s>", "</s>", "▁Hello", "▁world", "▁", "!"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


BYTES = byte_level()
SPACED = spaced()


def parts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detok = Detokenizer(tokenizer)
    return [*(detok.push(i) for i in ids), detok.finish()]


def folder(tmp_path: Path, **files: Any) -> Path:
    BYTES.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        path = tmp_path / (f"{name}.jinja" if isinstance(content, str) else f"{name}.json")
        path.write_text(text, encoding="utf-8")
    return tmp_path


# --- detokenizer ------------------------------------------------------------------------------


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    assume(not any(special in text for special in SPECIALS))  # they are tokens, and not shown
    ids = BYTES.encode(text).ids
    assert "".join(parts_of(BYTES, ids)) == text


@given(st.lists(st.integers(0, 258), max_size=200))
def test_pieces_of_any_bytes_join_to_what_decoding_at_once_gives(ids: list[int]) -> None:
    assert "".join(parts_of(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.text(min_size=1))
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts_of(BYTES, BYTES.encode(text).ids))


def test_a_character_comes_with_its_last_byte() -> None:
    assert parts_of(BYTES, BYTES.encode("a€🙂").ids) == [
        "a", "", "", "€", "", "", "", "🙂", "",
    ]  # fmt: skip


def test_broken_bytes_are_shown_at_once_except_what_may_still_become_a_character() -> None:
    ids = [BYTES.token_to_id(char) for char in "ÿ" * 5] + BYTES.encode("ok").ids  # 0xff
    assert parts_of(BYTES, ids) == ["", "", "", "\ufffd", "\ufffd", "\ufffd\ufffd\ufffdo", "k", ""]


def test_endless_broken_bytes_keep_the_window_small() -> None:
    detok = Detokenizer(BYTES)
    broken = BYTES.token_to_id("ÿ")
    given_out = "".join(detok.push(broken) for _ in range(1000)) + detok.finish()
    assert given_out == "\ufffd" * 1000
    assert len(detok._ids) <= WINDOW_TOKENS_MAX + CONTEXT_TOKENS


def test_special_tokens_have_no_text_and_hide_none() -> None:
    end = BYTES.token_to_id("<|im_end|>")
    a, euro = BYTES.encode("a").ids, BYTES.encode("€").ids
    assert "".join(parts_of(BYTES, [end, *a, end, end, *euro, end])) == "a€"


def test_spaces_between_words_survive_a_decoder_that_strips_the_first() -> None:
    hello, world, end = (SPACED.token_to_id(t) for t in ("▁Hello", "▁world", "</s>"))
    assert parts_of(SPACED, [hello, world, end, world]) == ["Hello", " world", "", " world", ""]


def test_byte_fallback_gives_whole_characters() -> None:
    ids = [SPACED.token_to_id(f"<0x{b:02X}>") for b in "你".encode()]
    assert parts_of(SPACED, [SPACED.token_to_id("▁Hello"), *ids]) == ["Hello", "", "", "你", ""]


# --- stop strings -----------------------------------------------------------------------------


def matched(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    return [*(matcher.push(piece) for piece in pieces), matcher.finish()], matcher.matched


@pytest.mark.parametrize(
    ("stops", "pieces", "out", "hit"),
    [
        (["\n"], ["a", "b", "\n", "c"], ["a", "b", "", "", ""], True),
        (["END"], ["x", "E", "N", "D", "y"], ["x", "", "", "", "", ""], True),
        (["END"], ["x", "E", "N", "x"], ["x", "", "", "ENx", ""], False),
        (["END"], ["x", "EN"], ["x", "", "EN"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (["b", "abc"], ["x", "ab", "c"], ["x", "a", "", ""], True),
        (["stop"], ["do not stop here"], ["do not ", ""], True),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], out: list[str], hit: bool) -> None:
    assert matched(stops, pieces) == (out, hit)


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1), min_size=1))
def test_a_stop_string_cuts_where_it_first_stands_however_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    out, hit = matched(stops, pieces)
    shown = "".join(out)
    assert hit == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not hit:
        assert shown == text


# --- folders ----------------------------------------------------------------------------------


def test_chatml_where_the_folder_has_no_template(tmp_path: Path) -> None:
    text = TextModel.load(folder(tmp_path))
    shown = text.render([{"role": "user", "content": "hi"}])
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert asyncio.run(text.encode(shown, special=False))[0] == BYTES.token_to_id("<|im_start|>")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": "A{{ messages[0].content }}"}},
        {"chat_template": "A{{ messages[0].content }}"},
        {"chat_template": {"chat_template": "A{{ messages[0].content }}"}},
        {
            "tokenizer_config": {
                "chat_template": [
                    {"name": "tool_use", "template": "B"},
                    {"name": "default", "template": "A{{ messages[0].content }}"},
                ]
            }
        },
    ],
    ids=["config", "jinja", "json", "named"],
)
def test_where_a_template_may_stand(files: dict[str, Any], tmp_path: Path) -> None:
    text = TextModel.load(folder(tmp_path, **files))
    assert text.render([{"role": "user", "content": "x"}]) == "Ax"


def test_end_of_sequence_ids_come_from_both_files(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|im_end|>"}}
    made = folder(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": [7, 256]})
    assert TextModel.load(made).eos_ids == (7, 256, BYTES.token_to_id("<|im_end|>"))


def test_end_of_sequence_id_from_the_model_config_alone(tmp_path: Path) -> None:
    assert TextModel.load(folder(tmp_path, config={"eos_token_id": 3})).eos_ids == (3,)


def test_a_folder_without_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as caught:
        TextModel.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_broken_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="not readable"):
        TextModel.load(tmp_path)


def test_a_broken_config_is_a_model_error(tmp_path: Path) -> None:
    made = folder(tmp_path)
    (made / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="no JSON"):
        TextModel.load(made)


def test_long_text_is_encoded_in_a_thread(tmp_path: Path) -> None:
    text = TextModel.load(folder(tmp_path))
    long = "word " * INLINE_CHARS_MAX

    async def turns_meanwhile() -> tuple[int, int]:
        turns, task = 0, asyncio.create_task(text.encode(long, special=False))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return len(task.result()), turns

    tokens, turns = asyncio.run(turns_meanwhile())
    assert tokens == len(long)
    assert turns > 10


# --- templates --------------------------------------------------------------------------------


def render(source: str, **extra: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user"}], **extra)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ bos_token }}", "<s>"),
        ("{% if tools is none %}no{% endif %}", "no"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{{ thinking }}", "off"),
    ],
)
def test_the_dialect_of_templates(source: str, shown: str) -> None:
    assert render(source, thinking="off") == shown


def test_templates_know_the_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 'x' }}",
        "{{ messages[5].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        render(source)


def test_a_template_that_is_no_jinja_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no Jinja"):
        ChatTemplate("{% if %}", {}, where="folder")


def test_chatml_asks_for_an_answer_only_when_told_to() -> None:
    messages = [{"role": "user", "content": "x"}]
    shown = ChatTemplate(CHATML, {}).render(messages, add_generation_prompt=False)
    assert shown == "<|im_start|>user\nx<|im_end|>\n"
