"""Who observes an engine: what is told, in which order, on which thread, and what a bad observer can do to others."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tars_core import (
    AllBackendsFailed,
    InferenceEngine,
    Overloaded,
    ProbeReport,
    RequestError,
    Started,
    StreamInterrupted,
    TextDelta,
    Usage,
)
from tars_core.config.gather import load_settings
from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    CancelFlag,
    GenerateRequest,
    GenerationFailed,
    LoadedModel,
    ProgressCallback,
    hookimpl,
)
from tars_core.plugin import Finished as BackendFinished
from tars_core.runtime.driver import Driver
from tars_core.runtime.observers import Observers
from tars_core.testing.fake import BackendScript, Exit, Finish, Kill, Raise, ReadPrompt, Say, Wait
from tars_core.testing.processes import workers
from tars_core.testing.watching import until
from tars_core.types import observed
from tars_core.types.observed import (
    AttemptEnded,
    CircuitChanged,
    EventsLost,
    LoadEnded,
    LoadProgressed,
    Observed,
    Probed,
    PromptRead,
    RequestEnded,
    RequestStarted,
    WorkerEnded,
    WorkerStarted,
)

MakeEngine = Callable[..., InferenceEngine]
WriteScript = Callable[..., str]
KEPT = 1024
"""So many events wait for a slow observer, as the documentation says."""


class Log:
    """An observer that keeps what it is told."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self.events: list[Observed] = []
        self.stop = engine.observe(self.events.append)

    def all(self) -> list[Observed]:
        """Close the engine, which delivers what waits, and return everything."""
        self.engine.close()
        return self.events


class Moody:
    """Answers, in this process; fails where the prompt asks for it, and loads as it is told to."""

    def __init__(self, *, progress: int = 0) -> None:
        self.deaf = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.progress: ProgressCallback = lambda _fraction, _note: None
        self._steps = progress

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self, progress: ProgressCallback) -> LoadedModel:
        self.progress = progress
        for number in range(self._steps):
            progress(number / self._steps, str(number))
        self.gate.wait(30)
        progress(0.9, "nearly")
        return LoadedModel(device="cpu", context_length=512, features=BASIC_FEATURES)

    @hookimpl
    def tars_generate(self, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
        if "bad" in request.prompt:
            raise GenerationFailed("a bad mood")
        if "deaf" in request.prompt:
            self.gate.clear()
            self.deaf.set()
            self.gate.wait(60)
        yield TextDelta(text="well")
        if "slow" in request.prompt:
            cancel.wait(60)
        yield BackendFinished(
            finish_reason="cancelled" if cancel.is_set() else "stop", usage=Usage(prompt_tokens=1, completion_tokens=1)
        )


def engine_of(moody: Moody, **settings: object) -> InferenceEngine:
    return InferenceEngine(settings, model="any:thing", plugins="moody", extra_plugins={"moody": moody})


# ---- what is told --------------------------------------------------------------------------------


def test_a_first_request_is_told_from_its_probes_to_its_workers_end(make_engine: MakeEngine) -> None:
    script = BackendScript(generate=(ReadPrompt(7), ReadPrompt(9), Say("x"), Finish()))
    log = Log(make_engine(alpha=script, beta=BackendScript(available=False, reason="not today")))
    completion = log.engine.complete("hi")
    (pid,) = workers(os.getpid())
    events = log.all()
    kinds = [type(event).__name__ for event in events]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == [
        "RequestStarted",
        "Probed",
        "LoadProgressed",
        "LoadEnded",
        "WorkerStarted",
        "PromptRead",
        "AttemptEnded",
        "RequestEnded",
        "WorkerEnded",
    ]
    (started,) = (event for event in events if isinstance(event, RequestStarted))
    (ended,) = (event for event in events if isinstance(event, RequestEnded))
    assert (started.request_id, started.model) == (ended.request_id, None) == (ended.request_id, ended.model)
    assert (ended.completion, ended.failure) == (completion, None)
    assert ended.duration_s > 0
    model = completion.model
    assert [event for event in events if isinstance(event, Probed) and event.backend != "gamma"] == [
        Probed(backend="alpha", model=model, available=True),
        Probed(backend="beta", model=model, available=False, reason="not today"),
    ]
    (load,) = (event for event in events if isinstance(event, LoadEnded))
    assert (load.backend, load.model, load.failure) == ("alpha", model, None)
    assert [event for event in events if isinstance(event, WorkerStarted | WorkerEnded)] == [
        WorkerStarted(backend="alpha", model=model, pid=pid),
        WorkerEnded(backend="alpha", model=model, pid=pid),
    ]
    progress = [event for event in events if isinstance(event, LoadProgressed)]
    assert (progress[0].fraction, progress[0].note, progress[-1].fraction) == (0.0, "reading the script", 1.0)
    assert [event for event in events if isinstance(event, PromptRead)] == [
        PromptRead(request_id=started.request_id, backend="alpha", prompt_tokens_done=tokens) for tokens in (7, 9)
    ]
    assert [event for event in events if isinstance(event, AttemptEnded)] == [
        AttemptEnded(request_id=started.request_id, attempt=completion.attempts[0])
    ]


def test_each_attempt_is_told_with_the_request_it_belongs_to(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript(generate=(Raise("GenerationFailed", "torn"),)), beta=BackendScript()))
    completions = [log.engine.complete("hi") for _ in range(2)]
    events = log.all()
    ids = [event.request_id for event in events if isinstance(event, RequestStarted)]
    assert len(set(ids)) == 2
    for request_id, completion in zip(ids, completions, strict=True):
        told = [e.attempt for e in events if isinstance(e, AttemptEnded) and e.request_id == request_id]
        assert tuple(told) == completion.attempts
        assert [attempt.failure and attempt.failure.kind for attempt in told] == ["GenerationFailed", None]


