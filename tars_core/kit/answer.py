"""One answer as it is decoded: tokens in, events and counts out. For backends that sample for themselves."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from tars_core.hookspecs import CancelFlag, LoadedModel
from tars_core.kit.text import StopFilter
from tars_core.types.errors import ContextLengthExceeded
from tars_core.types.events import BackendEvent, BackendFinished, TextDelta
from tars_core.types.request import GenerateRequest
from tars_core.types.results import FinishReason, Timings, Usage


class Answer:
    """Takes tokens as they are sampled; :attr:`finished` once the last event is out.

    ``decode`` gives the text a token completes, none for a special token. The text ends before a stop string; every
    token sampled is counted, the last one too. ``prompt_tokens`` is needed only for a model that cannot ``tokenize``.
    """

    def __init__(
        self, decode: Callable[[int], str], request: GenerateRequest, *, prompt_tokens: int | None = None
    ) -> None:
        self._decode = decode
        self._stop = StopFilter(request.sampling.stop)
        self._limit = request.sampling.max_tokens
        self._prompt_tokens = len(request.tokens) if prompt_tokens is None else prompt_tokens
        self._count = 0
        self._decoded = self._shown = 0  # characters
        self._hidden: collections.deque[tuple[int, int]] = collections.deque()
        self._first = self._last = 0.0
        self.finished: bool = False

    def push(self, token: int, *, ends: bool = False) -> list[BackendEvent]:
        """Add a token, which ``ends`` the answer or not; return what it brings, the last event too where it ends."""
        return self._add(self._text_of(token), ends=ends)

    def push_text(self, text: str) -> list[BackendEvent]:
        """Add a token that has no id."""
        self._decoded += len(text)
        return self._add(text, ends=False)

    def _add(self, text: str, *, ends: bool) -> list[BackendEvent]:
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._count += 1
        text = self._stop.push(text)
        if ends or self._stop.stopped:
            return self.finish("stop", text)
        if self._count >= self._limit:
            return self.finish("length", text)
        return self._delta(text)

    def finish(self, reason: FinishReason, text: str = "") -> list[BackendEvent]:
        """Return the last events: what was held back in case it began a stop string, and ``Finished``."""
        self.finished = True
        decoding_s = self._last - self._first
        end = BackendFinished(
            finish_reason=reason,
            usage=Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._count),
            timings=Timings(decode_tokens_per_s=(self._count - 1) / decoding_s if decoding_s > 0 else None),
        )
        return [*self._delta(text + self._stop.flush()), end]

    def _text_of(self, token: int) -> str:
        text = self._decode(token)
        self._decoded += len(text)
        self._hidden.append((token, self._decoded))
        return text

    def _delta(self, text: str) -> list[BackendEvent]:
        return [TextDelta(text=text, token_ids=self._show(text))] if text else []

    def _show(self, text: str) -> tuple[int, ...]:
        """Return the tokens whose text is now all shown: what the stop filter holds back keeps its tokens back."""
        self._shown += len(text)
        tokens = []
        while self._hidden and self._hidden[0][1] <= self._shown:
            tokens.append(self._hidden.popleft()[0])
        return tuple(tokens)


def say(
    tokens: Iterable[str],
    request: GenerateRequest,
    cancel: CancelFlag,
    loaded: LoadedModel,
    *,
    prompt_tokens: int | None = None,
) -> Iterator[BackendEvent]:
    """Yield the events of an answer whose tokens are texts, such as words; its end is the end of ``tokens``.

    It is stopped, bounded and counted as the contract says. ``prompt_tokens`` as for :class:`Answer`. Raises
    :class:`~tars_core.types.errors.ContextLengthExceeded` where they fill the context.
    """
    if prompt_tokens is not None:
        room = loaded.context_length - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(prompt_tokens=prompt_tokens, context_length=loaded.context_length)
        bounded = msgspec.structs.replace(request.sampling, max_tokens=min(room, request.sampling.max_tokens))
        request = msgspec.structs.replace(request, sampling=bounded)
    answer = Answer(lambda _: "", request, prompt_tokens=prompt_tokens)
    for token in tokens:
        if cancel.is_set():
            yield from answer.finish("cancelled")
            return
        yield from answer.push_text(token)
        if answer.finished:
            return
    yield from answer.finish("cancelled" if cancel.is_set() else "stop")
