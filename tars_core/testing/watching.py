"""For tests: wait for a condition instead of sleeping, and read what an engine tells its observers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tars_core.engine import InferenceEngine
from tars_core.types.observed import Observed

T = TypeVar("T")
E = TypeVar("E", bound=Observed)

_POLL_S = 0.01


def until(condition: Callable[[], T], what: str = "it did not come about", *, within_s: float = 30.0) -> T:
    """Return what ``condition`` gives once that is true; ``AssertionError`` with ``what`` after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(what)
        time.sleep(_POLL_S)
    return value


def told(engine: InferenceEngine) -> list[Observed]:
    """Return what observers are told, as it comes; all of it once the engine is closed."""
    events: list[Observed] = []
    engine.observe(events.append)
    return events


def of(events: Sequence[Observed], kind: type[E], backend: str | None = None) -> list[E]:
    """Return the events of one kind, of one backend or of all."""
    return [e for e in tuple(events) if isinstance(e, kind) and backend in (None, getattr(e, "backend", None))]
