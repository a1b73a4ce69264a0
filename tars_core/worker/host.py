"""The host's side of one worker: load it once, then many requests at a time."""

from __future__ import annotations

import asyncio
import collections
import itertools
import sys
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from tars_core.types.errors import BackendError, DeadlineExceeded, GenerationFailed, LoadFailed, TarsError
from tars_core.types.events import BackendEvent, BackendFinished
from tars_core.types.messages import Message
from tars_core.types.request import EmbedRequest, GenerateRequest
from tars_core.types.results import Embeddings, Usage
from tars_core.worker.channel import Channel, ProcessChannel, ThreadChannel
from tars_core.worker.protocol import (
    Cancel,
    Embed,
    Embedded,
    Events,
    Failed,
    Generate,
    HostFrame,
    Item,
    Load,
    Loaded,
    LoadProgress,
    LoadRefused,
    Render,
    Rendered,
    Tokenize,
    Tokens,
    WorkerFrame,
)

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

OnProgress: TypeAlias = Callable[[float, str], None]
OnEnd: TypeAlias = Callable[["Worker"], None]
OnIdle: TypeAlias = Callable[[], None]
Limit: TypeAlias = Callable[[], "float | None"]
"""Asked when a place was found: the seconds that the answer may take from there."""
R = TypeVar("R", Rendered, Tokens, Embedded)

_CANCEL_GRACE_S = 5.0
"""A backend stops within a token; one that needs longer than this, and has nobody else to serve, is taken for hung."""

_serials = itertools.count(1)
"""Numbers of workers, and of what ends several requests at once."""


class WorkerGoneError(Exception):
    """The worker ended, by somebody else's fault, while a request waited for a place."""