def test_a_request_that_fails_is_told_with_its_failure(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript(generate=(Raise("GenerationFailed", "torn"),))))
    with pytest.raises(AllBackendsFailed):
        log.engine.generate("hi", model=log.engine.settings.model)
    (ended,) = (event for event in log.all() if isinstance(event, RequestEnded))
    assert (ended.completion, ended.model) == (None, log.engine.settings.model)
    assert ended.failure is not None
    assert (ended.failure.kind, "torn" in ended.failure.message) == ("AllBackendsFailed", True)


def test_a_stream_that_is_interrupted_is_told_with_its_failure(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript(generate=(Say("x"), Raise("GenerationFailed", "torn")))))
    with pytest.raises(StreamInterrupted):
        list(log.engine.stream("hi"))
    (ended,) = (event for event in log.all() if isinstance(event, RequestEnded))
    assert ended.failure is not None
    assert ended.failure.kind == "StreamInterrupted"


def test_the_callers_mistake_is_told_as_the_requests_failure(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript(generate=(Raise("RequestError", "no such thing"),))))
    with pytest.raises(RequestError, match="no such thing"):
        log.engine.generate("hi")
    events = log.all()
    (ended,) = (event for event in events if isinstance(event, RequestEnded))
    assert ended.failure is not None
    assert ended.failure.kind == "RequestError"
    assert not any(isinstance(event, CircuitChanged) for event in events)


@pytest.mark.parametrize("how", ["stream", "task", "close"])
def test_a_caller_who_gives_up_is_told_as_a_cancelled_request(make_engine: MakeEngine, how: str) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("x"), Wait(60), Finish())))
    log = Log(engine)

    async def give_up() -> None:
        task = asyncio.ensure_future(engine.acomplete("hi"))
        await asyncio.to_thread(until, lambda: any(s.running for s in engine.loaded()), "it does not run")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    if how == "task":
        asyncio.run(give_up())
    else:
        stream = engine.stream("hi")
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), TextDelta)
        if how == "stream":
            stream.close()
    ended = [event for event in log.all() if isinstance(event, RequestEnded)]
    assert [event.failure and event.failure.kind for event in ended] == ["Cancelled"]
    assert ended[0].completion is None


