"""Adapters over HTTP and over workers: named as models, loaded and unloaded while it serves.

The fake engine's tokens follow from the adapter's content too, so every answer can be told.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import kvasir as package  # noqa: E402
from kvasir.core.errors import LINES_MAX  # noqa: E402
from kvasir.core.request import Adapter  # noqa: E402
from kvasir.engine.fake import fake_tokens  # noqa: E402
from kvasir.engine.peft import adapter_of  # noqa: E402
from tests.adapters import write_adapter  # noqa: E402
from tests.live.cluster import Answer, cluster, deployment_of, run  # noqa: E402
from tests.live.served import (  # noqa: E402
    Server,
    Stream,
    deployment,
    eventually,
    good,
    kvasir,
    prompt_of,
    short,
    written,
)

pytestmark = pytest.mark.timeout(120)

TINY = Path(package.__file__).parent / "models" / "tiny"
MOST = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that adapters may be loaded from, and one beside it that they may not."""
    root = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(("norse", "saga", "edda")):
        write_adapter(root / "in" / name, TINY, seed=i)
    write_adapter(root / "out" / "loki", TINY, seed=9)
    return root / "in"


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = deployment()
    config["models"][0] |= {
        "adapters": {"norse": str(home / "norse")}, "adapters_max": MOST,
        "adapters_folder": str(home), "allow_runtime_adapters": True,
    }  # fmt: skip
    with Server(written(tmp_path_factory.mktemp("serve"), config)) as server:
        yield server
        server.at_rest()
        assert server.interrupt() == 0
        assert server.stderr == ""


