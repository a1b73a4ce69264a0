"""What goes wrong between this backend and the daemon, and what it means to the engine."""

from __future__ import annotations

import json

import msgspec

from tars_core.plugin import (
    ContextLengthExceeded,
    GenerationFailed,
    LoadFailed,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    RequestError,
    TarsError,
    is_out_of_memory,
)

_WORDS = 300
_OVERFLOW = ("longer than the context length", "exceeds the context length", "exceeds maximum context length")
# 500, and yet the request is at fault: no other backend would take it either.
_CALLERS_500 = ('option "', "invalid format:")
_BUSY = (429, 503)
_SERVER_ERROR = 500


class Fault(Exception):
    """An answer that is an error, or none that could be used.

    ``status`` is ``None`` where the connection itself failed. ``figures`` are the prompt's tokens and the context's,
    where the daemon tells them.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        figures: tuple[int, int] | None = None,
        retry_after_s: float | None = None,
        refused: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.figures = figures
        self.retry_after_s = retry_after_s
        self.refused = refused

    @property
    def busy(self) -> bool:
        """Whether to ask again in a moment."""
        return self.status in _BUSY

    @property
    def crash(self) -> bool:
        """Whether the model's process, or the connection, broke: the daemon starts the process anew by itself."""
        if self.status is None:
            return not self.refused
        if self.status == _SERVER_ERROR and self.message.startswith(_CALLERS_500):
            return False
        return (self.status >= _SERVER_ERROR or self.status < 400) and not self.busy and not self._memory  # noqa: PLR2004

    @property
    def _memory(self) -> bool:
        return is_out_of_memory(self.message)

    def to_error(  # noqa: PLR0911 - one return for each meaning
        self, model: str, *, loading: bool = False, context_length: int = 0
    ) -> TarsError:
        """Return what the engine is to be told about ``model``."""
        failed = LoadFailed if loading else GenerationFailed
        if self.refused:
            return failed(f"cannot connect to Ollama: {self.message}", hint="ollama serve")
        if self._memory:
            return OutOfMemory(f"Ollama has not enough memory for {model}: {self.message}", hint="use a smaller model")
        if self.figures is not None:
            return ContextLengthExceeded(prompt_tokens=self.figures[0], context_length=self.figures[1])
        if self.status == 400 and any(words in self.message for words in _OVERFLOW):  # noqa: PLR2004
            return ContextLengthExceeded(prompt_tokens=max(1, context_length), context_length=context_length)
        if self.status == 404 and "not found" in self.message and "page not found" not in self.message:  # noqa: PLR2004
            return ModelNotFound(f"Ollama has no model {model}", hint=f"ollama pull {model}")
        if self.busy:
            return Overloaded(f"Ollama is busy: {self.message}", hint="try again in a moment")
        if "does not support" in self.message:
            # Seen for embedding models, and for a model whose file is gone from the store.
            return failed(f"Ollama cannot run {model}: {self.message}", hint=f"ollama pull {model} downloads it again")
        if self.status in (401, 403):
            words = self.message or "it refuses the Host header, or the model needs an account"
            return failed(f"Ollama refuses access ({self.status}): {words}", hint="check OLLAMA_HOST")
        if not loading and (self.status == 400 or self.message.startswith(_CALLERS_500)):  # noqa: PLR2004
            return RequestError(f"Ollama refuses the request: {self.message}")
        return failed(f"Ollama: {self.message or f'status {self.status}, no reason given'}")


def read_fault(status: int, body: bytes, *, retry_after: str | None = None) -> Fault:
    """Turn an error's body, whatever it is, into a :class:`Fault`."""
    try:
        value: object = msgspec.json.decode(body)
    except (ValueError, RecursionError):  # plain text, a proxy's page, or nothing
        text = body.decode(errors="replace").strip()
        value = {"error": "a page of HTML; what answers there is not Ollama" if text.startswith("<") else text}
    return told(value, status=status, retry_after=retry_after)


def told(value: object, *, status: int, retry_after: str | None = None) -> Fault:
    """Unwrap an error: the runner's arrive as JSON inside the daemon's own ``error`` text."""
    figures: tuple[int, int] | None = None
    for _ in range(8):  # deeper nesting is none of Ollama's
        if isinstance(value, str):
            inner = _inner(value)
            if inner is None:
                break
            value = inner
        if not isinstance(value, dict):
            break
        prompt, context = value.get("n_prompt_tokens"), value.get("n_ctx")
        if isinstance(prompt, int) and isinstance(context, int):
            figures = prompt, context
        if "error" not in value and "message" not in value:
            break
        value = value["error"] if "error" in value else value["message"]
    message = value if isinstance(value, str) else json.dumps(value)
    return Fault(message[:_WORDS], status=status, figures=figures, retry_after_s=_seconds(retry_after))


def _inner(text: str) -> dict[str, object] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        value: object = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _seconds(text: str | None) -> float | None:
    """Read a Retry-After in seconds; a date is left to the usual back-off."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
