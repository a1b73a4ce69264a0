"""From a model's name to a model in the daemon's memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import msgspec

from tars_core.plugin import (
    DEFAULT_CONTEXT,
    ChatTemplate,
    GenerationFailed,
    GGUFHeader,
    LoadFailed,
    LoadOptions,
    ModelNotFound,
    OutOfMemory,
)
from tars_ollama import store, wire
from tars_ollama.client import Client, mapped
from tars_ollama.failures import Fault, told
from tars_ollama.settings import OllamaSettings

_SMALLEST_CONTEXT = 2048
_ALL_LAYERS = 999  # Ollama's own way to say so: -1 means that it chooses
_PAUSES_S = (0.25, 0.5, 1.0, 2.0)
_LONGEST_PAUSE_S = 10.0

T = TypeVar("T")
Launch = Mapping[str, object]
"""Options that Ollama starts a model's process with. Another value of any of them loads the model anew, so they are
the same with every request."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model is."""

    name: str
    launch: Launch
    keep_alive: float | str | None
    context_length: int
    most_context: int
    """How far ``context_length`` may grow."""
    shrunk: bool
    """Whether memory was short for what was wanted."""
    device: str
    header: GGUFHeader | None
    """Of its file, where its own template is to be used."""
    renders_chat: bool
    stops: tuple[str, ...]
    """Of Ollama's template."""
    template_bytes: int


class Loader:
    """Loads one model, with the options given."""

    def __init__(  # noqa: PLR0913 - what it needs
        self,
        client: Client,
        name: str,
        options: LoadOptions,
        settings: OllamaSettings,
        progress: Callable[[float, str], None],
        *,
        local: bool,
    ) -> None:
        self._client = client
        self._name = name
        self._options = options
        self._settings = settings
        self._progress = progress
        self._local = local

    async def run(self) -> Facts:
        """Load it, with a smaller context or on the CPU where memory is short. Raises a ``TarsError``."""
        show = await self._show()
        if not show.generates:
            raise LoadFailed(f"{self._name} writes no text; it can {', '.join(show.capabilities or ())}")
        wanted = self._options.context_length or DEFAULT_CONTEXT
        wanted = min(wanted, show.trained_context or wanted)
        taken = await self._context_in_use()
        launch, loaded = await self._loaded(taken or wanted)
        asked = _context(launch)
        # Less than was asked for is what the model was trained for; an older daemon does not tell.
        context = min(asked, loaded.context_length or asked) if loaded is not None else asked
        header = await asyncio.to_thread(store.header, show, local=self._local)
        renders_chat = store.renders_chat(show, header) or _broken(header)
        return Facts(
            name=self._name,
            launch={**launch, "num_ctx": context},
            keep_alive=self._settings.keep_alive,
            context_length=context,
            most_context=(show.trained_context or wanted) if self._settings.grow_context else wanted,
            shrunk=context < min(taken or wanted, wanted),
            device=loaded.device if loaded is not None else "cpu",
            header=None if renders_chat else header,
            renders_chat=renders_chat,
            stops=show.stops,
            template_bytes=len((show.template + show.system).encode()),
        )

    async def _show(self) -> wire.Show:
        try:
            return await self._ask_show()
        except ModelNotFound:
            if not self._options.allow_download:
                raise
        await self._pull()
        return await self._ask_show()

    async def _ask_show(self) -> wire.Show:
        with self._mapped():
            return wire.decode(await self._client.whole("/api/show", {"model": self._name}), wire.Show)

    async def _pull(self) -> None:
        status = None
        with self._mapped(), mapped():
            async for part in await self._client.pull(self._name, stream=True):
                status = part.status
                self._progress((part.completed or 0) / part.total if part.total else 0.0, status or "")
        if status != "success":  # the only sign of one; the HTTP status is none
            raise LoadFailed(f"ollama pull {self._name} ended with {status!r}")

    async def _context_in_use(self) -> int | None:
        """Return the context that somebody loaded the model with: another one would load it anew, in turns."""
        if self._options.context_length is not None:
            return None
        running = await self._running()
        return running.context_length or None if running is not None else None

    async def _loaded(self, wanted: int) -> tuple[Launch, wire.Listed | None]:
        refusal: OutOfMemory | None = None
        for launch in self._launches(wanted):
            self._progress(0.0, f"loading {self._name} into Ollama, context {_context(launch)}")
            try:
                with self._mapped():
                    await patient(partial(self._load, launch))
            except OutOfMemory as error:
                refusal = error
            else:
                return launch, await self._running()
        assert refusal is not None  # noqa: S101 - there is at least one launch
        raise refusal

    def _launches(self, context: int) -> Iterator[Launch]:
        options = self._options
        base: dict[str, object] = {}
        if options.threads is not None:
            base["num_thread"] = options.threads
        if options.device == "cpu":
            base["num_gpu"] = 0
        elif options.gpu_layers is not None:
            base["num_gpu"] = _ALL_LAYERS if options.gpu_layers < 0 else options.gpu_layers
        yield {**base, "num_ctx": context}
        while context >= 2 * _SMALLEST_CONTEXT:
            context //= 2
            yield {**base, "num_ctx": context}
        if options.device == "auto":
            yield {**base, "num_ctx": context, "num_gpu": 0}

    async def _load(self, launch: Launch) -> None:
        """Load by an empty prompt: what is loaded with the first question stands under the question's time limit."""
        data = await self._client.whole("/api/generate", load_body(self._name, launch, self._settings.keep_alive))
        answer = wire.decode(data, wire.Chunk)
        if answer.error is not None:
            raise told(answer.error, status=200)

    async def _running(self) -> wire.Listed | None:
        with self._mapped():
            return wire.find(self._name, wire.models(await self._client.whole("/api/ps")))

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except Fault as fault:
            raise fault.to_error(self._name, loading=True) from fault
        except ValueError as error:
            raise LoadFailed(f"Ollama sent something unexpected: {error}") from error


def load_body(name: str, launch: Launch, keep_alive: float | str | None) -> dict[str, object]:
    """Return the request that loads a model and generates nothing."""
    body: dict[str, object] = {"model": name, "prompt": "", "stream": False, "options": dict(launch)}
    return body if keep_alive is None else {**body, "keep_alive": keep_alive}


async def patient(call: Callable[[], Awaitable[T]]) -> T:
    """Call again while the daemon is busy, for about four seconds; jitter keeps those who wait apart."""
    for pause in _PAUSES_S:
        try:
            return await call()
        except Fault as fault:  # noqa: PERF203 - a request takes longer
            wait = fault.retry_after_s if fault.retry_after_s is not None else pause * (0.5 + random.random())  # noqa: S311
            if not fault.busy or wait > _LONGEST_PAUSE_S:
                raise
            await asyncio.sleep(wait)
    return await call()


def _context(launch: Launch) -> int:
    context = launch["num_ctx"]
    assert isinstance(context, int)  # noqa: S101 - narrows the type
    return context


def _broken(header: GGUFHeader | None) -> bool:
    if header is None or header.chat_template is None:
        return False
    try:
        ChatTemplate(header.chat_template)
    except GenerationFailed:
        return True
    return False