@pytest.fixture(autouse=True)
def goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Afterwards the server answers a usual request, and has its first adapter alone."""
    yield
    if "server" in request.fixturenames:
        served: Server = request.getfixturevalue("server")
        good(served)
        for name in set(listed(served)) - {"tiny", "norse"}:
            unload(served, name)


def digest_of(folder: Path) -> str:
    return adapter_of("x", folder, str(TINY)).digest


def load(server: Server, name: str, path: Any, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return server.http.post("/v1/load_lora_adapter", json=body)


def unload(server: Server, name: str) -> httpx.Response:
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def listed(server: Server) -> dict[str, str | None]:
    """Names to their parents."""
    cards = server.http.get("/v1/models").raise_for_status().json()["data"]
    return {card["id"]: card["parent"] for card in cards}


def complete(server: Server, model: str, prompt: list[int], count: int = 4) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": count, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    return server.http.post("/v1/completions", json=body)


def message_of(response: httpx.Response) -> str:
    message: str = response.json()["error"]["message"]
    assert len(message.splitlines()) <= LINES_MAX
    return message


# --- names ----------------------------------------------------------------------------------------


def test_an_adapter_of_the_deployment_is_a_model(server: Server, home: Path) -> None:
    assert listed(server) == {"tiny": None, "norse": "tiny"}
    Stream(server, prompt_of(40, 1), 12, "norse", digest_of(home / "norse")).check()
    Stream(server, prompt_of(40, 1), 12).check()


def test_the_answer_names_what_was_asked_for(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        user = [{"role": "user", "content": "Hi"}]
        for model in ("norse", "tiny"):
            answer = client.chat.completions.create(model=model, messages=user, max_tokens=2)
            assert answer.model == model
            streamed = client.chat.completions.create(
                model=model, messages=user, max_tokens=2, stream=True
            )
            assert {chunk.model for chunk in streamed} == {model}
        assert client.models.retrieve("norse").id == "norse"


def test_an_unknown_adapter_is_not_found_and_the_nearest_named(server: Server) -> None:
    response = complete(server, "nose", [1, 2, 3])
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "nearest: norse" in message_of(response)


# --- while it serves ------------------------------------------------------------------------------


def test_loaded_used_by_several_at_once_and_unloaded(server: Server, home: Path) -> None:
    response = load(server, "saga", "saga")
    assert (response.status_code, response.text) == (
        200, "Success: LoRA adapter 'saga' added successfully."
    )  # fmt: skip
    assert load(server, "edda", home / "edda").status_code == 200
    assert listed(server) == {"tiny": None, "norse": "tiny", "saga": "tiny", "edda": "tiny"}
    streams = [
        Stream(server, prompt_of(30 + i, 2), 16, name, digest_of(home / name) if name else "")
        if name else Stream(server, prompt_of(30 + i, 2), 16)
        for i, name in enumerate(["saga", "norse", "", "edda", "saga", "norse"])
    ]  # fmt: skip
    for stream in streams:
        stream.check()
    assert unload(server, "saga").text == "Success: LoRA adapter 'saga' removed successfully."
    assert "saga" not in listed(server)
    again = unload(server, "saga")
    assert again.status_code == 404 and "no adapter 'saga'" in message_of(again)


def test_unloaded_while_in_use_it_ends_what_it_began(server: Server, home: Path) -> None:
    load(server, "saga", "saga").raise_for_status()
    stream = Stream(server, prompt_of(20, 3), 150, "saga", digest_of(home / "saga"))
    eventually(lambda: len(stream.tokens) > 5)
    unload(server, "saga").raise_for_status()
    assert stream.running
    assert complete(server, "saga", [1, 2]).status_code == 404
    stream.check()


def test_a_worker_that_dies_reads_its_adapters_again(server: Server, home: Path) -> None:
    load(server, "saga", "saga").raise_for_status()
    stream = Stream(server, prompt_of(20, 4), 120, "saga", digest_of(home / "saga"))
    eventually(lambda: len(stream.tokens) > 5)
    unload(server, "saga").raise_for_status()  # which is no reason to lose it
    server.kill("decode-0", "decode-1")  # whoever serves it; the prefill worker goes on with it
    assert stream.check().attempts > 1
    server.at_rest()
    eventually(server.healthy)
    load(server, "saga", "saga").raise_for_status()
    Stream(server, prompt_of(20, 6), 12, "saga", digest_of(home / "saga")).check()
    unload(server, "saga").raise_for_status()


def test_other_files_under_the_same_name_share_no_cached_block(server: Server, home: Path) -> None:
    prompt = prompt_of(64, 5)

    def cached(model: str) -> int:
        usage = complete(server, model, prompt).raise_for_status().json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    load(server, "new", "saga").raise_for_status()
    assert [cached("new"), cached("new"), cached("tiny"), cached("norse")] == [0, 48, 0, 0]
    again = load(server, "new", "edda")
    assert again.status_code == 400 and "load_inplace" in message_of(again)
    load(server, "new", "edda", load_inplace=True).raise_for_status()
    assert [cached("new"), cached("new")] == [0, 48]
    Stream(server, prompt, 8, "new", digest_of(home / "edda")).check()
    load(server, "old", "saga").raise_for_status()  # the same files, under another name
    assert cached("old") == 48


def test_files_that_changed_since_are_one_clear_error(server: Server, home: Path) -> None:
    folder = write_adapter(home / "changing", TINY, seed=76)  # no worker holds it yet
    load(server, "changing", "changing").raise_for_status()
    write_adapter(folder, TINY, seed=77)
    response = complete(server, "changing", [5] * 20)
    assert response.status_code == 503
    said = message_of(response)
    assert said.endswith("the adapter 'changing' cannot be loaded: "
                         "the adapter's files have changed since it was loaded")  # fmt: skip
    assert "attempts" not in said
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in message_of(complete(server, "changing", [5] * 20))
    write_adapter(folder, TINY, seed=78)
    load(server, "changing", "changing", load_inplace=True).raise_for_status()
    Stream(server, [5] * 20, 6, "changing", digest_of(folder)).check()
    shutil.rmtree(folder)


# --- what is refused ------------------------------------------------------------------------------


def outside(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": "../out/loki"}, "not inside the folder"


def outside_by_name(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": str(home.parent / "out" / "loki")}, "not inside the folder"


def outside_by_link(home: Path) -> tuple[dict[str, Any], str]:
    link = home / "link"
    if not link.is_symlink():
        link.symlink_to(home.parent / "out" / "loki")
    return {"lora_path": "link"}, "not inside the folder"


def weights_outside_by_link(home: Path) -> tuple[dict[str, Any], str]:
    folder = home / "half"
    if not folder.exists():
        shutil.copytree(home / "saga", folder)
        (folder / "adapter_model.safetensors").unlink()
        target = home.parent / "out" / "loki" / "adapter_model.safetensors"
        (folder / "adapter_model.safetensors").symlink_to(target)
    return {"lora_path": "half"}, "not inside the folder"


def no_path(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": "a\0b"}, "not inside the folder"


def long_path(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": "a" * 5000}, "lora_path is over 1024 characters"


def long_name(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": "a" * 1000}, "the adapter's folder does not exist"


def missing(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": "nowhere"}, "the adapter's folder does not exist"


def another_base(home: Path) -> tuple[dict[str, Any], str]:
    from kvasir.engine.tiny import make_tiny

    if not (home / "wide").exists():
        base = make_tiny(home.parent / "wide-base", hidden=128)
        write_adapter(home / "wide", base, base_model_name_or_path="org/wide")
    return {"lora_path": "wide"}, "for another base"


def name_of_the_base(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_name": "tiny"}, "the name of another model"


def no_name(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_name": ""}, "lora_name must be"


def other_type(home: Path) -> tuple[dict[str, Any], str]:
    return {"lora_path": 7}, "lora_path"


def unknown_base(home: Path) -> tuple[dict[str, Any], str]:
    return {"base_model_name": "tyni"}, "nearest: tiny"


@pytest.mark.parametrize(
    "case",
    [outside, outside_by_name, outside_by_link, weights_outside_by_link, no_path, long_path,
     long_name, missing, another_base, name_of_the_base, no_name, other_type, unknown_base],
    ids=lambda case: case.__name__,
)  # fmt: skip
def test_what_cannot_be_loaded(
    server: Server, home: Path, case: Callable[[Path], tuple[dict[str, Any], str]]
) -> None:
    changes, said = case(home)
    body = {"lora_name": "bad", "lora_path": "saga"} | changes
    response = server.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == (404 if case is unknown_base else 400), response.text
    assert said in message_of(response)
    assert listed(server) == {"tiny": None, "norse": "tiny"}


def test_no_more_than_the_limit(server: Server) -> None:
    for name in ("a", "b"):
        load(server, name, "saga").raise_for_status()
    response = load(server, "c", "saga")
    assert response.status_code == 400 and "adapters_max" in message_of(response)
    unload(server, "a").raise_for_status()
    load(server, "c", "saga").raise_for_status()


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"lora_name": 3}'])
def test_bodies_that_say_nothing(server: Server, path: str, body: bytes) -> None:
    response = server.http.post(path, content=body)
    assert response.status_code == 400
    assert message_of(response)


def test_only_where_the_deployment_allows_it(tmp_path: Path, home: Path) -> None:
    config = deployment()
    config["models"][0]["adapters"] = {"norse": str(home / "norse")}
    with Server(written(tmp_path, config)) as server:
        for response in (load(server, "saga", home / "saga"), unload(server, "norse")):
            assert response.status_code == 403
            assert "allow_runtime_adapters" in message_of(response)
        assert listed(server) == {"tiny": None, "norse": "tiny"}


def test_an_adapter_that_does_not_fit_ends_the_start(tmp_path: Path) -> None:
    from kvasir.engine.tiny import make_tiny

    write_adapter(tmp_path / "wide", make_tiny(tmp_path / "base", hidden=128))
    config = deployment()
    config["models"][0]["adapters"] = {"wide": str(tmp_path / "wide")}
    done = kvasir("serve", written(tmp_path, config), "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert "for another base" in done.stderr and str(tmp_path / "wide") in done.stderr


# --- over workers, with a real model --------------------------------------------------------------


def test_p_to_d_with_three_adapters_and_the_base_at_once(home: Path) -> None:
    """Each as it runs alone, on one worker."""
    adapters: list[Adapter | None] = [
        None, *(adapter_of(name, home / name, str(TINY)) for name in ("norse", "saga", "edda"))
    ]  # fmt: skip
    prompt = [7 * i % 250 for i in range(70)]

    async def answers(layout: dict[str, int], at_once: bool) -> list[list[int]]:
        async with cluster(deployment_of(TINY, chunk=32, **layout)) as c:
            asks = [c.ask(prompt, 24, adapter=adapter) for adapter in adapters]
            if at_once:
                found: list[Answer] = await asyncio.gather(*asks)
            else:
                found = [await ask for ask in asks]
            await c.at_rest()
            for runner in c.threads.runners.values():
                runner.adapters.check()
                assert not runner.adapters._using
            return [answer.tokens for answer in found]

    alone = run(answers({"mixed": 1}, False))
    assert len({tuple(tokens) for tokens in alone}) == len(adapters)
    assert run(answers({"prefill": 1, "decode": 2}, True)) == alone


def test_more_adapters_than_a_worker_holds(home: Path) -> None:
    """Read again after they made room; the one that has none is refused, and told so."""
    adapters = [adapter_of(name, home / name, str(TINY)) for name in ("norse", "saga", "edda")]
    prompt = [3 * i % 250 for i in range(20)]

    async def main() -> None:
        d = deployment_of(TINY, engine="fake", mixed=1)
        models = (d.models[0].model_copy(update={"adapters_max": 1}),)
        async with cluster(d.model_copy(update={"models": models})) as c:
            for adapter in (*adapters, adapters[0]):
                answer = await c.ask(prompt, 5, adapter=adapter)
                assert answer.tokens == fake_tokens(prompt, 5, adapter=adapter.digest)
                await c.at_rest()  # the worker lets go of it a little later than its answer ends
            gate = c.gates["mixed-0"]
            gate.shut()
            running = asyncio.create_task(c.ask(prompt, 5, adapter=adapters[0]))
            await c.until(lambda: gate.stopped)
            refused = await c.ask(prompt, 5, adapter=adapters[1])
            assert refused.fail is not None and refused.fail.status == 503
            assert "1 adapters are in use here" in refused.fail.reason
            gate.open()
            answer = await running
            assert answer.tokens == fake_tokens(prompt, 5, adapter=adapters[0].digest)
            await c.at_rest()

    run(main())


def test_a_recording_with_adapters_replays(home: Path, tmp_path: Path) -> None:
    config = deployment()
    config["models"][0]["adapters"] = {"norse": str(home / "norse")}
    record = tmp_path / "record"
    with Server(written(tmp_path, config), "--record", record) as server:
        Stream(server, prompt_of(40, 6), 10, "norse", digest_of(home / "norse")).check()
        server.at_rest()
    done = kvasir("verify", record)
    assert done.returncode == 0, done.stdout + done.stderr
    journal = (record / "conductor.jsonl").read_bytes()
    assert b'"adapter":"norse"' in journal
    submitted = [json.loads(line) for line in journal.splitlines() if b"Submit" in line]
    assert submitted and not any(str(home) in json.dumps(one) for one in submitted)
