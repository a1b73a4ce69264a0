"""One loop for all requests of a :class:`~tars_core.hookspecs.BatchedModel`: one frame a step."""

from __future__ import annotations

import threading

from tars_core.hookspecs import BatchedModel
from tars_core.types.errors import ContractError
from tars_core.types.events import BackendEvent, BackendFinished
from tars_core.types.results import Usage
from tars_core.worker.protocol import Cancel, Embed, Events, Failed, Generate, HostFrame, Item, Render, Tokenize
from tars_core.worker.requests import EventRules, Inbox, Prepared, Requests, Send


class BatchLoop:
    """Takes frames between the steps. What may take long is done in a thread for each request."""

    def __init__(self, model: BatchedModel, requests: Requests, inbox: Inbox, send: Send) -> None:
        self._model = model
        self._requests = requests
        self._inbox = inbox
        self._send = send
        self._threads: dict[int, tuple[threading.Thread, threading.Event]] = {}
        self._active: dict[int, EventRules] = {}

    def run(self) -> None:
        """Answer until the end; return when no thread is inside the model any more."""
        while True:
            while not self._active or not self._inbox.empty():
                item = self._inbox.get()
                if item is None:
                    for thread, cancel in list(self._threads.values()):
                        cancel.set()
                        thread.join()
                    return
                self._take(item)
            self._step()

    def _take(self, item: HostFrame | Prepared) -> None:
        match item:
            case Generate() | Embed() | Render() | Tokenize():
                cancel = threading.Event()
                thread = threading.Thread(target=self._work, args=(item, cancel), daemon=True)
                self._threads[item.request_id] = thread, cancel
                thread.start()
            case Prepared():
                self._submit(item)
            case Cancel(request_id=request_id) if request_id in self._active:
                if failed := self._cancel(request_id):
                    self._end(request_id, failed)
            case Cancel(request_id=request_id) if known := self._threads.get(request_id):
                known[1].set()  # what it makes of the request is dropped
                usage = Usage(prompt_tokens=0, completion_tokens=0)
                self._end(request_id, BackendFinished(finish_reason="cancelled", usage=usage))

    def _work(self, frame: Generate | Embed | Render | Tokenize, cancel: threading.Event) -> None:
        if not isinstance(frame, Generate):
            result = self._requests.aside(frame, cancel)
            del self._threads[frame.request_id]
            if not cancel.is_set():
                self._end(frame.request_id, result)
            return
        try:
            prepared = Prepared(frame.request_id, self._model.prepare(self._requests.prepare(frame.request)))
        except BaseException as error:  # noqa: BLE001 - a plugin must not end the worker
            prepared = Prepared(frame.request_id, None, self._requests.failed(error))
        self._inbox.put(prepared)

    def _submit(self, prepared: Prepared) -> None:
        request_id, value, failed = prepared
        _, cancelled = self._threads.pop(request_id)
        if cancelled.is_set():
            return
        if failed is not None:
            self._end(request_id, failed)
        else:
            self._active[request_id] = EventRules(self._requests.plugin)
            try:
                self._model.submit(request_id, value)
            except BaseException as error:  # noqa: BLE001 - a plugin must not end the worker
                self._end(request_id, self._requests.failed(error))

    def _end(self, request_id: int, item: Item) -> None:
        self._active.pop(request_id, None)
        self._send(Events(items=((request_id, item),)))

    def _cancel(self, request_id: int) -> Failed | None:
        try:
            self._model.cancel(request_id)
        except BaseException as error:  # noqa: BLE001 - it must not take the other requests along
            return self._requests.failed(error)
        return None

    def _step(self) -> None:
        items: list[tuple[int, Item]] = []
        try:
            for request_id, event in self._model.step():
                if (item := self._check(request_id, event)) is not None:
                    items.append((request_id, item))
        except BaseException as error:  # noqa: BLE001 - a step that fails fails every request in it
            items += [(request_id, self._requests.failed(error)) for request_id in self._active]
            self._active.clear()
        if items:
            self._send(Events(items=tuple(items)))

    def _check(self, request_id: int, event: BackendEvent | Exception) -> Item | None:
        rules = self._active.get(request_id)
        if rules is None:
            return None  # its terminal item is out already
        item: Item
        try:
            item = self._requests.failed(event) if isinstance(event, Exception) else rules.check(event)
        except ContractError as error:
            item = self._requests.failed(error)
            self._cancel(request_id)  # if that fails too, the first failure is what counts
        if isinstance(item, Failed | BackendFinished):
            del self._active[request_id]
        return item
