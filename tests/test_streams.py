"""Streams as their readers hold them, time limits that are turned off, and answers that a caller rejects."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tars_core import (
    AllBackendsFailed,
    AsyncStream,
    Completion,
    DeadlineExceeded,
    EngineClosed,
    Finished,
    InferenceEngine,
    Message,
    ProbeReport,
    ReasoningDelta,
    RequestError,
    Started,
    Stream,
    StreamEvent,
    StreamInterrupted,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tars_core.config.gather import load_settings
from tars_core.plugin import BASIC_FEATURES, BackendEvent, LoadedModel, hookimpl
from tars_core.plugin import Finished as BackendFinished
from tars_core.testing.fake import BackendScript, Finish, Raise, ReadPrompt, Say, Wait
from tars_core.testing.watching import until
from tars_core.types.observed import AttemptEnded, CircuitChanged, Observed, RequestEnded, RequestStarted

MakeEngine = Callable[..., InferenceEngine]
WriteScript = Callable[..., str]

HELD = BackendScript(generate=(Say("x"), Wait(60), Say("y"), Finish()), concurrency=1)
"""Says something and then nothing for a minute, and has one place: who does not free it blocks the next."""
LONG = {"first_token_s": 60.0, "between_tokens_s": 60.0, "total_s": 60.0}


def text_of(events: Sequence[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def to_the_text(stream: Iterator[StreamEvent]) -> None:
    """Read on until the first text has come."""
    while not isinstance(next(stream), TextDelta):
        pass


async def ato_the_text(stream: AsyncIterator[StreamEvent]) -> None:
    while not isinstance(await anext(stream), TextDelta):
        pass


class Player:
    """Runs any model, in this process: yields what it is told to, and says when it has done so."""

    def __init__(self, *events: BackendEvent) -> None:
        self._events = events
        self.done = threading.Event()

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return LoadedModel(device="cpu", context_length=100_000, features=BASIC_FEATURES | {"parses", "token_ids"})

    @hookimpl
    def tars_generate(self) -> Iterator[BackendEvent]:
        yield from self._events
        self.done.set()
        yield BackendFinished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=len(self._events)))


def engine_of(player: Player, **settings: object) -> InferenceEngine:
    return InferenceEngine(settings, model="any:thing", plugins="player", extra_plugins={"player": player})


def observed(engine: InferenceEngine) -> list[Observed]:
    events: list[Observed] = []
    engine.observe(events.append)
    return events


# ---- iterators and context managers --------------------------------------------------------------


def test_a_stream_is_an_iterator_and_a_context_manager(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    with engine.stream("hi") as stream:
        assert isinstance(stream, Stream)
        assert isinstance(stream, Iterator)
        assert iter(stream) is stream
        assert text_of(list(stream)) == "hello"


def test_an_async_stream_is_an_async_iterator_and_an_async_context_manager(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())

    async def read() -> None:
        async with engine.astream("hi") as stream:
            assert isinstance(stream, AsyncStream)
            assert isinstance(stream, AsyncIterator)
            assert aiter(stream) is stream
            assert text_of([event async for event in stream]) == "hello"

    asyncio.run(read())


def test_leaving_the_block_stops_the_generation_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)
    for _ in range(5):
        with engine.stream("hi") as stream:
            to_the_text(stream)
    assert engine.loaded()[0].name == engine.settings.model


def test_leaving_the_async_block_stops_the_generation_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)

    async def read() -> None:
        for _ in range(5):
            async with engine.astream("hi") as stream:
                await ato_the_text(stream)

    asyncio.run(asyncio.wait_for(read(), 50))


@pytest.mark.parametrize("before_text", [True, False])
def test_a_stream_that_is_dropped_stops_its_generation_though_no_event_comes(
    make_engine: MakeEngine, *, before_text: bool
) -> None:
    script = BackendScript(generate=(*(() if before_text else (Say("x"),)), Wait(60), Finish()), concurrency=1)
    engine = make_engine(alpha=script, limits=LONG)
    events = observed(engine)
    for number in (1, 2, 3):
        for event in engine.stream("hi"):
            if before_text or isinstance(event, TextDelta):
                break
        gc.collect()
        until(lambda number=number: len(ended(events)) == number, "it still runs")  # type: ignore[misc]
    assert [event.failure.kind for event in ended(events) if event.failure] == ["Cancelled"] * 3


def ended(events: Sequence[Observed]) -> list[RequestEnded]:
    return [event for event in events if isinstance(event, RequestEnded)]


def test_an_async_stream_that_is_dropped_stops_its_generation_though_no_event_comes(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)
    events = observed(engine)

    async def read() -> None:
        for number in (1, 2, 3):
            async for event in engine.astream("hi"):
                if isinstance(event, TextDelta):
                    break
            gc.collect()
            await asyncio.to_thread(until, lambda n=number: len(ended(events)) == n, "it still runs")

    asyncio.run(read())
    assert [event.failure.kind for event in ended(events) if event.failure] == ["Cancelled"] * 3


def test_a_stream_may_be_closed_twice_and_at_any_time(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)
    for read in (lambda _: None, next, to_the_text):  # at once, behind Started, behind the first text
        stream = engine.stream("hi")
        read(stream)
        stream.close()
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
    whole = make_engine(alpha=BackendScript()).stream("hi")
    assert isinstance(list(whole)[-1], Finished)
    whole.close()
    assert list(whole) == []


def test_an_async_stream_may_be_closed_twice_and_at_any_time(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)

    async def nothing(_: AsyncIterator[StreamEvent]) -> None:
        pass

    async def read_all() -> None:
        for read in (nothing, anext, ato_the_text):
            stream = engine.astream("hi")
            await read(stream)
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert [event async for event in stream] == []

    asyncio.run(asyncio.wait_for(read_all(), 50))


def test_an_async_stream_that_is_never_read_asks_nobody(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    events = observed(engine)

    async def only_open() -> None:
        async with engine.astream("hi"):
            pass
        engine.astream("hi")

    asyncio.run(only_open())
    engine.generate("hi")
    engine.close()
    assert sum(isinstance(event, RequestStarted) for event in events) == 1


def test_after_its_end_a_stream_stays_at_its_end(make_engine: MakeEngine) -> None:
    stream = make_engine(alpha=BackendScript()).stream("hi")
    assert isinstance(list(stream)[-1], Finished)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(stream)
    assert next(stream, None) is None


def test_after_its_end_an_async_stream_stays_at_its_end(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())

    async def read() -> None:
        stream = engine.astream("hi")
        assert isinstance([event async for event in stream][-1], Finished)
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    asyncio.run(read())


def test_events_that_wait_are_not_given_out_after_a_close(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(*(Say(str(n)) for n in range(10)), Finish())))
    events = observed(engine)
    stream = engine.stream("hi")
    until(lambda: bool(ended(events)), "it does not end")
    assert isinstance(next(stream), Started)
    stream.close()
    assert list(stream) == []


def test_an_exception_in_the_body_of_the_loop_frees_the_place_and_reaches_the_caller(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)

    async def aread() -> None:
        async with engine.astream("hi") as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    raise ZeroDivisionError

    def read() -> None:
        with engine.stream("hi") as stream:
            for event in stream:
                if isinstance(event, TextDelta):
                    raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            read()
        with pytest.raises(ZeroDivisionError):
            asyncio.run(asyncio.wait_for(aread(), 50))


def test_a_failure_comes_after_the_text_and_leaves_the_engine_usable(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("one "), Say("two"), Raise("GenerationFailed", "torn"))))
    for _ in range(2):
        seen: list[StreamEvent] = []
        with pytest.raises(StreamInterrupted, match="torn") as caught:
            seen.extend(engine.stream("hi"))
        assert text_of(seen) == caught.value.partial_text == "one two"


def test_another_thread_may_close_the_stream_that_a_reader_waits_for(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)
    stream = engine.stream("hi")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, stream)
        until(lambda: any(status.running for status in engine.loaded()), "it does not run")
        stream.close()
        events = reading.result(30)
    assert text_of(events) in ("", "x")
    assert not any(isinstance(event, Finished) for event in events)


def test_another_task_may_close_the_stream_that_a_reader_waits_for(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)

    async def read() -> None:
        stream = engine.astream("hi")
        await ato_the_text(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(reading, 30)

    asyncio.run(read())


def test_closing_the_engine_is_told_to_who_reads_a_stream(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)

    async def read() -> None:
        stream = engine.astream("hi")
        await ato_the_text(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await engine.aclose()
        with pytest.raises(EngineClosed):
            await asyncio.wait_for(reading, 30)

    sync = engine.stream("hi")
    to_the_text(sync)
    sync.close()
    waiting = engine.stream("hi")
    to_the_text(waiting)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(next, waiting)
        engine.close()
        with pytest.raises(EngineClosed):
            reading.result(30)
    assert next(sync, None) is None, "what was closed before stays closed"
    engine = make_engine(alpha=HELD, limits=LONG)
    asyncio.run(read())


def test_a_task_that_is_cancelled_while_it_reads_frees_the_place(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=HELD, limits=LONG)

    async def read(begun: asyncio.Event) -> None:
        async for event in engine.astream("hi"):
            if isinstance(event, TextDelta):
                begun.set()

    async def give_up() -> None:
        for _ in range(3):
            begun = asyncio.Event()
            task = asyncio.ensure_future(read(begun))
            await asyncio.wait_for(begun.wait(), 50)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())


def test_a_bad_request_is_refused_before_the_first_event_is_asked_for(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    with pytest.raises(RequestError, match="blank"):
        engine.stream(" ")
    with pytest.raises(RequestError, match="blank"):
        engine.astream(" ")
    with pytest.raises(RequestError, match="temperature"):
        engine.astream("hi", temperature=-1)


def test_a_stream_holds_its_engine_alive_and_nobody_else_does() -> None:
    player = Player(*(TextDelta(text=f"{n} ") for n in range(10)))
    engine = engine_of(player)
    gone = weakref.ref(engine)
    stream = engine.stream("hi")
    del engine
    gc.collect()
    assert text_of(list(stream)) == "".join(f"{n} " for n in range(10))
    assert any(thread.name == "tars-engine" for thread in threading.enumerate())
    del stream
    gc.collect()
    assert gone() is None
    until(lambda: all(thread.name != "tars-engine" for thread in threading.enumerate()), "its thread goes on")


def test_an_async_stream_holds_its_engine_alive() -> None:
    async def read() -> str:
        stream = engine_of(Player(*(TextDelta(text=f"{n} ") for n in range(10)))).astream("hi")
        gc.collect()
        return text_of([event async for event in stream])

    assert asyncio.run(read()) == "".join(f"{n} " for n in range(10))
    gc.collect()
    until(lambda: all(thread.name != "tars-engine" for thread in threading.enumerate()), "its thread goes on")


def test_two_threads_may_read_one_stream_and_each_event_goes_to_one_of_them(make_engine: MakeEngine) -> None:
    words = [f"{n} " for n in range(50)]
    engine = make_engine(alpha=BackendScript(generate=(*map(Say, words), Finish())))
    stream = engine.stream("hi")
    with ThreadPoolExecutor(2) as pool:
        read = [pool.submit(list, stream) for _ in range(2)]
        events = [event for part in read for event in part.result(30)]
    assert sorted("".join(event.text for event in events if isinstance(event, TextDelta)).split()) == sorted(
        word.strip() for word in words
    )
    assert sum(isinstance(event, Finished) for event in events) == 1


# ---- a slow reader -------------------------------------------------------------------------------

MANY = 1000


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token_id=token, text=f"{token} ", logprob=-token / 7, top=())


PIECES = [TextDelta(text=f"{n} ", token_ids=(n,), logprobs=(logprob(n),)) for n in range(MANY)]


def check_pieces(events: Sequence[StreamEvent]) -> None:
    """Assert that nothing is lost and that text, token ids and log-probabilities belong together."""
    started, *deltas, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert len(deltas) <= 65, "nothing was joined"
    for delta in deltas:
        assert isinstance(delta, TextDelta)
        assert delta.text == "".join(f"{token} " for token in delta.token_ids)
        assert delta.logprobs == tuple(logprob(token) for token in delta.token_ids)
    ids = [token for delta in deltas if isinstance(delta, TextDelta) for token in delta.token_ids]
    assert ids == list(range(MANY))
    assert finished.completion.text == text_of(deltas)
    assert finished.completion.logprobs == tuple(logprob(n) for n in range(MANY))


def test_what_a_slow_reader_lets_wait_is_joined_and_nothing_is_lost() -> None:
    player = Player(*PIECES)
    with engine_of(player) as engine:
        events = observed(engine)
        stream = engine.stream("hi", max_tokens=MANY)
        until(lambda: bool(ended(events)), "the backend waits for the reader")
        check_pieces(list(stream))


def test_what_a_slow_async_reader_lets_wait_is_joined_and_nothing_is_lost() -> None:
    player = Player(*PIECES)

    async def read(engine: InferenceEngine, events: list[Observed]) -> list[StreamEvent]:
        stream = engine.astream("hi", max_tokens=MANY)
        first = await anext(stream)
        await asyncio.to_thread(until, lambda: bool(ended(events)), "the backend waits for the reader")
        return [first, *[event async for event in stream]]

    with engine_of(player) as engine:
        check_pieces(asyncio.run(read(engine, observed(engine))))


def test_a_reader_that_keeps_up_gets_each_piece_by_itself() -> None:
    gates = [threading.Event() for _ in range(100)]

    def pieces() -> Iterator[BackendEvent]:
        for number, gate in enumerate(gates):
            gate.wait(30)
            yield TextDelta(text=f"{number} ")

    player = Player()
    player._events = pieces()  # type: ignore[assignment]  # made one by one
    with engine_of(player) as engine, engine.stream("hi", max_tokens=MANY) as stream:
        assert isinstance(next(stream), Started)
        for number, gate in enumerate(gates):
            gate.set()
            assert next(stream) == TextDelta(text=f"{number} ")


def test_pieces_of_different_kinds_are_joined_only_among_themselves() -> None:
    thoughts = [ReasoningDelta(text=f"t{n} ", token_ids=(n,)) for n in range(200)]
    texts = [TextDelta(text=f"{n} ", token_ids=(n,)) for n in range(200)]
    calls = [
        ToolCallDelta(index=index, id=f"c{index}" * (n == 0), name=f"f{index}" * (n == 0), arguments=f"{n},")
        for index in range(2)
        for n in range(200)
    ]
    player = Player(*thoughts, *texts, *calls)
    with engine_of(player) as engine:
        events = observed(engine)
        stream = engine.stream("hi", max_tokens=MANY)
        until(lambda: bool(ended(events)), "the backend waits for the reader")
        _, *deltas, finished = list(stream)
    kinds = [type(delta).__name__ for delta in deltas]
    assert kinds == sorted(kinds, key=["ReasoningDelta", "TextDelta", "ToolCallDelta"].index)
    assert "".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) == "".join(t.text for t in thoughts)
    assert text_of(deltas) == "".join(t.text for t in texts)
    numbers = ",".join(map(str, range(200))) + ","
    for index in range(2):
        own = [delta for delta in deltas if isinstance(delta, ToolCallDelta) and delta.index == index]
        assert (own[0].id, own[0].name) == (f"c{index}", f"f{index}")
        assert "".join(delta.arguments for delta in own) == numbers
    assert isinstance(finished, Finished)
    assert [call.arguments for call in finished.completion.tool_calls] == [numbers] * 2
    assert finished.completion.reasoning == "".join(t.text for t in thoughts)
    assert len(deltas) < 100


# ---- limits that are turned off ------------------------------------------------------------------

SILENT = {
    "first_token_s": BackendScript(generate=(Wait(0.8), Say("x"), Finish())),
    "between_tokens_s": BackendScript(generate=(Say("x"), Wait(0.8), Finish())),
    "total_s": BackendScript(generate=(Wait(0.4), ReadPrompt(1), Wait(0.4), Say("x"), Finish())),
    "load_s": BackendScript(load=(Wait(0.8),), generate=(Say("x"), Finish())),
}
"""What is silent for longer than half a second, by the limit that ends it."""


@pytest.mark.parametrize("limit", SILENT)
def test_a_limit_that_is_turned_off_does_not_end_what_it_would_have_ended(make_engine: MakeEngine, limit: str) -> None:
    assert make_engine(alpha=SILENT[limit], limits={limit: None}).generate("hi") == "x"
    bounded = make_engine(alpha=SILENT[limit], limits={limit: 0.3})
    if limit in ("first_token_s", "between_tokens_s"):
        bounded.load()
    with pytest.raises((AllBackendsFailed, StreamInterrupted, DeadlineExceeded), match=r"0\.3 s"):
        bounded.generate("hi")


def test_all_limits_may_be_turned_off(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(), limits=dict.fromkeys(SILENT))
    assert engine.generate("hi") == "hello"
    assert text_of(list(engine.stream("hi"))) == "hello"
    assert [getattr(engine.settings.limits, limit) for limit in SILENT] == [None] * 4


def test_a_limit_is_turned_off_in_a_file_by_a_word(write_script: WriteScript, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[limits]\ntotal_s = "none"\nbetween_tokens_s = "none"\nload_s = 7\n')
    model = write_script(alpha=SILENT["between_tokens_s"])
    with InferenceEngine(model=model, plugins="alpha", settings_file=file) as engine:
        limits = engine.settings.limits
        assert (limits.total_s, limits.between_tokens_s, limits.load_s) == (None, None, 7)
        assert engine.generate("hi") == "x"


def test_a_limit_is_turned_off_in_a_variable_by_a_word(
    write_script: WriteScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARS_LIMITS__TOTAL_S", "none")
    monkeypatch.setenv("TARS_LIMITS__LOAD_S", "7")
    with InferenceEngine(model=write_script(alpha=BackendScript()), plugins="alpha") as engine:
        assert (engine.settings.limits.total_s, engine.settings.limits.load_s) == (None, 7)
        assert engine.generate("hi") == "hello"


def test_an_argument_turns_a_limit_on_again_that_a_variable_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_LIMITS__TOTAL_S", "none")
    assert load_settings({"limits": {"total_s": 5}}).limits.total_s == 5
    assert load_settings({"limits": {"load_s": 5}}).limits.total_s is None
    monkeypatch.setenv("TARS_LIMITS__TOTAL_S", "5")
    assert load_settings({"limits": {"total_s": None}}).limits.total_s is None


# ---- answers that are rejected -------------------------------------------------------------------

NO = BackendScript(generate=(Say("no"), Finish()))
YES = BackendScript(generate=(Say("yes"), Finish()))


def is_no(completion: Completion) -> bool:
    return completion.text == "no"


def kinds(completion: Completion) -> list[tuple[str, str | None]]:
    return [(a.backend, a.failure.kind if a.failure else None) for a in completion.attempts]


TURNS = [Message(role="user", content="hi")]
JUDGED: dict[str, Callable[[InferenceEngine], str]] = {
    "generate": lambda engine: engine.generate("hi", fallback_on=is_no),
    "complete": lambda engine: engine.complete("hi", fallback_on=is_no).text,
    "chat": lambda engine: engine.chat(TURNS, fallback_on=is_no).text,
    "agenerate": lambda engine: asyncio.run(engine.agenerate("hi", fallback_on=is_no)),
    "acomplete": lambda engine: asyncio.run(engine.acomplete("hi", fallback_on=is_no)).text,
    "achat": lambda engine: asyncio.run(engine.achat(TURNS, fallback_on=is_no)).text,
}


@pytest.mark.parametrize("call", JUDGED.values(), ids=JUDGED)
def test_a_rejected_answer_leaves_the_question_to_the_next_candidate(
    make_engine: MakeEngine, call: Callable[[InferenceEngine], str]
) -> None:
    assert call(make_engine(alpha=NO, beta=NO, gamma=YES)) == "yes"


def test_a_rejected_answer_is_recorded_and_none_of_its_text_is_kept(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=NO, beta=NO, gamma=YES)
    events = observed(engine)
    completion = engine.complete("hi", fallback_on=is_no)
    assert (completion.text, completion.backend) == ("yes", "gamma")
    assert kinds(completion) == [("alpha", "Rejected"), ("beta", "Rejected"), ("gamma", None)]
    assert completion.usage.completion_tokens == 1
    assert engine.get_active_backend() == "gamma"
    engine.close()
    told = [event.attempt for event in events if isinstance(event, AttemptEnded)]
    assert tuple(told) == completion.attempts


def test_rejected_answers_do_not_count_against_the_backend(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=NO, beta=YES)
    events = observed(engine)
    for _ in range(6):
        assert kinds(engine.complete("hi", fallback_on=is_no)) == [("alpha", "Rejected"), ("beta", None)]
    assert engine.complete("hi").backend == "alpha"
    engine.close()
    assert not any(isinstance(event, CircuitChanged) for event in events)


def test_where_every_answer_is_rejected_all_backends_have_failed(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=NO, beta=NO)
    with pytest.raises(AllBackendsFailed, match="rejected") as caught:
        engine.generate("hi", fallback_on=lambda _: True)
    assert [(a.backend, a.failure and a.failure.kind) for a in caught.value.attempts] == [
        ("alpha", "Rejected"),
        ("beta", "Rejected"),
    ]
    assert engine.generate("hi") == "no"


def test_failures_and_rejections_stand_side_by_side(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Raise("GenerationFailed"),)), beta=NO, gamma=YES)
    completion = engine.complete("hi", fallback_on=is_no)
    assert kinds(completion) == [("alpha", "GenerationFailed"), ("beta", "Rejected"), ("gamma", None)]


def test_the_caller_judges_the_whole_completion_on_a_thread_on_which_the_engine_can_be_asked(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(alpha=NO, beta=YES)
    judged: list[Completion] = []

    def judge(completion: Completion) -> bool:
        assert threading.current_thread().name != "tars-engine"
        assert engine.generate("may I?") == "no"
        judged.append(completion)
        return completion.backend == "alpha"

    assert engine.generate("hi", fallback_on=judge) == "yes"
    assert [(c.text, c.backend, c.finish_reason) for c in judged] == [("no", "alpha", "stop"), ("yes", "beta", "stop")]


def test_an_answer_that_failed_is_not_judged(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Raise("GenerationFailed"),)))
    with pytest.raises(AllBackendsFailed):
        engine.generate("hi", fallback_on=lambda _: pytest.fail("there is no answer to judge"))


class JudgeError(Exception):
    pass


def refuse(_: Completion) -> bool:
    raise JudgeError("cannot tell")


@pytest.mark.parametrize("call", ["sync", "async"])
def test_an_exception_of_the_callers_function_reaches_the_caller(make_engine: MakeEngine, call: str) -> None:
    engine = make_engine(alpha=BackendScript(concurrency=1), beta=YES)
    events = observed(engine)

    def ask() -> None:
        if call == "sync":
            engine.complete("hi", fallback_on=refuse)
        else:
            asyncio.run(engine.acomplete("hi", fallback_on=refuse))

    for _ in range(4):
        with pytest.raises(JudgeError, match="cannot tell"):
            ask()
    assert engine.complete("hi").backend == "alpha"
    engine.close()
    failures = [event.failure for event in ended(events)]
    assert [failure and failure.message for failure in failures] == ["JudgeError: cannot tell"] * 4 + [None]


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), StopIteration(), GeneratorExit()], ids=repr)
def test_whatever_the_callers_function_raises_the_engine_goes_on(
    make_engine: MakeEngine, raised: BaseException
) -> None:
    engine = make_engine(alpha=BackendScript())

    def judge(_: Completion) -> bool:
        raise raised

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.generate, "hi", fallback_on=judge)
        with pytest.raises(RuntimeError, match=type(raised).__name__):
            asked.result(20)
        assert pool.submit(engine.generate, "hi").result(20) == "hello"


def test_a_caller_who_gives_up_while_the_answer_is_judged_frees_the_place(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(concurrency=1))
    judging, gate = threading.Event(), threading.Event()

    def judge(_: Completion) -> bool:
        judging.set()
        return gate.wait(30)

    async def give_up() -> None:
        task = asyncio.ensure_future(engine.acomplete("hi", fallback_on=judge))
        assert await asyncio.to_thread(judging.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await engine.agenerate("hi") == "hello"
        gate.set()

    asyncio.run(give_up())
