"""What observers of an engine are told: see :meth:`~tars_core.engine.InferenceEngine.observe`."""

from __future__ import annotations

from typing import Literal, TypeAlias

from tars_core.types.failures import Attempt, Failure
from tars_core.types.models import ModelRef
from tars_core.types.public import Public
from tars_core.types.results import Completion


class Probed(Public, frozen=True, kw_only=True):
    """A backend was asked about a model, or was left out; ``reason`` says why it will not be tried."""

    backend: str
    model: ModelRef | None
    available: bool
    reason: str | None = None


class LoadProgressed(Public, frozen=True, kw_only=True):
    """A model is being loaded: 0 to 1, and what is going on."""

    backend: str
    model: ModelRef
    fraction: float
    note: str = ""


class LoadEnded(Public, frozen=True, kw_only=True):
    """A load ended after so many seconds, well or with a failure."""

    backend: str
    model: ModelRef
    duration_s: float
    failure: Failure | None = None


class PromptRead(Public, frozen=True, kw_only=True):
    """A backend has read so many tokens of a request's prompt."""

    request_id: int
    backend: str
    prompt_tokens_done: int


class AttemptEnded(Public, frozen=True, kw_only=True):
    """One candidate's try at a request ended."""

    request_id: int
    attempt: Attempt


class CircuitChanged(Public, frozen=True, kw_only=True):
    """A backend is paused, quarantined, or trusted again."""

    backend: str
    model: ModelRef
    state: Literal["closed", "open", "quarantined"]
    pause_s: float = 0.0


class WorkerStarted(Public, frozen=True, kw_only=True):
    """A worker has loaded its model. ``pid`` is ``None`` for a backend in this process."""

    backend: str
    model: ModelRef
    pid: int | None


class WorkerEnded(Public, frozen=True, kw_only=True):
    """A worker ended: unloaded, or with a failure."""

    backend: str
    model: ModelRef
    pid: int | None
    failure: Failure | None = None


class RequestStarted(Public, frozen=True, kw_only=True):
    """A request was accepted. ``model`` is the name that was asked for; ``None``: the setting's."""

    request_id: int
    model: str | None


class RequestEnded(Public, frozen=True, kw_only=True):
    """A request ended, with its answer or with a failure (``kind`` is ``Cancelled`` where the caller gave up)."""

    request_id: int
    model: str | None
    duration_s: float
    completion: Completion | None = None
    failure: Failure | None = None


class EventsLost(Public, frozen=True, kw_only=True):
    """Observers were too slow: so many events, the oldest, were dropped."""

    count: int


Observed: TypeAlias = (
    Probed
    | LoadProgressed
    | LoadEnded
    | PromptRead
    | AttemptEnded
    | CircuitChanged
    | WorkerStarted
    | WorkerEnded
    | RequestStarted
    | RequestEnded
    | EventsLost
)
