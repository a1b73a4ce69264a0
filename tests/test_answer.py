"""An answer in the making: tokens in, whole text, exact counts and one last event out."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_core.plugin import (
    Answer,
    BackendEvent,
    ContextLengthExceeded,
    Finished,
    GenerateRequest,
    LoadedModel,
    SamplingParams,
    TextDelta,
    Usage,
    say,
)

PIECES = ["a", "b", "st", "op", "", "é"]


def request(stop: Sequence[str] = (), max_tokens: int = 200) -> GenerateRequest:
    sampling = SamplingParams(stop=tuple(stop), max_tokens=max_tokens)
    return GenerateRequest(tokens=(1, 2, 3), sampling=sampling)


def text_of(events: Sequence[BackendEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def pushed(answer: Answer, tokens: Sequence[int]) -> list[BackendEvent]:
    events: list[BackendEvent] = []
    for token in tokens:
        if answer.finished:
            break
        events += answer.push(token)
    return events


def test_the_text_of_the_token_that_ends_it_is_not_lost() -> None:
    answer = Answer(PIECES.__getitem__, request())
    events = [*answer.push(0), *answer.push(1, ends=True)]
    assert text_of(events) == "ab"
    assert isinstance(events[-1], Finished)
    assert (events[-1].finish_reason, events[-1].usage) == ("stop", Usage(prompt_tokens=3, completion_tokens=2))


@pytest.mark.parametrize("reason", ["stop", "cancelled"])
def test_what_was_held_back_in_case_it_began_a_stop_string_comes_at_the_end(reason: str) -> None:
    answer = Answer(PIECES.__getitem__, request(stop=["stop"]))
    assert text_of(answer.push(2)) == ""
    events = answer.finish(reason)  # type: ignore[arg-type]
    assert text_of(events) == "st"
    assert events[0].token_ids == (2,) if isinstance(events[0], TextDelta) else pytest.fail("no text")


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.sampled_from(["stop", "ab", "é", "bst"]), max_size=2))
def test_no_text_and_no_token_is_lost_or_doubled(tokens: list[int], stop: list[str]) -> None:
    answer = Answer(PIECES.__getitem__, request(stop))
    events = pushed(answer, tokens)
    if not answer.finished:
        events += answer.finish("stop")
    whole = "".join(PIECES[token] for token in tokens)
    shown = text_of(events)
    assert whole.startswith(shown)
    assert not any(text in shown for text in stop)
    ids = [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]
    assert ids == tokens[: len(ids)]
    assert [isinstance(event, Finished) for event in events].count(True) == 1
    if not any(text in whole for text in stop):
        assert shown == whole


def test_max_tokens_ends_it_with_the_reason_length() -> None:
    answer = Answer(PIECES.__getitem__, request(max_tokens=2))
    *_, end = pushed(answer, [0, 0, 0])
    assert isinstance(end, Finished)
    assert (end.finish_reason, end.usage.completion_tokens) == ("length", 2)


def test_an_answer_of_one_token_has_no_speed() -> None:
    *_, end = Answer(PIECES.__getitem__, request(max_tokens=1)).push(0)
    assert isinstance(end, Finished)
    assert end.timings.decode_tokens_per_s is None


# ---- words as tokens ---------------------------------------------------------------------------

MODEL = LoadedModel(device="cpu", context_length=10)


def test_words_become_an_answer_that_ends_with_them() -> None:
    events = list(say(iter(["one", " two"]), request(), threading.Event(), MODEL, prompt_tokens=4))
    assert text_of(events) == "one two"
    assert events[-1] == Finished(
        finish_reason="stop",
        usage=Usage(prompt_tokens=4, completion_tokens=2),
        timings=events[-1].timings,  # type: ignore[union-attr]
    )


def test_words_without_end_are_bounded_by_max_tokens_and_by_the_context() -> None:
    def words() -> object:
        while True:
            yield "a"

    for most, prompt_tokens, wanted in ((5, 2, 5), (200, 2, 8)):
        events = list(say(words(), request(max_tokens=most), threading.Event(), MODEL, prompt_tokens=prompt_tokens))  # type: ignore[arg-type]
        assert text_of(events) == "a" * wanted
    with pytest.raises(ContextLengthExceeded):
        list(say(words(), request(), threading.Event(), MODEL, prompt_tokens=10))  # type: ignore[arg-type]


def test_words_stop_with_the_next_one_after_a_cancel() -> None:
    cancel = threading.Event()
    events = say(iter("abcdef"), request(), cancel, MODEL)
    next(events)
    cancel.set()
    (end,) = events
    assert isinstance(end, Finished)
    assert (end.finish_reason, end.usage.completion_tokens) == ("cancelled", 1)