def test_a_question_that_is_no_generation_is_told_too(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript()))
    with pytest.raises(RequestError, match="tokenize"):
        log.engine.tokenize("hi", model=log.engine.settings.model)
    with pytest.raises(RequestError, match="embeddings"):
        log.engine.embed(["hi"])
    events = log.all()
    started = [event.request_id for event in events if isinstance(event, RequestStarted)]
    assert started == [event.request_id for event in events if isinstance(event, RequestEnded)]
    assert len(set(started)) == 2


def test_a_request_that_is_refused_at_the_door_is_not_told(make_engine: MakeEngine) -> None:
    slow = BackendScript(generate=(Say("x"), Wait(60), Finish()))
    log = Log(make_engine(alpha=slow, options={"max_queue": 1}))
    with log.engine.stream("hi") as stream:
        next(stream)
        with pytest.raises(Overloaded):
            log.engine.generate("hi")
        with pytest.raises(RequestError):
            log.engine.generate(" ")
    assert sum(isinstance(event, RequestStarted | RequestEnded) for event in log.all()) == 2


def test_every_request_that_begins_ends_once(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript()))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: log.engine.generate("hi"), range(60)))
    events = log.all()
    started = [event.request_id for event in events if isinstance(event, RequestStarted)]
    ended = [event.request_id for event in events if isinstance(event, RequestEnded)]
    assert len(set(started)) == len(started) == 60
    assert sorted(started) == sorted(ended)


def test_a_pause_and_its_end_are_told() -> None:
    log = Log(engine_of(Moody()))
    for _ in range(3):
        with pytest.raises(AllBackendsFailed):
            log.engine.generate("bad")
    assert log.engine.generate("good") == "well"
    changes = [event for event in log.all() if isinstance(event, CircuitChanged)]
    assert [(event.backend, event.state) for event in changes] == [("moody", "open"), ("moody", "closed")]
    assert changes[0].pause_s >= 2
    assert changes[1].pause_s == 0


def test_a_quarantine_is_told(make_engine: MakeEngine) -> None:
    log = Log(make_engine(alpha=BackendScript(generate=(Kill(),))))
    for _ in range(6):
        with pytest.raises(AllBackendsFailed):
            log.engine.generate("hi")
    with pytest.raises(AllBackendsFailed, match="quarantine"):
        log.engine.generate("hi")
    events = log.all()
    states = [event.state for event in events if isinstance(event, CircuitChanged)]
    assert "open" in states
    assert states[-1] == "quarantined"
    deaths = [event.failure for event in events if isinstance(event, WorkerEnded)]
    assert [failure and failure.kind for failure in deaths] == ["WorkerDied"] * 6
    assert all(failure is not None and "SIGKILL" in failure.message for failure in deaths)


@pytest.mark.parametrize(
    "script",
    [
        BackendScript(load=(Raise("LoadFailed", "torn"),)),
        BackendScript(load=(Exit(3),)),
        BackendScript(load=(Wait(60, deaf=True),)),
    ],
    ids=["refused", "died", "hung"],
)
def test_a_load_that_fails_is_told_with_its_failure_and_no_worker_ever_started_or_ended(
    make_engine: MakeEngine, script: BackendScript
) -> None:
    log = Log(make_engine(alpha=script, limits={"load_s": 0.5}))
    with pytest.raises(AllBackendsFailed):
        log.engine.generate("hi")
    events = log.all()
    (load,) = (event for event in events if isinstance(event, LoadEnded))
    assert load.failure is not None
    assert load.failure.kind in ("LoadFailed", "WorkerDied", "DeadlineExceeded")
    assert not any(isinstance(event, WorkerStarted | WorkerEnded) for event in events)


