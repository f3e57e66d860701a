"""`kvasir serve`: from a folder, a file or nothing at all to a deployment that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

if TYPE_CHECKING:
    from kvasir.core.specs import Deployment, Role

app = App(name="serve")


@app.default
def serve(
    model: str | None = None,
    /,
    *,
    prefill: int | None = None,
    decode: int | None = None,
    mixed: int | None = None,
    engine: Literal["torch", "fake"] | None = None,
    policy: str | None = None,
    transport: Literal["auto", "shm", "nixl", "mooncake", "tcp"] | None = None,
    first_token: Literal["prefill", "decode"] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    record: Path | None = None,
) -> None:
    """Serve over HTTP (OpenAI's API) until Ctrl-C. Each flag is also read from KVASIR_<FLAG>.

    Parameters
    ----------
    model
        HuggingFace folder, deployment file or bundled name (default: ./kvasir.yaml, else local).
    prefill
        Number of prefill workers.
    decode
        Number of decode workers.
    mixed
        Number of workers that do both; alone, it leaves no others.
    engine
        What computes; fake gives made-up tokens at once and needs no torch.
    policy
        Name of the route policy.
    transport
        How KV travels between workers.
    first_token
        Which worker samples a request's first token.
    host
        Address to listen on; 0.0.0.0 lets other machines in.
    port
        Port to listen on; 0 takes a free one.
    record
        Folder for a recording that `kvasir verify` re-runs.
    """
    from kvasir.cli.models import with_folders
    from kvasir.cli.overrides import changed, with_counts, with_policy

    flags = {"engine": engine, "transport.kind": transport, "first_token": first_token}
    counts: dict[Role, int | None] = {"prefill": prefill, "decode": decode, "mixed": mixed}
    deployment = with_policy(with_counts(_deployment(model), counts), policy)
    deployment = changed(deployment, {k: v for k, v in flags.items() if v is not None}, "flags")
    if deployment.engine == "torch":
        need_torch()
    deployment = with_folders(deployment)

    from kvasir.gateway.platform import run

    run(deployment, host=host, port=port, record=record)


def _deployment(model: str | None) -> Deployment:
    from kvasir.cli.files import bundled, chosen, load_deployment
    from kvasir.cli.models import model_folder, with_model

    name = chosen(model, "local")
    if name in bundled() or Path(name).suffix in (".yaml", ".yml"):
        return load_deployment(name)
    return with_model(load_deployment("local"), model_folder(name))


def need_torch() -> None:
    """Raises ConfigError when it is not installed."""
    from importlib.util import find_spec

    from kvasir.core.errors import ConfigError

    if find_spec("torch") is None:
        raise ConfigError(
            "engine torch needs torch, which is not installed",
            next_step="pip install 'kvasir-llm[engine]', or --engine fake",
        )
