"""The host's side of one worker: load it once, then many requests at a time."""

from __future__ import annotations

import asyncio
import collections
import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from tars_core.errors import BackendError, DeadlineExceeded, GenerationFailed, LoadFailed, TarsError
from tars_core.events import BackendEvent, BackendFinished
from tars_core.worker.channel import Channel, ProcessChannel, ThreadChannel
from tars_core.worker.protocol import (
    Cancel,
    Events,
    Failed,
    Generate,
    Load,
    Loaded,
    LoadProgress,
    LoadRefused,
    WorkerFrame,
)

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

if TYPE_CHECKING:
    from tars_core.schema import Message, SamplingParams

OnProgress: TypeAlias = Callable[[float, str], None]

_CANCEL_GRACE_S = 5.0
"""A backend stops within a token; one that needs longer than this is taken for hung."""

_serials = itertools.count(1)


class WorkerGoneError(Exception):
    """The worker ended, by somebody else's fault, while a request waited for a place."""


class Request:
    """One request's events, in order. Ask with :meth:`next` until it finishes or raises."""

    def __init__(self, worker: Worker, request_id: int) -> None:
        self.id = request_id
        self._worker = worker
        self._items: collections.deque[BackendEvent | TarsError] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False

    def push(self, item: BackendEvent | TarsError) -> None:
        """Take what the worker sent."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, timeout_s: float) -> BackendEvent:
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

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.serial = next(_serials)
        self.dead: BackendError | None = None
        self.loaded: Loaded | None = None
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

    async def load(self, frame: Load, *, limit_s: float, plugin: object | None, on_progress: OnProgress) -> Loaded:
        """Start it and load the model.

        With ``plugin``, that object is run in a thread of this process; without, the plugin the frame names in a
        process of its own. ``limit_s`` bounds the time without a sign of life. Raises ``LoadFailed``, ``WorkerDied`` or
        ``DeadlineExceeded``; nothing is left running then.
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
                self._channel = await ProcessChannel.open(self.plugin, self._on_frame, self._on_closed)
            self._channel.send(frame)
            while not self._outcome.done():
                left = self._sign_of_life + limit_s - loop.time()
                if left <= 0:
                    raise DeadlineExceeded(stage="load", limit_s=limit_s)
                await asyncio.wait((self._outcome,), timeout=left)
            self.loaded = self._outcome.result()
        except BaseException:
            if self._channel is not None:
                self._channel.kill()
                await self.close()
            raise
        self._slots = asyncio.Semaphore(max(1, self.loaded.concurrency))
        return self.loaded

    async def generate(self, *, messages: tuple[Message, ...], prompt: str | None, sampling: SamplingParams) -> Request:
        """Start a request as soon as one of the worker's places is free.

        Raises :class:`WorkerGoneError` where the worker ended before: this request has not been tried yet.
        """
        assert self._slots is not None  # noqa: S101 - loaded before it is used
        await self._slots.acquire()
        request = Request(self, next(self._ids))
        try:
            if self._closing or self.dead is not None or self._channel is None:
                raise WorkerGoneError
            self._channel.send(Generate(request_id=request.id, messages=messages, prompt=prompt, sampling=sampling))
        except BaseException:
            self._slots.release()
            raise
        self._requests[request.id] = request
        return request

    def abandon(self, request: Request) -> None:
        """See :meth:`Request.abandon`."""
        if request.ended or self._channel is None or self.dead is not None:
            return
        self._channel.send(Cancel(request_id=request.id))
        asyncio.get_running_loop().call_later(_CANCEL_GRACE_S, self._kill_unless_ended, request)

    def _kill_unless_ended(self, request: Request) -> None:
        if not request.ended:
            self.kill(GenerationFailed(f"{self.plugin} did not stop within {_CANCEL_GRACE_S:g} s of a cancel"))

    def kill(self, reason: BackendError) -> None:
        """End the process now; whoever still waits on it gets ``reason``, and nobody new comes."""
        self._on_closed(reason)
        if self._channel is not None:
            self._channel.kill()

    async def close(self) -> None:
        """End it in good order; return when it is gone. Nobody gets a place any more from here on."""
        self._closing = True
        if self._channel is not None:
            await self._channel.close()

    def _on_frame(self, frame: WorkerFrame) -> None:
        match frame:
            case Events(items=items):
                for request_id, item in items:
                    self._on_item(request_id, item)
            case LoadProgress():
                self._sign_of_life = asyncio.get_running_loop().time()
                if self._on_progress:
                    self._on_progress(frame.fraction, frame.note)
            case Loaded():
                self._settle(frame)
            case LoadRefused():
                self._settle(frame.failure.to_error(LoadFailed))

    def _on_item(self, request_id: int, item: BackendEvent | Failed) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if isinstance(item, Failed | BackendFinished):
            self._end(request)
        request.push(item.failure.to_error(GenerationFailed) if isinstance(item, Failed) else item)

    def _end(self, request: Request) -> None:
        request.ended = True
        del self._requests[request.id]
        if self._slots is not None:
            self._slots.release()

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
