"""The worker's side of the conversation, whatever carries the frames: a process's pipes or a thread's queues."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pluggy

from tars_core import hookspecs
from tars_core.hookspecs import BatchedModel, LoadedModel
from tars_core.types.errors import ContractError, LoadFailed, OutOfMemory, TarsError
from tars_core.types.events import BackendFinished
from tars_core.types.failures import Failure
from tars_core.types.public import field_error
from tars_core.worker import protocol
from tars_core.worker.batch import BatchLoop
from tars_core.worker.protocol import (
    Cancel,
    Embed,
    Events,
    Generate,
    Item,
    Load,
    Loaded,
    LoadProgress,
    LoadRefused,
    Render,
    Terminal,
    Tokenize,
)
from tars_core.worker.requests import EventRules, Inbox, Requests, Send, told_with_trace

_BATCHED = ("prepare", "submit", "step", "cancel")


def serve(inbox: Inbox, send: Send, closing: threading.Event, plugin: object | None = None) -> None:
    """Load what the first frame names, then answer until ``None`` comes.

    ``closing`` is set from outside when the session is to end, so that a load can stop early. ``plugin`` is used
    as it is where given (a plugin object that is no entry point).
    """
    frame = inbox.get()
    if not isinstance(frame, Load):
        return
    try:
        hooks = _register(frame, plugin)
        loaded = _load(hooks, frame, send, closing)
        requests = Requests(frame.plugin, loaded, hooks)
        ready = Loaded(
            device=loaded.device,
            context_length=loaded.context_length,
            concurrency=loaded.concurrency,
            features=loaded.features,
            has_template=bool(loaded.chat_template),
        )
        try:
            protocol.check(ready)
        except (TypeError, ValueError) as error:
            raise ContractError(f"{frame.plugin}: invalid LoadedModel: {field_error(error)}") from error
    except TarsError as error:
        send(LoadRefused(failure=Failure.of(error)))
        return
    send(ready)
    if isinstance(loaded, BatchedModel):
        BatchLoop(loaded, requests, inbox, send).run()
    else:
        _ThreadPerRequest(requests, inbox, send).run()
    hooks.tars_unload(loaded=loaded)


def _register(frame: Load, plugin: object | None) -> pluggy.HookRelay:
    manager = hookspecs.new_manager()
    try:
        manager.register(hookspecs.import_plugin(frame.target) if plugin is None else plugin, frame.plugin)
    except (Exception, SystemExit) as error:
        raise LoadFailed(f"it cannot be imported in the worker: {told_with_trace(error)}") from error
    return manager.hook


def _load(hooks: pluggy.HookRelay, frame: Load, send: Send, closing: threading.Event) -> LoadedModel:
    def progress(fraction: float, note: str) -> None:
        send(LoadProgress(fraction=min(max(float(fraction), 0.0), 1.0), note=str(note)))

    try:
        loaded: object = hooks.tars_load(model=frame.model, options=frame.options, progress=progress, cancel=closing)
    except TarsError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"out of memory: {error}", hint="use a smaller model or context") from error
    except (Exception, SystemExit) as error:
        raise LoadFailed(told_with_trace(error)) from error
    if not isinstance(loaded, LoadedModel):
        raise ContractError(f"{frame.plugin}: tars_load must return a LoadedModel, not {type(loaded).__name__}")
    missing = [name for name in _BATCHED if not hasattr(loaded, name)]
    if 0 < len(missing) < len(_BATCHED):
        raise ContractError(
            f"{frame.plugin}: {type(loaded).__name__} has {', '.join(n for n in _BATCHED if n not in missing)},"
            f" but not {', '.join(missing)}",
            hint="a batched model has all four; one that runs tars_generate has none",
        )
    return loaded


class _ThreadPerRequest:
    """Runs ``tars_generate``, an iterator in a thread for each request."""

    def __init__(self, requests: Requests, inbox: Inbox, send: Send) -> None:
        self._requests = requests
        self._inbox = inbox
        self._send = send
        self._running: dict[int, tuple[threading.Thread, threading.Event]] = {}

    def run(self) -> None:
        """Answer until the end; return when no request is inside the model any more."""
        while (frame := self._inbox.get()) is not None:
            if isinstance(frame, Cancel) and (known := self._running.get(frame.request_id)):
                known[1].set()
            elif isinstance(frame, Generate | Embed | Render | Tokenize):
                flag = threading.Event()
                thread = threading.Thread(
                    target=self._answer, args=(frame, flag), name=f"tars-request-{frame.request_id}", daemon=True
                )
                self._running[frame.request_id] = thread, flag
                thread.start()
        running = list(self._running.values())
        for _, flag in running:
            flag.set()
        for thread, _ in running:
            thread.join()

    def _answer(self, frame: Generate | Embed | Render | Tokenize, cancel: threading.Event) -> None:
        end = self._generate(frame, cancel) if isinstance(frame, Generate) else self._requests.aside(frame, cancel)
        del self._running[frame.request_id]
        self._send(Events(items=((frame.request_id, end),)))

    def _generate(self, frame: Generate, cancel: threading.Event) -> Terminal:
        rules = EventRules(self._requests.plugin)
        end: BackendFinished | None = None  # waits until the iterator has really ended
        try:
            request = self._requests.prepare(frame.request)
            rules = EventRules(self._requests.plugin, max_tokens=request.sampling.max_tokens)
            events: Iterable[object] | None = self._requests.hooks.tars_generate(
                loaded=self._requests.loaded, request=request, cancel=cancel
            )
            if events is None or not hasattr(events, "__iter__"):
                raise rules.broken("it must return an iterator of events")
            for event in events:
                item: Item = rules.check(event)
                if isinstance(item, BackendFinished):
                    end = item
                else:
                    self._send(Events(items=((frame.request_id, item),)))
            if end is None:
                raise rules.broken("it ended without Finished")
        except BaseException as error:  # noqa: BLE001 - a plugin must not end the worker
            return self._requests.failed(error)
        return end
