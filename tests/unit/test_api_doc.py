"""The examples of docs/api.md: what it says is served is accepted, what is refused is refused."""

import asyncio
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from kvasir.core.specs.tenants import CachesSpec
from kvasir.gateway.caches import Caching
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.openai import Caller, Plan, plan_chat, plan_completion
from kvasir.gateway.schema import BadField, decode_cache, decode_chat, decode_completion

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"^```json (?P<kind>served|refused) (?P<path>\S+)\n(?P<body>.*?)^```\n"
    r"(?:\n```text\n(?P<said>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
    kind: str
    path: str
    body: str
    said: str | None


EXAMPLES = [Example(*found.groups()) for found in EXAMPLE.finditer(PAGE)]


def served(example: Example) -> bool:
    raw, desk = example.body.encode(), FakeDesk(FakeText())
    if example.path == "/v1/caches":
        caching, card = Caching(desk, CachesSpec(), time.time), desk.models()[0]
        body = decode_cache(raw)
        made = asyncio.run(caching.create(body, FakeText(), card, "default", "r"))
        return bool(made["status"] == "ready")
    return bool(planned(example, raw, desk).asks)


def planned(example: Example, raw: bytes, desk: FakeDesk) -> Plan:
    if example.path == "/v1/chat/completions":
        return asyncio.run(plan_chat(decode_chat(raw), desk, Caller("r"), "r"))
    assert example.path == "/v1/completions"
    return asyncio.run(plan_completion(decode_completion(raw), desk, Caller("r"), "r"))


def test_each_json_block_is_an_example() -> None:
    assert len(EXAMPLES) == PAGE.count("\n```json") >= 5
    assert {example.kind for example in EXAMPLES} == {"served", "refused"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: f"{one.kind}:{one.body[:40]}")
def test_an_example_does_what_the_page_says(example: Example) -> None:
    if example.kind == "served":
        assert served(example)
        return
    with pytest.raises(BadField) as caught:
        served(example)
    assert example.said is not None and str(caught.value) == example.said.rstrip("\n")


def test_the_page_names_every_field_that_is_refused() -> None:
    from kvasir.gateway.schema import NEUTRAL

    part = PAGE.split("## What is refused")[1].split("##")[0]
    assert [name for name in NEUTRAL if f"`{name}`" not in part] == []
