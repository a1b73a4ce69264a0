"""What an engine does on its event loop: decide, load, answer, fail over.

Everything here runs on one loop, the private one of :mod:`.portal` or an application's own; no locks are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec

from tars_core.config.settings import Settings
from tars_core.planning.planner import Planner
from tars_core.runtime import failover
from tars_core.runtime.attempt import Sink, Try, lacks
from tars_core.runtime.circuits import CircuitPolicy, Circuits, Key
from tars_core.runtime.decisions import Decisions, in_daemon_thread
from tars_core.runtime.failover import Attempts
from tars_core.runtime.observers import Observers, Teller
from tars_core.runtime.pool import Place, Pool
from tars_core.types.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    EngineClosed,
    Overloaded,
    RequestError,
    TarsError,
)
from tars_core.types.events import Finished, Started
from tars_core.types.failures import Attempt, Failure
from tars_core.types.messages import Message
from tars_core.types.models import OfferedModel
from tars_core.types.observed import AttemptEnded, CircuitChanged, PromptRead, RequestEnded, RequestStarted
from tars_core.types.reports import BackendStatus, LoadedStatus
from tars_core.types.request import EmbedRequest, GenerateRequest, SamplingParams, Task
from tars_core.types.results import Candidate, Completion, Decision, Embeddings, Rejection
from tars_core.worker.host import Limit, Worker, WorkerGoneError

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

_log = logging.getLogger("tars_core.engine")

_LEAST = GenerateRequest(prompt="Hi", sampling=SamplingParams(temperature=0, max_tokens=1))
"""What a backend is tried with after a pause; where it can only chat, the same as a message."""
_LEAST_CHAT = msgspec.structs.replace(_LEAST, prompt="", messages=(Message(role="user", content="Hi"),))

T = TypeVar("T")


class Ask(NamedTuple):
    """One request as the caller meant it."""

    request: GenerateRequest
    """With messages, or with a raw prompt."""
    model: str | None = None
    """The name of a model; ``None``: the setting's."""
    backend: str | None = None
    """Only this one; for benchmarks."""
    fallback_on: Callable[[Completion], bool] | None = None
    """Whether the next candidate is to answer instead."""


