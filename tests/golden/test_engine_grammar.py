"""Whatever a random model draws under a grammar matches it, however its text is broken up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llguidance")

from kvasir.core.request import Grammar, Sampling, Steering  # noqa: E402
from kvasir.engine.grammar import Grammars, Matcher, fault  # noqa: E402
from kvasir.engine.tiny import EOS_TOKEN_ID, VOCAB, make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import Driver, Job, close, copy_blocks  # noqa: E402

N = 400
SIZE = 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["æ", "dwarf", "a \"b\" \\ c"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}  # fmt: skip
TREE = {
    "$defs": {"leaf": {"type": "object", "properties": {"v": {"const": 7}}, "required": ["v"],
                       "additionalProperties": False}},
    "type": "array", "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    "minItems": 2, "maxItems": 4,
}  # fmt: skip


def schema(of: dict[str, Any]) -> Grammar:
    return Grammar("json", json.dumps(of))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    return TorchRunner(folder, blocks_count=400)


def job_of(grammar: Grammar, seed: int, place: int = 0, **values: Any) -> Job:
    sampling = Sampling(seed=seed, **{"temperature": 1.0, **values})
    prompt = list(f"prompt {seed} ".encode()) * 3
    blocks = list(range(place * 30, place * 30 + 30))
    return Job(f"g{seed}", prompt, N, blocks, sampling=sampling, steering=Steering((), grammar))


def text_of(job: Job) -> str:
    ids = [token for token in job.output if token != EOS_TOKEN_ID]
    return bytes(ids).decode()


def assert_whole(job: Job, of: dict[str, Any]) -> None:
    assert job.end == "stop", (job.end, len(job.output))
    jsonschema.validate(json.loads(text_of(job)), of)


@pytest.mark.parametrize(
    ("of", "temperature", "seeds"), [(PERSON, 1.0, 48), (PERSON, 2.0, 24), (TREE, 1.0, 24)]
)
def test_every_text_parses_under_its_schema(
    runner: TorchRunner, of: dict[str, Any], temperature: float, seeds: int
) -> None:
    """Twelve at a time, beside a row without a grammar."""
    drive = Driver(runner)
    for first in range(0, seeds, 12):
        jobs = [job_of(schema(of), first + i, i, temperature=temperature) for i in range(12)]
        free = Job("free", list(range(40)), 30, list(range(370, 380)), sampling=Sampling(seed=1))
        drive.run([drive.open(job) for job in (*jobs, free)], chunk=16, steps=1)
        for job in jobs:
            assert_whole(job, of)
        close(runner, [*jobs, free])


def test_the_text_is_the_same_however_it_is_made(runner: TorchRunner, folder: Path) -> None:
    """In one piece; chunked; in runs of steps; preempted; resumed; handed over after token 0."""
    whole = []
    for seed in range(3):
        drive = Driver(runner)
        one = job_of(schema(PERSON), seed)
        whole.append(drive.run([drive.open(one)], steps=1)[0])
        assert_whole(one, PERSON)
        close(runner, [one])
    assert len({tuple(text) for text in whole}) == 3
    for seed in range(3):
        for chunk, steps in ((7, 1), (512, 64)):
            one = job_of(schema(PERSON), seed)
            assert drive.run([drive.open(one)], chunk, steps) == [whole[seed]]
            close(runner, [one])

        one = drive.open(job_of(schema(PERSON), seed))
        drive.step([one])
        drive.step([one], steps=9)
        one.computed, one.held, one.fresh, one.free = 0, 0, True, list(range(100, 130))
        assert drive.run([one], chunk=7) == [whole[seed]]
        close(runner, [one])

        lost = drive.open(job_of(schema(PERSON), seed))
        drive.step([lost])
        drive.step([lost], steps=9)
        close(runner, [lost])
        again = job_of(schema(PERSON), seed, 2)
        again.attempt, again.output = 2, list(lost.output)
        assert drive.run([drive.open(again)]) == [whole[seed]]
        close(runner, [again])

        source = drive.open(job_of(schema(PERSON), seed))
        drive.step([source])
        other = Driver(TorchRunner(folder, blocks_count=40))
        held = -(-len(source.prompt) // SIZE)
        copy_blocks(runner, other.runner, ((block, block) for block in range(held)))
        target = job_of(schema(PERSON), seed)
        other.runner.adopt(target.name, 1, list(range(held)))
        target.computed, target.held, target.free = len(source.prompt), held, list(range(held, 40))
        other.open(target)
        other.runner.append(target.name, 1, source.output[0])
        target.output = list(source.output)
        assert other.run([target]) == [whole[seed]]
        close(runner, [source])


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[0-9]{3}-(ja|nein)"), r"[0-9]{3}-(ja|nein)"),
        (Grammar("lark", 'start: "é" | "no \\"q\\"" | "a\\nb"'), 'é|no "q"|a\nb'),
        (Grammar("lark", 'root ::= "x" [0-9] | "y"'), "x[0-9]|y"),
    ],
)
def test_other_forms(runner: TorchRunner, grammar: Grammar, pattern: str) -> None:
    drive = Driver(runner)
    seen = set()
    for seed in range(12):
        one = job_of(grammar, seed)
        drive.run([drive.open(one)])
        assert one.end == "stop"
        assert re.fullmatch(pattern, text_of(one))
        seen.add(text_of(one))
        close(runner, [one])
    assert len(seen) > 1


def test_a_text_may_be_cut_by_its_length(runner: TorchRunner) -> None:
    drive = Driver(runner)
    one = job_of(schema(PERSON), 1)
    one.n = 5
    drive.run([drive.open(one)])
    assert (one.end, len(one.output)) == ("length", 5)
    close(runner, [one])


def test_a_text_that_cannot_go_on_fails_and_its_neighbours_do_not(runner: TorchRunner) -> None:
    """A grammar that the gateway would have refused, and tokens that do not fit their grammar."""
    drive = Driver(runner)
    broken = job_of(Grammar("regex", "("), 1, 0)
    stranger = job_of(schema(PERSON), 2, 1)
    stranger.output = list(b"no JSON")
    beside = job_of(schema(PERSON), 3, 2)
    jobs = [drive.open(job) for job in (broken, stranger, beside)]
    drive.run(jobs)
    assert (broken.end, broken.output) == ("failed", [EOS_TOKEN_ID])
    assert (stranger.end, stranger.output[-1]) == ("failed", EOS_TOKEN_ID)
    assert_whole(beside, PERSON)
    close(runner, jobs)


def test_a_grammar_that_ends_needs_no_end_of_sequence(folder: Path) -> None:
    grammars = Grammars(folder / "tokenizer.json", VOCAB, ())
    matcher = grammars.matcher(Grammar("regex", "ab"))
    assert matcher.allowed().nonzero()[0].tolist() == [ord("a")]
    matcher.take(ord("a"))
    assert matcher.end() == ""
    matcher.take(ord("b"))
    assert matcher.end() == "stop"


def test_texts_of_one_grammar_do_not_share_a_place(folder: Path) -> None:
    grammars = Grammars(folder / "tokenizer.json", VOCAB, (EOS_TOKEN_ID,))
    first, second = (grammars.matcher(Grammar("regex", "[ab]c")) for _ in range(2))
    first.take(ord("a"))
    assert first.allowed().nonzero()[0].tolist() == [ord("c")]
    assert second.allowed().nonzero()[0].tolist() == [ord("a"), ord("b")]


def test_a_folder_without_a_tokenizer_fails_the_text_only(tmp_path: Path) -> None:
    matcher = Grammars(tmp_path / "none.json", VOCAB, ()).matcher(Grammar("regex", "a"))
    assert isinstance(matcher, Matcher)
    assert (matcher.end(), matcher.allowed().any()) == ("failed", False)


# --- checking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", [
    schema(PERSON), schema(TREE), schema({}), schema({"type": "object"}), Grammar("regex", "a*"),
    schema({"$ref": "#/$defs/n",
            "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}),
    Grammar("lark", 'root ::= "a"'),
])  # fmt: skip
def test_what_can_be_served(grammar: Grammar) -> None:
    assert fault(grammar) == ""


@pytest.mark.parametrize(("grammar", "said"), [
    (schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
    (schema({"enum": []}), "Unsatisfiable"),
    (schema({"type": "wibble"}), "Invalid type: wibble"),
    (schema({"$ref": "#"}), "no text matches it"),
    (schema({"not": {}}), "Unimplemented"),
    (Grammar("json", "[]"), "object"),
    (Grammar("json", "{"), "EOF"),
    (Grammar("regex", "("), "unclosed group"),
    (Grammar("regex", "(?=a)b"), "look-around"),
    (Grammar("regex", r"[^\s\S]"), "no text matches it"),
    (Grammar("lark", "start: ("), "Expected"),
    (Grammar("lark", 'start: start "a"'), "no text matches it"),
    (Grammar("lark", "nonsense"), ""),
])  # fmt: skip
def test_what_cannot_be_served_is_said_in_one_line(grammar: Grammar, said: str) -> None:
    found = fault(grammar)
    assert found and said in found
    assert "\n" not in found


def test_the_program_says_what_the_function_says() -> None:
    for grammar in (schema(PERSON), schema({"enum": []})):
        done = subprocess.run(
            [sys.executable, "-m", "kvasir.engine.grammar"], input=msgspec.json.encode(grammar),
            capture_output=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.decode().strip() == fault(grammar)
