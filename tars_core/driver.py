"""What an engine does on its event loop: decide, load, answer, fail over.

Everything here runs on the one private loop of :mod:`tars_core.engine`; no locks are needed beyond it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TypeAlias, TypeVar, cast

import msgspec

from tars_core import failover
from tars_core.errors import (
    DeadlineExceeded,
    EngineClosed,
    LoadFailed,
    Overloaded,
    RequestError,
    TarsError,
)
from tars_core.events import BackendFinished, Finished, Started, StreamEvent, TextDelta
from tars_core.planning import Planner
from tars_core.schema import (
    BackendStatus,
    Candidate,
    Completion,
    Decision,
    LoadOptions,
    Message,
    OfferedModel,
    SamplingParams,
    Timings,
)
from tars_core.settings import Settings
from tars_core.worker.host import Request, Worker, WorkerGoneError
from tars_core.worker.protocol import Load, Loaded

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

_log = logging.getLogger("tars_core.engine")

_DECISION_AGE_S = 30.0
"""How old a decision may be: a daemon that came up in the meantime is noticed after this."""

Sink: TypeAlias = Callable[[StreamEvent], None]
OnLoad: TypeAlias = Callable[[str, float, str], None]
"""``on_load(backend, fraction, note)``, called on the engine's own thread."""

T = TypeVar("T")


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the caller meant it."""

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    """Raw text instead of messages."""
    sampling: SamplingParams
    backend: str | None = None
    """Only this one; for benchmarks."""


class _Place:
    """Where a candidate's worker lives: none yet, loading, or loaded."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.loading: asyncio.Task[Worker] | None = None
        self.serial = 0
        """Of the worker loaded, or tried, last."""


