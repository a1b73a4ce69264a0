"""What comes of a request: the decision, the answer, and how it came about."""

from __future__ import annotations

from typing import Literal, TypeAlias

from tars_core.types.failures import Attempt
from tars_core.types.messages import ToolCall
from tars_core.types.models import ModelRef
from tars_core.types.public import Public, brief
from tars_core.types.reports import ProbeReport

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "tool_calls"]


class Usage(Public, frozen=True, kw_only=True):
    """Counts of tokens.

    ``prompt_tokens`` includes those found in a cache; ``completion_tokens`` every token sampled, the end token
    and those of a stop string included.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    """Those of ``completion_tokens`` that were thought."""


class TokenLogprob(Public, frozen=True, kw_only=True):
    """A token and the natural logarithm of its probability, by the raw logits: before bias, penalty and filters."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, the likeliest first."""


class Timings(Public, frozen=True, kw_only=True):
    """Seconds on a monotonic clock; ``None`` where nothing was measured."""

    load_s: float | None = None
    """Time this request waited for a model to load; ``None`` where it was loaded already."""
    ttft_s: float | None = None
    """From the request to the first text, load included."""
    decode_tokens_per_s: float | None = None
    """Tokens after the first, by the time they took."""


class Candidate(Public, frozen=True, kw_only=True):
    """A backend with a form of the model it can run, and why it stands where it stands."""

    backend: str
    model: ModelRef
    report: ProbeReport
    reasons: tuple[str, ...] = ()
    degraded: bool = False
    """Other weights than the first choice's."""


class Rejection(Public, frozen=True, kw_only=True):
    """A backend that will not be tried, and what stands in the way."""

    backend: str
    model: ModelRef | None = None
    reason: str
    hint: str | None = None


class Decision(Public, frozen=True, kw_only=True):
    """What was to be tried, in order, and what not. Kept on every result."""

    model: str
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    notice: str | None = None

    def _parts(self) -> list[str]:
        order = ", ".join(candidate.backend for candidate in self.candidates)
        parts = [f"model={brief(self.model)}", f"candidates=[{order}]", f"rejected=<{len(self.rejected)} items>"]
        return [*parts, f"notice={brief(self.notice)}"] if self.notice else parts


class Completion(Public, frozen=True, kw_only=True):
    """A whole answer and how it came about. ``text`` is exactly what was generated."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    backend: str
    model: ModelRef
    device: str
    degraded: bool
    decision: Decision
    attempts: tuple[Attempt, ...]
    reasoning: str = ""
    """What the model thought first, where the backend tells it apart from the answer."""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    warnings: tuple[str, ...] = ()
    """Settings that could not be honoured exactly, such as a context that is longer than memory allows."""

    def _parts(self) -> list[str]:
        used = self.usage
        model = self.model.path.name if self.model.path is not None else str(self.model)
        parts = [f"text={brief(self.text)}", f"backend={self.backend!r}", f"model={brief(model)}"]
        parts.append(f"finish_reason={self.finish_reason!r}")
        parts.append(f"tokens={used.prompt_tokens}+{used.completion_tokens}")
        return [*parts, "degraded=True"] if self.degraded else parts


class Embeddings(Public, frozen=True, kw_only=True):
    """Vectors of texts, one after the other: ``len(data) == count * dimensions * 4`` bytes of float32, little-endian.

    With a query they are scores: one number a text.
    """

    data: bytes
    count: int
    dimensions: int
    usage: Usage