class Request:
    """One request's events, in order. Ask with :meth:`next` until it finishes or raises."""

    def __init__(self, worker: Worker, request_id: int, *, takes_place: bool) -> None:
        self.id = request_id
        self.takes_place = takes_place
        self._worker = worker
        self._items: collections.deque[Item | TarsError] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False
        self.cancelled = False
        self.incident: int | None = None
        """By what it failed together with others; ``None`` where it failed alone, or with its worker."""

    def push(self, item: Item | TarsError) -> None:
        """Take what the worker sent."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, timeout_s: float | None) -> Item:
        """Return the next event.

        Raises ``asyncio.TimeoutError`` where none comes within ``timeout_s``, and the request's own error.
        """
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                # Not wait_for: before Python 3.12 it may lose a cancel that comes together with an event.
                async with timeout(timeout_s):
                    await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        if isinstance(item, TarsError):
            raise item
        return item

    def abandon(self) -> None:
        """Tell the worker to stop, unless the request has ended. Its slot is freed when the worker obeys."""
        self._worker.abandon(self)


class Worker:
    """One loaded model. Not reused after it ended: :attr:`dead` then holds why."""

    def __init__(self, plugin: str, on_end: OnEnd | None = None, on_idle: OnIdle | None = None) -> None:
        self.plugin = plugin
        self.serial = next(_serials)
        self.dead: BackendError | None = None
        self.blameless = False
        """It ended, and that says nothing about the backend."""
        self.loaded: Loaded | None = None
        self._on_end = on_end
        self._on_idle = on_idle
        self._channel: Channel | None = None
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count(1)
        self._outcome: asyncio.Future[Loaded] | None = None
        self._on_progress: OnProgress | None = None
        self._sign_of_life = 0.0
        self._slots: asyncio.Semaphore | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """The process, or ``None`` for a backend inside this one."""
        return self._channel.pid if self._channel else None

    @property
    def idle(self) -> bool:
        """Whether no request runs here or waits for a place."""
        return not self._requests and not (self._slots and self._slots.locked())

    @property
    def running(self) -> int:
        """How many requests run here."""
        return len(self._requests)

    @property
    def answers(self) -> bool:
        """Whether it is loaded, lives, and takes requests."""
        return self.loaded is not None and self.dead is None and not self._closing

    async def load(
        self,
        frame: Load,
        *,
        limit_s: float | None,
        plugin: object | None,
        python: str | None,
        on_progress: OnProgress,
    ) -> Loaded:
        """Start it and load the model.

        With ``plugin``, that object is run in a thread of this process; without, the plugin the frame names in a
        process of its own, run by ``python``. ``limit_s`` bounds the time without a sign of life. Raises
        ``LoadFailed``, ``WorkerDied`` or ``DeadlineExceeded``; it has been killed then.
        """
        loop = asyncio.get_running_loop()
        self._outcome = loop.create_future()
        self._outcome.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen even if unread
        self._on_progress = on_progress
        self._sign_of_life = loop.time()
        try:
            if plugin is not None:
                self._channel = ThreadChannel(self.plugin, plugin, self._on_frame, self._on_closed)
            else:
                self._channel = await ProcessChannel.open(
                    self.plugin, self._on_frame, self._on_closed, model=str(frame.model), python=python
                )
            self._channel.send(frame)
            while not self._outcome.done():
                left = None if limit_s is None else self._sign_of_life + limit_s - loop.time()
                if limit_s is not None and left is not None and left <= 0:
                    raise DeadlineExceeded(stage="load", limit_s=limit_s)
                await asyncio.wait((self._outcome,), timeout=left)
            self.loaded = self._outcome.result()
        except BaseException:
            self._closing = True  # its end is no incident of its own
            if self._channel is not None:
                self._channel.kill()
            raise
        self._slots = asyncio.Semaphore(max(1, self.loaded.concurrency))
        return self.loaded

    async def generate(self, request: GenerateRequest) -> Request:
        """Start a request as soon as one of the worker's places is free.

        Raises :class:`WorkerGoneError` where the worker ended before: this request has not been tried yet.
        """
        return await self._start(lambda number: Generate(request_id=number, request=request), takes_place=True)

    async def embed(self, request: EmbedRequest, limit: Limit) -> Embeddings:
        """Return the vectors of texts. Raises as :meth:`generate` and :meth:`Request.next`."""
        found = await self._ask(lambda n: Embed(request_id=n, request=request), Embedded, limit, takes_place=True)
        usage = Usage(prompt_tokens=found.prompt_tokens, completion_tokens=0)
        return Embeddings(data=found.data, count=found.count, dimensions=found.dimensions, usage=usage)

    async def render(self, messages: tuple[Message, ...], limit: Limit, template_options: str = "{}") -> str:
        """Return the prompt that the model's template makes of ``messages``."""

        def frame(number: int) -> Render:
            return Render(request_id=number, messages=messages, template_options=template_options)

        return (await self._ask(frame, Rendered, limit, takes_place=False)).prompt

    async def tokenize(self, prompt: str, limit: Limit) -> tuple[int, ...]:
        """Return the tokens of a prompt."""
        return (await self._ask(lambda n: Tokenize(request_id=n, prompt=prompt), Tokens, limit, takes_place=False)).ids

    async def _ask(self, frame: Callable[[int], HostFrame], kind: type[R], limit: Limit, *, takes_place: bool) -> R:
        request = await self._start(frame, takes_place=takes_place)
        try:
            item = await request.next(limit())
        finally:
            request.abandon()
        if not isinstance(item, kind):
            raise GenerationFailed(f"{self.plugin} sent {type(item).__name__}, not {kind.__name__}")
        return item

    async def _start(self, frame: Callable[[int], HostFrame], *, takes_place: bool) -> Request:
        assert self._slots is not None  # noqa: S101 - loaded before it is used
        if takes_place:
            await self._slots.acquire()
        request = Request(self, next(self._ids), takes_place=takes_place)
        try:
            if not self.answers or self._channel is None:
                raise WorkerGoneError
            self._channel.send(frame(request.id))
        except BaseException:
            if takes_place:
                self._slots.release()
            raise
        self._requests[request.id] = request
        return request

    def abandon(self, request: Request) -> None:
        """See :meth:`Request.abandon`."""
        if request.ended or request.cancelled or self._channel is None or self.dead is not None:
            return
        request.cancelled = True
        self._channel.send(Cancel(request_id=request.id))
        self._watch_cancel(request)

    def _watch_cancel(self, request: Request) -> None:
        asyncio.get_running_loop().call_later(_CANCEL_GRACE_S, self._kill_unless_ended, request)

    def _kill_unless_ended(self, request: Request) -> None:
        if request.ended:
            return
        # Others wait for the same native step. They have limits of their own, by which a hang is told from a long step.
        if any(not other.cancelled for other in self._requests.values()):
            self._watch_cancel(request)
            return
        self.blameless = True  # one caller's cancel is no incident of the backend's
        self.kill(GenerationFailed(f"{self.plugin} did not stop within {_CANCEL_GRACE_S:g} s of a cancel"))

    def kill(self, reason: BackendError) -> None:
        """End the process now; whoever still waits on it gets ``reason``, and nobody new comes."""
        self._on_closed(reason)
        if self._channel is not None:
            self._channel.kill()

    async def close(self) -> None:
        """End it in good order; return when it is gone, or cannot be ended. Nobody gets a place any more from here."""
        self._closing = True
        if self._channel is not None:
            await self._channel.close()

    def _on_frame(self, frame: WorkerFrame) -> None:
        match frame:
            case Events(items=items):
                together = sum(isinstance(item, Failed) for _, item in items) > 1  # a step of a batch
                incident = next(_serials) if together else None
                for request_id, item in items:
                    self._on_item(request_id, item, incident)
            case LoadProgress() if self._outcome is not None and not self._outcome.done():
                self._sign_of_life = asyncio.get_running_loop().time()
                if self._on_progress:
                    self._on_progress(frame.fraction, frame.note)
            case Loaded():
                self._settle(frame)
            case LoadRefused():
                self._settle(frame.failure.to_error(LoadFailed))

    def _on_item(self, request_id: int, item: Item, incident: int | None) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        request.incident = incident
        if not isinstance(item, BackendEvent) or isinstance(item, BackendFinished):
            self._end(request)
        request.push(item.failure.to_error(GenerationFailed) if isinstance(item, Failed) else item)

    def _end(self, request: Request) -> None:
        request.ended = True
        del self._requests[request.id]
        if request.takes_place and self._slots is not None:
            self._slots.release()
        if self._on_idle is not None and self.idle:  # its caller may have left before
            self._on_idle()

    def _settle(self, outcome: Loaded | TarsError) -> None:
        if self._outcome is None or self._outcome.done():
            return
        if isinstance(outcome, Loaded):
            self._outcome.set_result(outcome)
        else:
            self._outcome.set_exception(outcome)

    def _on_closed(self, error: BackendError) -> None:
        if self.dead is not None:
            return
        self.dead = error
        self._settle(error)
        for request in list(self._requests.values()):
            self._end(request)
            request.push(error)
        if self._on_end is not None and not self._closing:
            self._on_end(self)