class Driver:
    """The engine's asynchronous core. An application with a loop of its own may use it there directly."""

    def __init__(
        self, settings: Settings, plugins: Mapping[str, object] | None = None, observers: Observers | None = None
    ) -> None:
        limits = settings.limits
        self.settings = settings
        self._tell = Teller(observers if observers is not None else Observers())
        self._planner = Planner(settings, plugins or {})
        self._limits = failover.Limits(
            load_s=limits.load_s,
            first_token_s=limits.first_token_s,
            between_tokens_s=limits.between_tokens_s,
            total_s=limits.total_s,
        )
        self._circuits = Circuits(CircuitPolicy(), random.Random(), self._on_circuit)  # noqa: S311 - jitter
        self._pool = Pool(settings, self._planner, self._circuits, self._tell)
        self._decisions = Decisions(self._planner, self._pool, self._tell)
        self._calls: set[asyncio.Task[object]] = set()
        self._trials: dict[Place, asyncio.Task[None]] = {}
        self._ids = itertools.count(1)
        self._answering = 0
        self._closed = False
        self.last_answered: dict[str | None, str] = {}
        """By the model that was asked for: the backend."""

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

    # ---- what would happen, and what is there --------------------------------------------------

    async def decide(self, model: str | None = None, *, refresh: bool = False) -> Decision:
        """Return what would be tried for a model, in order. Raises where nothing can be."""
        return await self._decisions.get(model, refresh=refresh)

    async def models(self) -> tuple[OfferedModel, ...]:
        """Return the models known by name."""
        return await self._decisions.models()

    async def statuses(self) -> tuple[BackendStatus, ...]:
        """Return the state of every installed plugin, quarantined ones included; crashed ones are tried anew."""
        return await self._decisions.statuses()

    async def loaded(self) -> tuple[LoadedStatus, ...]:
        """Return the models in memory."""
        return self._pool.loaded()

    async def load(self, model: str | None = None) -> LoadedStatus:
        """Load the first candidate for a model, unless it is loaded. Nobody takes over."""
        decision = await self.decide(model)
        place = self._pool.place(decision.model, decision.candidates[0])
        self._pool.hold(place)
        try:
            worker = await self._pool.worker(place)
            return self._pool.status(place, worker)
        finally:
            self._pool.release(place)

    async def unload(self, model: str | None = None) -> None:
        """End the workers of a model, or all, each when its requests are done."""
        await self._pool.unload(self._pool.find(model))

    # ---- answering -----------------------------------------------------------------------------

    async def answer(self, ask: Ask, sink: Sink) -> Completion:
        """Answer one request; ``sink`` gets every event of its stream, on this loop's thread."""
        return await self._counted(ask.model, lambda number: self._answer(ask, sink, number))

    async def _counted(self, model: str | None, work: Callable[[int], Awaitable[T]]) -> T:
        """Do the work of one request, and tell the observers of its beginning and its end."""
        if self._answering >= self.settings.max_queue:
            raise Overloaded(
                f"{self._answering} requests are running or waiting, max_queue is {self.settings.max_queue}",
                hint="try again in a moment, or raise max_queue",
            )
        if self._closed:
            raise EngineClosed
        number, began = next(self._ids), time.monotonic()
        self._answering += 1
        self._tell(RequestStarted(request_id=number, model=model))
        answer: T | None = None
        failure: Failure | None = None
        try:
            answer = await work(number)
        except asyncio.CancelledError:
            failure = Failure(kind="Cancelled", message="the caller gave up")
            raise
        except Exception as error:
            failure = Failure.of(error)
            raise
        finally:
            self._answering -= 1
            self._tell(
                RequestEnded(
                    request_id=number,
                    model=model,
                    duration_s=time.monotonic() - began,
                    completion=answer if isinstance(answer, Completion) else None,
                    failure=failure,
                )
            )
        return answer

    async def _answer(self, ask: Ask, sink: Sink, number: int) -> Completion:
        started = time.monotonic()
        decided = await self._in_time(self.decide(ask.model))
        decision = self._suited(decided, ask.request.needs(), "generate", ask.backend)
        sink(Started(decision=decision))

        async def accepted(attempt: Try) -> Completion | None:
            completion = await attempt.run(ask.request, sink, decision)
            judge = ask.fallback_on
            if judge is None:
                return completion
            # In a thread: it is not known what a caller's function does.
            refused = await in_daemon_thread(lambda: judge(completion), name="tars-judge")
            return None if refused else completion

        completion = await self._first(decision, ask.model, "generate", number, accepted, started)
        self.last_answered[ask.model] = completion.backend
        sink(Finished(completion=completion))
        return completion

    async def _first(  # noqa: PLR0913, PLR0917 - what there is to know of a request
        self,
        decision: Decision,
        model: str | None,
        task: Task,
        number: int,
        run: Callable[[Try], Awaitable[T | None]],
        started: float,
    ) -> T:
        """Return what the first candidate brings that neither fails nor is refused, which is ``None``."""

        def on_progress(backend: str, done: int) -> None:
            self._tell(PromptRead(request_id=number, backend=backend, prompt_tokens_done=done))

        attempts = Attempts(decision.candidates, self._limits, self._circuits, now=started)
        told: list[Attempt] = []
        while True:
            candidate = attempts.next(time.monotonic(), self._pool.warm(task))
            self._try_again(attempts, decision.model, task)
            _log.info("asking %s for %s (%s)", candidate.backend, candidate.model, ", ".join(candidate.reasons))
            place = self._pool.place(decision.model, candidate, task)
            attempt = Try(self._pool, place, attempts, started, on_progress)
            self._pool.hold(place)
            try:
                if (answer := await run(attempt)) is not None:
                    return answer
                attempts.rejected(time.monotonic())
            except WorkerGoneError:
                attempts.reconsider()
            except TarsError as error:
                if isinstance(error, EngineClosed) or (isinstance(error, RequestError) and not attempts.text):
                    attempts.undecided()
                    raise
                _log.info("%s failed: %s", candidate.backend, error)
                self._decisions.doubt(model)
                attempts.failed(error, time.monotonic(), incident=attempt.incident, together=attempt.together)
            except BaseException:
                attempts.undecided()
                raise
            finally:
                self._pool.release(place)
                for ended in attempts.attempts:
                    if ended not in told:
                        told.append(ended)
                        self._tell(AttemptEnded(request_id=number, attempt=ended))

    def _suited(self, decision: Decision, needs: frozenset[str], task: Task, only: str | None = None) -> Decision:
        """Return the decision without candidates that are known to lack what the request needs."""
        unsuited: list[Rejection] = []
        for candidate in decision.candidates:
            known = self._pool.features(candidate, task)
            if known is not None and (lacking := needs - known):
                unsuited.append(Rejection(backend=candidate.backend, model=candidate.model, reason=lacks(lacking)))
            elif only not in (None, candidate.backend):
                unsuited.append(
                    Rejection(backend=candidate.backend, model=candidate.model, reason=f"only {only} was asked for")
                )
        if not unsuited:
            return decision
        left_out = {(r.backend, r.model) for r in unsuited}
        kept = tuple(c for c in decision.candidates if (c.backend, c.model) not in left_out)
        if not kept:
            raise failover.unanswerable(decision.model, [f"{r.backend}: {r.reason}" for r in unsuited])
        return msgspec.structs.replace(decision, candidates=kept, rejected=(*decision.rejected, *unsuited))

    async def _in_time(self, step: Awaitable[T]) -> T:
        try:
            async with timeout(self._limits.total_s):
                return await step
        except asyncio.TimeoutError:
            raise DeadlineExceeded(stage="total", limit_s=self._limits.total_s or 0.0) from None

    def _try_again(self, attempts: Attempts, name: str, task: Task) -> None:
        """Give those whose pause is over their trial, behind the caller's back.

        Not where it would displace who answers: then they are tried when that one fails.
        """
        while attempts.for_trial:
            candidate = attempts.for_trial.pop()
            place = self._pool.place(name, candidate, task)
            if place not in self._trials and self._pool.fits(place):
                trial = self._trials[place] = asyncio.ensure_future(self._trial(name, candidate, task))
                trial.add_done_callback(lambda _, place=place: self._trials.pop(place, None))  # type: ignore[misc]

    async def _trial(self, name: str, candidate: Candidate, task: Task) -> None:
        """Load a model and have it answer a request of the least size; the circuit learns of the outcome."""
        decision = Decision(model=name, candidates=(candidate,), rejected=())

        async def least(attempt: Try) -> Completion | Embeddings:
            attempt.displaces = False
            if task == "generate":
                with contextlib.suppress(BackendUnavailable):  # it cannot continue raw text
                    return await attempt.run(_LEAST, lambda _: None, decision)
                return await attempt.run(_LEAST_CHAT, lambda _: None, decision)
            request = EmbedRequest(texts=("a",), query="a" if task == "rerank" else None)
            return await attempt.ask(frozenset(), lambda worker, limit: worker.embed(request, limit))

        try:
            await self._first(decision, None, task, 0, least, time.monotonic())
        except TarsError as error:
            _log.info("the trial of %s failed: %s", candidate.backend, error)

    # ---- other questions -----------------------------------------------------------------------

    async def tokenize(self, model: str | None, messages: Sequence[Message], prompt: str | None) -> tuple[int, ...]:
        """Return the tokens of a prompt, or of what the model's template makes of ``messages``."""

        async def question(worker: Worker, limit: Limit) -> tuple[int, ...]:
            text = prompt if prompt is not None else await worker.render(tuple(messages), limit)
            return await worker.tokenize(text, limit)

        return await self._counted(
            model, lambda number: self._asked(model, "generate", frozenset({"tokenize"}), question, number)
        )

    async def embed(self, model: str | None, request: EmbedRequest) -> Embeddings:
        """Return the vectors of texts; with a query, their scores."""
        task: Task = "embed" if request.query is None else "rerank"
        feature = "embeddings" if request.query is None else "rerank"
        return await self._counted(
            model,
            lambda number: self._asked(
                model, task, frozenset({feature}), lambda worker, limit: worker.embed(request, limit), number
            ),
        )

    async def _asked(
        self,
        model: str | None,
        task: Task,
        needs: frozenset[str],
        question: Callable[[Worker, Limit], Awaitable[T]],
        number: int,
    ) -> T:
        started = time.monotonic()
        decision = self._suited(await self._in_time(self.decide(model)), needs, task)
        return await self._first(decision, model, task, number, lambda attempt: attempt.ask(needs, question), started)

    # ---- the end -------------------------------------------------------------------------------

    def _on_circuit(self, key: Key, state: Literal["closed", "open", "quarantined"], pause_s: float) -> None:
        self._tell(CircuitChanged(backend=key[0], model=key[1], state=state, pause_s=pause_s))

    async def close(self) -> None:
        """Cancel what runs and end every worker."""
        self._closed = True
        await _cancelled(self._calls)
        await _cancelled(self._trials.values())
        await self._decisions.close()
        await self._pool.close()


async def _cancelled(tasks: Iterable[asyncio.Task[T]]) -> None:
    """Cancel ``tasks``; return when they have ended."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
