"""Which backends are left alone for a while, after what happened there.

Pure: time and randomness are passed in. After Envoy's outlier detection (consecutive failures eject, cool-downs grow
and decay, the last one stays) and Erlang's supervisors (a bounded number of restarts within a period).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from tars_core.types.models import ModelRef

Key: TypeAlias = tuple[str, ModelRef]
"""A backend's name and the form of the model."""
State: TypeAlias = Literal["closed", "open", "half-open", "quarantined"]
OnChange: TypeAlias = Callable[[Key, Literal["closed", "open", "quarantined"], float], None]
"""``on_change(key, state, pause_s)``."""


_REMEMBERED = 64
"""Incidents, for who comes late to tell of one."""


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
    decay_s: float = 3600.0
    """For each such period without a quarantine, the next one is half as long again."""


class _Circuit:
    def __init__(self) -> None:
        self.failures = 0
        self.openings = 0
        self.open_until = 0.0
        self.trial: object = None
        self.incidents: deque[int] = deque(maxlen=_REMEMBERED)
        self.deaths: deque[float] = deque()
        self.quarantines = 0
        self.quarantined_until = 0.0


class Circuits:
    """One circuit for each backend with a form of the model."""

    def __init__(self, policy: CircuitPolicy, rng: random.Random, on_change: OnChange | None = None) -> None:
        self._policy = policy
        self._rng = rng
        self._on_change = on_change
        self._circuits: dict[Key, _Circuit] = {}

    def state(self, key: Key, now: float) -> State:
        """Say whether requests may go there: ``half-open`` allows a single trial."""
        circuit = self._circuit(key)
        if now < circuit.quarantined_until:
            return "quarantined"
        if circuit.failures < self._policy.failures:
            return "closed" if now >= circuit.open_until else "open"
        return "half-open" if now >= circuit.open_until and circuit.trial is None else "open"

    def closed(self, key: Key, now: float) -> bool:
        """Say whether a request may go there, be it as the trial."""
        return self.state(key, now) in ("closed", "half-open")

    def quarantined(self, key: Key, now: float) -> bool:
        """Say whether its worker died too often of late; not even the last candidate is tried then."""
        return self.state(key, now) == "quarantined"

    def began(self, key: Key, request: object) -> None:
        """Note that a request went there; after a pause it is the one trial."""
        circuit = self._circuit(key)
        if circuit.trial is None and circuit.failures >= self._policy.failures:
            circuit.trial = request

    def succeeded(self, key: Key) -> None:
        """Close the circuit."""
        circuit = self._circuit(key)
        if circuit.failures >= self._policy.failures:
            self._changed(key, "closed", 0.0)
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

        Requests that failed by one ``incident`` (one worker's end, one load, one step of a batch) count once; ``None``
        is a failure of this request alone.
        """
        self.undecided(key, request)
        circuit = self._circuit(key)
        if incident is not None:
            if incident in circuit.incidents:
                return
            circuit.incidents.append(incident)
        if died:
            self._count_death(key, circuit, now)
        circuit.failures += 1
        # What failed while it was paused began before, or had no other choice: the pause grows only after a trial.
        if circuit.failures >= self._policy.failures and now >= circuit.open_until:
            pause = min(self._policy.cooldown_s * 2.0**circuit.openings, self._policy.cooldown_max_s)
            pause *= 1 + self._rng.random() / 4
            circuit.open_until = now + pause
            circuit.openings = min(circuit.openings + 1, 32)
            self._changed(key, "open", pause)

    def _count_death(self, key: Key, circuit: _Circuit, now: float) -> None:
        circuit.deaths.append(now)
        while circuit.deaths[0] < now - self._policy.death_period_s:
            circuit.deaths.popleft()
        if len(circuit.deaths) > self._policy.deaths:
            forgotten = int(max(0.0, now - circuit.quarantined_until) // self._policy.decay_s)
            circuit.quarantines = max(0, circuit.quarantines - forgotten)
            pause = min(self._policy.quarantine_s * 2.0**circuit.quarantines, self._policy.quarantine_max_s)
            circuit.quarantined_until = now + pause
            circuit.quarantines = min(circuit.quarantines + 1, 32)
            circuit.deaths.clear()
            self._changed(key, "quarantined", pause)

    def _changed(self, key: Key, state: Literal["closed", "open", "quarantined"], pause_s: float) -> None:
        if self._on_change is not None:
            self._on_change(key, state, pause_s)

    def _circuit(self, key: Key) -> _Circuit:
        return self._circuits.setdefault(key, _Circuit())
