"""One engine, many models: every call takes one; what fits stays in memory, and what does not makes room."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tars_core import (
    BackendUnavailable,
    Completion,
    EngineClosed,
    Finished,
    InferenceEngine,
    Message,
    ModelNotFound,
    ModelRef,
    ProbeReport,
    RequestError,
    SamplingParams,
    Started,
    StreamEvent,
    StreamInterrupted,
    TextDelta,
    Usage,
)
from tars_core.config.gather import load_settings
from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    LoadedModel,
    hookimpl,
)
from tars_core.plugin import Finished as BackendFinished
from tars_core.runtime.driver import Ask, Driver
from tars_core.system import memory
from tars_core.testing.fake import BackendScript, Echo, Finish, Mark, Raise, Say, Wait
from tars_core.testing.processes import workers
from tars_core.testing.watching import until
from tars_core.types.observed import (
    LoadEnded,
    LoadProgressed,
    Observed,
    RequestEnded,
    RequestStarted,
    WorkerEnded,
    WorkerStarted,
)

MakeEngine = Callable[..., InferenceEngine]
WriteScript = Callable[..., str]
MIB = 2**20


class Log:
    """An observer that keeps what it is told."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.events: list[Observed] = []
        engine.observe(self.events.append)

    def loads(self) -> list[str]:
        """Return the models that were loaded, or failed to, in order."""
        return [str(event.model) for event in self.events if isinstance(event, LoadEnded)]

    def ended(self) -> list[str]:
        """Return the models whose workers ended, in order."""
        return [str(event.model) for event in self.events if isinstance(event, WorkerEnded)]


class Book(LoadedModel):
    """A file, loaded."""

    def __init__(self, text: str) -> None:
        super().__init__(
            device="paper",
            context_length=512,
            concurrency=4,
            features=BASIC_FEATURES | {"tokenize", "embeddings"},
        )
        self.text = text

    def tokenize(self, text: str) -> Sequence[int]:
        return [len(self.text), *map(ord, text)]


class Shelf:
    """Every file is a model that says what is in it. Loads and answers wait where they are told to."""

    def __init__(self) -> None:
        self.load_gate: Callable[[], object] = lambda: None
        self.answer_gate: Callable[[], object] = lambda: None
        self.log: list[str] = []

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self, model: ModelRef) -> LoadedModel:
        self.load_gate()
        assert model.path is not None
        self.log.append("loaded")
        return Book(model.path.read_text())

    @hookimpl
    def tars_generate(self, loaded: Book) -> Iterator[BackendEvent]:
        yield TextDelta(text=loaded.text)
        self.answer_gate()
        self.log.append("answered")
        yield BackendFinished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))

    @hookimpl
    def tars_embed(self, loaded: Book, request: EmbedRequest) -> Embeddings:
        count = len(request.texts)
        usage = Usage(prompt_tokens=len(loaded.text), completion_tokens=0)
        return Embeddings(data=bytes(4 * count), count=count, dimensions=1, usage=usage)

    @hookimpl
    def tars_unload(self) -> None:
        self.log.append("unloaded")


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def books(tmp_path: Path) -> tuple[Path, Path]:
    """Return the files of two models, which say ``first`` and ``second book``."""
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("first")
    other.write_text("second book")
    return one, other


@pytest.fixture
def library(shelf: Shelf, books: tuple[Path, Path]) -> Iterator[InferenceEngine]:
    """Return an engine whose default is the first book."""
    with InferenceEngine(model=books[0], plugins="shelf", extra_plugins={"shelf": shelf}) as engine:
        yield engine


# ---- which model ---------------------------------------------------------------------------------

Model = str | Path | None


