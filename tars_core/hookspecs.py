"""The plugin contract, generation 1. Each hook's docstring is the contract's text.

A plugin is a module or an object that implements a subset of these hooks, marked with
``tars_core.plugin.hookimpl`` and registered under the entry-point group ``tars.plugins.v1``::

    [project.entry-points."tars.plugins.v1"]
    echo = "tars_echo"

The host process calls ``tars_probe``, ``tars_models`` and ``tars_settings``; ``tars_load``, ``tars_generate``,
``tars_embed`` and ``tars_unload`` run in a worker process of their own. Each call goes to one plugin only.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import pluggy

from tars_core.models.gguf import GGUFHeader
from tars_core.system import processors
from tars_core.types.events import BackendEvent
from tars_core.types.models import ModelRef, OfferedModel
from tars_core.types.public import Public
from tars_core.types.reports import ProbeLimits, ProbeReport
from tars_core.types.request import EmbedRequest, GenerateRequest, Task
from tars_core.types.results import Embeddings

if TYPE_CHECKING:
    import pydantic  # a third of a second, and no worker needs it

PROJECT = "tars"
GROUP = "tars.plugins.v1"
GROUP_STEM = "tars.plugins.v"

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)

CancelFlag: TypeAlias = threading.Event
"""Set once the request or the load is no longer wanted; ``wait(seconds)`` sleeps until then."""

ProgressCallback: TypeAlias = Callable[[float, str], None]
"""``progress(fraction, note)``: 0 to 1, and what is going on. Every call counts as a sign of life."""


BASIC_FEATURES: frozenset[str] = frozenset({"raw", "chat", "continue", "seed"})
"""What every model can do, unless it states otherwise: the core renders the template, and a seed is to be honoured."""


class LoadOptions(Public, frozen=True, kw_only=True):
    """How to load. ``None`` leaves the choice to the backend."""

    task: Task = "generate"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    context_length: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    concurrency: int = 4
    """Requests that shall run at once."""
    allow_download: bool = False
    backend_settings: str = "{}"
    """The backend's own settings, ``[backends.NAME]``, as JSON that its ``tars_settings`` model has accepted."""

    @property
    def cpu_threads(self) -> int:
        """``threads``, else half of the processors this process may use: two of them are mostly one core.

        A container's quota counts: never more threads than it allows.
        """
        return self.threads or max(1, processors.usable() // 2)


class LoadedModel:
    """A model in memory. Derive from it to hold whatever the backend needs to run it.

    device
        Where it really runs, as a fact: ``cpu``, ``cuda:0``, ``metal``, …
    context_length
        Tokens one request can use, prompt and answer together.
    concurrency
        Requests it runs at once; the engine never hands it more.
    header
        A GGUF file's, which states what follows.
    chat_template, bos_token, eos_token
        The model's own jinja template and the texts of the two tokens; no template: prompts stay plain text.
    features
        What it can do, as a fact; the names are those of :data:`~tars_core.types.features.FEATURES`. With
        ``renders_chat`` the backend puts messages into the model's form itself, with a template that cannot be handed
        out: ``request.messages`` is filled then, and ``request.prompt`` empty, unless the caller gave a raw prompt.
    longest_token
        Bytes that one token stands for at most, where that is known: the core refuses by it, at once, a prompt of
        megabytes that cannot fit.
    adds_bos
        Whether its tokenizer puts a BOS token in front of every text.
    context_shrunk
        Set where memory forced a shorter context than was asked for: an overflow then moves on to the next
        candidate instead of being the caller's mistake.
    """

    def __init__(  # noqa: PLR0913 - each is one fact about the model
        self,
        *,
        device: str,
        context_length: int,
        concurrency: int = 1,
        features: frozenset[str] = BASIC_FEATURES,
        header: GGUFHeader | None = None,
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        adds_bos: bool | None = None,
        longest_token: int | None = None,
        context_shrunk: bool = False,
    ) -> None:
        self.device = device
        self.context_length = context_length
        self.concurrency = concurrency
        self.features = features
        self.chat_template = chat_template or (header.chat_template if header else None)
        self.bos_token = bos_token or (header.bos_token if header else "")
        self.eos_token = eos_token or (header.eos_token if header else "")
        self.adds_bos = (header.adds_bos if header else False) if adds_bos is None else adds_bos
        self.longest_token = longest_token or (header.longest_token if header else None)
        self.context_shrunk = context_shrunk

    def tokenize(self, text: str) -> Sequence[int]:
        """Return the tokens of a prompt, as generation would read it. Called from any thread, several at once.

        Only with the feature ``tokenize``. The core then counts each prompt, refuses one that leaves no room for an
        answer, bounds ``max_tokens`` by the room there is, and hands the tokens over in ``request.tokens``.
        """
        raise NotImplementedError


@runtime_checkable
class BatchedModel(Protocol):
    """A :class:`LoadedModel` that runs many requests in one loop, instead of ``tars_generate``.

    ``submit``, ``step`` and ``cancel`` are called from one thread. What a step returns is sent as one frame.
    """

    def prepare(self, request: GenerateRequest) -> Any:  # noqa: ANN401 - the plugin's own
        """Do what may take long, such as tokenising, and return what :meth:`submit` is to get.

        Called from any thread, while other requests run; so it must not touch what a step uses. Raise a
        :class:`~tars_core.types.errors.RequestError` to refuse the request.
        """

    def submit(self, request_id: int, prepared: Any) -> None:  # noqa: ANN401
        """Take a request up. Return at once: the running ones wait meanwhile."""

    def step(self) -> Sequence[tuple[int, BackendEvent | Exception]]:
        """Advance all requests by about a token; return each one's events, or the error that ended it.

        Called again and again while a request is active. Return within about 50 ms, with nothing if need be.
        """

    def cancel(self, request_id: int) -> None:
        """Stop a request; its last event is ``Finished(finish_reason="cancelled", …)``, from the next steps."""


def import_plugin(target: str) -> object:
    """Import an entry point's value, ``module`` or ``module:attribute``."""
    module, _, attribute = target.partition(":")
    plugin: object = importlib.import_module(module)
    for name in attribute.split(".") if attribute else ():
        plugin = getattr(plugin, name)
    return plugin


def new_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the hooks and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(TarsSpec)
    return manager


class TarsSpec:
    """The hooks."""

    @hookspec(firstresult=True)
    def tars_probe(self, model: ModelRef | None, limits: ProbeLimits, backend_settings: str) -> ProbeReport | None:
        """Say whether this machine can run ``model`` with this backend.

        ``model=None`` asks about the backend itself: is its runtime installed, its daemon up, on which device.

        Return within ``limits.deadline_s`` and do not import the runtime: look at files, sockets and
        ``importlib.metadata``. Report facts only; the core ranks. ``backend_settings`` are the backend's own, as in
        ``LoadOptions``; like every argument of a hook it can be left out of a plugin's function.

        ``None``: not a kind of model of mine. ``available=False``: mine, but ``reason`` stands in the way.
        """

    @hookspec(firstresult=True)
    def tars_models(self, backend_settings: str) -> Sequence[OfferedModel]:
        """Name the models this plugin brings along or can list, within half a second; none is an answer too.

        No import of a runtime, and no network but to a daemon that would run the models.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def tars_settings(self) -> type[pydantic.BaseModel]:
        """Return the model of this backend's own settings, which users write under ``[backends.NAME]``.

        Forbid extra fields, so that a misspelt one is an error. What it accepted comes back to ``tars_load`` in
        ``options.backend_settings``.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def tars_load(
        self, model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag
    ) -> LoadedModel:
        """Load ``model``. Runs in the worker, once per process.

        Call ``progress`` when there is something to tell. Return early, with any error, once ``cancel`` is set.
        Download nothing unless ``options.allow_download``.

        Raise :class:`~tars_core.types.errors.LoadFailed` with the reason, or
        :class:`~tars_core.types.errors.OutOfMemory`.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def tars_generate(
        self, loaded: LoadedModel, request: GenerateRequest, cancel: CancelFlag
    ) -> Iterator[BackendEvent]:
        """Answer ``request``: ``Progress`` and ``TextDelta`` in any number, then exactly one ``Finished``.

        Every value of ``request.sampling`` is to be honoured as its docstring says, stop strings included: the
        text ends before the first of them (``tars_core.plugin.Answer`` helps). A prompt that does not fit is refused
        with :class:`~tars_core.types.errors.ContextLengthExceeded` before decoding, by the core where the model can
        ``tokenize``; nothing is truncated.

        Once ``cancel`` is set, stop within a token and finish with ``finish_reason="cancelled"``.
        Called from several threads at once if ``loaded.concurrency`` is above 1.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def tars_embed(self, loaded: LoadedModel, request: EmbedRequest, cancel: CancelFlag) -> Embeddings:
        """Return a vector for each of ``request.texts``, or with a query a score for each.

        Only for a model that was loaded with ``options.task`` ``embed`` or ``rerank`` and declares ``embeddings`` or
        ``rerank``. A text that is longer than the context is refused unless ``request.truncate``.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def tars_unload(self, loaded: LoadedModel) -> None:
        """Free what ``loaded`` holds. Optional: the process ends right after it. No request runs any more."""
