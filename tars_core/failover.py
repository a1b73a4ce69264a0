"""What to do after what happened: the attempts of one request, and the circuits all requests share.

A state machine without I/O: time is passed in, randomness is passed in, and every answer is data.
After Envoy's outlier detection (consecutive failures eject, cool-downs grow, the last one stays) and Erlang's
supervisors (a bounded number of restarts within a period).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from tars_core.errors import AllBackendsFailed, DeadlineExceeded, StreamInterrupted, TarsError, WorkerDied
from tars_core.schema import Attempt, Candidate, Failure, ModelRef

Key: TypeAlias = tuple[str, ModelRef]
Stage: TypeAlias = Literal["load", "prompt", "stream"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds without progress, by stage, and for the whole request with all its attempts."""

    load_s: float = 300.0
    first_token_s: float = 120.0
    between_tokens_s: float = 30.0
    total_s: float = 900.0


class CircuitPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a backend is left alone for a while."""

    failures: int = 3
    """Consecutive failures that open the circuit."""
    cooldown_s: float = 2.0
    """The first pause; each further one is twice as long, with jitter up to a quarter."""
    cooldown_max_s: float = 120.0
    deaths: int = 5
    """A worker that dies more often than this within ``death_period_s`` is quarantined."""
    death_period_s: float = 60.0
    quarantine_s: float = 60.0
    """The first quarantine; each further one is twice as long."""
    quarantine_max_s: float = 3600.0


class _Circuit:
    def __init__(self) -> None:
        self.failures = 0
        self.openings = 0
        self.open_until = 0.0
        self.trial: object = None
        self.incident: int | None = None
        self.deaths: deque[float] = deque()
        self.quarantines = 0
        self.quarantined_until = 0.0


class Circuits:
    """One circuit for each backend with a form of the model."""

    def __init__(self, policy: CircuitPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._circuits: dict[Key, _Circuit] = {}

    def closed(self, key: Key, now: float) -> bool:
        """Say whether requests may go there: never failed much, or a single trial after the pause."""
        circuit = self._circuit(key)
        if self.quarantined(key, now) or now < circuit.open_until:
            return False
        return circuit.failures < self._policy.failures or circuit.trial is None

    def quarantined(self, key: Key, now: float) -> bool:
        """Say whether its worker died too often of late; not even the last candidate is tried then."""
        return now < self._circuit(key).quarantined_until

    def began(self, key: Key, request: object) -> None:
        """Note that a request went there; after a pause it is the one trial."""
        circuit = self._circuit(key)
        if circuit.trial is None and circuit.failures >= self._policy.failures:
            circuit.trial = request

    def succeeded(self, key: Key) -> None:
        """Close the circuit."""
        circuit = self._circuit(key)
        circuit.failures = circuit.openings = 0
        circuit.open_until = 0.0
        circuit.trial = None

    def undecided(self, key: Key, request: object) -> None:
        """Note that a request ended without saying anything about the backend: cancelled, or the caller's mistake.

        A trial is then still to be made; a request from before the pause leaves the trial under way alone.
        """
        circuit = self._circuit(key)
        if circuit.trial is request:
            circuit.trial = None

    def failed(self, key: Key, request: object, now: float, *, incident: int | None, died: bool) -> None:
        """Count a failure.

        Requests that failed by one ``incident`` (one worker's end, one load) count once; ``None`` is a failure of
        this request alone.
        """
        self.undecided(key, request)
        circuit = self._circuit(key)
        if incident is not None and circuit.incident == incident:
            return
        circuit.incident = incident
        if died:
            self._count_death(circuit, now)
        circuit.failures += 1
        # What failed while it was paused began before, or had no other choice: the pause grows only after a trial.
        if circuit.failures >= self._policy.failures and now >= circuit.open_until:
            pause = min(self._policy.cooldown_s * 2.0**circuit.openings, self._policy.cooldown_max_s)
            circuit.open_until = now + pause * (1 + self._rng.random() / 4)
            circuit.openings = min(circuit.openings + 1, 32)

    def _count_death(self, circuit: _Circuit, now: float) -> None:
        circuit.deaths.append(now)
        while circuit.deaths[0] < now - self._policy.death_period_s:
            circuit.deaths.popleft()
        if len(circuit.deaths) > self._policy.deaths:
            pause = self._policy.quarantine_s * 2.0**circuit.quarantines
            circuit.quarantined_until = now + min(pause, self._policy.quarantine_max_s)
            circuit.quarantines = min(circuit.quarantines + 1, 32)
            circuit.deaths.clear()

    def _circuit(self, key: Key) -> _Circuit:
        return self._circuits.setdefault(key, _Circuit())


class Attempts:
    """The course of one request. Ask :meth:`next`; tell what happened; on failure ask again.

    ``now`` is always a monotonic clock in seconds.
    """

    def __init__(self, candidates: Sequence[Candidate], limits: Limits, circuits: Circuits, *, now: float) -> None:
        self._waiting = deque(candidates)
        self._limits = limits
        self._circuits = circuits
        self._total_until = now + limits.total_s
        self._current: Candidate | None = None
        self._began = now
        self._stage: Stage = "load"
        self._text: list[str] = []
        self.attempts: list[Attempt] = []

    @property
    def text(self) -> str:
        """What was delivered so far."""
        return "".join(self._text)

    def next(self, now: float) -> Candidate:
        """Return whom to try now: the paused ones last. Raises ``AllBackendsFailed`` where nobody is left."""
        while self._waiting:
            candidate = self._waiting.popleft()
            key = (candidate.backend, candidate.model)
            untried = [c for c in self._waiting if self._circuits.closed((c.backend, c.model), now)]
            if self._circuits.quarantined(key, now):
                self._skip(candidate, "in quarantine: its process died too often", now)
            elif self._circuits.closed(key, now) or not untried:
                self._current, self._began, self._stage = candidate, now, "load"
                self._circuits.began(key, self)
                self.attempts = [a for a in self.attempts if (a.backend, a.model) != key]  # "paused" is over
                return candidate
            else:
                self._skip(candidate, "paused after repeated failures", now)
                self._waiting.append(candidate)
        raise AllBackendsFailed(attempts=self.attempts)

    def _skip(self, candidate: Candidate, reason: str, now: float) -> None:
        self._began, self._stage = now, "load"
        self._record(candidate, now, Failure(kind="Skipped", message=reason))

    def total_left(self, now: float) -> float:
        """Return the seconds left for the whole request."""
        return max(0.0, self._total_until - now)

    def wait_s(self, now: float) -> float:
        """Return how long the next event may take: the stage's limit, within the whole."""
        return min(self._stage_limit()[1], self.total_left(now))

    def expired(self, now: float) -> DeadlineExceeded:
        """Return the error for a wait that brought nothing."""
        if now >= self._total_until:
            return DeadlineExceeded(stage="total", limit_s=self._limits.total_s)
        stage, limit_s = self._stage_limit()
        return DeadlineExceeded(stage=stage, limit_s=limit_s)

    def _stage_limit(self) -> tuple[str, float]:
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
        self._circuits.succeeded((candidate.backend, candidate.model))
        self.attempts.append(
            Attempt(backend=candidate.backend, model=candidate.model, stage="done", duration_s=now - self._began)
        )
        return tuple(self.attempts)

    def undecided(self) -> None:
        """The request ended for a reason that is not the backend's."""
        candidate = self._active()
        self._circuits.undecided((candidate.backend, candidate.model), self)

    def failed(self, error: TarsError, now: float, *, incident: int) -> None:
        """Note a failure; return where the next candidate may be tried, else raise what the caller gets.

        Raises ``StreamInterrupted`` once text was delivered, and ``AllBackendsFailed`` when the whole time is up.
        """
        candidate = self._active()
        key = (candidate.backend, candidate.model)
        died = isinstance(error, WorkerDied)
        overdue = error.stage if isinstance(error, DeadlineExceeded) else None
        if overdue == "total":
            self._circuits.undecided(key, self)  # the last candidate may have had only what others left of the time
        else:
            # Shared with others: a worker's end, a hang it is killed for, a load.
            shared = died or overdue is not None or self._stage == "load"
            self._circuits.failed(key, self, now, incident=incident if shared else None, died=died)
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
