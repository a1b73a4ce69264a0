"""Request and result types. All are frozen, keyword-only and validated on construction."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from tars_core import errors

if TYPE_CHECKING:
    from collections.abc import Sequence

Role: TypeAlias = Literal["system", "user", "assistant"]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
RAW_STOP = ("User:", "Usuario:")
"""A raw prompt has no roles of its own; without these a base model goes on to play the user."""

MAX_TEXT = 2**26
"""Characters of one text; beyond every model's context, and within one frame to a worker."""

_PATH = "path"


class ModelRef(msgspec.Struct, frozen=True, kw_only=True):
    r"""A model's name: ``scheme:rest`` or a path.

    A scheme has at least two letters, so that ``C:\models`` is a path. A scheme the core does not know is
    passed to every plugin's probe as it is.
    """

    scheme: str
    rest: str

    @classmethod
    def parse(cls, text: str | Path) -> ModelRef:
        """Read a reference. Raises :class:`~tars_core.errors.RequestError` where it is blank or no UTF-8."""
        check_text("the model's name", str(text))
        if isinstance(text, Path):
            return cls(scheme=_PATH, rest=_expanded(text))
        if not text.strip():
            raise errors.RequestError("the model's name is blank", hint="tars plan shows what there is")
        scheme, colon, rest = text.partition(":")
        if colon and len(scheme) > 1 and scheme.replace("-", "").replace("_", "").isalnum():
            return cls(scheme=scheme.lower(), rest=rest)
        return cls(scheme=_PATH, rest=_expanded(Path(text)))

    @property
    def path(self) -> Path | None:
        """The file or folder meant, or ``None`` where the scheme is no path."""
        return Path(self.rest) if self.scheme == _PATH else None

    def __str__(self) -> str:
        return self.rest if self.scheme == _PATH else f"{self.scheme}:{self.rest}"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise errors.RequestError(f"unknown role {self.role!r}", hint=f"use one of {', '.join(ROLES)}")
        # Of an enum of strings, the string; of NumPy's text, the text.
        msgspec.structs.force_setattr(self, "role", ROLES[ROLES.index(self.role)])
        msgspec.structs.force_setattr(self, "content", check_text("message content", self.content))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop.

    Raises :class:`~tars_core.errors.RequestError` for a value of the wrong type or out of range.
    """

    temperature: float = 0.8
    """0 (greedy: always the most likely token) to 10."""
    top_p: float = 0.9
    """Keep the smallest set of tokens whose probability reaches this; (0, 1], 1 = off."""
    top_k: int = 40
    """Keep this many most likely tokens; 0 = off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; [0, 1), 0 = off."""
    repeat_penalty: float = 1.1
    """Divides (multiplies, where negative) the logits of the last 64 tokens, prompt included; (0, 10], 1 = off."""
    max_tokens: int = 200
    """At least 1; bounded by what the context still holds."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    seed: int | None = None
    """0 to 2³²-1; ``None`` draws one."""

    def __post_init__(self) -> None:
        plain: dict[str, object] = {
            "temperature": _check_number("temperature", self.temperature, 0, 10),
            "top_p": _check_number("top_p", self.top_p, 0, 1, low_open=True),
            "top_k": _check_whole("top_k", self.top_k, 0, 2**31 - 1),
            "min_p": _check_number("min_p", self.min_p, 0, 1, high_open=True),
            "repeat_penalty": _check_number("repeat_penalty", self.repeat_penalty, 0, 10, low_open=True),
            "max_tokens": _check_whole("max_tokens", self.max_tokens, 1, 2**63 - 1),
            "seed": None if self.seed is None else _check_whole("seed", self.seed, 0, 2**32 - 1),
        }
        if not isinstance(self.stop, Iterable):
            raise errors.RequestError(f"stop must be a string or a list of them, not {self.stop!r:.40}")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        plain["stop"] = stop = tuple(check_text("stop", text) for text in stops)
        if "" in stop:
            raise errors.RequestError("a stop string is empty", hint="it would stop before the first token")
        for name, value in plain.items():
            msgspec.structs.force_setattr(self, name, value)


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend is asked: the whole prompt as text, templates already applied.

    Only a backend whose :class:`~tars_core.hookspecs.LoadedModel` says ``renders_chat`` gets ``messages`` instead.

    Tokenise it with special tokens recognised, and add a BOS token where the model's tokenizer adds one: the
    core has taken a leading BOS out of the rendered template.
    """

    prompt: str
    messages: tuple[Message, ...] = ()
    sampling: SamplingParams


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of tokens.

    ``prompt_tokens`` includes those found in a cache; ``completion_tokens`` every token sampled, the end token
    and those of a stop string included.
    """

    prompt_tokens: int
    completion_tokens: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds on a monotonic clock; ``None`` where nothing was measured."""

    load_s: float | None = None
    """Time this request waited for a model to load; ``None`` where it was loaded already."""
    ttft_s: float | None = None
    """From the request to the first text, load included."""
    decode_tokens_per_s: float | None = None
    """Tokens after the first, by the time they took."""


class ProbeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe may cost."""

    deadline_s: float = 2.0


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Facts a plugin states about one model on this machine. It does not rank itself."""

    available: bool
    reason: str | None = None
    """Why it is not available."""
    hint: str | None = None
    """What the user can do about it."""
    device: str | None = None
    """Where it would likely run: ``cpu``, ``cuda``, ``metal``, …"""
    memory_bytes: int | None = None
    """Estimate of what the loaded model takes."""
    weights_id: str | None = None
    """Equal for equal tensor contents and dtypes."""
    context_length: int | None = None
    """Tokens the model was trained for."""
    concurrency: int = 1
    """Requests it can run at once."""
    deviations: tuple[str, ...] = ()
    """Where a request means something else here than on the other backends; ``tars backends`` shows them."""
    preference: int = 50
    """0 to 100; decides only where all else is equal."""

    def __post_init__(self) -> None:
        if not self.available and not self.reason:
            raise errors.ContractError("a ProbeReport with available=False must give its reason")
        if not 0 <= self.preference <= 100:  # noqa: PLR2004 - a percentage
            raise errors.ContractError(f"preference is 0 to 100, not {self.preference}")


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to load. ``None`` leaves the choice to the backend."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    context_length: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    concurrency: int = 4
    """Requests that shall run at once."""
    allow_download: bool = False
    backend_settings: str = "{}"
    """The backend's own settings, ``[backends.NAME]``, as JSON that its ``tars_settings`` model has accepted."""

    @property
    def cpu_threads(self) -> int:
        """``threads``, else half of the processors this process may use: two of them are mostly one core."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, usable // 2)


class OfferedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model a plugin brings along or can name.

    ``refs`` lists the forms it has, best first. With a ``weights_id`` the plugin vouches that all hold these weights.
    """

    name: ModelRef
    refs: tuple[ModelRef, ...]
    weights_id: str | None = None
    notice: str | None = None
    """Shown when it is used without having been asked for."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
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
            kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
            return cls(kind=kind, message=_utf8(error.message), hint=_utf8(error.hint) if error.hint else None)
        # With its module: another library's RequestError is not the caller's mistake.
        of = type(error)
        kind = of.__name__ if of.__module__ == "builtins" else f"{of.__module__}.{of.__qualname__}"
        return cls(kind=kind, message=_utf8(f"{of.__name__}: {error}"))

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
        errors.ContractError,
    )
}


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A backend with a form of the model it can run, and why it stands where it stands."""

    backend: str
    model: ModelRef
    report: ProbeReport
    reasons: tuple[str, ...] = ()
    degraded: bool = False
    """Other weights than the first choice's."""


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A backend that will not be tried, and what stands in the way."""

    backend: str
    model: ModelRef | None = None
    reason: str
    hint: str | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was to be tried, in order, and what not. Kept on every result."""

    model: str
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    notice: str | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try of one candidate; ``failure`` is ``None`` for the one that answered."""

    backend: str
    model: ModelRef
    stage: Literal["load", "prompt", "stream", "done"]
    duration_s: float
    failure: Failure | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer and how it came about. ``text`` is exactly what was generated."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    backend: str
    model: ModelRef
    device: str
    degraded: bool
    decision: Decision
    attempts: tuple[Attempt, ...]


class BackendStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One installed plugin, as ``tars backends`` shows it.

    ``available`` is ``None`` for a plugin that brings models and runs none.
    """

    name: str
    distribution: str
    version: str
    available: bool | None
    device: str | None = None
    reason: str | None = None
    hint: str | None = None
    deviations: tuple[str, ...] = ()
    """Where a request means something else here than on the other backends."""
    quarantined: str | None = None
    """The stage at which it was put aside: discovery, generation, import, register, probe."""


