"""Every error TARS raises. ``AllBackendsFailed``, which carries attempts, is defined in :mod:`.failures`.

::

    TarsError
    ├── RequestError                 the caller's mistake; never fails over
    │   └── ContextLengthExceeded    prompt longer than the model's or the user's limit
    ├── ConfigError                  an invalid setting
    ├── ModelNotFound                the model named is not on this machine
    ├── EngineClosed                 used after close()
    ├── Overloaded                   more requests than the queue holds
    ├── BackendError                 one backend's failure; the next one is tried
    │   ├── BackendUnavailable       it cannot serve this model on this machine
    │   ├── PluginError              it does not import, or its probe misbehaves
    │   ├── LoadFailed
    │   │   └── OutOfMemory
    │   ├── GenerationFailed
    │   │   └── ContextShrunk        the prompt fits the model, and not the memory
    │   ├── ContractError            it broke a rule of the plugin contract
    │   ├── DeadlineExceeded         no progress within a time limit
    │   └── WorkerDied               its process ended: signal, exit code, last stderr lines
    ├── StreamInterrupted            failed after text was delivered; carries that text
    └── AllBackendsFailed            no candidate was left; carries every attempt

Messages say what happened and with which figures; ``hint`` is the next step.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class TarsError(Exception):
    """Base of all errors of TARS."""

    message: str = "no reason given"
    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class RequestError(TarsError, ValueError):
    """The request itself is wrong; no backend would answer it."""


class ContextLengthExceeded(RequestError):
    """The prompt does not fit the context. Nothing was truncated."""

    def __init__(self, *, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the context holds {context_length}"
            " with at least one for the answer",
            hint="shorten the prompt, or raise context_length where the model allows it",
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class ConfigError(TarsError, ValueError):
    """A setting has an unknown name or an invalid value."""


class ModelNotFound(TarsError):
    """The model named does not exist here, or no model was named and none is installed."""


class EngineClosed(TarsError, RuntimeError):
    """The engine was closed."""

    def __init__(self) -> None:
        super().__init__("this engine is closed", hint="create a new InferenceEngine")


class Overloaded(TarsError):
    """More requests are waiting than the queue holds. Nothing was started."""


class BackendError(TarsError):
    """One backend failed; the engine tries the next."""


class BackendUnavailable(BackendError):
    """The backend cannot serve this model on this machine.

    ``reasons`` maps each backend asked to why not.
    """

    def __init__(self, message: str, *, reasons: Mapping[str, str], hint: str | None = None) -> None:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        super().__init__(message + listed, hint=hint)
        self.reasons: dict[str, str] = dict(reasons)


class PluginError(BackendError):
    """A plugin does not import, or its hook fails."""


class LoadFailed(BackendError):
    """The backend could not load the model."""


class OutOfMemory(LoadFailed):
    """The model does not fit the memory of the device."""


class GenerationFailed(BackendError):
    """The backend failed while it generated."""


class ContextShrunk(GenerationFailed):
    """The prompt does not fit a context that memory made shorter than it was asked for.

    Another backend may hold it, so the next one is tried; it does not count as a failure of this one.
    """


class ContractError(BackendError):
    """A plugin broke a rule of the contract in :mod:`tars_core.hookspecs`."""


class DeadlineExceeded(BackendError):
    """A stage made no progress within its limit.

    ``stage`` is one of ``load``, ``first token``, ``between tokens``, ``total``; ``limit_s`` in seconds.
    """

    def __init__(self, *, stage: str, limit_s: float) -> None:
        setting = stage.replace(" ", "_") + "_s"
        super().__init__(
            f"no progress within {limit_s:g} s ({stage})",
            hint=f"raise limits.{setting} if the machine is only slow",
        )
        self.stage = stage
        self.limit_s = limit_s


class WorkerDied(BackendError):
    """The backend's process ended while it was needed.

    ``signal_name`` is set where a signal killed it (``SIGSEGV``, ``SIGKILL``, …), ``exit_code``
    otherwise; ``stderr_tail`` holds the end of its stderr.
    """

    def __init__(self, *, returncode: int | None, stderr_tail: str = "") -> None:
        self.signal_name: str | None = _signal_name(returncode)
        self.exit_code: int | None = returncode if returncode is not None and returncode >= 0 else None
        self.stderr_tail = stderr_tail
        if self.signal_name:
            how = f"was killed by {self.signal_name}"
        elif returncode is None:
            how = "closed its connection"
        else:
            how = f"ended with exit code {returncode}"
        hint = "likely out of memory: try a smaller model" if self.signal_name == "SIGKILL" else None
        last = stderr_tail.strip().splitlines()[-3:]
        words = "".join(f"\n  | {line}" for line in last)
        super().__init__(f"the backend's process {how}{words}", hint=hint)


class StreamInterrupted(TarsError):
    """The backend failed after part of the answer was delivered.

    ``partial_text`` is what was delivered, complete; ``cause`` the backend's error.
    """

    def __init__(self, *, partial_text: str, backend: str, cause: TarsError) -> None:
        super().__init__(
            f"{backend} failed after {len(partial_text)} characters were delivered: {cause.message}",
            hint="ask again for a new answer",
        )
        self.partial_text = partial_text
        self.backend = backend
        self.cause = cause


def told(error: BaseException) -> str:
    """Describe an exception that is not ours: its type, its text and the innermost place, `` (file.py, line 7)``."""
    try:
        text = str(error)
    except Exception as failure:  # noqa: BLE001 - a plugin's own exception may fail at this too
        text = f"(its message cannot be read: {type(failure).__name__})"
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({Path(place.tb_frame.f_code.co_filename).name}, line {place.tb_lineno})" if place else ""
    return f"{type(error).__name__}: {text}{where}"


def _signal_name(returncode: int | None) -> str | None:
    if returncode is None or returncode >= 0:
        return None
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