def read(events: Iterator[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def aread(engine: InferenceEngine, model: Model) -> str:
    return "".join([e.text async for e in engine.astream("hi", model=model) if isinstance(e, TextDelta)])


TURNS = [Message(role="user", content="hi")]
ANSWERING: dict[str, Callable[[InferenceEngine, Model], str]] = {
    "generate": lambda engine, model: engine.generate("hi", model=model),
    "complete": lambda engine, model: engine.complete("hi", model=model).text,
    "complete of messages": lambda engine, model: engine.complete(messages=TURNS, model=model).text,
    "complete of a raw prompt": lambda engine, model: engine.complete("hi", raw=True, model=model).text,
    "chat": lambda engine, model: engine.chat(TURNS, model=model).text,
    "stream": lambda engine, model: read(engine.stream("hi", model=model)),
    "agenerate": lambda engine, model: asyncio.run(engine.agenerate("hi", model=model)),
    "acomplete": lambda engine, model: asyncio.run(engine.acomplete("hi", model=model)).text,
    "achat": lambda engine, model: asyncio.run(engine.achat(TURNS, model=model)).text,
    "astream": lambda engine, model: asyncio.run(aread(engine, model)),
}
OTHER_CALLS: dict[str, Callable[[InferenceEngine, Model], object]] = {
    "tokenize": lambda engine, model: engine.tokenize("hi", model=model),
    "embed": lambda engine, model: engine.embed(["hi"], model=model),
    "plan": lambda engine, model: engine.plan(model),
    "load": lambda engine, model: engine.load(model),
    "unload": lambda engine, model: engine.unload(model),
}


@pytest.mark.parametrize("call", ANSWERING.values(), ids=ANSWERING)
def test_every_answering_call_takes_a_model_and_the_setting_is_the_default(
    library: InferenceEngine, books: tuple[Path, Path], call: Callable[[InferenceEngine, Model], str]
) -> None:
    one, other = books
    answers = [call(library, model) for model in (None, other, str(other), one, str(one), None)]
    assert answers == ["first", "second book", "second book", "first", "first", "first"]
    assert len(library.loaded()) == 2


def test_every_other_call_takes_a_model_too(library: InferenceEngine, books: tuple[Path, Path]) -> None:
    one, other = books
    assert library.tokenize("x") == (len("first"), ord("x"))
    assert library.tokenize("x", model=other) == (len("second book"), ord("x"))
    assert library.embed(["x"]).usage.prompt_tokens == len("first")
    assert library.embed(["x"], model=str(other)).usage.prompt_tokens == len("second book")
    assert (library.plan().model, library.plan(other).model) == (str(one), str(other))
    assert library.plan(str(other)).candidates[0].model.path == other


def test_an_alias_is_a_model_too(shelf: Shelf, books: tuple[Path, Path]) -> None:
    aliases = {"big": str(books[0]), "small": str(books[1])}
    with InferenceEngine(model="big", models=aliases, plugins="shelf", extra_plugins={"shelf": shelf}) as engine:
        assert (engine.generate("hi"), engine.generate("hi", model="small")) == ("first", "second book")
        assert {status.name for status in engine.loaded()} == {"big", "small"}
        engine.unload("small")
        assert [status.name for status in engine.loaded()] == ["big"]


def test_an_engine_without_a_default_answers_with_the_model_named(shelf: Shelf, books: tuple[Path, Path]) -> None:
    with InferenceEngine(plugins="shelf", extra_plugins={"shelf": shelf}) as engine:
        assert engine.generate("hi", model=books[1]) == "second book"
        with pytest.raises(ModelNotFound, match="no model was named"):
            engine.generate("hi")


@pytest.mark.parametrize("model", [3, 1.5, True, b"one.txt", ["one.txt"], object()], ids=repr)
def test_a_model_that_is_neither_path_nor_name_is_refused_before_anything_starts(
    library: InferenceEngine, shelf: Shelf, model: Model
) -> None:
    for call in (*ANSWERING.values(), *OTHER_CALLS.values()):
        with pytest.raises(RequestError, match="model must be a path or a name"):
            call(library, model)
    assert shelf.log == []


def test_a_blank_model_is_refused(library: InferenceEngine) -> None:
    with pytest.raises(RequestError, match="blank"):
        library.generate("hi", model=" ")


def test_a_model_that_does_not_exist_leaves_the_others_alone(
    library: InferenceEngine, shelf: Shelf, books: tuple[Path, Path], tmp_path: Path
) -> None:
    library.generate("hi")
    before = library.loaded()
    missing = tmp_path / "missing.txt"
    for call in (library.load, library.plan, lambda model: library.generate("hi", model=model)):
        with pytest.raises(ModelNotFound, match=r"missing\.txt"):
            call(missing)
    with pytest.raises(ModelNotFound, match=r"missing\.txt"):
        next(library.stream("hi", model=missing))
    assert library.generate("hi") == "first"
    assert [status.name for status in library.loaded()] == [before[0].name]
    assert shelf.log.count("loaded") == 1
    missing.write_text("here now")
    assert library.generate("hi", model=missing) == "here now"


def test_a_model_that_does_not_load_leaves_the_others_alone(make_engine: MakeEngine, write_script: WriteScript) -> None:
    engine = make_engine(alpha=BackendScript())
    broken = write_script(alpha=BackendScript(load=(Raise("LoadFailed", "torn"),)))
    (before,) = (engine.load(),)
    for _ in range(4):
        with pytest.raises(Exception, match="torn"):
            engine.generate("hi", model=broken)
    assert engine.generate("hi") == "hello"
    assert [status.pid for status in engine.loaded()] == [before.pid]


def test_a_backend_that_fails_with_one_model_is_still_trusted_with_another(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    """A circuit is for one backend with one model."""
    broken = write_script(
        alpha=BackendScript(generate=(Raise("GenerationFailed", "bad weights"),)), beta=BackendScript()
    )
    engine = make_engine(alpha=BackendScript(), beta=BackendScript())
    for _ in range(4):
        assert engine.complete("hi", model=broken).backend == "beta"
    assert engine.complete("hi").backend == "alpha"


# ---- in memory -----------------------------------------------------------------------------------


def test_two_models_in_turn_a_hundred_times_are_loaded_once_each(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("one"), Finish())))
    other = write_script(alpha=BackendScript(generate=(Say("other"), Finish())))
    log = Log(engine)
    for _ in range(100):
        assert engine.generate("hi") == "one"
        assert engine.generate("hi", model=other) == "other"
    assert len(engine.loaded()) == 2
    engine.close()
    assert len(log.loads()) == 2
    assert sum(isinstance(event, WorkerStarted) for event in log.events) == 2


def test_what_is_loaded_is_shown_with_its_process_and_its_memory(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    engine = make_engine(alpha=BackendScript(device="npu", concurrency=3), options={"context_length": 10**6})
    other = write_script(alpha=BackendScript(generate=(Say("x"), Wait(60), Finish())))
    assert engine.loaded() == ()
    engine.generate("hi")
    (status,) = engine.loaded()
    assert status.name == engine.settings.model == str(status.model)
    assert (status.backend, status.task, status.device, status.concurrency) == ("alpha", "generate", "npu", 3)
    assert (status.context_length, status.running, status.features) == (512, 0, tuple(sorted(BASIC_FEATURES)))
    assert status.pid in workers(os.getpid())
    assert status.resident_bytes is not None
    assert status.resident_bytes > MIB
    assert "context of 512" in status.warnings[0]
    until(lambda: engine.loaded()[0].idle_s > status.idle_s >= 0, "its idle time does not grow")
    with engine.stream("hi", model=other) as stream:
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), TextDelta)
        by_name = {status.name: status for status in engine.loaded()}
        assert (by_name[other].running, by_name[other].idle_s) == (1, 0.0)
        assert by_name[status.name].running == 0
    until(lambda: not any(status.running for status in engine.loaded()), "the stream that was left still runs")


