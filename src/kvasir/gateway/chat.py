"""A chat's messages, as templates want them. Knows OpenAI's shapes; renders nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.gateway.schema import BadField


def messages_of(messages: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages as templates want them: a role, and content as one string."""
    if not messages:
        raise BadField("messages must not be empty", "messages")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: dict[str, Any]) -> Mapping[str, Any]:
    where = f"messages[{i}]"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadField(f"{where}.role is required", f"{where}.role")
    if isinstance(content, str):
        return message
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, list):
        raise BadField(
            f"{where}.content must be a string or a list of text parts", f"{where}.content"
        )
    return {**message, "content": "".join(_part(where, part) for part in content)}


def _part(where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadField(f"{where}.content: only text parts, not {kind!r}", f"{where}.content")
    return text
