"""A stream as its reader holds it: an iterator and a context manager, sync and async."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import os
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from tars_core.runtime.attempt import Sink
from tars_core.types.errors import EngineClosed
from tars_core.types.events import ReasoningDelta, StreamEvent, TextDelta, ToolCallDelta
from tars_core.types.results import Completion

if TYPE_CHECKING:
    from typing_extensions import Self

_WAITING = 64
"""Events a slow reader lets wait; beyond that the pieces of the text are joined. Nothing is dropped."""

_LOOK_S = 0.1

Held: TypeAlias = "weakref.ref[Stream] | weakref.ref[AsyncStream]"
Answering: TypeAlias = Callable[[Sink, Held], "concurrent.futures.Future[Completion]"]
"""Begins the answer of a stream; its events go to the sink, on another thread."""


class _Waiting:
    """The events that the reader has not fetched yet."""

    def __init__(self) -> None:
        self._events: collections.deque[StreamEvent] = collections.deque()
        self._lock = threading.Lock()

    def put(self, event: StreamEvent) -> bool:
        """Add an event; ``False`` where it was joined to the one before."""
        with self._lock:
            if len(self._events) >= _WAITING and (joined := _joined(self._events[-1], event)) is not None:
                self._events[-1] = joined
                return False
            self._events.append(event)
            return True

    def take(self) -> StreamEvent | None:
        """Return the next event, if there is one."""
        with self._lock:
            return self._events.popleft() if self._events else None


def _joined(one: StreamEvent, other: StreamEvent) -> StreamEvent | None:
    match one, other:
        case TextDelta(), TextDelta():
            return TextDelta(
                text=one.text + other.text,
                token_ids=one.token_ids + other.token_ids,
                logprobs=one.logprobs + other.logprobs,
            )
        case ReasoningDelta(), ReasoningDelta():
            return ReasoningDelta(text=one.text + other.text, token_ids=one.token_ids + other.token_ids)
        case ToolCallDelta(index=index), ToolCallDelta() if other.index == index:
            arguments = one.arguments + other.arguments
            return ToolCallDelta(index=index, id=one.id or other.id, name=one.name or other.name, arguments=arguments)
    return None


async def while_held(stream: Held, answer: Awaitable[Completion]) -> Completion:
    """Await ``answer``; cancel it where nobody holds its stream any more.

    Looked at from time to time, instead of a ``__del__``: Python loses a Ctrl-C that comes while that runs.
    """
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=_LOOK_S)
            if stream() is None:
                task.cancel()
    finally:
        task.cancel()
        await asyncio.wait((task,))
    return task.result()


class Stream(Iterator[StreamEvent]):
    """The events of one answer. Leaving its ``with`` block, or :meth:`close`, stops the generation at once."""

    def __init__(self, answering: Answering) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._answering = answering  # keeps the engine alive that nobody else may hold
        self._waiting = _Waiting()
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """One for each event that waits; ``False``: the end."""
        tickets, waiting = self._tickets, self._waiting

        def put(event: StreamEvent) -> None:
            if waiting.put(event):
                tickets.put(True)  # noqa: FBT003

        self._future = answering(put, weakref.ref(self))
        self._future.add_done_callback(lambda _: tickets.put(False))  # noqa: FBT003

    def __next__(self) -> StreamEvent:
        if self._closed:
            raise StopIteration
        if self._pid != os.getpid():
            raise EngineClosed  # in a forked child: the thread that fills the queue is the parent's
        try:
            goes_on = self._tickets.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._closed:
            raise StopIteration
        if goes_on and (event := self._waiting.take()) is not None:
            return event
        self._tickets.put(False)  # noqa: FBT003 - the end stays the end
        if self._future.cancelled():
            raise EngineClosed
        self._future.result()
        raise StopIteration

    def close(self) -> None:
        """Stop the generation, unless it has ended. May be called twice; no event comes afterwards."""
        self._closed = True
        if self._pid == os.getpid():
            self._future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(AsyncIterator[StreamEvent]):
    """The events of one answer. Leaving its ``async with`` block, or :meth:`aclose`, stops the generation at once."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._waiting = _Waiting()
        self._ready = asyncio.Event()
        self._future: concurrent.futures.Future[Completion] | None = None
        self._closed = False

    async def __anext__(self) -> StreamEvent:
        if self._closed:
            raise StopAsyncIteration
        if self._future is None:
            self._future = self._begin()
        while True:
            self._ready.clear()
            is_done = self._future.done()  # before the last look: what comes first is read first
            if (event := self._waiting.take()) is not None:
                return event
            if is_done:
                break
            try:
                await self._ready.wait()
            except BaseException:  # the task was cancelled
                self._stop()
                raise
        if self._closed:  # meanwhile, by another task
            raise StopAsyncIteration
        if self._future.cancelled():
            raise EngineClosed
        self._future.result()
        raise StopAsyncIteration

    def _begin(self) -> concurrent.futures.Future[Completion]:
        loop, ready, waiting = asyncio.get_running_loop(), self._ready, self._waiting

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ready.set)

        def put(event: StreamEvent) -> None:
            if waiting.put(event):
                wake()

        future = self._answering(put, weakref.ref(self))
        future.add_done_callback(lambda _: wake())
        return future

    async def aclose(self) -> None:
        """Stop the generation, unless it has ended. May be called twice; no event comes afterwards."""
        self._stop()

    def _stop(self) -> None:
        self._closed = True
        if self._future is not None:
            self._future.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