def test_the_latest_used_is_shown_first(make_engine: MakeEngine, write_script: WriteScript) -> None:
    engine = make_engine(alpha=BackendScript())
    one, two, three = (write_script(alpha=BackendScript()) for _ in range(3))
    for model in (one, two, three):
        engine.load(model)
    assert [status.name for status in engine.loaded()] == [three, two, one]
    engine.generate("hi", model=one)
    assert [status.name for status in engine.loaded()] == [one, three, two]
    engine.load(two)
    assert [status.name for status in engine.loaded()] == [two, one, three]


def test_a_model_that_answers_now_is_shown_before_one_that_answered_last(
    library: InferenceEngine, shelf: Shelf, books: tuple[Path, Path]
) -> None:
    library.load(books[1])
    gate = threading.Event()
    shelf.answer_gate = lambda: gate.wait(30)
    with library.stream("hi") as stream:
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), TextDelta)
        library.tokenize("x", model=books[1])
        assert [status.name for status in library.loaded()] == [str(books[0]), str(books[1])]
        gate.set()


def test_load_says_where_the_model_runs_and_a_second_load_finds_it_there(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(device="npu"), beta=BackendScript())
    log = Log(engine)
    first, second = engine.load(), engine.load()
    assert (first.backend, first.device, first.pid) == ("alpha", "npu", second.pid)
    assert engine.complete("hi").timings.load_s is None
    engine.close()
    assert len(log.loads()) == 1


