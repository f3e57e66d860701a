"""A cache of latents, one plane a layer, goes through the real transfer layer by layer while later
layers compute, and the text goes on at the other runner."""

from __future__ import annotations

import os
import queue
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvasir.engine.torch_runner import TorchRunner
from kvasir.transfer import (
    PLAIN,
    ReceiveResult,
    Trailer,
    make_receiver,
    make_sender,
    open_media,
)
from tests.engine_driver import Driver, Hooks, Job, close
from tests.families import N, generated, make, prompt_of, reference_of

LENGTH, SIZE, BLOCKS = 61, 16, 32
HELD = -(-LENGTH // SIZE)
WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("deepseek"), "deepseek-v3")


@pytest.mark.parametrize("kind", PLAIN)
def test_latents_arrive_and_the_text_goes_on(kind: str, folder: Path, tmp_path: Path) -> None:
    p, d = (Driver(TorchRunner(folder, blocks_count=BLOCKS, block_size=SIZE)) for _ in range(2))
    layers = range(len(p.runner.spec.layers))
    received: queue.Queue[ReceiveResult] = queue.Queue()
    over: queue.Queue[bool] = queue.Queue()
    to, of = d.runner.planes(), p.runner.planes()
    receiver = make_receiver(
        open_media(kind, to, run_dir=str(tmp_path)), to, on_received=received.put
    )
    sender = make_sender(
        open_media(kind, of, run_dir=str(tmp_path)), of,
        on_over=lambda request, attempt, ok, reason: over.put(ok),
    )  # fmt: skip
    try:
        table = [20, 9, 10, 3]
        deadline_s = time.monotonic() + WAIT_S
        receiver.expect("r", 1, 0, table, len(layers), deadline_s)
        sender.open("r", 1, receiver.addresses[0], deadline_s)
        source = p.open(Job("r", prompt_of(LENGTH), N, list(range(HELD))))
        hooks = Hooks(on_layer=lambda layer: sender.push("r", 1, 0, list(range(HELD)), layer))
        p.step([source], hooks=hooks)
        sender.finish("r", 1, Trailer(tuple(source.output)))
        result = received.get(timeout=WAIT_S)
        assert result.ok and over.get(timeout=WAIT_S), result.reason
    finally:
        sender.close()
        receiver.close()
    assert hooks.layers == list(layers)
    assert result.bytes == HELD * SIZE * p.runner.spec.kv_token_bytes
    close(p.runner, [source])
    target = Job("r", prompt_of(LENGTH), N, [12, 13], computed=LENGTH, held=HELD)
    assert result.trailer is not None
    target.output = list(result.trailer.tokens)
    d.runner.adopt("r", 1, table)
    assert d.run([d.open(target)]) == [generated(reference_of(folder), prompt_of(LENGTH))]
