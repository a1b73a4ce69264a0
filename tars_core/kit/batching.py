"""Many requests at once, for a backend that is a plain generator over one shared model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from tars_core.hookspecs import CancelFlag, LoadedModel
from tars_core.types.events import BackendEvent, BackendFinished
from tars_core.types.request import GenerateRequest


class InterleavedModel(LoadedModel):
    """Runs a generator for each request, in turns, all in one thread: derive from it and write :meth:`generate`.

    The model need not be safe to use from several threads. ``tars_generate`` is not needed.
    """

    def generate(self, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
        """Answer ``request`` as ``tars_generate`` would, one event or so a token."""
        raise NotImplementedError

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request itself: all is done in :meth:`generate`."""
        return request

    def submit(self, request_id: int, prepared: GenerateRequest) -> None:
        """Begin a generator."""
        cancel = threading.Event()
        self._running[request_id] = self.generate(prepared, cancel), cancel

    def step(self) -> Sequence[tuple[int, BackendEvent | Exception]]:
        """Take the next event of each."""
        reported: list[tuple[int, BackendEvent | Exception]] = []
        for request_id, (events, _) in list(self._running.items()):
            try:
                event: BackendEvent | Exception = next(events)
            except StopIteration:
                event = RuntimeError("generate() ended without Finished")
            except Exception as error:  # noqa: BLE001 - it fails this request alone
                event = error
            reported.append((request_id, event))
            if isinstance(event, BackendFinished | Exception):
                del self._running[request_id]
        return reported

    def cancel(self, request_id: int) -> None:
        """Set the flag that the generator looks at."""
        if (running := self._running.get(request_id)) is not None:
            running[1].set()

    @property
    def _running(self) -> dict[int, tuple[Iterator[BackendEvent], CancelFlag]]:
        # Not in __init__: who derives from this may forget to call it in time.
        running: dict[int, tuple[Iterator[BackendEvent], CancelFlag]] = self.__dict__.setdefault("_generators", {})
        return running
