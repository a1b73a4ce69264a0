"""Who is told of what an engine does: on a thread of their own, so that a slow one holds nobody up."""

from __future__ import annotations

import collections
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import TypeAlias

from tars_core.types.observed import EventsLost, Observed

_log = logging.getLogger("tars_core.engine")
_KEPT = 1024
"""Events that wait; beyond that the oldest go, and are counted."""
_FLUSH_S = 2.0

Observer: TypeAlias = Callable[[Observed], None]


class _Mailbox:
    """The events on their way. The delivering thread holds it, and nothing that leads back to the engine's owner."""

    def __init__(self) -> None:
        self.ready = threading.Condition()
        self._events: collections.deque[Observed] = collections.deque()
        self._lost = 0
        self._closed = False

    def put(self, event: Observed) -> None:
        with self.ready:
            if len(self._events) >= _KEPT:
                self._events.popleft()
                self._lost += 1
            self._events.append(event)
            self.ready.notify()

    def close(self) -> None:
        with self.ready:
            self._closed = True
            self.ready.notify()

    def take(self) -> Observed | None:
        """Return the next event; ``None`` at the end."""
        with self.ready:
            while not self._events and not self._closed:
                self.ready.wait()
            if self._lost:
                lost, self._lost = self._lost, 0
                return EventsLost(count=lost)
            return self._events.popleft() if self._events else None


class Observers:
    """The callbacks of one engine, which owns this object.

    Everything that runs holds it weakly: a callback is often a method of the object that owns the engine, and both are
    to be collected when nobody else uses them.
    """

    _finalizer: weakref.finalize[..., Observers] | None = None

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Begin without a thread, as in a forked child, where it is the parent's."""
        self._callbacks: list[Observer] = getattr(self, "_callbacks", [])
        self._mailbox = _Mailbox()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        if self._finalizer is not None:
            self._finalizer.detach()  # the parent's mailbox may be locked for ever here
        self._finalizer = weakref.finalize(self, self._mailbox.close)
        self._finalizer.atexit = False

    def add(self, callback: Observer) -> Callable[[], None]:
        """Call ``callback`` with every event from now on; what is returned ends that."""
        own = functools.partial(callback)  # one callback may observe twice
        self._callbacks.append(own)

        def remove() -> None:
            if own in self._callbacks:
                self._callbacks.remove(own)

        return remove

    def tell(self, event: Observed) -> None:
        """Pass an event on, from any thread; returns at once."""
        if not self._callbacks:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_deliver, args=(self._mailbox, weakref.ref(self)), name="tars-observers", daemon=True
                )
                self._thread.start()
        self._mailbox.put(event)

    def deliver_to(self, event: Observed) -> None:
        """Call everyone; who raises is dropped, and that is reported. On the delivering thread."""
        for callback in list(self._callbacks):
            try:
                callback(event)
            except BaseException:  # noqa: BLE001, PERF203 - it must not keep events from the others
                _log.exception("an observer raised an exception and is not called again")
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

    def close(self) -> None:
        """Deliver what waits; return when it is delivered, or after 2 s."""
        self._mailbox.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_FLUSH_S)


def _deliver(mailbox: _Mailbox, owner: weakref.ref[Observers]) -> None:
    while (event := mailbox.take()) is not None:
        observers = owner()
        if observers is None:
            return
        observers.deliver_to(event)
        del observers


class Teller:
    """Tells the observers, if the engine that owns them still exists."""

    def __init__(self, observers: Observers) -> None:
        self._observers = weakref.ref(observers)

    def __call__(self, event: Observed) -> None:
        """Pass ``event`` on; returns at once."""
        if (observers := self._observers()) is not None:
            observers.tell(event)
