"""Errors as data, and the errors that carry several of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tars_core.types import errors
from tars_core.types.models import ModelRef
from tars_core.types.public import Public
from tars_core.types.text import as_utf8


class Failure(Public, frozen=True, kw_only=True):
    """An error as data: kept in an attempt, sent between processes."""

    kind: str
    message: str
    hint: str | None = None
    prompt_tokens: int | None = None
    context_length: int | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe ``error``; one that is not TARS' own is named with its type."""
        if isinstance(error, errors.ContextLengthExceeded):
            return cls(
                kind="ContextLengthExceeded",
                message=error.message,
                hint=error.hint,
                prompt_tokens=error.prompt_tokens,
                context_length=error.context_length,
            )
        if isinstance(error, errors.TarsError):  # a plugin's own subclass counts as what it is derived from
            kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ in (errors.__name__, __name__))
            return cls(kind=kind, message=as_utf8(error.message), hint=as_utf8(error.hint) if error.hint else None)
        # With its module: another library's RequestError is not the caller's mistake.
        of = type(error)
        kind = of.__name__ if of.__module__ == "builtins" else f"{of.__module__}.{of.__qualname__}"
        return cls(kind=kind, message=as_utf8(f"{of.__name__}: {error}"))

    def to_error(self, default: type[errors.BackendError]) -> errors.TarsError:
        """Rebuild the error; ``default`` stands for kinds that are not the worker's to raise."""
        if self.kind == "ContextLengthExceeded":
            return errors.ContextLengthExceeded(
                prompt_tokens=self.prompt_tokens or 0, context_length=self.context_length or 0
            )
        kind = _CROSSING.get(self.kind, default)
        return kind(self.message, hint=self.hint)


_CROSSING: dict[str, type[errors.TarsError]] = {
    kind.__name__: kind
    for kind in (
        errors.RequestError,
        errors.ModelNotFound,
        errors.Overloaded,
        errors.BackendError,
        errors.PluginError,
        errors.LoadFailed,
        errors.OutOfMemory,
        errors.GenerationFailed,
        errors.ContextShrunk,
        errors.ContractError,
    )
}


class Attempt(Public, frozen=True, kw_only=True):
    """One try of one candidate; ``failure`` is ``None`` for the one that answered."""

    backend: str
    model: ModelRef
    stage: Literal["load", "prompt", "stream", "done"]
    duration_s: float
    failure: Failure | None = None


class AllBackendsFailed(errors.TarsError):
    """Every candidate failed. ``attempts`` has one entry each, in order, with error and hint."""

    def __init__(self, *, attempts: Sequence[Attempt]) -> None:
        causes = [f"{a.backend} ({a.model}): {a.failure.message}" for a in attempts if a.failure]
        listed = (
            f": {causes[0]}" if len(causes) == 1 else f"; {len(causes)} tried" + "".join(f"\n  {c}" for c in causes)
        )
        hints = [f"{a.backend}: {a.failure.hint}" for a in attempts if a.failure and a.failure.hint]
        super().__init__(
            f"no backend answered{listed}",
            hint="\n  → ".join(dict.fromkeys(hints)) or "tars backends shows what is installed",
        )
        self.attempts: tuple[Attempt, ...] = tuple(attempts)
