"""One candidate's try at one request."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from tars_core.runtime.failover import Attempts
from tars_core.runtime.pool import Place, Pool
from tars_core.types.errors import BackendUnavailable, DeadlineExceeded
from tars_core.types.events import BackendFinished, Progress, ReasoningDelta, StreamEvent, TextDelta, ToolCallDelta
from tars_core.types.messages import ToolCall
from tars_core.types.request import GenerateRequest
from tars_core.types.results import Completion, Decision, Timings, TokenLogprob
from tars_core.worker.host import Limit, Request, Worker

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

OnProgress: TypeAlias = Callable[[str, int], None]
"""``on_progress(backend, prompt_tokens_done)``."""
Sink: TypeAlias = Callable[[StreamEvent], None]
T = TypeVar("T")


class Try:
    """Loads if need be, generates, and passes the text on."""

    def __init__(self, pool: Pool, place: Place, attempts: Attempts, started: float, on_progress: OnProgress) -> None:
        self._pool = pool
        self._on_progress = on_progress
        self._place = place
        self._attempts = attempts
        self._started = started
        self._load_s: float | None = None
        self._first = self._last = 0.0
        self._tokens = 0
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCall] = {}
        self._logprobs: list[TokenLogprob] = []
        self._worker: Worker | None = None
        self._request: Request | None = None
        self.displaces = True
        """Whether another model may have to make room for this one."""

    @property
    def incident(self) -> int:
        """What this failure may have had in common with others': a step of a batch, or the worker's end."""
        return (self._request and self._request.incident) or (self._worker or self._place).serial

    @property
    def together(self) -> bool:
        """Whether others failed by the same step."""
        return self._request is not None and self._request.incident is not None

    async def run(self, request: GenerateRequest, sink: Sink, decision: Decision) -> Completion:
        """Return the answer.

        Raises :class:`~tars_core.worker.host.WorkerGoneError` where the worker ended before anything was tried.
        """
        worker = await self._load()
        check_features(self._place, request.needs(), worker)
        started = self._request = await self._bounded(worker.generate(request))
        self._worker = worker
        self._attempts.loaded()
        try:
            finished = await self._relay(worker, started, sink)
        finally:
            started.abandon()
        return self._completion(worker, finished, decision)

    async def ask(self, needs: frozenset[str], question: Callable[[Worker, Limit], Awaitable[T]]) -> T:
        """Return the answer to a question that is no generation. Raises as :meth:`run`."""
        worker = await self._load()
        check_features(self._place, needs, worker)
        self._worker = worker

        def limit() -> float | None:  # waiting for a place is no sign of a hang
            self._attempts.loaded()
            return self._attempts.wait_s(time.monotonic())

        try:
            answer = await self._bounded(question(worker, limit))
        except DeadlineExceeded:
            raise self._overdue(worker) from None
        self._attempts.finished(time.monotonic())
        return answer

    async def _load(self) -> Worker:
        began = time.monotonic()
        loaded_before = self._place.answers
        worker = await self._bounded(self._pool.worker(self._place, displaces=self.displaces))
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
                raise self._overdue(worker) from None
            match event:
                case TextDelta():
                    self._count(len(event.token_ids))
                    self._logprobs += event.logprobs
                    self._attempts.delivered(event.text)
                    sink(event)
                case ReasoningDelta():
                    self._count(len(event.token_ids))
                    self._reasoning.append(event.text)
                    self._attempts.delivered("")  # nobody else may think or call again for the same reader
                    sink(event)
                case ToolCallDelta():
                    self._count(0)
                    self._call(event)
                    self._attempts.delivered("")
                    sink(event)
                case Progress(prompt_tokens_done=done):
                    self._on_progress(self._place.candidate.backend, done)
                case BackendFinished():
                    return event

    def _overdue(self, worker: Worker) -> DeadlineExceeded:
        error = self._attempts.expired(time.monotonic())
        if error.stage != "total":
            worker.kill(error)  # it hangs; whoever shares it would wait in vain
        return error

    def _count(self, tokens: int) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._tokens += tokens or 1

    def _call(self, delta: ToolCallDelta) -> None:
        call = self._calls.get(delta.index, ToolCall(id="", name="", arguments=""))
        self._calls[delta.index] = ToolCall(
            id=call.id or delta.id, name=call.name or delta.name, arguments=call.arguments + delta.arguments
        )

    def _completion(self, worker: Worker, finished: BackendFinished, decision: Decision) -> Completion:
        now = time.monotonic()
        candidate = self._place.candidate
        decode_s = self._last - self._first
        measured = (self._tokens - 1) / decode_s if decode_s > 0 and self._tokens > 1 else None
        assert worker.loaded is not None  # noqa: S101 - it has just generated
        return Completion(
            text=self._attempts.text,
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            timings=Timings(
                load_s=self._load_s,
                ttft_s=self._first - self._started if self._first else None,
                # One token after the first is the least that has a speed.
                decode_tokens_per_s=(finished.timings.decode_tokens_per_s or measured)
                if finished.usage.completion_tokens > 1
                else None,
            ),
            backend=candidate.backend,
            model=candidate.model,
            device=worker.loaded.device,
            degraded=candidate.degraded,
            decision=decision,
            attempts=self._attempts.finished(now),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(call for _, call in sorted(self._calls.items())),
            logprobs=tuple(self._logprobs),
            warnings=self._place.warnings,
        )


def check_features(place: Place, needs: frozenset[str], worker: Worker) -> None:
    """Raise :class:`~tars_core.types.errors.BackendUnavailable` where the loaded model lacks what a request needs."""
    assert worker.loaded is not None  # noqa: S101 - it has just been loaded
    if lacking := needs - worker.loaded.features:
        backend = place.candidate.backend
        raise BackendUnavailable(
            f"{backend} cannot answer this request with {place.candidate.model}", reasons={backend: lacks(lacking)}
        )


def lacks(features: frozenset[str]) -> str:
    """Say which features are missing."""
    return f"it lacks the feature{'s' if len(features) > 1 else ''} {', '.join(sorted(features))}"
