"""One answer as it is decoded: tokens in, events and counts out. For backends that sample for themselves."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from tars_core.kit.text import StopFilter
from tars_core.types.events import BackendEvent, BackendFinished, TextDelta
from tars_core.types.request import SamplingParams
from tars_core.types.results import FinishReason, Timings, Usage


class Answer:
    """Takes tokens as they are sampled; :attr:`finished` once the last event is out.

    ``decode`` gives the text a token completes, none for a special token; ``limit`` is how many tokens there may be.
    The text ends before a stop string; every token sampled is counted, the last one too.
    """

    def __init__(
        self, decode: Callable[[int], str], sampling: SamplingParams, *, prompt_tokens: int, limit: int
    ) -> None:
        self._decode = decode
        self._stop = StopFilter(sampling.stop)
        self._prompt_tokens = prompt_tokens
        self._limit = limit
        self._count = 0
        self._decoded = self._shown = 0  # characters
        self._hidden: collections.deque[tuple[int, int]] = collections.deque()
        self._first = self._last = 0.0
        self.finished: bool = False

    def push(self, token: int, *, ends: bool) -> list[BackendEvent]:
        """Add a token, which ``ends`` the answer or not; return what it brings."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._count += 1
        text = "" if ends else self._stop.push(self._text_of(token))
        reason: FinishReason | None = None
        if ends or self._stop.stopped:
            reason = "stop"
        elif self._count >= self._limit:
            reason = "length"
        if reason is not None:
            text += self._stop.flush()
        events: list[BackendEvent] = []
        if text:
            events.append(TextDelta(text=text, token_ids=self._show(text)))
        if reason is not None:
            events.append(self.finish(reason))
        return events

    def finish(self, reason: FinishReason) -> BackendFinished:
        """Return the last event."""
        self.finished = True
        decoding_s = self._last - self._first
        return BackendFinished(
            finish_reason=reason,
            usage=Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._count),
            timings=Timings(decode_tokens_per_s=(self._count - 1) / decoding_s if decoding_s > 0 else None),
        )

    def _text_of(self, token: int) -> str:
        text = self._decode(token)
        self._decoded += len(text)
        self._hidden.append((token, self._decoded))
        return text

    def _show(self, text: str) -> tuple[int, ...]:
        """Return the tokens whose text is now all shown: what the stop filter holds back keeps its tokens back."""
        self._shown += len(text)
        tokens = []
        while self._hidden and self._hidden[0][1] <= self._shown:
            tokens.append(self._hidden.popleft()[0])
        return tuple(tokens)
