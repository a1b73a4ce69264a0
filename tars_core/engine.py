"""The engine: discovers, ranks, loads, answers and fails over. One object, a sync and an async face.

Both faces submit to one private thread with an event loop of its own; so the engine works in scripts, threads,
notebooks and inside a running loop alike.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict, TypeVar

from tars_core import schema
from tars_core.driver import Ask, Driver, OnLoad
from tars_core.errors import ConfigError, EngineClosed, RequestError, TarsError
from tars_core.events import StreamEvent
from tars_core.schema import BackendStatus, Completion, Decision, Message, OfferedModel, SamplingParams
from tars_core.settings import Settings, load_settings
from tars_core.worker.protocol import Loaded

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_BENCHMARK_PROMPT = "¿Cuál es tu nombre?"
_BENCHMARK_TOKENS = 32

T = TypeVar("T")

logging.getLogger("tars_core").addHandler(logging.NullHandler())  # silent unless the application listens


class Sampling(TypedDict, total=False):
    """The keyword arguments of every answering method; see :class:`~tars_core.schema.SamplingParams`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    max_tokens: int
    stop: str | Sequence[str]
    seed: int | None


class InferenceEngine:
    """Answers with the best local backend there is, and with the next when that one fails.

    ``config`` and ``settings`` are the same thing, as a mapping and as keywords; see
    :class:`~tars_core.settings.Settings` for all of them. ``use_NAME=False`` forbids a backend.
    ``settings_file`` is a TOML file read besides the user's own. ``config`` may also be settings gathered before.
    ``extra_plugins`` are plugin objects that are not installed, by name; they run in this process.
    ``on_load(backend, fraction, note)`` is told of loading, on the engine's own thread; 1.0 comes last, whatever became
    of it.

    Nothing is imported, probed or loaded before the first question. Safe to use from several threads.
    Raises :class:`~tars_core.errors.ConfigError` for a setting that cannot be meant.
    """

    _loop: asyncio.AbstractEventLoop | None
    _thread: threading.Thread | None
    _driver: Driver | None
    _shut_down: weakref.finalize[..., InferenceEngine] | None = None

    def __init__(  # noqa: PLR0913 - the most used settings have names of their own
        self,
        config: Mapping[str, object] | Settings | None = None,
        *,
        backend: str | None = None,
        model: str | os.PathLike[str] | None = None,
        extra_plugins: Mapping[str, object] | None = None,
        settings_file: str | os.PathLike[str] | None = None,
        on_load: OnLoad | None = None,
        **settings: object,
    ) -> None:
        if model is not None:
            settings["model"] = _path("model", model)
        if backend is not None:
            settings["backend"] = backend
        if isinstance(config, Settings):
            if settings or settings_file is not None:
                raise ConfigError("give settings gathered before, or arguments, not both")
            self.settings: Settings = config
        elif config is None or isinstance(config, Mapping):
            file = Path(_path("settings_file", settings_file)) if settings_file is not None else None
            self.settings = load_settings({**(config or {}), **settings}, file=file)
        else:
            raise ConfigError(f"config must be a mapping of settings, not {type(config).__name__}")
        if not isinstance(extra_plugins, Mapping | None):
            raise ConfigError(f"extra_plugins must map names to plugins, not {type(extra_plugins).__name__}")
        self._plugins = dict(extra_plugins or {})
        self._on_load = on_load
        self._start_anew()
        self._closed = False
        _engines.add(self)

    # ---- answers -------------------------------------------------------------------------------

    def generate(self, prompt: str, system_prompt: str | None = None, **sampling: Unpack[Sampling]) -> str:
        """Return the answer as text, without white space around it.

        Raises :class:`~tars_core.errors.RequestError` for a request nobody could answer, and
        :class:`~tars_core.errors.AllBackendsFailed` when every candidate failed.
        """
        return self.complete(prompt, system_prompt, **sampling).text.strip()

    def complete(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Sequence[Message | dict[str, str]] | None = None,
        raw: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Return the answer with its usage, timings and the way it came about.

        Either a ``prompt``, with or without a system prompt, or a conversation in ``messages``; one that ends with
        an assistant message is continued. ``raw`` passes the prompt on without the model's chat template.
        """
        ask = _ask(prompt, system_prompt, messages, sampling, raw=raw)
        return self._wait(lambda driver: driver.answer(ask, _ignore))

    def chat(self, messages: Sequence[Message | dict[str, str]], **sampling: Unpack[Sampling]) -> Completion:
        """Return the answer to a conversation."""
        return self.complete(messages=messages, **sampling)

    def stream(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Sequence[Message | dict[str, str]] | None = None,
        raw: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Iterator[StreamEvent]:
        """Yield ``Started``, then ``TextDelta`` as the text grows, then ``Finished``.

        A bad request is refused here, before the first event is asked for. Leaving the loop early stops the
        generation. Raises :class:`~tars_core.errors.StreamInterrupted`, with the text so far, where the backend
        fails after its first text.
        """
        return self._stream(_ask(prompt, system_prompt, messages, sampling, raw=raw))

    async def agenerate(self, prompt: str, system_prompt: str | None = None, **sampling: Unpack[Sampling]) -> str:
        """:meth:`generate` for asyncio."""
        return (await self.acomplete(prompt, system_prompt, **sampling)).text.strip()

    async def acomplete(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Sequence[Message | dict[str, str]] | None = None,
        raw: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """:meth:`complete` for asyncio. Cancelling the task stops the generation."""
        ask = _ask(prompt, system_prompt, messages, sampling, raw=raw)
        return await self._await(lambda driver: driver.answer(ask, _ignore))

    async def achat(self, messages: Sequence[Message | dict[str, str]], **sampling: Unpack[Sampling]) -> Completion:
        """:meth:`chat` for asyncio."""
        return await self.acomplete(messages=messages, **sampling)

    def astream(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Sequence[Message | dict[str, str]] | None = None,
        raw: bool = False,
        **sampling: Unpack[Sampling],
    ) -> AsyncIterator[StreamEvent]:
        """:meth:`stream` for asyncio."""
        return self._astream(_ask(prompt, system_prompt, messages, sampling, raw=raw))

    # ---- what would happen ---------------------------------------------------------------------

    def plan(self) -> Decision:
        """Return what the next request would try, in order, with reasons; asks every probe anew, loads nothing.

        Raises :class:`~tars_core.errors.BackendUnavailable` where nothing can be tried.
        """
        return self._wait(lambda driver: driver.decide(refresh=True))

    def load(self) -> Loaded:
        """Load the first candidate now, instead of at the first question; return where it runs and what it holds.

        Nobody takes over: what stands in its way is raised.
        """
        return self._wait(lambda driver: driver.load())

    def backends(self) -> tuple[BackendStatus, ...]:
        """Return every installed plugin with its state, the broken ones included."""
        return self._wait(lambda driver: driver.statuses())

    def models(self) -> tuple[OfferedModel, ...]:
        """Return the models known by name: the aliases of the settings, then what the plugins bring or list."""
        return self._wait(lambda driver: driver.models())

    def list_available_backends(self) -> list[str]:
        """Return the names of the backends that can run the model, best first; none is an empty list."""
        try:
            return list(dict.fromkeys(candidate.backend for candidate in self.plan().candidates))
        except EngineClosed:
            raise
        except TarsError:
            return []

    def get_active_backend(self) -> str | None:
        """Return the backend that answered last, else the one that would be tried first. Loads nothing."""
        driver = self._driver
        if driver is not None and driver.last_answered is not None:
            return driver.last_answered
        return next(iter(self.list_available_backends()), None)

    def benchmark(self) -> dict[str, float | None]:
        """Time each backend that can run the model: at most 32 tokens, fixed prompt, warm; seconds.

        ``None`` for one that is installed and cannot, or that failed.
        """
        available = self.list_available_backends()
        results: dict[str, float | None] = {
            status.name: None for status in self.backends() if status.available is not None
        }
        return results | {name: self._time(name) for name in available}

    def _time(self, backend: str) -> float | None:
        sampling = SamplingParams(temperature=0, max_tokens=_BENCHMARK_TOKENS)
        question = Message(role="user", content=_BENCHMARK_PROMPT)
        ask = Ask(messages=(question,), sampling=sampling, backend=backend)
        try:
            self._wait(lambda driver: driver.answer(ask, _ignore))
            began = time.perf_counter()
            self._wait(lambda driver: driver.answer(ask, _ignore))
        except TarsError:
            return None  # the promised answer for a backend that fails
        return time.perf_counter() - began

    # ---- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End all workers and the engine's thread. Requests under way raise ``EngineClosed``; may be called twice."""
        self._refuse_own_thread()
        with self._lock:
            self._closed = True
            thread, shut_down = self._thread, self._shut_down
            self._driver = None
        if thread is not None and shut_down is not None:
            # Not called but taken apart: at interpreter exit a finalizer does nothing. None: another close() is at it.
            if (ours := shut_down.detach()) is not None:
                ours[1](*ours[2]).result()
            thread.join()

    async def aclose(self) -> None:
        """:meth:`close` for asyncio."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # ---- crossing into the loop ----------------------------------------------------------------

    def _submit(self, call: Callable[[Driver], Coroutine[None, None, T]]) -> concurrent.futures.Future[T]:
        self._refuse_own_thread()
        with self._lock:
            if self._closed:
                raise EngineClosed
            if self._loop is None or self._driver is None:
                loop = asyncio.new_event_loop()
                driver = Driver(self.settings, self._plugins, self._on_load)
                thread = threading.Thread(target=_run, args=(loop,), name="tars-engine", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    loop.close()
                    raise TarsError(f"the engine cannot start its thread: {error}") from error
                self._loop, self._driver, self._thread = loop, driver, thread
                # Also where the engine is forgotten without close(); at exit _close_all does it, and waits.
                self._shut_down = weakref.finalize(self, _shut_down, loop, driver)
                self._shut_down.atexit = False
            return asyncio.run_coroutine_threadsafe(self._driver.run(call(self._driver)), self._loop)

    def _refuse_own_thread(self) -> None:
        """Raise where a callback such as ``on_load`` calls: it would wait for itself."""
        if threading.current_thread() is self._thread:
            raise TarsError("the engine cannot be called from its own thread", hint="let on_load only take notes")

    def _wait(self, call: Callable[[Driver], Coroutine[None, None, T]]) -> T:
        future = self._submit(call)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineClosed from None
        finally:
            future.cancel()  # Ctrl-C in this thread must not leave the request running

    async def _await(self, call: Callable[[Driver], Coroutine[None, None, T]]) -> T:
        future = self._submit(call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed:
                raise EngineClosed from None
            raise
        finally:
            future.cancel()

    def _stream(self, ask: Ask) -> Iterator[StreamEvent]:
        pid = self._pid
        events: queue.SimpleQueue[StreamEvent | None] = queue.SimpleQueue()
        future = self._submit(lambda driver: driver.answer(ask, events.put))
        future.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                yield event
                if self._pid != pid:
                    raise EngineClosed  # in a forked child: the thread that fills the queue is the parent's
            future.result()
        except concurrent.futures.CancelledError:
            raise EngineClosed from None
        finally:
            future.cancel()

    async def _astream(self, ask: Ask) -> AsyncIterator[StreamEvent]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[StreamEvent | None] = asyncio.Queue()

        def put(event: StreamEvent | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        future = self._submit(lambda driver: driver.answer(ask, put))
        future.add_done_callback(lambda _: put(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            future.result()
        except concurrent.futures.CancelledError:
            raise EngineClosed from None
        finally:
            future.cancel()

    def _start_anew(self) -> None:
        """Begin without a thread; in a forked child, where thread and workers are the parent's, once more."""
        self._lock = threading.Lock()
        if self._shut_down is not None:
            self._shut_down.detach()
        self._loop = self._thread = self._driver = self._shut_down = None
        self._pid = os.getpid()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, driver: Driver) -> concurrent.futures.Future[None]:
    """Begin to end the workers, and then the loop."""
    closing = asyncio.run_coroutine_threadsafe(driver.close(), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    return closing


def _path(name: str, value: object) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fsdecode(value)
    raise ConfigError(f"{name} must be a path or a name, not {value!r:.40}")


def _ask(
    prompt: str | None,
    system_prompt: str | None,
    messages: Sequence[Message | dict[str, str]] | None,
    sampling: Sampling,
    *,
    raw: bool,
) -> Ask:
    params = _sampling(sampling)
    if messages is not None:
        if prompt is not None or system_prompt is not None or raw:
            raise RequestError("give either messages, or a prompt with or without a system prompt")
        turns = schema.check_messages(messages)
        if not any(turn.content.strip() for turn in turns):
            raise RequestError("every message is blank")
        return Ask(messages=turns, sampling=params)
    if prompt is None:
        raise RequestError("there is neither a prompt nor messages")
    prompt = schema.check_text("prompt", prompt)
    if not prompt.strip():
        raise RequestError("the prompt is blank", hint="say what is to be answered")
    if raw:
        if system_prompt is not None:
            raise RequestError("a raw prompt has no system prompt", hint="write it into the prompt")
        return Ask(prompt=prompt, sampling=params)
    system = () if system_prompt is None else (Message(role="system", content=system_prompt),)
    return Ask(messages=(*system, Message(role="user", content=prompt)), sampling=params)


def _sampling(options: Sampling) -> SamplingParams:
    unknown = options.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise RequestError(
            f"unknown sampling option {', '.join(sorted(unknown))}",
            hint=f"known: {', '.join(Sampling.__annotations__)}",
        )
    return SamplingParams(**options)  # type: ignore[arg-type]  # stop: any sequence; it is checked there


def _ignore(_event: StreamEvent) -> None:
    """Take the events of a request whose caller wants only the result."""


_engines: weakref.WeakSet[InferenceEngine] = weakref.WeakSet()


def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


def _start_all_anew() -> None:
    for engine in list(_engines):
        engine._start_anew()  # noqa: SLF001 - this module's own


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_all_anew)
