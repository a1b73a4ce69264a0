"""The worker's side of the conversation, whatever carries the frames: a process's pipes or a thread's queues."""

from __future__ import annotations

import queue
import random
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import pluggy

from tars_core import hookspecs
from tars_core.errors import ContextLengthExceeded, ContractError, GenerationFailed, LoadFailed, TarsError, told
from tars_core.events import BackendEvent, BackendFinished, Progress, TextDelta
from tars_core.hookspecs import BatchedModel, LoadedModel
from tars_core.schema import RAW_STOP, Failure, GenerateRequest
from tars_core.templates import ChatTemplate, render_plain
from tars_core.worker import protocol
from tars_core.worker.protocol import (
    Cancel,
    Events,
    Failed,
    Generate,
    HostFrame,
    Item,
    Load,
    Loaded,
    LoadProgress,
    LoadRefused,
    WorkerFrame,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

Send: TypeAlias = Callable[[WorkerFrame], None]
Inbox: TypeAlias = "queue.SimpleQueue[HostFrame | None]"
"""``None`` ends the session."""


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
        template = (
            ChatTemplate(
                loaded.chat_template,
                bos_token=loaded.bos_token,
                eos_token=loaded.eos_token,
                adds_bos=loaded.adds_bos,
            )
            if loaded.chat_template
            else None
        )
        ready = Loaded(device=loaded.device, context_length=loaded.context_length, concurrency=loaded.concurrency)
        try:
            protocol.check(ready)
        except (TypeError, ValueError) as error:
            raise ContractError(f"{frame.plugin}: its LoadedModel is not sound: {error}") from error
    except TarsError as error:
        send(LoadRefused(failure=Failure.of(error)))
        return
    send(ready)
    prompts = _Prompts(frame.plugin, loaded, template)
    if isinstance(loaded, BatchedModel):
        _BatchLoop(loaded, prompts, send).run(inbox)
    else:
        _ThreadPerRequest(hooks, prompts, send).run(inbox)
    hooks.tars_unload(loaded=loaded)


def _register(frame: Load, plugin: object | None) -> pluggy.HookRelay:
    manager = hookspecs.new_manager()
    try:
        manager.register(hookspecs.import_plugin(frame.target) if plugin is None else plugin, frame.plugin)
    except (Exception, SystemExit) as error:
        raise LoadFailed(f"it does not import here: {_told(error)}") from error
    return manager.hook


def _load(hooks: pluggy.HookRelay, frame: Load, send: Send, closing: threading.Event) -> LoadedModel:
    def progress(fraction: float, note: str) -> None:
        send(LoadProgress(fraction=min(max(float(fraction), 0.0), 1.0), note=str(note)))

    try:
        loaded: object = hooks.tars_load(model=frame.model, options=frame.options, progress=progress, cancel=closing)
    except TarsError:
        raise
    except MemoryError as error:
        raise LoadFailed(f"out of memory: {error}") from error
    except (Exception, SystemExit) as error:
        raise LoadFailed(_told(error)) from error
    if not isinstance(loaded, LoadedModel):
        raise ContractError(f"{frame.plugin}: tars_load must return a LoadedModel, not {type(loaded).__name__}")
    return loaded


def _told(error: BaseException) -> str:
    """Describe a plugin's own exception by type and place; the whole traceback goes to stderr, for ``tars -vv``."""
    traceback.print_exception(error)
    return told(error)


class _Prompts:
    """Turns the host's request into the one a backend sees, and its errors into the host's terms."""

    def __init__(self, plugin: str, loaded: LoadedModel, template: ChatTemplate | None) -> None:
        self.plugin = plugin
        self.loaded = loaded
        self._template = template

    def prepare(self, frame: Generate) -> GenerateRequest:
        as_messages = frame.prompt is None and self.loaded.renders_chat
        raw = frame.prompt is not None or (self._template is None and not as_messages)
        if frame.prompt is not None:
            prompt = frame.prompt
        elif as_messages:
            prompt = ""
        elif self._template is not None:
            prompt = self._template.render(frame.messages)
        else:
            prompt = render_plain(frame.messages)
        sampling = frame.sampling
        return GenerateRequest(
            prompt=prompt,
            messages=frame.messages if as_messages else (),
            sampling=msgspec.structs.replace(
                sampling,
                max_tokens=min(sampling.max_tokens, self.loaded.context_length),
                seed=random.getrandbits(32) if sampling.seed is None else sampling.seed,
                stop=tuple(dict.fromkeys((*sampling.stop, *(RAW_STOP if raw else ())))),
            ),
        )

    def failed(self, error: BaseException) -> Failed:
        """Describe why a request ended; whatever a plugin raises becomes data."""
        if not isinstance(error, Exception):
            error = _EventRules(self.plugin).broken(f"it raised {type(error).__name__}")
        elif isinstance(error, ContextLengthExceeded) and self.loaded.context_shrunk:
            error = GenerationFailed(
                f"the prompt has {error.prompt_tokens} tokens; memory allowed a context of only {error.context_length}"
            )
        elif not isinstance(error, TarsError):
            error = GenerationFailed(_told(error))
        return Failed(failure=Failure.of(error))


class _EventRules:
    """Holds one request's events against the contract."""

    def __init__(self, plugin: str) -> None:
        self._plugin = plugin
        self.finished = False

    def check(self, event: object) -> BackendEvent:
        if self.finished:
            raise self.broken("an event came after Finished")
        if not isinstance(event, Progress | TextDelta | BackendFinished):
            raise self.broken(f"events are Progress, TextDelta and Finished, not {type(event).__name__}")
        if isinstance(event, TextDelta) and not event.text:
            raise self.broken("a TextDelta must not be empty")
        try:
            protocol.check(Events(items=((0, event),)))
        except (TypeError, ValueError) as error:
            raise self.broken(f"a {type(event).__name__} is not sound: {error}") from error
        self.finished = isinstance(event, BackendFinished)
        return event

    def broken(self, rule: str) -> ContractError:
        return ContractError(
            f"plugin {self._plugin} broke the contract of tars_generate: {rule}",
            hint=f"report it to the authors of {self._plugin}",
        )


class _ThreadPerRequest:
    """Runs ``tars_generate``, an iterator in a thread for each request."""

    def __init__(self, hooks: pluggy.HookRelay, prompts: _Prompts, send: Send) -> None:
        self._hooks = hooks
        self._prompts = prompts
        self._send = send
        self._cancel: dict[int, threading.Event] = {}

    def run(self, inbox: Inbox) -> None:
        while (frame := inbox.get()) is not None:
            if isinstance(frame, Generate):
                flag = self._cancel[frame.request_id] = threading.Event()
                threading.Thread(
                    target=self._answer, args=(frame, flag), name=f"tars-request-{frame.request_id}", daemon=True
                ).start()
            elif isinstance(frame, Cancel) and (known := self._cancel.get(frame.request_id)):
                known.set()

    def _answer(self, frame: Generate, cancel: threading.Event) -> None:
        rules = _EventRules(self._prompts.plugin)
        pending: Item | None = None  # Finished waits until the iterator has really ended
        try:
            request = self._prompts.prepare(frame)
            events: Iterable[object] | None = self._hooks.tars_generate(
                loaded=self._prompts.loaded, request=request, cancel=cancel
            )
            if events is None or not hasattr(events, "__iter__"):
                raise rules.broken("it must return an iterator of events")
            for event in events:
                item = rules.check(event)
                if rules.finished:
                    pending = item
                else:
                    self._send(Events(items=((frame.request_id, item),)))
            if pending is None:
                raise rules.broken("it ended without Finished")
        except BaseException as error:  # noqa: BLE001 - a plugin must not end the worker
            pending = self._prompts.failed(error)
        del self._cancel[frame.request_id]
        self._send(Events(items=((frame.request_id, pending),)))


class _BatchLoop:
    """Drives a :class:`BatchedModel`: one loop, one frame a step."""

    def __init__(self, model: BatchedModel, prompts: _Prompts, send: Send) -> None:
        self._model = model
        self._prompts = prompts
        self._send = send
        self._active: dict[int, _EventRules] = {}

    def run(self, inbox: Inbox) -> None:
        while True:
            while not self._active or not inbox.empty():
                frame = inbox.get()
                if frame is None:
                    return
                self._take(frame)
            self._step()

    def _take(self, frame: HostFrame) -> None:
        if isinstance(frame, Generate):
            try:
                self._model.submit(frame.request_id, self._prompts.prepare(frame))
            except BaseException as error:  # noqa: BLE001 - a plugin must not end the worker
                self._send(Events(items=((frame.request_id, self._prompts.failed(error)),)))
            else:
                self._active[frame.request_id] = _EventRules(self._prompts.plugin)
        elif (
            isinstance(frame, Cancel)
            and frame.request_id in self._active
            and (failed := self._cancel(frame.request_id))
        ):
            del self._active[frame.request_id]
            self._send(Events(items=((frame.request_id, failed),)))

    def _cancel(self, request_id: int) -> Failed | None:
        try:
            self._model.cancel(request_id)
        except BaseException as error:  # noqa: BLE001 - it must not take the other requests along
            return self._prompts.failed(error)
        return None

    def _step(self) -> None:
        items: list[tuple[int, Item]] = []
        try:
            for request_id, event in self._model.step():
                if (item := self._check(request_id, event)) is not None:
                    items.append((request_id, item))
        except BaseException as error:  # noqa: BLE001 - a step that fails fails every request in it
            items += [(request_id, self._prompts.failed(error)) for request_id in self._active]
            self._active.clear()
        if items:
            self._send(Events(items=tuple(items)))

    def _check(self, request_id: int, event: BackendEvent | Exception) -> Item | None:
        rules = self._active.get(request_id)
        if rules is None:
            return None  # its terminal item is out already
        item: Item
        try:
            item = self._prompts.failed(event) if isinstance(event, Exception) else rules.check(event)
        except ContractError as error:
            item = self._prompts.failed(error)
            self._cancel(request_id)  # if that fails too, the first failure is what counts
        if isinstance(item, Failed | BackendFinished):
            del self._active[request_id]
        return item