def test_every_worker_that_started_ends_once(make_engine: MakeEngine, write_script: WriteScript) -> None:
    log = Log(make_engine(alpha=BackendScript(), options={"max_loaded": 1}))
    dying = write_script(alpha=BackendScript(generate=(Kill(),)))
    log.engine.generate("hi")
    with pytest.raises(AllBackendsFailed):
        log.engine.generate("hi", model=dying)
    log.engine.generate("hi")
    log.engine.unload()
    log.engine.generate("hi")
    events = log.all()
    started = [event.pid for event in events if isinstance(event, WorkerStarted)]
    ended = [event for event in events if isinstance(event, WorkerEnded)]
    assert len(set(started)) == len(started) == 4
    assert sorted(map(str, started)) == sorted(str(event.pid) for event in ended)
    assert [event.failure is not None for event in ended].count(True) == 1


def test_a_backend_in_this_process_has_no_process_id() -> None:
    log = Log(engine_of(Moody()))
    log.engine.generate("hi")
    assert [e.pid for e in log.all() if isinstance(e, WorkerStarted | WorkerEnded)] == [None, None]


def test_a_backend_that_ignores_a_cancel_is_told_as_ended_when_it_is_ended() -> None:
    moody = Moody()
    log = Log(engine_of(moody))
    with log.engine.stream("deaf") as stream:
        assert isinstance(next(stream), Started)
        assert moody.deaf.wait(30)
    until(lambda: any(isinstance(event, WorkerEnded) for event in log.events), "its end is not told")
    (ended,) = (event for event in log.events if isinstance(event, WorkerEnded))
    assert ended.failure is not None
    assert "did not stop" in ended.failure.message
    assert log.engine.loaded() == ()
    moody.gate.set()
    log.engine.close()


def test_a_driver_on_an_applications_loop_has_observers_too(write_script: WriteScript) -> None:
    observers = Observers()
    events: list[Observed] = []
    observers.add(events.append)
    settings = load_settings({"model": write_script(alpha=BackendScript()), "plugins": "alpha"})

    async def run() -> None:
        driver = Driver(settings, observers=observers)
        await driver.run(driver.load())
        await driver.close()

    asyncio.run(run())
    observers.close()
    kinds = {type(event) for event in events}
    assert {Probed, LoadProgressed, LoadEnded, WorkerStarted, WorkerEnded} == kinds


def test_the_tests_of_this_file_know_every_kind_of_event() -> None:
    kinds = set(typing.get_args(observed.Observed))
    assert {kind.__name__ for kind in kinds} <= set(globals())
    documented = {name for name, value in vars(observed).items() if isinstance(value, type) and value.__doc__}
    assert {kind.__name__ for kind in kinds} <= documented


# ---- how it is told ------------------------------------------------------------------------------


