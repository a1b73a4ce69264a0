"""What every request in a worker goes through: from the host's terms to the backend's, and back."""

from __future__ import annotations

import queue
import random
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
import pluggy

from tars_core.hookspecs import LoadedModel
from tars_core.kit.templates import ChatTemplate, render_plain
from tars_core.kit.text import least_tokens
from tars_core.types.errors import (
    ContextLengthExceeded,
    ContextShrunk,
    ContractError,
    GenerationFailed,
    TarsError,
    told,
)
from tars_core.types.events import BackendEvent, BackendFinished, Progress, ReasoningDelta, TextDelta, ToolCallDelta
from tars_core.types.failures import Failure
from tars_core.types.messages import Message
from tars_core.types.public import brief, field_error
from tars_core.types.request import RAW_STOP, GenerateRequest
from tars_core.types.results import Embeddings
from tars_core.worker import protocol
from tars_core.worker.protocol import (
    Embed,
    Embedded,
    Events,
    Failed,
    HostFrame,
    Render,
    Rendered,
    Terminal,
    Tokenize,
    Tokens,
    WorkerFrame,
)


class Prepared(NamedTuple):
    """What a thread has made of a request: what to submit, or why not."""

    request_id: int
    value: Any
    failed: Failed | None = None


Send: TypeAlias = Callable[[WorkerFrame], None]
Inbox: TypeAlias = "queue.SimpleQueue[HostFrame | Prepared | None]"
"""``None`` ends the session."""


def told_with_trace(error: BaseException) -> str:
    """Describe a plugin's own exception by type and place; the whole traceback goes to stderr, for ``tars -vv``."""
    traceback.print_exception(error)
    return told(error)


class Requests:
    """What every kind of request goes through: from the host's terms to the backend's and back."""

    def __init__(self, plugin: str, loaded: LoadedModel, hooks: pluggy.HookRelay) -> None:
        self.plugin = plugin
        self.loaded = loaded
        self.hooks = hooks
        self._template = (
            ChatTemplate(
                loaded.chat_template,
                bos_token=loaded.bos_token,
                eos_token=loaded.eos_token,
                adds_bos=loaded.adds_bos,
            )
            if loaded.chat_template
            else None
        )

    def prepare(self, asked: GenerateRequest) -> GenerateRequest:
        """Return the request as the backend gets it: messages rendered, a seed drawn, the stop strings complete."""
        rendered_there = bool(asked.messages) and "renders_chat" in self.loaded.features
        raw = not asked.messages or (self._template is None and not rendered_there)
        prompt = self._rendered(asked.messages) if asked.messages and not rendered_there else asked.prompt
        tokens = () if rendered_there else self._tokens(prompt)
        sampling = asked.sampling
        return msgspec.structs.replace(
            asked,
            prompt=prompt,
            tokens=tokens,
            messages=asked.messages if rendered_there else (),
            sampling=msgspec.structs.replace(
                sampling,
                max_tokens=min(sampling.max_tokens, self.loaded.context_length - len(tokens)),
                seed=random.getrandbits(32) if sampling.seed is None else sampling.seed,
                stop=tuple(dict.fromkeys((*sampling.stop, *(RAW_STOP if raw else ())))),
            ),
        )

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        """Return the prompt's tokens where the model tells them. Raises where no room is left for an answer."""
        context = self.loaded.context_length
        tokens: tuple[int, ...] = ()
        count = least_tokens(prompt, self.loaded.longest_token) if self.loaded.longest_token else 0
        if count < context and "tokenize" in self.loaded.features:
            tokens = tuple(self.loaded.tokenize(prompt))
            count = len(tokens)
            if not count:
                raise GenerationFailed("the prompt has no tokens in this model's vocabulary")
        if count >= context:
            raise ContextLengthExceeded(prompt_tokens=count, context_length=context)
        return tokens

    def _rendered(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages) if self._template is not None else render_plain(messages)

    def aside(self, frame: Embed | Render | Tokenize, cancel: threading.Event) -> Terminal:
        """Answer what is no generation."""
        try:
            match frame:
                case Render(messages=messages):
                    return Rendered(prompt=self._rendered(messages))
                case Tokenize(prompt=prompt):
                    return Tokens(ids=tuple(map(int, self.loaded.tokenize(prompt))))
                case Embed(request=request):
                    vectors = self.hooks.tars_embed(loaded=self.loaded, request=request, cancel=cancel)
                    return self._embedded(vectors, len(request.texts))
        except BaseException as error:  # noqa: BLE001 - a plugin must not end the worker
            return self.failed(error)

    def _embedded(self, vectors: object, count: int) -> Embedded:
        if not isinstance(vectors, Embeddings):
            raise EventRules(self.plugin, "tars_embed").broken(
                f"it must return Embeddings, not {type(vectors).__name__}"
            )
        if vectors.count != count or len(vectors.data) != 4 * vectors.count * vectors.dimensions:
            raise EventRules(self.plugin, "tars_embed").broken(
                f"{count} texts were asked for; it returned {vectors.count} times {vectors.dimensions} numbers"
                f" in {len(vectors.data)} bytes"
            )
        return Embedded(
            data=bytes(vectors.data),
            count=vectors.count,
            dimensions=vectors.dimensions,
            prompt_tokens=vectors.usage.prompt_tokens,
        )

    def failed(self, error: BaseException) -> Failed:
        """Describe why a request ended; whatever a plugin raises becomes data."""
        if not isinstance(error, Exception):
            error = EventRules(self.plugin).broken(f"it raised {type(error).__name__}")
        elif isinstance(error, ContextLengthExceeded) and self.loaded.context_shrunk:
            error = ContextShrunk(
                f"the prompt has {error.prompt_tokens} tokens; memory allowed a context of only {error.context_length}"
            )
        elif not isinstance(error, TarsError):
            error = GenerationFailed(told_with_trace(error))
        return Failed(failure=Failure.of(error))


def _name(event: object) -> str:
    """Return a type's name as plugins know it."""
    return type(event).__name__.removeprefix("Backend")


class EventRules:
    """Holds one request's events against the contract."""

    def __init__(self, plugin: str, hook: str = "tars_generate", max_tokens: int = 2**63) -> None:
        self._plugin = plugin
        self._hook = hook
        self._max_tokens = max_tokens
        self.finished = False

    def check(self, event: object) -> BackendEvent:
        """Return ``event`` if it may come now. Raises ``ContractError``."""
        if self.finished:
            raise self.broken("an event came after Finished")
        if not isinstance(event, Progress | TextDelta | ReasoningDelta | ToolCallDelta | BackendFinished):
            raise self.broken(f"events are Progress, TextDelta and Finished, not {brief(event)} ({_name(event)})")
        if isinstance(event, TextDelta | ReasoningDelta) and not event.text:
            raise self.broken(f"a {_name(event)} must not be empty; leave it out")
        try:
            protocol.check(Events(items=((0, event),)))
        except (TypeError, ValueError) as error:
            raise self.broken(f"invalid {_name(event)}: {field_error(error, '.items[0][1]')}") from error
        if isinstance(event, BackendFinished) and event.usage.completion_tokens > self._max_tokens:
            raise self.broken(
                f"it sampled {event.usage.completion_tokens} tokens, and request.sampling.max_tokens is"
                f" {self._max_tokens}"
            )
        self.finished = isinstance(event, BackendFinished)
        return event

    def broken(self, rule: str) -> ContractError:
        """Return the error for a rule that was broken."""
        return ContractError(
            f"plugin {self._plugin} broke the contract of {self._hook}: {rule}",
            hint=f"report it to the authors of {self._plugin}",
        )
