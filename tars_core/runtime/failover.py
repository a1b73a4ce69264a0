"""What one request tries next, after what happened. A state machine without I/O: time is passed in."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Sequence
from typing import Literal, TypeAlias

import msgspec

from tars_core.runtime.circuits import Circuits, Key
from tars_core.types.errors import (
    BackendUnavailable,
    ContextShrunk,
    DeadlineExceeded,
    RequestError,
    StreamInterrupted,
    TarsError,
    WorkerDied,
)
from tars_core.types.failures import AllBackendsFailed, Attempt, Failure
from tars_core.types.results import Candidate

Stage: TypeAlias = Literal["load", "prompt", "stream"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds without progress, by stage, and for the whole request with all its attempts. ``None``: no limit."""

    load_s: float | None = 300.0
    first_token_s: float | None = 120.0
    between_tokens_s: float | None = 30.0
    total_s: float | None = 900.0


def key_of(candidate: Candidate) -> Key:
    """Return what a candidate's circuit is known by."""
    return candidate.backend, candidate.model


def unanswerable(model: object, reasons: Sequence[str]) -> RequestError:
    """Return the error for a request that needs a feature no candidate has."""
    listed = "".join(f"\n  {reason}" for reason in reasons)
    return RequestError(
        f"no backend can answer this request with {model}{listed}", hint="tars plan shows what each backend can do"
    )


