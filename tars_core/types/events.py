"""What a stream yields: to the caller, and from a backend to the engine."""

from __future__ import annotations

from typing import TypeAlias

from tars_core.types.public import Public
from tars_core.types.results import Completion, Decision, FinishReason, Timings, TokenLogprob, Usage


class Progress(Public, frozen=True, kw_only=True, tag="progress"):
    """A backend is reading the prompt. It counts as a sign of life and reaches no caller."""

    prompt_tokens_done: int


class TextDelta(Public, frozen=True, kw_only=True, tag="text"):
    """The next piece of the answer: whole code points, never empty.

    ``token_ids`` are the tokens behind it where the backend knows them; ``logprobs``, where they were asked for, has
    one entry for each of them.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(Public, frozen=True, kw_only=True, tag="reasoning"):
    """The next piece of what the model thinks first; not part of the answer.

    Backends yield it only where their engine splits thoughts from text itself (the feature ``parses``).
    """

    text: str
    token_ids: tuple[int, ...] = ()


class ToolCallDelta(Public, frozen=True, kw_only=True, tag="tool_call"):
    """The next piece of a call; ``id`` and ``name`` come with its first, ``arguments`` is more of its JSON.

    Backends yield it only where their engine splits calls from text itself (the feature ``parses``).
    """

    index: int
    """Which call of the answer, from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""


class BackendFinished(Public, frozen=True, kw_only=True, tag="finished"):
    """The last event of a backend (``tars_core.plugin`` calls it ``Finished``)."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings = Timings()


BackendEvent: TypeAlias = Progress | TextDelta | ReasoningDelta | ToolCallDelta | BackendFinished
"""What ``tars_generate`` yields."""


class Started(Public, frozen=True, kw_only=True):
    """The first event of a stream: what will be tried, in which order."""

    decision: Decision


class Finished(Public, frozen=True, kw_only=True):
    """The last event of a stream."""

    completion: Completion


StreamEvent: TypeAlias = Started | TextDelta | ReasoningDelta | ToolCallDelta | Finished
"""What ``InferenceEngine.stream`` yields."""