def test_nobody_takes_over_a_load_that_was_asked_for(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(load=(Raise("LoadFailed", "torn"),)), beta=BackendScript())
    with pytest.raises(Exception, match="torn"):
        engine.load()
    assert engine.loaded() == ()


def test_a_load_that_is_asked_for_does_not_take_the_model_for_idle_meanwhile(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    engine = make_engine(alpha=BackendScript(), options={"max_loaded": 1})
    other = write_script(alpha=BackendScript())
    with ThreadPoolExecutor(8) as pool:
        for model, status in ((m, pool.submit(engine.load, m)) for m in (None, other) * 4):
            assert status.result().name == (model or engine.settings.model)


# ---- unloading -----------------------------------------------------------------------------------


def test_unloading_one_model_leaves_the_others(make_engine: MakeEngine, write_script: WriteScript) -> None:
    engine = make_engine(alpha=BackendScript())
    one, two = (write_script(alpha=BackendScript()) for _ in range(2))
    pids = {model: engine.load(model).pid for model in (None, one, two)}
    engine.unload(one)
    assert pids[one] not in workers(os.getpid()), "unload returned before the process was gone"
    assert {status.pid for status in engine.loaded()} == {pids[None], pids[two]}
    engine.unload(one)
    assert engine.generate("hi", model=one) == "hello"
    assert engine.loaded()[0].pid != pids[one]


def test_unloading_without_a_name_ends_every_worker_and_the_engine_goes_on(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    engine = make_engine(alpha=BackendScript())
    engine.unload()
    pids = {engine.load(model).pid for model in (None, write_script(alpha=BackendScript()))}
    engine.unload()
    assert engine.loaded() == ()
    assert not pids.intersection(workers(os.getpid()))
    assert engine.generate("hi") == "hello"


def test_unloading_what_was_never_loaded_does_nothing(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(alpha=BackendScript())
    pid = engine.load().pid
    engine.unload(tmp_path / "nowhere.gguf")
    engine.unload("no-such-alias")
    assert [status.pid for status in engine.loaded()] == [pid]


def test_a_model_that_has_two_names_is_loaded_once_and_unloaded_by_either(
    shelf: Shelf, books: tuple[Path, Path]
) -> None:
    aliases = {"this": str(books[0]), "that": str(books[0])}
    with InferenceEngine(models=aliases, plugins="shelf", extra_plugins={"shelf": shelf}) as engine:
        for load, unload in (("this", "that"), ("that", "this"), ("that", books[0])):
            engine.load(load)
            engine.load(unload)
            assert len(engine.loaded()) == 1
            engine.unload(unload)
            assert engine.loaded() == ()


def test_a_model_is_unloaded_by_its_path_however_that_is_written(
    library: InferenceEngine, books: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(books[0].parent))
    library.load("~/one.txt")
    library.unload(books[0])
    assert library.loaded() == ()
    library.load(books[0])
    library.unload("~/one.txt")
    assert library.loaded() == ()


@pytest.mark.parametrize("by_name", [True, False])
def test_unloading_waits_for_the_request_that_runs(
    library: InferenceEngine, shelf: Shelf, books: tuple[Path, Path], *, by_name: bool
) -> None:
    gate = threading.Event()
    shelf.answer_gate = lambda: gate.wait(30)
    stream = library.stream("hi")
    assert isinstance(next(stream), Started)
    assert isinstance(next(stream), TextDelta)
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(library.unload, books[0] if by_name else None)
        for _ in range(20):
            assert library.loaded()[0].running == 1
        assert not unloading.done()
        gate.set()
        unloading.result(30)
    assert isinstance(next(stream), Finished)
    assert shelf.log == ["loaded", "answered", "unloaded"]
    assert library.loaded() == ()


def test_unloading_waits_for_a_load_under_way(library: InferenceEngine, shelf: Shelf) -> None:
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(30)

    shelf.load_gate = hold
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(library.generate, "hi")
        assert begun.wait(30)
        unloading = pool.submit(library.unload)
        for _ in range(20):
            assert library.loaded() == ()
        assert not unloading.done()
        gate.set()
        assert answer.result(30) == "first"
        unloading.result(30)
    assert library.loaded() == ()


# ---- no more than max_loaded ---------------------------------------------------------------------


def test_beyond_max_loaded_the_least_recently_used_goes(make_engine: MakeEngine, write_script: WriteScript) -> None:
    engine = make_engine(alpha=BackendScript(), options={"max_loaded": 2})
    log = Log(engine)
    one, two, three = (write_script(alpha=BackendScript()) for _ in range(3))
    for model in (one, two, one, three):
        assert engine.generate("hi", model=model) == "hello"
    assert [status.name for status in engine.loaded()] == [three, one]
    assert engine.generate("hi", model=two) == "hello"
    assert [status.name for status in engine.loaded()] == [two, three]
    until(lambda: len(log.ended()) == 2, "it was not told of the workers' ends")
    assert log.ended() == [two, one]


def test_max_loaded_one_keeps_one_model_at_a_time(make_engine: MakeEngine, write_script: WriteScript) -> None:
    engine = make_engine(alpha=BackendScript(), options={"max_loaded": 1})
    models = [write_script(alpha=BackendScript()) for _ in range(3)]
    for model in models * 2:
        assert engine.generate("hi", model=model) == "hello"
        assert [status.name for status in engine.loaded()] == [model]


def test_max_loaded_waits_for_the_busy_one_and_evicts_it_then(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    engine = make_engine(
        alpha=BackendScript(generate=(Say("x"), Wait(60), Finish())),
        options={"max_loaded": 1},
        limits={"between_tokens_s": 60.0, "total_s": 60.0},
    )
    log = Log(engine)
    other = write_script(alpha=BackendScript())
    with ThreadPoolExecutor(1) as pool, engine.stream("hi") as stream:
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), TextDelta)
        waiting = pool.submit(engine.generate, "hi", model=other)
        until(
            lambda: sum(isinstance(event, RequestStarted) for event in log.events) == 2, "the second was not accepted"
        )
        for _ in range(20):
            assert [status.name for status in engine.loaded()] == [engine.settings.model]
        assert not waiting.done()
        stream.close()
        assert waiting.result(30) == "hello"
    assert [status.name for status in engine.loaded()] == [other]
    engine.close()
    first_end, second_load = (
        next(i for i, event in enumerate(log.events) if isinstance(event, RequestEnded)),
        [i for i, event in enumerate(log.events) if isinstance(event, LoadEnded)][1],
    )
    assert first_end < second_load


def test_many_callers_of_more_models_than_may_be_loaded_all_get_their_own_answers(
    make_engine: MakeEngine, write_script: WriteScript
) -> None:
    engine = make_engine(alpha=BackendScript(), options={"max_loaded": 2})
    models = [write_script(alpha=BackendScript(generate=(Say(f"m{n} "), Echo(), Finish()))) for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: engine.generate(f"q{n}", model=models[n % 4]), range(24)))
    assert answers == [f"m{n % 4} q{n}" for n in range(24)]
    assert len(engine.loaded()) <= 2


# ---- memory --------------------------------------------------------------------------------------

SIZE = 100 * MIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that makes this a machine in which so many models fit, of ``SIZE`` each."""
    before = set(workers(os.getpid()))

    def hold(models: float) -> None:
        def free_bytes() -> int:
            return int(models * SIZE) - SIZE * len(set(workers(os.getpid())) - before)

        monkeypatch.setattr(memory, "free_bytes", free_bytes)

    return hold


SIZED = BackendScript(memory_bytes=SIZE)


def test_what_fits_the_memory_stays_and_the_least_recently_used_goes_when_it_is_needed(
    make_engine: MakeEngine, write_script: WriteScript, machine: Callable[[float], None]
) -> None:
    machine(3.5)
    engine = make_engine(alpha=SIZED)
    log = Log(engine)
    models = [write_script(alpha=SIZED) for _ in range(4)]
    for model in models[:3]:
        engine.generate("hi", model=model)
    assert {status.name for status in engine.loaded()} == set(models[:3])
    engine.generate("hi", model=models[0])
    engine.generate("hi", model=models[3])
    assert [status.name for status in engine.loaded()] == [models[3], models[0], models[2]]
    until(lambda: bool(log.ended()), "it was not told of the worker's end")
    assert log.ended() == [models[1]]


def test_a_model_that_memory_cannot_hold_at_all_is_refused_and_nothing_is_evicted_for_it(
    make_engine: MakeEngine, write_script: WriteScript, machine: Callable[[float], None]
) -> None:
    machine(2.5)
    engine = make_engine(alpha=SIZED)
    pid = engine.load().pid
    with pytest.raises(BackendUnavailable, match=r"needs .* GiB"):
        engine.generate("hi", model=write_script(alpha=BackendScript(memory_bytes=3 * SIZE)))
    assert [status.pid for status in engine.loaded()] == [pid]


def test_46_what_is_loaded_counts_as_room_for_its_successor(
    make_engine: MakeEngine, write_script: WriteScript, machine: Callable[[float], None]
) -> None:
    machine(1.5)
    engine = make_engine(alpha=SIZED)
    models = [write_script(alpha=SIZED) for _ in range(3)]
    for model in models:
        assert engine.complete("hi", model=model).attempts[-1].failure is None
        assert [status.name for status in engine.loaded()] == [model]


def test_as_many_go_as_are_needed(
    make_engine: MakeEngine, write_script: WriteScript, machine: Callable[[float], None]
) -> None:
    machine(3.5)
    engine = make_engine(alpha=SIZED)
    models = [write_script(alpha=SIZED) for _ in range(3)]
    for model in models:
        engine.load(model)
    large = write_script(alpha=BackendScript(memory_bytes=5 * SIZE // 2))
    engine.load(large)
    assert [status.name for status in engine.loaded()] == [large, models[2]]


def test_memory_that_a_busy_model_holds_is_waited_for(
    make_engine: MakeEngine, write_script: WriteScript, machine: Callable[[float], None]
) -> None:
    machine(1.5)
    busy = BackendScript(memory_bytes=SIZE, generate=(Say("x"), Wait(60), Finish()))
    engine = make_engine(alpha=busy, limits={"between_tokens_s": 60.0, "total_s": 60.0})
    other = write_script(alpha=SIZED)
    with ThreadPoolExecutor(1) as pool, engine.stream("hi") as stream:
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), TextDelta)
        waiting = pool.submit(engine.generate, "hi", model=other)
        for _ in range(50):
            assert [status.name for status in engine.loaded()] == [engine.settings.model]
        stream.close()
        assert waiting.result(30) == "hello"


def test_two_loads_at_once_do_not_count_the_same_memory_twice(
    make_engine: MakeEngine, write_script: WriteScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model takes its memory only while it loads; what a load under way will take is not free for another."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 3 * SIZE // 2)
    engine = make_engine(alpha=SIZED)
    log = Log(engine)
    slow = BackendScript(memory_bytes=SIZE, load=(Wait(0.5),))
    models = [write_script(alpha=slow) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda model: engine.generate("hi", model=model), models)) == ["hello"] * 2
    engine.close()
    moments = [
        type(event).__name__
        for event in log.events
        if isinstance(event, LoadEnded) or (isinstance(event, LoadProgressed) and event.fraction == 0)
    ]
    assert moments == ["LoadProgressed", "LoadEnded"] * 2


# ---- how long ------------------------------------------------------------------------------------


def test_keep_alive_zero_ends_a_model_when_nobody_uses_it(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(), options={"keep_alive": 0})
    log = Log(engine)
    for number in (1, 2):
        assert engine.complete("hi").timings.load_s is not None
        until(lambda number=number: len(log.ended()) == number, "its worker did not end")  # type: ignore[misc]
        assert engine.loaded() == ()
    assert len(log.loads()) == 2


def test_keep_alive_ends_a_model_after_so_many_seconds(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(), options={"keep_alive": 0.5})
    asked = time.monotonic()
    engine.generate("hi")
    until(lambda: engine.loaded() == (), "it is still in memory")
    assert time.monotonic() - asked >= 0.5


def test_keep_alive_counts_from_the_last_use(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("x"), Wait(0.4), Finish())), options={"keep_alive": 0.1})
    log = Log(engine)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(engine.generate, "hi")]
        until(lambda: any(status.running for status in engine.loaded()), "the first does not run")
        answers += [pool.submit(engine.generate, "hi") for _ in range(2)]
        assert [answer.result(30) for answer in answers] == ["x"] * 3
    until(lambda: bool(log.ended()), "its worker did not end")
    assert len(log.loads()) == 1


def test_keep_alive_also_ends_a_model_whose_caller_gave_up_while_it_was_loaded(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    script = BackendScript(load=(Mark(str(begun)), Wait(0.5, deaf=True)))
    engine = make_engine(alpha=script, options={"keep_alive": 0.1})
    log = Log(engine)

    async def give_up() -> None:
        task = asyncio.ensure_future(engine.agenerate("hi"))
        await asyncio.to_thread(until, begun.exists, "no load began")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    until(lambda: bool(log.loads()), "the load was ended with its caller")
    until(lambda: bool(log.ended()), "it stays in memory although nobody uses it", within_s=10)


# ---- loading at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_twenty_first_requests_share_one_load(make_engine: MakeEngine, *, batched: bool) -> None:
    engine = make_engine(alpha=BackendScript(load=(Wait(0.3),), generate=(Echo(), Finish()), batched=batched))
    log = Log(engine)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: engine.generate(f"question {n}"), range(20)))
    assert answers == [f"question {n}" for n in range(20)]
    engine.close()
    assert len(log.loads()) == 1


def test_a_caller_who_gives_up_does_not_end_the_load_that_others_wait_for(
    library: InferenceEngine, shelf: Shelf
) -> None:
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(30)

    shelf.load_gate = hold

    async def ask() -> str:
        impatient, patient = (asyncio.ensure_future(library.agenerate("hi")) for _ in range(2))
        await asyncio.to_thread(begun.wait, 30)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        gate.set()
        return await patient

    assert asyncio.run(ask()) == "first"
    assert shelf.log.count("loaded") == 1


def test_two_models_load_side_by_side(library: InferenceEngine, shelf: Shelf, books: tuple[Path, Path]) -> None:
    both = threading.Barrier(2)
    shelf.load_gate = lambda: both.wait(30)  # neither goes on before the other is here
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda model: library.generate("hi", model=model), books)) == ["first", "second book"]


def test_a_model_that_loads_does_not_delay_one_that_answers(
    library: InferenceEngine, shelf: Shelf, books: tuple[Path, Path]
) -> None:
    library.load()
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(30)

    shelf.load_gate = hold
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(library.generate, "hi", model=books[1])
        assert begun.wait(30)
        assert [library.generate("hi") for _ in range(10)] == ["first"] * 10
        assert not other.done()
        gate.set()
        assert other.result(30) == "second book"


# ---- the driver on an application's own loop -----------------------------------------------------


def asking(text: str, model: str | None = None) -> Ask:
    request = GenerateRequest(messages=(Message(role="user", content=text),), sampling=SamplingParams())
    return Ask(request, model)


def driven(model: str, work: Callable[[Driver], object], **settings: object) -> set[str]:
    """Run ``work`` with a driver on a loop of this thread; return the names of the threads there were."""
    seen: set[str] = set()

    async def run() -> None:
        driver = Driver(load_settings({"model": model, "plugins": "alpha,beta", **settings}))
        try:
            await work(driver)  # type: ignore[misc]
            seen.update(thread.name for thread in threading.enumerate())
        finally:
            await driver.close()

    asyncio.run(run())
    return seen


def test_a_driver_answers_on_the_applications_own_loop_without_a_thread_for_an_engine(
    write_script: WriteScript,
) -> None:
    events: list[StreamEvent] = []
    threads: set[threading.Thread] = set()

    def sink(event: StreamEvent) -> None:
        events.append(event)
        threads.add(threading.current_thread())

    async def work(driver: Driver) -> None:
        completion = await driver.run(driver.answer(asking("hi"), sink))
        assert isinstance(completion, Completion)
        assert completion.text == "hi"
        assert [status.backend for status in await driver.loaded()] == ["alpha"]
        assert [type(event) for event in events] == [Started, TextDelta, TextDelta, Finished]
        assert threads == {threading.current_thread()}

    names = driven(write_script(alpha=BackendScript(generate=(Echo(), Finish()))), work)
    assert "tars-engine" not in names
    assert "tars-observers" not in names
    assert workers(os.getpid()) == []


def test_a_driver_answers_many_at_once_with_several_models(write_script: WriteScript) -> None:
    models = [write_script(alpha=BackendScript(generate=(Say(f"m{n} "), Echo(), Finish()))) for n in range(2)]

    async def work(driver: Driver) -> None:
        asks = [driver.run(driver.answer(asking(f"q{n}", models[n % 2]), lambda _: None)) for n in range(10)]
        assert [c.text for c in await asyncio.gather(*asks)] == [f"m{n % 2} q{n}" for n in range(10)]
        await driver.unload(models[0])
        assert [status.name for status in await driver.loaded()] == [models[1]]

    driven(models[0], work)


def test_a_task_that_is_cancelled_on_the_applications_loop_frees_its_place(write_script: WriteScript) -> None:
    begun = asyncio.Event()

    async def work(driver: Driver) -> None:
        for _ in range(3):
            begun.clear()
            task = asyncio.ensure_future(driver.run(driver.answer(asking("hi"), lambda _: begun.set())))
            await asyncio.wait_for(begun.wait(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    driven(write_script(alpha=BackendScript(generate=(Say("x"), Wait(60), Finish()), concurrency=1)), work)


@pytest.mark.parametrize("runs", [True, False])
def test_a_driver_that_was_closed_starts_nothing_more(write_script: WriteScript, *, runs: bool) -> None:
    async def ask(model: str) -> None:
        driver = Driver(load_settings({"model": model, "plugins": "alpha"}))
        await driver.close()
        for work in (driver.answer(asking("hi"), lambda _: None), driver.load()):
            with pytest.raises(EngineClosed):
                await (driver.run(work) if runs else work)

    asyncio.run(ask(write_script(alpha=BackendScript())))
    assert workers(os.getpid()) == []


def test_a_request_that_runs_when_its_driver_is_closed_loads_no_other_model(write_script: WriteScript) -> None:
    async def ask(model: str) -> None:
        driver = Driver(load_settings({"model": model, "plugins": "alpha,beta"}))
        begun = asyncio.Event()
        running = asyncio.ensure_future(
            driver.answer(asking("hi"), lambda event: begun.set() if isinstance(event, TextDelta) else None)
        )
        waiting = asyncio.ensure_future(driver.answer(asking("hi"), lambda _: None))
        await asyncio.wait_for(begun.wait(), 30)
        await driver.close()
        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
        assert isinstance(outcomes[0], Completion | StreamInterrupted), "what it had said was said"
        assert isinstance(outcomes[1], EngineClosed)

    slow = BackendScript(generate=(Say("x"), Wait(60), Finish()), concurrency=1)
    asyncio.run(ask(write_script(alpha=slow, beta=slow)))
    assert workers(os.getpid()) == []
