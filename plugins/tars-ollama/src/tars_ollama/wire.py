"""What the daemon sends, as far as it is used here. Zero fields are left out of it, and some are null."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

_FROM = re.compile(r"^FROM (.*[\\/]blobs[\\/]sha256[-:]([0-9a-f]{64}))$", re.MULTILINE)
_STOP = re.compile(r'^stop\s+(".*")\s*$', re.MULTILINE)
_LIBRARY = "registry.ollama.ai/library/"

T = TypeVar("T")


class _Message(msgspec.Struct):
    content: str | None = None
    thinking: str | None = None


class _DebugInfo(msgspec.Struct):
    rendered_template: str | None = None


class Chunk(msgspec.Struct):
    """A line of ``/api/generate`` or ``/api/chat``, or their whole answer."""

    response: str | None = None
    thinking: str | None = None
    message: _Message | None = None
    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    error: object = None
    debug_info: _DebugInfo | None = msgspec.field(default=None, name="_debug_info")

    @property
    def text(self) -> str:
        """The piece of the answer; thinking is not part of it."""
        return self.response or (self.message.content if self.message else None) or ""

    @property
    def thought(self) -> str:
        """The piece of thinking."""
        return self.thinking or (self.message.thinking if self.message else None) or ""


class Listed(msgspec.Struct):
    """A model in ``/api/tags`` or ``/api/ps``."""

    name: str = ""
    size: int = 0
    size_vram: int = 0
    context_length: int = 0
    capabilities: list[str] | None = None
    remote_host: str | None = None
    """Where it runs in somebody's cloud."""

    @property
    def device(self) -> str:
        """Where it runs; Ollama tells no maker."""
        if self.size_vram <= 0:
            return "cpu"
        return "gpu" if self.size_vram >= self.size else "gpu+cpu"


class _Models(msgspec.Struct):
    models: list[Listed] | None = None


class Show(msgspec.Struct):
    """``/api/show``."""

    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    system: str = ""
    messages: list[object] | None = None
    capabilities: list[str] | None = None
    model_info: dict[str, Any] | None = None

    @property
    def trained_context(self) -> int | None:
        """Tokens the model was trained for."""
        info = self.model_info or {}
        value = info.get(f"{info.get('general.architecture')}.context_length")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    @property
    def generates(self) -> bool:
        """Whether it writes text; an older daemon does not tell."""
        return not self.capabilities or "completion" in self.capabilities

    @property
    def weights(self) -> tuple[str, str] | None:
        """The path and the digest of the model's file in the daemon's store; a second FROM is a projector."""
        found = _FROM.search(self.modelfile)
        return (found[1], found[2]) if found else None

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes the weights."""
        return "\nADAPTER " in self.modelfile

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings that belong to the model's own template."""
        return tuple(text for quoted in _STOP.findall(self.parameters) if (text := _unquoted(quoted)))


def decode(data: bytes, kind: type[T]) -> T:
    """Read JSON. Raises ``ValueError`` where it is none, or of another form."""
    try:
        # Go writes nothing else than UTF-8; should a proxy, one broken byte is no reason to drop an answer.
        return msgspec.json.decode(data.decode(errors="replace"), type=kind)
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error


def models(data: bytes) -> list[Listed]:
    """Read the answer of ``/api/tags`` or ``/api/ps``; raises ``ValueError``."""
    return decode(data, _Models).models or []


def canonical(name: str) -> str:
    """Return the form in which two names of one model are equal: ``Llama3`` is ``llama3:latest``."""
    name = name.lower().removeprefix(_LIBRARY)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def find(name: str, among: list[Listed]) -> Listed | None:
    """Return the model called ``name``."""
    return next((model for model in among if canonical(model.name) == canonical(name)), None)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:  # an escape that Go writes and JSON does not know
        return text[1:-1]
