"""What is asked of a backend: one request object for all of them, and how to sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from tars_core.types.errors import RequestError
from tars_core.types.messages import Message
from tars_core.types.public import Public
from tars_core.types.text import check_text

Task: TypeAlias = Literal["generate", "embed", "rerank"]
RAW_STOP = ("User:", "Usuario:")
"""A raw prompt has no roles of its own; without these a base model goes on to play the user."""


class SamplingParams(Public, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop.

    Raises :class:`~tars_core.types.errors.RequestError` for a value of the wrong type or out of range.
    """

    temperature: float = 0.8
    """0 (greedy: always the most likely token) to 10."""
    top_p: float = 0.9
    """Keep the smallest set of tokens whose probability reaches this; (0, 1], 1 = off."""
    top_k: int = 40
    """Keep this many most likely tokens; 0 = off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; [0, 1), 0 = off."""
    repeat_penalty: float = 1.1
    """Divides (multiplies, where negative) the logits of the last 64 tokens, prompt included; (0, 10], 1 = off."""
    max_tokens: int = 200
    """At least 1; bounded by what the context still holds."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    seed: int | None = None
    """0 to 2³²-1; ``None`` draws one."""

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "temperature": _check_number("temperature", self.temperature, 0, 10),
            "top_p": _check_number("top_p", self.top_p, 0, 1, low_open=True),
            "top_k": _check_whole("top_k", self.top_k, 0, 2**31 - 1),
            "min_p": _check_number("min_p", self.min_p, 0, 1, high_open=True),
            "repeat_penalty": _check_number("repeat_penalty", self.repeat_penalty, 0, 10, low_open=True),
            "max_tokens": _check_whole("max_tokens", self.max_tokens, 1, 2**63 - 1),
            "seed": None if self.seed is None else _check_whole("seed", self.seed, 0, 2**32 - 1),
        }
        if not isinstance(self.stop, Iterable):
            raise RequestError(f"stop must be a string or a list of them, not {self.stop!r:.40}")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        checked["stop"] = stop = tuple(check_text("stop", text) for text in stops)
        if "" in stop:
            raise RequestError("a stop string is empty", hint="it would stop before the first token")
        for name, value in checked.items():
            msgspec.structs.force_setattr(self, name, value)


class Constraint(Public, frozen=True, kw_only=True):
    """What the text must look like. Needs the feature named like its ``kind``."""

    kind: Literal["json_schema", "regex", "grammar", "choices"]
    source: str
    """A JSON schema, a regular expression, a Lark grammar, or a JSON list of strings."""
    after: str = ""
    """The constraint begins behind the first occurrence of this text; empty: with the first token."""


class Tool(Public, frozen=True, kw_only=True):
    """A function the model may call; ``parameters`` is a JSON schema, as JSON."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object"}'


class Resume(Public, frozen=True, kw_only=True):
    """An answer that another worker began: go on behind it, and do not repeat it."""

    text: str
    token_ids: tuple[int, ...] = ()
    """The tokens of ``text``, where they are known; empty: tokenise the text."""
    completion_tokens: int = 0
    """How many were sampled for it; they count against ``max_tokens``."""


class GenerateRequest(Public, frozen=True, kw_only=True):
    """What a backend is asked.

    ``prompt`` is the whole prompt as text, with the model's template applied. Tokenise it with special tokens
    recognised, except in the ``literal`` ranges, and add a BOS token where the model's tokenizer adds one: the core has
    taken a leading BOS out of the rendered template. Only a backend with the feature ``renders_chat`` gets ``messages``
    instead.

    A field at its default asks for nothing. Any other value is a *need*: a request goes only to models that declare the
    feature, so a plugin never has to look at fields it does not know.
    """

    prompt: str = ""
    tokens: tuple[int, ...] = ()
    """The prompt's tokens, where the model can ``tokenize``; the core has seen that they fit."""
    messages: tuple[Message, ...] = ()
    literal: tuple[tuple[int, int], ...] = ()
    """Ranges of ``prompt``, in characters, that are users' text: control tokens in them are only text."""
    sampling: SamplingParams
    constraint: Constraint | None = None
    tools: tuple[Tool, ...] = ()
    template_options: str = "{}"
    """A JSON object for the model's template, such as ``{"enable_thinking": false}``."""
    think: bool | Literal["low", "medium", "high"] | None = None
    """Whether, and how much, the model shall think first; ``None``: as the model does by itself."""
    reasoning_budget: int | None = None
    """Tokens the thought may take."""
    resume: Resume | None = None
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of so many of the likeliest ones, for each token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
    show: tuple[str, ...] = ()
    """Control tokens whose text is wanted in the answer."""

    def needs(self) -> frozenset[str]:
        """Return the features that a model must have to answer this."""
        wanted = {
            "chat": bool(self.messages),
            "raw": not self.messages,
            "continue": bool(self.messages) and self.messages[-1].role == "assistant",
            "seed": self.sampling.seed is not None,
            self.constraint.kind if self.constraint is not None else "": self.constraint is not None,
            "tools": bool(self.tools) or any(m.role == "tool" or m.tool_calls for m in self.messages),
            "images": any(not isinstance(m.content, str) for m in self.messages),
            "literal": bool(self.literal),
            "template_options": self.template_options != "{}",
            "think": self.think is not None,
            "reasoning_budget": self.reasoning_budget is not None,
            "resume": self.resume is not None,
            "logprobs": self.logprobs is not None,
            "logit_bias": bool(self.logit_bias),
            "show": bool(self.show),
        }
        return frozenset(feature for feature, is_needed in wanted.items() if is_needed)


class EmbedRequest(Public, frozen=True, kw_only=True):
    """Texts to turn into vectors; with a ``query``, texts to be scored by how well they answer it."""

    texts: tuple[str, ...]
    query: str | None = None
    truncate: bool = False
    """Cut what is longer than the context; else it is an error."""


def _check_number(  # noqa: PLR0913 - bounds and whether they are meant
    name: str, value: object, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> float:
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, not {value!r:.40}")
    inside = low < value if low_open else low <= value  # neither holds for NaN
    if not inside or not (value < high if high_open else value <= high):
        raise RequestError(f"{name} is {_shown(value)}", hint=f"it must be in {left}{low:g}, {high:g}{right}")
    return float(value)


def _check_whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, not {value!r:.40}")
    if not low <= value <= high:
        hint = f"it must be at least {low}" if value < low else f"it must be at most {high}"
        raise RequestError(f"{name} is {_shown(value)}", hint=hint)
    return int(value)


def _shown(value: float) -> str:
    # Python refuses to print whole numbers of more than 4,300 digits.
    return repr(value) if isinstance(value, float) or abs(value) < 2**64 else "beyond 2**64"
