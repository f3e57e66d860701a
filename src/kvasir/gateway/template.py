"""Chat templates in HuggingFace's dialect of Jinja, sandboxed. Knows no tokenizer and no HTTP.

A template comes with a model folder, so it is somebody else's program: it runs in an immutable
sandbox, sees only what it is handed, and its errors become the client's 400.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvasir.core.errors import ModelError, RequestError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Generation(Extension):
    """`{% generation %}` marks assistant text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate:
    """Compiled once, rendered per request. `names` are the tokens a template may speak of."""

    def __init__(self, source: str, names: Mapping[str, str], *, where: str = "") -> None:
        """Raises ModelError when the template is no Jinja."""
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = _refuse
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = env.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is no Jinja: {error.message}", where=f"{where}:{error.lineno}"
            ) from error
        self._names = dict(names)

    def render(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        """Text to be encoded without further special tokens. Raises RequestError."""
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render({**self._names, **given, **extra, "messages": messages})
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", where="messages"
            ) from error


def template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A folder's chat template: a file of its own, else the one in `tokenizer_config.json`."""
    jinja, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if wrapped.is_file():
        return _chosen(json.loads(wrapped.read_text(encoding="utf-8")).get("chat_template"))
    return _chosen(config.get("chat_template"))


def _chosen(found: Any) -> str | None:
    """A template, or the `default` (else the first) of several named ones."""
    if isinstance(found, list):
        named = {str(one["name"]): str(one["template"]) for one in found}
        return named.get("default") or next(iter(named.values()), None)
    return str(found) if found else None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