def test_observers_are_called_on_a_thread_of_their_own(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    threads: set[str] = set()
    for _ in range(2):
        engine.observe(lambda _: threads.add(threading.current_thread().name))
    engine.generate("hi")
    engine.close()
    assert threads == {"tars-observers"}
    assert "tars-observers" not in {thread.name for thread in threading.enumerate()}


def test_without_an_observer_there_is_no_thread_for_them(make_engine: MakeEngine) -> None:
    make_engine(alpha=BackendScript()).generate("hi")
    assert "tars-observers" not in {thread.name for thread in threading.enumerate()}


def test_a_slow_observer_delays_no_answer(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    gate, called = threading.Event(), threading.Event()

    def slow(_: Observed) -> None:
        called.set()
        gate.wait(60)

    engine.observe(slow)
    assert [engine.generate("hi") for _ in range(20)] == ["hello"] * 20
    assert "".join(event.text for event in engine.stream("hi") if isinstance(event, TextDelta)) == "hello"
    assert called.is_set()
    gate.set()


def test_beyond_a_thousand_waiting_events_the_oldest_go_and_their_number_is_told() -> None:
    steps = 3000
    moody = Moody(progress=steps)
    engine = engine_of(moody)
    gate = threading.Event()
    seen: list[Observed] = []

    def slow(event: Observed) -> None:
        gate.wait(60)
        seen.append(event)

    engine.observe(slow)
    engine.load()
    gate.set()
    engine.close()
    kinds = [type(event).__name__ for event in seen]
    assert kinds.count("EventsLost") == 1
    lost = seen[kinds.index("EventsLost")]
    assert isinstance(lost, EventsLost)
    kept = seen[kinds.index("EventsLost") + 1 :]
    # Probed, all progress with "nearly" and 1.0, LoadEnded, WorkerStarted; what comes at the end may add WorkerEnded.
    told = 1 + steps + 2 + 1 + 1 + kinds.count("WorkerEnded")
    assert len(seen) - 1 + lost.count == told
    assert len(kept) >= KEPT
    numbers = [int(e.note) for e in kept if isinstance(e, LoadProgressed) and e.note.isdigit()]
    assert numbers == list(range(steps - len(numbers), steps)), "those that are kept are the latest, and in order"


def test_up_to_a_thousand_waiting_events_none_is_lost() -> None:
    steps = KEPT - 20
    engine = engine_of(Moody(progress=steps))
    gate = threading.Event()
    seen: list[Observed] = []

    def slow(event: Observed) -> None:
        gate.wait(60)
        seen.append(event)

    engine.observe(slow)
    engine.load()
    gate.set()
    engine.close()
    assert not any(isinstance(event, EventsLost) for event in seen)
    assert [e.note for e in seen if isinstance(e, LoadProgressed)] == [*map(str, range(steps)), "nearly", ""]


@pytest.mark.parametrize("raised", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_observer_that_raises_is_dropped_and_logged_and_the_others_go_on(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, raised: BaseException
) -> None:
    engine = make_engine(alpha=BackendScript())
    calls: list[Observed] = []

    def bad(event: Observed) -> None:
        calls.append(event)
        raise raised

    before, after = [], []  # type: ignore[var-annotated]  # of events
    engine.observe(before.append)
    engine.observe(bad)
    engine.observe(after.append)
    with caplog.at_level(logging.ERROR, "tars_core.engine"):
        assert engine.generate("hi") == "hello"
        engine.close()
    assert len(calls) == 1
    assert before == after
    assert isinstance(before[-1], WorkerEnded)
    assert "is not called again" in caplog.text
    assert type(raised).__name__ in caplog.text


def test_what_observe_returns_ends_it_and_may_be_called_twice(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    first, second = Log(engine), Log(engine)
    engine.generate("hi")
    until(lambda: any(isinstance(event, RequestEnded) for event in first.events), "it is not told")
    first.stop()
    count = len(first.events)
    first.stop()
    engine.generate("hi")
    second.all()
    assert len(first.events) == count
    assert sum(isinstance(event, RequestEnded) for event in second.events) == 2


def test_one_callback_may_observe_twice_and_each_end_is_its_own(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    events: list[Observed] = []
    stop = engine.observe(events.append)
    engine.observe(events.append)
    stop()
    stop()
    engine.generate("hi")
    engine.close()
    assert sum(isinstance(event, RequestEnded) for event in events) == 1


def test_an_observer_may_end_itself_and_add_another(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    first: list[Observed] = []
    later: list[Observed] = []

    def once(event: Observed) -> None:
        first.append(event)
        stop()
        engine.observe(later.append)

    stop = engine.observe(once)
    engine.generate("hi")
    engine.close()
    assert len(first) == 1
    assert isinstance(later[-1], WorkerEnded)


def test_an_observer_may_ask_the_engine(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    answers: list[str] = []

    def ask(event: Observed) -> None:
        if isinstance(event, WorkerStarted):
            answers.append(engine.generate("me too"))
            answers.append(engine.loaded()[0].backend)

    engine.observe(ask)
    engine.generate("hi")
    until(lambda: len(answers) == 2, "it got no answer")
    assert answers == ["hello", "alpha"]


def test_who_observes_later_is_told_from_then_on(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    engine.generate("hi")
    log = Log(engine)
    engine.generate("hi")
    assert [type(event) for event in log.all()] == [RequestStarted, AttemptEnded, RequestEnded, WorkerEnded]


def test_closing_delivers_what_waits() -> None:
    engine = engine_of(Moody(progress=50))
    seen: list[Observed] = []

    def slow(event: Observed) -> None:
        time.sleep(0.001)
        seen.append(event)

    engine.observe(slow)
    engine.load()
    engine.close()
    assert isinstance(seen[-1], WorkerEnded)
    assert sum(isinstance(event, LoadProgressed) for event in seen) == 52


def test_closing_does_not_wait_for_an_observer_that_hangs(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    gate = threading.Event()

    def hang(_: Observed) -> None:
        gate.wait(60)

    engine.observe(hang)
    engine.generate("hi")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.close).result(20)
    gate.set()


# ---- on_load -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_on_load_is_told_of_loading_and_1_comes_last_whatever_becomes_of_it(
    write_script: WriteScript, *, fails: bool
) -> None:
    told: list[tuple[str, float, str]] = []
    script = BackendScript(load=(Raise("LoadFailed", "torn"),) if fails else ())
    with InferenceEngine(
        model=write_script(alpha=script), plugins="alpha", on_load=lambda *call: told.append(call)
    ) as engine:
        if fails:
            with pytest.raises(AllBackendsFailed):
                engine.generate("hi")
        else:
            engine.generate("hi")
            engine.generate("hi")
    assert {backend for backend, _, _ in told} == {"alpha"}
    assert [(fraction, note) for _, fraction, note in told] == [
        (0.0, "reading the script"),
        *([] if fails else [(1.0, "done")]),
        (1.0, ""),
    ]


def test_progress_that_comes_after_the_load_is_not_told() -> None:
    moody = Moody()
    told: list[float] = []
    engine = InferenceEngine(
        model="any:thing",
        plugins="moody",
        extra_plugins={"moody": moody},
        on_load=lambda _backend, fraction, _note: told.append(fraction),
    )
    engine.load()
    moody.progress(0.5, "late")
    assert engine.generate("hi") == "well"
    engine.close()
    assert told == [0.9, 1.0]


def test_progress_of_a_load_that_was_given_up_is_not_told() -> None:
    moody = Moody(progress=1)
    moody.gate.clear()
    engine = engine_of(moody, limits={"load_s": 0.3})
    log = Log(engine)
    with pytest.raises(AllBackendsFailed):
        engine.generate("hi")
    moody.gate.set()
    moody.progress(0.8, "late")
    events = log.all()
    assert [event.fraction for event in events if isinstance(event, LoadProgressed)] == [0.0, 1.0]


# ---- fork ----------------------------------------------------------------------------------------

_AFTER_FORK = """
import os, sys
from tars_core import InferenceEngine
events = []
engine = InferenceEngine(model=sys.argv[1], plugins="alpha")
engine.observe(lambda event: events.append((os.getpid(), type(event).__name__)))
engine.generate("one")
if os.fork() == 0:
    events.clear()
    engine.generate("two")
    engine.close()
    ok = {pid for pid, _ in events} == {os.getpid()} and [k for _, k in events].count("RequestEnded") == 1
    os._exit(0 if ok else 1)
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 0
engine.generate("three")
engine.close()
assert {pid for pid, _ in events} == {os.getpid()}
print([kind for _, kind in events].count("RequestEnded"), [kind for _, kind in events].count("WorkerEnded"))
"""


def test_37_a_forked_child_has_its_own_events_and_the_parent_keeps_its_own(write_script: WriteScript) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _AFTER_FORK, write_script(alpha=BackendScript())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "2 1\n"), done.stderr