def check_text(what: str, text: object) -> str:
    """Return ``text`` as a plain ``str``: a subclass, such as NumPy's, cannot be sent to a worker.

    Raises ``RequestError`` unless it is a string that UTF-8 can express, of at most 64 Mi characters.
    """
    if not isinstance(text, str):
        raise errors.RequestError(f"{what} must be text, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise errors.RequestError(f"{what} has {len(text)} characters", hint=f"no model takes more than {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.RequestError(
            f"{what} holds a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}",
            hint="decode the text with errors='replace' before it comes here",
        ) from None
    return str.__str__(text)


def check_messages(messages: Sequence[Message | dict[str, str]]) -> tuple[Message, ...]:
    """Accept messages as objects or as ``{"role": …, "content": …}``, the form chat APIs share.

    Raises :class:`~tars_core.errors.RequestError` for none at all, an unknown role, or other keys.
    """
    if isinstance(messages, str) or not isinstance(messages, Iterable) or not messages:
        raise errors.RequestError("messages must be a list with at least one message")
    return tuple(_check_message(message) for message in messages)


def _check_message(message: object) -> Message:
    if isinstance(message, Message):
        return message
    if isinstance(message, dict) and message.keys() == {"role", "content"}:
        fields: dict[str, Any] = message  # Message checks both values itself
        return Message(role=fields["role"], content=fields["content"])
    raise errors.RequestError(f"a message has exactly the keys role and content, not {message!r:.80}")


def _check_number(  # noqa: PLR0913 - bounds and whether they are meant
    name: str, value: object, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> float:
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise errors.RequestError(f"{name} must be a number, not {value!r:.40}")
    inside = low < value if low_open else low <= value  # neither holds for NaN
    if not inside or not (value < high if high_open else value <= high):
        raise errors.RequestError(f"{name} is {_shown(value)}", hint=f"it lies in {left}{low:g}, {high:g}{right}")
    return float(value)


def _check_whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise errors.RequestError(f"{name} must be a whole number, not {value!r:.40}")
    if not low <= value <= high:
        hint = f"it is at least {low}" if value < low else f"it is at most {high}"
        raise errors.RequestError(f"{name} is {_shown(value)}", hint=hint)
    return int(value)


def _shown(value: float) -> str:
    # Python refuses to print whole numbers of more than 4,300 digits.
    return repr(value) if isinstance(value, float) or abs(value) < 2**64 else "beyond 2**64"


def _utf8(text: object) -> str:
    """Make what came from a file's name or a library fit to be sent."""
    return str(text).encode(errors="backslashreplace").decode()


def _expanded(path: Path) -> str:
    try:
        return str(path.expanduser())
    except RuntimeError:  # no such user, no home: it stays as it is, as in a shell
        return str(path)
