"""Between an application's threads and the engine's event loop: one private thread, and a driver on it."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import TypeVar

from tars_core.config.settings import Settings
from tars_core.runtime.driver import Ask, Driver
from tars_core.runtime.observers import Observers
from tars_core.runtime.streams import AsyncStream, Stream, while_held
from tars_core.types.errors import EngineClosed, TarsError

T = TypeVar("T")


class Portal:
    """Starts the thread with the first question. Safe to use from several threads.

    Neither the thread nor what runs on it leads back here: who forgets the engine ends it.
    """

    _loop: asyncio.AbstractEventLoop | None
    _thread: threading.Thread | None
    _shut_down: weakref.finalize[..., Portal] | None = None
    driver: Driver | None
    """``None`` before the first question and after the end."""

    def __init__(self, settings: Settings, plugins: Mapping[str, object], observers: Observers) -> None:
        self._settings = settings
        self._plugins = plugins
        self._observers = observers
        self._closed = False
        self.start_anew()
        _portals.add(self)

    def start_anew(self) -> None:
        """Begin without a thread; in a forked child, where thread and workers are the parent's, once more."""
        self._lock = threading.Lock()
        if self._shut_down is not None:
            self._shut_down.detach()
            self._observers.start_anew()
        self._loop = self._thread = self.driver = self._shut_down = None

    def wait(self, call: Callable[[Driver], Coroutine[None, None, T]]) -> T:
        """Return what ``call`` brings, for a thread."""
        future = self._submit(call)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineClosed from None
        finally:
            future.cancel()  # Ctrl-C in this thread must not leave the request running

    async def wait_async(self, call: Callable[[Driver], Coroutine[None, None, T]]) -> T:
        """Return what ``call`` brings, for a coroutine on whatever loop."""
        future = self._submit(call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed:
                raise EngineClosed from None
            raise
        finally:
            future.cancel()

    def stream(self, ask: Ask) -> Stream:
        """Begin an answer, for a thread."""
        return Stream(lambda sink, held: self._submit(lambda driver: while_held(held, driver.answer(ask, sink))))

    def stream_async(self, ask: Ask) -> AsyncStream:
        """Return an answer that begins with its first event, for a coroutine."""
        return AsyncStream(lambda sink, held: self._submit(lambda driver: while_held(held, driver.answer(ask, sink))))

    def _submit(self, call: Callable[[Driver], Coroutine[None, None, T]]) -> concurrent.futures.Future[T]:
        if threading.current_thread() is self._thread:
            raise TarsError("the engine cannot be called from its own thread")
        with self._lock:
            if self._closed:
                raise EngineClosed
            if self._loop is None or self.driver is None:
                loop = asyncio.new_event_loop()
                driver = Driver(self._settings, self._plugins, self._observers)
                thread = threading.Thread(target=_run, args=(loop,), name="tars-engine", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    loop.close()
                    raise TarsError(f"the engine cannot start its thread: {error}") from error
                self._loop, self.driver, self._thread = loop, driver, thread
                # Also where the engine is forgotten without close(); at exit _close_all does it, and waits.
                self._shut_down = weakref.finalize(self, _shut_down, loop, driver)
                self._shut_down.atexit = False
            return asyncio.run_coroutine_threadsafe(self.driver.run(call(self.driver)), self._loop)

    def close(self) -> None:
        """End all workers and the thread; may be called twice, from any thread but the engine's own."""
        if threading.current_thread() is self._thread:
            raise TarsError("the engine cannot be closed from its own thread")
        with self._lock:
            self._closed = True
            thread, shut_down = self._thread, self._shut_down
            self.driver = None
        if thread is not None and shut_down is not None:
            # Not called but taken apart: at interpreter exit a finalizer does nothing. None: another close() is at it.
            if (ours := shut_down.detach()) is not None:
                ours[1](*ours[2]).result()
            thread.join()
        self._observers.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, driver: Driver) -> concurrent.futures.Future[None]:
    """Begin to end the workers, and then the loop."""
    closing = asyncio.run_coroutine_threadsafe(driver.close(), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    return closing


_portals: weakref.WeakSet[Portal] = weakref.WeakSet()


def _close_all() -> None:
    for portal in list(_portals):
        portal.close()


def _start_all_anew() -> None:
    for portal in list(_portals):
        portal.start_anew()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_all_anew)
