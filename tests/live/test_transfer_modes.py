"""`transport.mode` live: every mode gives the same tokens, and blocks hold what their keys name."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kvasir.core.specs.deployment import TransportSpec  # noqa: E402
from kvasir.engine.fake import fake_tokens  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from tests.live.cluster import cluster, deployment_of, run, wrong_blocks  # noqa: E402

PROMPTS = [[(7 * i + j) % 200 for j in range(length)] for i, length in enumerate((5, 40, 97, 130))]


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("mode", "threshold"), [("streamed", 0), ("streamed", 64), ("serial", 0), ("pull", 0)]
)
def test_a_mode_moves_the_same_kv(tmp_path: Path, kind: str, mode: str, threshold: int) -> None:
    async def main() -> None:
        make_tiny(tmp_path)
        spec = deployment_of(
            tmp_path, engine="fake", transport=kind, chunk=16,
            route={"decode_choice": "prefill_end" if mode == "pull" else "arrival"},
        )  # fmt: skip
        transport = TransportSpec(kind=kind, mode=mode, serial_tokens=threshold)
        async with cluster(spec.model_copy(update={"transport": transport})) as c:
            for prompt in PROMPTS:
                assert (await c.ask(prompt, 12)).tokens == fake_tokens(prompt, 12)
            assert wrong_blocks(c, [prompt + fake_tokens(prompt, 12) for prompt in PROMPTS]) == []

    run(main())
