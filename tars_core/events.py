"""What a stream yields: to the caller, and from a backend to the engine."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from tars_core.schema import Completion, Decision, FinishReason, Timings, Usage


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """A backend is reading the prompt. It counts as a sign of life and reaches no caller."""

    prompt_tokens_done: int


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """The next piece of the answer: whole code points, never empty.

    ``token_ids`` are the tokens behind it where the backend knows them.
    """

    text: str
    token_ids: tuple[int, ...] = ()


class BackendFinished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The last event of a backend (``tars_core.plugin`` calls it ``Finished``)."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings = Timings()


BackendEvent: TypeAlias = Progress | TextDelta | BackendFinished
"""What ``tars_generate`` yields."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The first event of a stream: what will be tried, in which order."""

    decision: Decision


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The last event of a stream."""

    completion: Completion


StreamEvent: TypeAlias = Started | TextDelta | Finished
"""What ``InferenceEngine.stream`` yields."""
