"""Readers that stop reading an answer. Numbers are rows of the fault list."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

import pytest

from tars_core import Finished, InferenceEngine, Started, StreamEvent, TextDelta
from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    GenerationFailed,
    LoadedModel,
    ProbeReport,
    ReasoningDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    hookimpl,
)
from tars_core.plugin import Finished as BackendFinished
from tars_core.types.errors import StreamInterrupted
from tars_core.types.observed import EventsLost, Observed, RequestEnded, WorkerEnded

T = TypeVar("T")
MANY = 5_000
MOST = 64 + 3
"""Events that may wait, with the ones before and after."""
Read: TypeAlias = Callable[[InferenceEngine, Callable[[], bool]], list[StreamEvent]]


def text(number: int) -> TextDelta:
    word = f"w{number} "
    return TextDelta(text=word, token_ids=(number,), logprobs=(TokenLogprob(token_id=number, text=word, logprob=-0.5),))


class Flood(LoadedModel):
    """Says a lot at once."""

    def __init__(self, *events: BackendEvent, fails: bool = False) -> None:
        super().__init__(device="cpu", context_length=10 * MANY, features=BASIC_FEATURES | {"logprobs", "parses"})
        self._events = events
        self._fails = fails

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return self

    @hookimpl
    def tars_generate(self) -> Iterator[BackendEvent]:
        yield from self._events
        if self._fails:
            raise GenerationFailed("the flood is over")
        yield BackendFinished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=len(self._events)))


def read(engine: InferenceEngine, is_over: Callable[[], bool]) -> list[StreamEvent]:
    """Read the first event, and nothing more until the answer is complete; then all the rest."""
    stream = engine.stream("hi", max_tokens=4 * MANY)
    first = next(stream)
    deadline = time.monotonic() + 60
    while not is_over():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [first, *stream]


def aread(engine: InferenceEngine, is_over: Callable[[], bool]) -> list[StreamEvent]:
    async def go() -> list[StreamEvent]:
        stream = engine.astream("hi", max_tokens=4 * MANY)
        first = await anext(stream)
        deadline = time.monotonic() + 60
        while not is_over():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        return [first, *[event async for event in stream]]

    return asyncio.run(go())


def events_of(read: Read, *events: BackendEvent) -> list[StreamEvent]:
    """Return what a reader gets who does not read until the answer is complete."""
    ended: list[RequestEnded] = []
    with InferenceEngine(model="flood:x", plugins="flood", extra_plugins={"flood": Flood(*events)}) as engine:
        engine.observe(lambda event: ended.append(event) if isinstance(event, RequestEnded) else None)
        return read(engine, lambda: bool(ended))


@pytest.mark.parametrize("read", [read, aread])
def test_57_a_reader_that_stops_reading_lets_few_events_wait_and_loses_nothing(read: Read) -> None:
    said = [text(number) for number in range(MANY)]
    started, *deltas, finished = events_of(read, *said)
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert len(deltas) <= MOST
    got = [delta for delta in deltas if isinstance(delta, TextDelta)]
    whole = "".join(delta.text for delta in said)
    assert "".join(delta.text for delta in got) == finished.completion.text == whole
    assert [token for delta in got for token in delta.token_ids] == list(range(MANY))
    for delta in got:  # each piece of text is with its own tokens
        assert [logprob.token_id for logprob in delta.logprobs] == list(delta.token_ids)
        assert "".join(logprob.text for logprob in delta.logprobs) == delta.text
    assert finished.completion.usage.completion_tokens == MANY


@pytest.mark.parametrize("read", [read, aread])
def test_57_thoughts_and_calls_are_joined_too_and_stay_in_order(read: Read) -> None:
    thoughts = [ReasoningDelta(text=f"t{number} ", token_ids=(number,)) for number in range(MANY)]
    calls = [
        ToolCallDelta(
            index=index, id="" if number else f"id{index}", name="" if number else "f", arguments=f"{number},"
        )
        for index in (0, 1)
        for number in range(MANY // 2)
    ]
    said = [text(number) for number in range(MANY)]
    _, *deltas, finished = events_of(read, *thoughts, *said, *calls)
    assert len(deltas) <= MOST + 3
    kinds = [type(delta) for delta in deltas]
    assert sorted(kinds, key=[ReasoningDelta, TextDelta, ToolCallDelta].index) == kinds
    assert isinstance(finished, Finished)
    completion = finished.completion
    assert (
        completion.text == "".join(d.text for d in deltas if isinstance(d, TextDelta)) == "".join(d.text for d in said)
    )
    thought = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    assert completion.reasoning == thought == "".join(delta.text for delta in thoughts)
    tokens = [token for delta in deltas if isinstance(delta, ReasoningDelta) for token in delta.token_ids]
    assert tokens == list(range(MANY))
    arguments = "".join(f"{number}," for number in range(MANY // 2))
    for index, call in enumerate(completion.tool_calls):
        got = [delta for delta in deltas if isinstance(delta, ToolCallDelta) and delta.index == index]
        assert ("".join(delta.arguments for delta in got), got[0].id, got[0].name) == (arguments, f"id{index}", "f")
        assert (call.arguments, call.id, call.name) == (arguments, f"id{index}", "f")


def test_57_a_reader_that_keeps_up_gets_every_piece_by_itself() -> None:
    said = [text(number) for number in range(50)]
    with InferenceEngine(model="flood:x", plugins="flood", extra_plugins={"flood": Flood(*said)}) as engine:
        assert [event for event in engine.stream("hi") if isinstance(event, TextDelta)] == said


def test_57_a_failure_comes_behind_all_the_text_that_waited() -> None:
    flood = Flood(*(text(number) for number in range(MANY)), fails=True)
    ended: list[RequestEnded] = []
    got: list[StreamEvent] = []
    with InferenceEngine(model="flood:x", plugins="flood", extra_plugins={"flood": flood}) as engine:
        engine.observe(lambda event: ended.append(event) if isinstance(event, RequestEnded) else None)
        stream = engine.stream("hi", max_tokens=4 * MANY)
        got.append(next(stream))
        deadline = time.monotonic() + 60
        while not ended:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(StreamInterrupted) as caught:
            got.extend(stream)
    received = "".join(event.text for event in got if isinstance(event, TextDelta))
    assert received == caught.value.partial_text == "".join(text(number).text for number in range(MANY))


def test_57_an_observer_that_stops_reading_loses_the_oldest_events_and_is_told_how_many() -> None:
    answers = 700  # three events each
    told: list[Observed] = []
    until_asked = threading.Event()
    with InferenceEngine(model="flood:x", plugins="flood", extra_plugins={"flood": Flood(text(0))}) as engine:
        engine.generate("hi")
        first = True

        def slow(event: Observed) -> None:
            nonlocal first
            if first:
                first = False
                until_asked.wait(60)
            told.append(event)

        engine.observe(slow)
        for _ in range(answers):
            engine.generate("hi")
        until_asked.set()
    (lost,) = (event for event in told if isinstance(event, EventsLost))
    assert isinstance(told[-1], WorkerEnded)
    assert isinstance(told[-2], RequestEnded)
    assert lost.count + len(told[:-1]) - 1 == 3 * answers