class Attempts:
    """The course of one request. Ask :meth:`next`; tell what happened; on failure ask again.

    ``now`` is always a monotonic clock in seconds.
    """

    def __init__(self, candidates: Sequence[Candidate], limits: Limits, circuits: Circuits, *, now: float) -> None:
        self._waiting = deque(candidates)
        self._limits = limits
        self._circuits = circuits
        self._total_until = math.inf if limits.total_s is None else now + limits.total_s
        self._current: Candidate | None = None
        self._began = now
        self._stage: Stage = "load"
        self._text: list[str] = []
        self.attempts: list[Attempt] = []
        self.for_trial: list[Candidate] = []
        """Whose pause is over: to be tried behind this request's back, so that no caller waits for a load."""

    @property
    def text(self) -> str:
        """What was delivered so far."""
        return "".join(self._text)

    def next(self, now: float, warm: Container[Key] = ()) -> Candidate:
        """Return whom to try now: the paused ones last. Raises ``AllBackendsFailed`` where nobody is left.

        ``warm`` are those in memory. A paused one is not loaded for this request while one of them answers.
        """
        while self._waiting:
            candidate = self._waiting.popleft()
            key = key_of(candidate)
            state = self._circuits.state(key, now)
            others = [key_of(c) for c in self._waiting if self._circuits.closed(key_of(c), now)]
            if state == "quarantined":
                self._skip(candidate, "in quarantine: its process died too often", now)
            elif state == "half-open" and key not in warm and any(other in warm for other in others):
                self._skip(candidate, "paused after repeated failures; a trial is running", now)
                self.for_trial.append(candidate)
                self._waiting.append(candidate)
            elif state in ("closed", "half-open") or not others:
                self._current, self._began, self._stage = candidate, now, "load"
                self._circuits.began(key, self)
                self.attempts = [a for a in self.attempts if (a.backend, a.model) != key]  # "paused" is over
                return candidate
            else:
                self._skip(candidate, "paused after repeated failures", now)
                self._waiting.append(candidate)
        reasons = [a.failure.message for a in self.attempts if a.failure and a.failure.kind == "BackendUnavailable"]
        if reasons and len(reasons) == len(self.attempts):  # each was loaded, and lacks what its probe promised
            raise unanswerable(self.attempts[0].model, [reason.rpartition("\n")[2].strip() for reason in reasons])
        raise AllBackendsFailed(attempts=self.attempts)

    def _skip(self, candidate: Candidate, reason: str, now: float) -> None:
        self._began, self._stage = now, "load"
        self._record(candidate, now, Failure(kind="Skipped", message=reason))

    def total_left(self, now: float) -> float | None:
        """Return the seconds left for the whole request; ``None`` for a request without that limit."""
        return None if self._total_until == math.inf else max(0.0, self._total_until - now)

    def wait_s(self, now: float) -> float | None:
        """Return how long the next event may take: the stage's limit, within the whole."""
        limits = [limit for limit in (self._stage_limit()[1], self.total_left(now)) if limit is not None]
        return min(limits, default=None)

    def expired(self, now: float) -> DeadlineExceeded:
        """Return the error for a wait that brought nothing."""
        stage, limit_s = self._stage_limit()
        if self._limits.total_s is not None and (now >= self._total_until or limit_s is None):
            return DeadlineExceeded(stage="total", limit_s=self._limits.total_s)
        return DeadlineExceeded(stage=stage, limit_s=limit_s or 0.0)

    def _stage_limit(self) -> tuple[str, float | None]:
        if self._stage == "load":
            return "load", self._limits.load_s
        if self._stage == "prompt":
            return "first token", self._limits.first_token_s
        return "between tokens", self._limits.between_tokens_s

    def loaded(self) -> None:
        """The model is in memory; the prompt is being read."""
        self._stage = "prompt"

    def delivered(self, text: str) -> None:
        """Text went to the caller: from here on nobody else can take over."""
        self._stage = "stream"
        self._text.append(text)

    def finished(self, now: float) -> tuple[Attempt, ...]:
        """The answer is complete; return all attempts, this one last."""
        candidate = self._active()
        self._circuits.succeeded(key_of(candidate))
        self.attempts.append(
            Attempt(backend=candidate.backend, model=candidate.model, stage="done", duration_s=now - self._began)
        )
        return tuple(self.attempts)

    def rejected(self, now: float) -> None:
        """The answer is complete, and the caller does not take it: the next candidate may try. Nobody saw its text."""
        self.attempts.pop()
        self._record(self._active(), now, Failure(kind="Rejected", message="the caller rejected its answer"))
        self._text.clear()

    def reconsider(self) -> None:
        """The worker ended while this request waited for a place in it: nothing was tried. Ask :meth:`next` again."""
        self.undecided()
        self._waiting.appendleft(self._active())

    def undecided(self) -> None:
        """The request ended for a reason that is not the backend's."""
        self._circuits.undecided(key_of(self._active()), self)

    def failed(self, error: TarsError, now: float, *, incident: int, together: bool = False) -> None:
        """Note a failure; return where the next candidate may be tried, else raise what the caller gets.

        ``together``: the same ``incident`` ended other requests. Raises ``StreamInterrupted`` once text was delivered,
        and ``AllBackendsFailed`` when the whole time is up.
        """
        candidate = self._active()
        died = isinstance(error, WorkerDied)
        overdue = error.stage if isinstance(error, DeadlineExceeded) else None
        # The last candidate may have had only what others left of the time; neither a context that memory shrank nor a
        # request that needs what a model has not is a fault of the backend.
        if overdue == "total" or isinstance(error, ContextShrunk | BackendUnavailable):
            self.undecided()
        else:
            # Shared with others: a worker's end, a hang it is killed for, a load.
            shared = together or died or overdue is not None or self._stage == "load"
            self._circuits.failed(key_of(candidate), self, now, incident=incident if shared else None, died=died)
        self._record(candidate, now, Failure.of(error))
        outcome: TarsError | None = None
        if self._text:
            outcome = StreamInterrupted(partial_text=self.text, backend=candidate.backend, cause=error)
        elif now >= self._total_until:
            outcome = AllBackendsFailed(attempts=self.attempts)
        if outcome is not None:
            raise outcome from error

    def _record(self, candidate: Candidate, now: float, failure: Failure) -> None:
        self.attempts.append(
            Attempt(
                backend=candidate.backend,
                model=candidate.model,
                stage=self._stage,
                duration_s=now - self._began,
                failure=failure,
            )
        )

    def _active(self) -> Candidate:
        assert self._current is not None  # noqa: S101 - next() came before
        return self._current
