"""Chat templates: the model's own jinja, in a sandbox.

The conventions (``add_generation_prompt``, ``raise_exception``, ``strftime_now``, trimmed blocks) are those Hugging
Face's checkpoints are written for.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from typing import NoReturn

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tars_core.types.errors import GenerationFailed, RequestError
from tars_core.types.messages import Message

_PREFILL = "\ufdd0tars-prefill\ufdd0"  # U+FDD0 is a noncharacter: no template and no user writes it


class ChatTemplate:
    """One model's template, compiled once.

    Raises :class:`~tars_core.types.errors.GenerationFailed` where the template itself is at fault, and
    :class:`~tars_core.types.errors.RequestError` where it refuses the messages.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", adds_bos: bool = False) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Python's own compiler has a say too: SyntaxError, ValueError
            raise _at_fault(error) from error
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._adds_bos = adds_bos

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the next assistant turn.

        A conversation that ends with an assistant message is continued from that text. A template that refuses the
        system role gets the system text at the head of the first user turn.
        """
        try:
            text = self._render(messages)
        except _Refused as refusal:
            merged = _merge_system(messages)
            try:
                if merged is None:
                    raise
                text = self._render(merged)
            except _Refused:
                raise RequestError(f"the model's chat template refuses these messages: {refusal}") from None
        if self._adds_bos and self._bos_token and text.startswith(self._bos_token):
            return text[len(self._bos_token) :]
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        prefill = messages[-1].text if messages[-1].role == "assistant" else None
        turns = [{"role": m.role, "content": m.text} for m in messages]
        if prefill is not None:
            turns[-1]["content"] = _PREFILL
        try:
            text = self._template.render(
                messages=turns,
                add_generation_prompt=prefill is None,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
            )
        except _Refused:
            raise
        except Exception as error:
            raise _at_fault(error) from error
        if prefill is None:
            return text
        before, found, _ = text.rpartition(_PREFILL)
        if not found:
            raise GenerationFailed("the model's chat template drops a trailing assistant message")
        return before + prefill


def render_plain(messages: Sequence[Message]) -> str:
    """Return the text a model without a template gets: the contents, a blank line between them."""
    return "\n\n".join(message.text for message in messages)


def _merge_system(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    system = [m.text for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    if not system or not rest or rest[0].role != "user":
        return None
    first = Message(role="user", content="\n\n".join([*system, rest[0].text]))
    return (first, *rest[1:])


def _at_fault(error: Exception) -> GenerationFailed:
    return GenerationFailed(
        f"the model's chat template fails: {type(error).__name__}: {error}",
        hint="the model's file carries a damaged or unsafe template; try another copy of it",
    )


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        """Refuse at once: jinja's own answer prints as nothing, and the template would go on."""
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__} is unsafe")


class _Refused(jinja2.TemplateError):
    """A template's own ``raise_exception``: it does not take these messages."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks, for training, what the assistant said. Here only its contents matter."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)  # noqa: DTZ005 - a template means the user's own clock


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - Hugging Face's signature, which templates are written for
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Unlike jinja's own ``tojson``, escape nothing for HTML: the reader is a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
