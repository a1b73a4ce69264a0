"""A conversation: turns of typed parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import msgspec

from tars_core.types.errors import RequestError
from tars_core.types.public import Public
from tars_core.types.text import check_text

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

_KEYS = {"role", "content", "tool_calls", "tool_call_id"}


class Text(Public, frozen=True, kw_only=True, tag="text"):
    """A piece of text in a message."""

    text: str

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "text", check_text("message content", self.text))


class Image(Public, frozen=True, kw_only=True, tag="image"):
    """A picture in a message: the bytes of its file. Needs a backend with the feature ``images``."""

    data: bytes
    media_type: str
    """``image/png``, ``image/jpeg``, …"""


Part: TypeAlias = Text | Image


class ToolCall(Public, frozen=True, kw_only=True):
    """A call that a model asked for; ``arguments`` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(Public, frozen=True, kw_only=True):
    """One turn of a conversation.

    ``content`` is text, or parts in order. Parts that are all text are joined into one, with nothing between them.
    Raises :class:`~tars_core.types.errors.RequestError` for an unknown role or content of another type.
    """

    role: Role
    content: str | tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant: what it asked for. Needs the feature ``tools``, like the role ``tool``."""
    tool_call_id: str | None = None
    """Of a tool: the call that this answers."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(f"unknown role {self.role!r}", hint=f"use one of {', '.join(ROLES)}")
        # Of an enum of strings, the string; of NumPy's text, the text.
        msgspec.structs.force_setattr(self, "role", ROLES[ROLES.index(self.role)])
        msgspec.structs.force_setattr(self, "content", _content(self.content))

    @property
    def text(self) -> str:
        """The text of the message, pictures left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, Text))


def _content(content: object) -> str | tuple[Part, ...]:
    if not isinstance(content, list | tuple):
        return check_text("message content", content)
    parts = tuple(_part(part) for part in content)
    if any(isinstance(part, Image) for part in parts):
        return parts
    return "".join(part.text for part in parts if isinstance(part, Text))


def _part(part: object) -> Part:
    match part:
        case Text() | Image():
            return part
        case {"type": "text", "text": text, **others} if not others:
            return Text(text=cast("str", text))  # checked there
        case {"type": kind}:
            raise RequestError(f"a part of the type {kind!r:.40} is not supported", hint="use text")
    raise RequestError(f"a part of a message is {{'type': 'text', 'text': …}}, not {part!r:.60}")


def check_messages(messages: Sequence[Message | Mapping[str, object]]) -> tuple[Message, ...]:
    """Accept messages as objects or as ``{"role": …, "content": …}``, the form chat APIs share.

    Raises :class:`~tars_core.types.errors.RequestError` for none at all, an unknown role, or other keys.
    """
    if isinstance(messages, str) or not isinstance(messages, Iterable) or not messages:
        raise RequestError("messages must be a list with at least one message")
    return tuple(_message(message) for message in messages)


def _message(message: object) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise RequestError(f"a message has the keys role and content, not {message!r:.80}")
    if unknown := sorted(map(str, message.keys() - _KEYS)):
        raise RequestError(
            f"a message has the keys role and content, not {unknown[0]}",
            hint=f"known: {', '.join(sorted(_KEYS))}",
        )
    fields: dict[str, Any] = dict(message)  # Message checks its values itself
    fields["tool_calls"] = tuple(_call(call) for call in fields.get("tool_calls") or ())
    return Message(**fields)


def _call(call: object) -> ToolCall:
    match call:
        case ToolCall():
            return call
        case {"id": str() as identity, "function": {"name": str() as name, "arguments": str() as arguments}}:
            return ToolCall(id=identity, name=name, arguments=arguments)
    raise RequestError(f"a tool call is {{'id': …, 'function': {{'name': …, 'arguments': …}}}}, not {call!r:.80}")
