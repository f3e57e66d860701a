"""The verbs by import path; a wrong command line becomes one ConfigError with the nearest name."""

from __future__ import annotations

from typing import Final

from cyclopts import App, CycloptsError, UnknownCommandError, UnknownOptionError
from cyclopts.config import Env

from kvasir import __version__
from kvasir.core.errors import ConfigError, nearest

VERBS: Final = {
    "serve": "Serve a model folder or a deployment over HTTP.",
    "bench": "Send load to a server; print the table of `vllm bench serve`.",
    "simulate": "Run a deployment on a trace in virtual time.",
    "compare": "Simulate several policies on the same arrivals.",
    "verify": "Re-run a recording, decision by decision.",
    "explain": "Why a recorded request ran where it did: candidates and score terms.",
    "timeline": "A recording as Chrome trace JSON, for Perfetto.",
    "measure": "Time an engine; fit the cost that a pool takes.",
    "drain": "Let a worker of a running server go, in good order.",
    "config": "Check, show or describe kvasir.yaml.",
    "trace": "Look into traces; convert, generate and split them.",
}


def make_app() -> App:
    """The command tree. No verb's module is imported before the verb is named."""
    app = App(
        name="kvasir",
        help="Serve LLMs with prefill and decode on separate workers: live and simulated.",
        version=__version__,
        help_format="plaintext",
        config=Env("KVASIR_", command=False),
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    for order, (verb, text) in enumerate(VERBS.items()):
        app.command(f"kvasir.cli.{verb}:app", name=verb, help=text, sort_key=order)
    return app


def run(argv: list[str]) -> int:
    """Exit status of the verb. Raises KvasirError; ConfigError for a wrong command line."""
    try:
        status = make_app()(argv)
    except CycloptsError as error:
        raise _wrong(error) from None
    return status if isinstance(status, int) else 0


def _wrong(error: CycloptsError) -> ConfigError:
    error.verbose = False
    verb = " ".join(("kvasir", *(error.command_chain or ())))
    near = ""
    if isinstance(error, UnknownCommandError):
        word = (error.unused_tokens or [""])[0]
        what = f"{verb} has no command {word!r}"
        near = nearest(word, (n for n in error.app or () if not n.startswith("-")))
    elif isinstance(error, UnknownOptionError):
        word = error.token.keyword or error.token.value
        what = f"{verb} has no flag {word}"
        flags = [n for a in error.argument_collection for n in a.names if n.startswith("-")]
        near = nearest(word, flags)
    elif error.unused_tokens:
        what = f"{verb} does not take {error.unused_tokens[0]!r}"
    else:
        what = " ".join(str(error).split())
    return ConfigError(what, nearest=near, next_step=f"{verb} --help")