class Driver:
    """The engine's asynchronous core."""

    def __init__(self, settings: Settings, plugins: Mapping[str, object], on_load: OnLoad | None) -> None:
        self.settings = settings
        self._planner = Planner(settings, plugins)
        self._on_load = on_load
        self._limits = failover.Limits(
            load_s=settings.limits.load_s,
            first_token_s=settings.limits.first_token_s,
            between_tokens_s=settings.limits.between_tokens_s,
            total_s=settings.limits.total_s,
        )
        self._circuits = failover.Circuits(failover.CircuitPolicy(), random.Random())  # noqa: S311 - jitter
        self._deciding = asyncio.Lock()
        self._planning = threading.Lock()
        """Held by the thread: it goes on where its caller was cancelled, and the planner is not made for two."""
        self._decision: tuple[Decision, float] | None = None
        self._places: dict[failover.Key, _Place] = {}
        self._calls: set[asyncio.Task[object]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._answering = 0
        self._closed = False
        self.last_answered: str | None = None

    async def run(self, work: Coroutine[None, None, T]) -> T:
        """Await what a caller asked for; :meth:`close` cancels it."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        self._calls.add(task)
        try:
            if self._closed:
                work.close()
                raise EngineClosed
            return await work
        finally:
            self._calls.discard(task)

    # ---- deciding ------------------------------------------------------------------------------

    async def decide(self, *, refresh: bool = False) -> Decision:
        """Return what would be tried, in order. Raises where nothing can be.

        Discovery happens once; probes are asked again after 30 s, after a failure, or on ``refresh``.
        """
        async with self._deciding:
            if self._decision is not None and not refresh:
                decision, made = self._decision
                if time.monotonic() - made < _DECISION_AGE_S:
                    return decision
            self._decision = None  # where deciding fails, what was decided before does not hold either
            decision = await _in_daemon_thread(self._alone, self._planner.decide, self._running_keys())
            self._decision = decision, time.monotonic()
            return decision

    async def models(self) -> tuple[OfferedModel, ...]:
        """Return the models known by name."""
        async with self._deciding:
            return await _in_daemon_thread(self._alone, self._planner.models)

    async def statuses(self) -> tuple[BackendStatus, ...]:
        """Return the state of every installed plugin, quarantined ones included; crashed ones are tried anew."""
        async with self._deciding:
            return await _in_daemon_thread(self._alone, self._planner.statuses)

    def _alone(self, function: Callable[..., T], *arguments: object) -> T:
        with self._planning:
            return function(*arguments)

    def _running_keys(self) -> frozenset[failover.Key]:
        return frozenset(key for key, place in self._places.items() if place.worker and place.worker.dead is None)

    # ---- answering -----------------------------------------------------------------------------

    async def answer(self, ask: Ask, sink: Sink) -> Completion:
        """Answer one request; ``sink`` gets every event of its stream, on this loop's thread."""
        if self._answering >= self.settings.max_queue:
            raise Overloaded(
                f"{self._answering} requests are running or waiting, max_queue is {self.settings.max_queue}",
                hint="try again in a moment, or raise max_queue",
            )
        self._answering += 1
        try:
            return await self._answer(ask, sink)
        finally:
            self._answering -= 1

    async def _answer(self, ask: Ask, sink: Sink) -> Completion:
        started = time.monotonic()
        try:
            async with timeout(self._limits.total_s):
                decision = await self.decide()
        except asyncio.TimeoutError:
            raise DeadlineExceeded(stage="total", limit_s=self._limits.total_s) from None
        sink(Started(decision=decision))
        candidates = [c for c in decision.candidates if ask.backend in (None, c.backend)]
        attempts = failover.Attempts(candidates, self._limits, self._circuits, now=started)
        while True:
            candidate = attempts.next(time.monotonic())
            _log.info("asking %s for %s (%s)", candidate.backend, candidate.model, ", ".join(candidate.reasons))
            place = self._places.setdefault((candidate.backend, candidate.model), _Place())
            attempt = _Attempt(self, place, candidate, attempts, started)
            try:
                completion = await attempt.run(ask, sink, decision)
            except TarsError as error:
                if isinstance(error, RequestError) and not attempts.text:
                    attempts.undecided()
                    raise
                _log.info("%s failed: %s", candidate.backend, error)
                self._decision = None  # facts have changed; the next request asks the probes again
                attempts.failed(error, time.monotonic(), incident=attempt.incident)
            except BaseException:
                attempts.undecided()
                raise
            else:
                self.last_answered = candidate.backend
                sink(Finished(completion=completion))
                return completion

    async def load(self) -> Loaded:
        """Load the first candidate, unless it is loaded."""
        candidate = (await self.decide()).candidates[0]
        place = self._places.setdefault((candidate.backend, candidate.model), _Place())
        worker = await self.loaded_worker(place, candidate)
        assert worker.loaded is not None  # noqa: S101 - it has just been loaded
        return worker.loaded

    async def loaded_worker(self, place: _Place, candidate: Candidate) -> Worker:
        """Return the candidate's worker, loading it unless it lives; requests that come meanwhile share the load."""
        if place.worker is not None and place.worker.dead is None:
            return place.worker
        if place.loading is None or place.loading.done():
            place.loading = asyncio.ensure_future(self._load(place, candidate))
            place.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded: one caller who gives up must not end the load the others wait for.
        return await asyncio.shield(place.loading)

    async def _load(self, place: _Place, candidate: Candidate) -> Worker:
        # One model in memory at a time, unless the others are at work: what died must be gone, what idles goes.
        others = [p for p in self._places.values() if p.worker is not None and (p is place or p.worker.idle)]
        for other in others:
            worker, other.worker = other.worker, None
            if worker is not None:
                await self._put_away(worker)
        target, value = self._planner.plugin(candidate.backend)
        worker = Worker(candidate.backend)
        place.serial = worker.serial
        try:
            loaded = await worker.load(
                Load(
                    plugin=candidate.backend,
                    target=target or "",
                    model=candidate.model,
                    options=LoadOptions(
                        device=self.settings.require_device or self.settings.device,
                        context_length=self.settings.context_length,
                        threads=self.settings.threads,
                        gpu_layers=self.settings.gpu_layers,
                        concurrency=self.settings.concurrency,
                        allow_download=self.settings.allow_download,
                        backend_settings=self._planner.backend_settings(candidate.backend),
                    ),
                ),
                limit_s=self._limits.load_s,
                plugin=value if target is None or self.settings.isolation == "none" else None,
                on_progress=lambda fraction, note: self._tell(candidate.backend, fraction, note),
            )
        finally:
            self._tell(candidate.backend, 1.0, "")
        _log.info("%s loaded: %s", candidate.backend, loaded)
        if self.settings.require_device == "gpu" and loaded.device == "cpu":
            await self._put_away(worker)
            raise LoadFailed(f"{candidate.backend} loaded the model on the CPU, and a GPU is required")
        if self.settings.device == "gpu" and loaded.device == "cpu":
            _log.warning("%s runs on the CPU, not on a GPU; require_device='gpu' forbids it", candidate.backend)
        wanted = self.settings.context_length
        if wanted is not None and loaded.context_length < wanted:
            _log.warning("%s has a context of %d tokens, not of %d", candidate.backend, loaded.context_length, wanted)
        place.worker = worker
        return worker

    async def _put_away(self, worker: Worker) -> None:
        """End a worker that nobody can reach any more, also where the caller is cancelled meanwhile."""
        ending = asyncio.ensure_future(worker.close())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.shield(ending)

    def _tell(self, backend: str, fraction: float, note: str) -> None:
        if self._on_load is None:
            return
        try:
            self._on_load(backend, fraction, note)
        except Exception:  # noqa: BLE001 - an observer must not stop the load
            _log.exception("on_load raised and is not called again")
            self._on_load = None

    async def close(self) -> None:
        """Cancel what runs and end every worker."""
        self._closed = True
        await _cancelled(self._calls)
        await _cancelled(place.loading for place in self._places.values() if place.loading is not None)
        workers = [p.worker for p in self._places.values() if p.worker is not None]
        await asyncio.gather(*self._ending, *(worker.close() for worker in workers))
        self._places.clear()


class _Attempt:
    """One candidate's try at one request."""

    def __init__(
        self, driver: Driver, place: _Place, candidate: Candidate, attempts: failover.Attempts, started: float
    ) -> None:
        self._driver = driver
        self._place = place
        self._candidate = candidate
        self._attempts = attempts
        self._started = started
        self._load_s: float | None = None
        self._first = self._last = 0.0
        self._tokens = 0
        self._worker: Worker | None = None

    @property
    def incident(self) -> int:
        """Which worker's end this failure may have been."""
        return self._worker.serial if self._worker else self._place.serial

    async def run(self, ask: Ask, sink: Sink, decision: Decision) -> Completion:
        """Load if need be, generate, and pass the text on."""
        worker, request = await self._begin(ask)
        self._worker = worker
        self._attempts.loaded()
        try:
            finished = await self._relay(worker, request, sink)
        finally:
            request.abandon()
        return self._completion(worker, finished, decision)

    async def _begin(self, ask: Ask) -> tuple[Worker, Request]:
        while True:
            worker = await self._load()
            start = worker.generate(messages=ask.messages, prompt=ask.prompt, sampling=ask.sampling)
            try:
                return worker, await self._bounded(start)
            except WorkerGoneError:
                continue  # it died of another request, or was put away, while this one waited; nothing was tried yet

    async def _load(self) -> Worker:
        began = time.monotonic()
        loaded_before = self._place.worker is not None and self._place.worker.dead is None
        worker = await self._bounded(self._driver.loaded_worker(self._place, self._candidate))
        if not loaded_before:
            self._load_s = time.monotonic() - began
        return worker

    async def _bounded(self, step: Awaitable[T]) -> T:
        """Await a step that has limits of its own, or none, within the request's whole time."""
        try:
            async with timeout(self._attempts.total_left(time.monotonic())):
                return await step
        except asyncio.TimeoutError:
            raise self._attempts.expired(time.monotonic()) from None

    async def _relay(self, worker: Worker, request: Request, sink: Sink) -> BackendFinished:
        while True:
            try:
                event = await request.next(self._attempts.wait_s(time.monotonic()))
            except asyncio.TimeoutError:
                error = self._attempts.expired(time.monotonic())
                if error.stage != "total":
                    worker.kill(error)  # it hangs; whoever shares it would wait in vain
                raise error from None
            if isinstance(event, BackendFinished):
                return event
            if isinstance(event, TextDelta):
                self._last = time.monotonic()
                self._first = self._first or self._last
                self._tokens += len(event.token_ids) or 1
                self._attempts.delivered(event.text)
                sink(event)

    def _completion(self, worker: Worker, finished: BackendFinished, decision: Decision) -> Completion:
        now = time.monotonic()
        decode_s = self._last - self._first
        measured = (self._tokens - 1) / decode_s if decode_s > 0 else None
        assert worker.loaded is not None  # noqa: S101 - it has just generated
        return Completion(
            text=self._attempts.text,
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            timings=Timings(
                load_s=self._load_s,
                ttft_s=self._first - self._started if self._first else None,
                decode_tokens_per_s=finished.timings.decode_tokens_per_s or measured,
            ),
            backend=self._candidate.backend,
            model=self._candidate.model,
            device=worker.loaded.device,
            degraded=self._candidate.degraded,
            decision=decision,
            attempts=self._attempts.finished(now),
        )


async def _cancelled(tasks: Iterable[asyncio.Task[T]]) -> None:
    """Cancel ``tasks``; return when they have ended."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def _in_daemon_thread(function: Callable[..., T], *arguments: object) -> T:
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
            value = function(*arguments)
        except BaseException as raised:  # noqa: BLE001 - handed over to the waiting coroutine
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="tars-decide", daemon=True).start()
    return await future
