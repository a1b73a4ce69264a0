"""The engine: discovers, ranks, loads, answers and fails over. One object, a sync and an async face.

Both faces submit to one private thread with an event loop of its own; so the engine works in scripts, threads,
notebooks and inside a running loop alike.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from tars_core.config.gather import load_settings
from tars_core.config.settings import Settings
from tars_core.runtime.driver import Ask, Driver
from tars_core.runtime.observers import Observer, Observers
from tars_core.runtime.portal import Portal
from tars_core.runtime.streams import AsyncStream, Stream
from tars_core.types.errors import ConfigError, EngineClosed, RequestError, TarsError
from tars_core.types.events import StreamEvent
from tars_core.types.messages import Message, check_messages
from tars_core.types.models import OfferedModel
from tars_core.types.observed import LoadProgressed, Observed
from tars_core.types.reports import BackendStatus, LoadedStatus
from tars_core.types.request import EmbedRequest, GenerateRequest, SamplingParams
from tars_core.types.results import Completion, Decision, Embeddings
from tars_core.types.text import check_text

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_BENCHMARK_PROMPT = "¿Cuál es tu nombre?"
_BENCHMARK_TOKENS = 32

OnLoad: TypeAlias = Callable[[str, float, str], None]
"""``on_load(backend, fraction, note)``."""
FallbackOn: TypeAlias = Callable[[Completion], bool]
"""Whether an answer is not good enough, so that the next candidate is to answer."""
Messages: TypeAlias = Sequence[Message | Mapping[str, object]]

logging.getLogger("tars_core").addHandler(logging.NullHandler())  # silent unless the application listens


class Sampling(TypedDict, total=False):
    """The keyword arguments of every answering method; see :class:`~tars_core.types.request.SamplingParams`."""

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
    :class:`~tars_core.config.settings.Settings` for all of them. ``use_NAME=False`` forbids a backend.
    ``settings_file`` is a TOML file read besides the user's own. ``config`` may also be settings gathered before.
    ``extra_plugins`` are plugin objects that are not installed, by name; they run in this process.
    ``on_load(backend, fraction, note)`` is called while a model loads, as :meth:`observe` would; 1.0 comes last, also
    after a failure.

    ``model`` is the default; every answering method takes another. Models stay in memory while they fit.
    Nothing is imported, probed or loaded before the first question. Safe to use from several threads.
    Raises :class:`~tars_core.types.errors.ConfigError` for an invalid setting.
    """

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
                raise ConfigError("pass either a Settings object or keyword arguments, not both")
            self.settings: Settings = config
        elif config is None or isinstance(config, Mapping):
            file = Path(_path("settings_file", settings_file)) if settings_file is not None else None
            self.settings = load_settings({**(config or {}), **settings}, file=file)
        else:
            raise ConfigError(f"config must be a mapping of settings, not {type(config).__name__}")
        if not isinstance(extra_plugins, Mapping | None):
            raise ConfigError(f"extra_plugins must map names to plugins, not {type(extra_plugins).__name__}")
        self._observers = Observers()
        self._portal = Portal(self.settings, dict(extra_plugins or {}), self._observers)
        if on_load is not None:
            self.observe(_load_observer(on_load))

    # ---- answers -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        system_prompt: str | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        fallback_on: FallbackOn | None = None,
        **sampling: Unpack[Sampling],
    ) -> str:
        """Return the answer as text, without white space around it.

        Raises :class:`~tars_core.types.errors.RequestError` for a request nobody could answer, and
        :class:`~tars_core.types.failures.AllBackendsFailed` when every candidate failed.
        """
        return self.complete(prompt, system_prompt, model=model, fallback_on=fallback_on, **sampling).text.strip()

    def complete(  # noqa: PLR0913 - the request's parts
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Messages | None = None,
        raw: bool = False,
        model: str | os.PathLike[str] | None = None,
        fallback_on: FallbackOn | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Return the answer with its usage, timings and the way it came about.

        Either a ``prompt``, with or without a system prompt, or a conversation in ``messages``; one that ends with
        an assistant message is continued. ``raw`` passes the prompt on without the model's chat template.
        ``fallback_on(completion)`` says whether the next candidate is to answer instead; it is called in a thread.
        """
        ask = _ask(prompt, system_prompt, messages, sampling, raw=raw, model=model, fallback_on=fallback_on)
        return self._portal.wait(lambda driver: driver.answer(ask, _ignore))

    def chat(
        self,
        messages: Messages,
        *,
        model: str | os.PathLike[str] | None = None,
        fallback_on: FallbackOn | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Return the answer to a conversation."""
        return self.complete(messages=messages, model=model, fallback_on=fallback_on, **sampling)

    def stream(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Messages | None = None,
        raw: bool = False,
        model: str | os.PathLike[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Yield ``Started``, then ``TextDelta`` as the text grows, then ``Finished``.

        A bad request is refused here, before the first event is asked for. The stream is a context manager: leaving its
        block stops the generation at once. For a slow reader pieces are joined; nothing is lost. Raises
        :class:`~tars_core.types.errors.StreamInterrupted`, with the text so far, where the backend fails after its
        first text.
        """
        return self._portal.stream(_ask(prompt, system_prompt, messages, sampling, raw=raw, model=model))

    async def agenerate(
        self,
        prompt: str,
        system_prompt: str | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        fallback_on: FallbackOn | None = None,
        **sampling: Unpack[Sampling],
    ) -> str:
        """:meth:`generate` for asyncio."""
        answer = await self.acomplete(prompt, system_prompt, model=model, fallback_on=fallback_on, **sampling)
        return answer.text.strip()

    async def acomplete(  # noqa: PLR0913 - the request's parts
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Messages | None = None,
        raw: bool = False,
        model: str | os.PathLike[str] | None = None,
        fallback_on: FallbackOn | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """:meth:`complete` for asyncio. Cancelling the task stops the generation."""
        ask = _ask(prompt, system_prompt, messages, sampling, raw=raw, model=model, fallback_on=fallback_on)
        return await self._portal.wait_async(lambda driver: driver.answer(ask, _ignore))

    async def achat(
        self,
        messages: Messages,
        *,
        model: str | os.PathLike[str] | None = None,
        fallback_on: FallbackOn | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """:meth:`chat` for asyncio."""
        return await self.acomplete(messages=messages, model=model, fallback_on=fallback_on, **sampling)

    def astream(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        *,
        messages: Messages | None = None,
        raw: bool = False,
        model: str | os.PathLike[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """:meth:`stream` for asyncio: an async iterator and an async context manager."""
        return self._portal.stream_async(_ask(prompt, system_prompt, messages, sampling, raw=raw, model=model))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        raw: bool = False,
        model: str | os.PathLike[str] | None = None,
    ) -> tuple[int, ...]:
        """Return the tokens that the model would read of a request; ``len()`` of it is its ``prompt_tokens``."""
        asked = _ask(prompt, None, messages, {}, raw=raw, model=model)
        return self._portal.wait(
            lambda driver: driver.tokenize(asked.model, asked.request.messages, asked.request.prompt or None)
        )

    def embed(self, texts: Sequence[str], *, model: str | os.PathLike[str] | None = None) -> Embeddings:
        """Return a vector for each text. Needs a backend with the feature ``embeddings``."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise RequestError("texts must be a list with at least one text")
        request = EmbedRequest(texts=tuple(check_text("a text to embed", text) for text in texts))
        name = _model(model)
        return self._portal.wait(lambda driver: driver.embed(name, request))

    # ---- what would happen, and what is there --------------------------------------------------

    def plan(self, model: str | os.PathLike[str] | None = None) -> Decision:
        """Return what the next request would try, in order, with reasons; asks every probe anew, loads nothing.

        Raises :class:`~tars_core.types.errors.BackendUnavailable` where nothing can be tried.
        """
        name = _model(model)
        return self._portal.wait(lambda driver: driver.decide(name, refresh=True))

    def load(self, model: str | os.PathLike[str] | None = None) -> LoadedStatus:
        """Load the first candidate now, instead of at the first question; return where it runs and what it holds.

        Nobody takes over: what stands in its way is raised.
        """
        name = _model(model)
        return self._portal.wait(lambda driver: driver.load(name))

    def unload(self, model: str | os.PathLike[str] | None = None) -> None:
        """Free the memory of a model, or of all; requests under way are answered first."""
        name = _model(model)
        self._portal.wait(lambda driver: driver.unload(name))

    def loaded(self) -> tuple[LoadedStatus, ...]:
        """Return the models in memory, the latest used first."""
        return self._portal.wait(lambda driver: driver.loaded())

    def backends(self) -> tuple[BackendStatus, ...]:
        """Return every installed plugin with its state, the broken ones included."""
        return self._portal.wait(lambda driver: driver.statuses())

    def models(self) -> tuple[OfferedModel, ...]:
        """Return the models known by name: the aliases of the settings, then what the plugins bring or list."""
        return self._portal.wait(lambda driver: driver.models())

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
        if driver is not None and None in driver.last_answered:
            return driver.last_answered[None]
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
        ask = Ask(GenerateRequest(messages=(question,), sampling=sampling), backend=backend)
        try:
            self._portal.wait(lambda driver: driver.answer(ask, _ignore))
            began = time.perf_counter()
            self._portal.wait(lambda driver: driver.answer(ask, _ignore))
        except TarsError:
            return None  # the promised answer for a backend that fails
        return time.perf_counter() - began

    @property
    def _driver(self) -> Driver | None:
        return self._portal.driver

    # ---- life ----------------------------------------------------------------------------------

    def observe(self, callback: Observer) -> Callable[[], None]:
        """Call ``callback`` with every event (:mod:`~tars_core.types.observed`) from now on; return what ends that.

        On a thread of its own: a slow callback delays nobody, and loses the oldest events beyond 1,024, which is an
        event of its own. One that raises is not called again, and that is logged.
        """
        return self._observers.add(callback)

    def close(self) -> None:
        """End all workers and the engine's thread. Requests under way raise ``EngineClosed``; may be called twice."""
        self._portal.close()

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


def _path(name: str, value: object) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fsdecode(value)
    raise ConfigError(f"{name} must be a path or a name, not {value!r:.40}")


def _model(value: object) -> str | None:
    if value is None or isinstance(value, str | os.PathLike):
        return None if value is None else os.fsdecode(value)
    raise RequestError(f"model must be a path or a name, not {value!r:.40}")


def _ask(  # noqa: PLR0913 - the request's parts
    prompt: str | None,
    system_prompt: str | None,
    messages: Messages | None,
    sampling: Sampling,
    *,
    raw: bool,
    model: str | os.PathLike[str] | None = None,
    fallback_on: FallbackOn | None = None,
) -> Ask:
    params = _sampling(sampling)
    if messages is not None:
        if prompt is not None or system_prompt is not None or raw:
            raise RequestError("give either messages, or a prompt with or without a system prompt")
        turns = check_messages(messages)
        if not any(turn.text.strip() or not isinstance(turn.content, str) for turn in turns):
            raise RequestError("every message is blank")
        return Ask(GenerateRequest(messages=turns, sampling=params), _model(model), fallback_on=fallback_on)
    if prompt is None:
        raise RequestError("no prompt and no messages given")
    prompt = check_text("prompt", prompt)
    if not prompt.strip():
        raise RequestError("the prompt is blank", hint="write a question")
    if raw:
        if system_prompt is not None:
            raise RequestError("a raw prompt has no system prompt", hint="write it into the prompt")
        return Ask(GenerateRequest(prompt=prompt, sampling=params), _model(model), fallback_on=fallback_on)
    system = () if system_prompt is None else (Message(role="system", content=system_prompt),)
    turns = (*system, Message(role="user", content=prompt))
    return Ask(GenerateRequest(messages=turns, sampling=params), _model(model), fallback_on=fallback_on)


def _sampling(options: Sampling) -> SamplingParams:
    unknown = options.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise RequestError(
            f"unknown sampling option {', '.join(sorted(unknown))}",
            hint=f"known: {', '.join(Sampling.__annotations__)}",
        )
    return SamplingParams(**options)  # type: ignore[arg-type]  # stop: any sequence; it is checked there


def _load_observer(on_load: OnLoad) -> Observer:
    def observer(event: Observed) -> None:
        if isinstance(event, LoadProgressed):
            on_load(event.backend, event.fraction, event.note)

    return observer


def _ignore(_event: StreamEvent) -> None:
    """Take the events of a request whose caller wants only the result."""
