"""What would be tried, by model: decided once for all who wait, and refreshed behind their backs."""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

from tars_core.planning.planner import Planner
from tars_core.runtime.failover import key_of
from tars_core.runtime.observers import Teller
from tars_core.runtime.pool import Pool
from tars_core.types.models import OfferedModel
from tars_core.types.observed import Probed
from tars_core.types.reports import BackendStatus
from tars_core.types.results import Decision

_FRESH_S = 30.0
"""How old a decision may be: a daemon that came up in the meantime is noticed after this."""
_KEPT = 256
"""Decisions; names of models come from callers."""

T = TypeVar("T")


class Decisions:
    """Asks the planner, which blocks, in a thread: one question at a time, whoever gives up waiting for it."""

    def __init__(self, planner: Planner, pool: Pool, tell: Teller) -> None:
        self._planner = planner
        self._pool = pool
        self._tell = tell
        self._known: collections.OrderedDict[str | None, tuple[Decision, float]] = collections.OrderedDict()
        """Each with the time until which it is fresh."""
        self._tasks: dict[tuple[str, str | None], asyncio.Task[object]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def get(self, wanted: str | None, *, refresh: bool = False) -> Decision:
        """Return what would be tried for a model, in order. Raises where nothing can be.

        Discovery happens once; probes are asked again after 30 s, after a failure, or on ``refresh``. While a candidate
        is loaded and answers, nobody waits for that.
        """
        known = self._known.get(wanted)
        if known is not None and not refresh:
            decision, fresh_until = known
            if time.monotonic() < fresh_until:
                return decision
            warm = self._pool.warm()
            if any(key_of(candidate) in warm for candidate in decision.candidates):
                self._shared("decide", wanted, lambda: self._decide(wanted))
                return decision
        return cast("Decision", await asyncio.shield(self._shared("decide", wanted, lambda: self._decide(wanted))))

    def doubt(self, wanted: str | None) -> None:
        """Note that facts have changed: the probes are asked again."""
        if (known := self._known.get(wanted)) is not None:
            self._known[wanted] = known[0], 0.0

    async def models(self) -> tuple[OfferedModel, ...]:
        """Return the models known by name."""
        task = self._shared("models", None, self._planner.models)
        return cast("tuple[OfferedModel, ...]", await asyncio.shield(task))

    async def statuses(self) -> tuple[BackendStatus, ...]:
        """Return the state of every installed plugin, quarantined ones included; crashed ones are tried anew."""
        task = self._shared("statuses", None, self._planner.statuses)
        return cast("tuple[BackendStatus, ...]", await asyncio.shield(task))

    async def close(self) -> None:
        """Cancel what is being asked; the thread goes on by itself."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _shared(self, what: str, wanted: str | None, ask: Callable[[], object]) -> asyncio.Task[object]:
        key = what, wanted
        task = self._tasks.get(key)
        if task is None or task.done():
            task = self._tasks[key] = asyncio.ensure_future(self._ask(what, wanted, ask))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen even if nobody waits
        return task

    async def _ask(self, what: str, wanted: str | None, ask: Callable[[], object]) -> object:
        try:
            async with self._one_at_a_time:
                answer = await in_daemon_thread(ask, name=f"tars-{what}")
            if isinstance(answer, Decision):
                self._known[wanted] = answer, time.monotonic() + _FRESH_S
                self._known.move_to_end(wanted)
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
                self._report(answer)
        except Exception:
            self._known.pop(wanted, None)  # where deciding fails, what was decided before does not hold either
            raise
        finally:
            self._tasks.pop((what, wanted), None)
        return answer

    def _decide(self, wanted: str | None) -> Decision:
        return self._planner.decide(wanted, self._pool.in_memory)

    def _report(self, decision: Decision) -> None:
        for candidate in decision.candidates:
            self._tell(Probed(backend=candidate.backend, model=candidate.model, available=True))
        for rejection in decision.rejected:
            self._tell(
                Probed(backend=rejection.backend, model=rejection.model, available=False, reason=rejection.reason)
            )


async def in_daemon_thread(function: Callable[[], T], *, name: str) -> T:
    """Run ``function`` in a thread that cannot keep the interpreter from ending, as an executor's would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", value))

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = function()
        except BaseException as raised:  # noqa: BLE001 - handed over to the waiting coroutine
            error = raised
            if isinstance(raised, StopIteration) or not isinstance(raised, Exception):
                # A future takes no StopIteration, and any other of these would end the loop.
                error = RuntimeError(f"a function called by the engine raised {type(raised).__name__}")
                error.__cause__ = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future
