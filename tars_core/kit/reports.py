"""For a backend whose requests run in threads of its own, or in an event loop."""

from __future__ import annotations

import queue
from typing import TypeAlias

from tars_core.types.events import BackendEvent

Report: TypeAlias = tuple[int, BackendEvent | Exception]
"""A request's id, and its event or the error that ended it."""

_WAIT_S = 0.05


class Reports:
    """What the requests have to tell, kept until :meth:`~tars_core.hookspecs.BatchedModel.step` fetches it.

    >>> reports = Reports()
    >>> reports.put(7, ValueError("no"))
    >>> reports.fetch()
    [(7, ValueError('no'))]
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Report] = queue.SimpleQueue()

    def put(self, request_id: int, event: BackendEvent | Exception) -> None:
        """Add what a request has to tell, from any thread."""
        self._queue.put((request_id, event))

    def fetch(self) -> list[Report]:
        """Return all there is, oldest first; waits up to 50 ms for the first, and returns an empty list after that."""
        try:
            fetched = [self._queue.get(timeout=_WAIT_S)]
        except queue.Empty:
            return []
        while not self._queue.empty():  # nobody else takes from it
            fetched.append(self._queue.get())
        return fetched
