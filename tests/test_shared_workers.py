"""Requests that share a worker, and what one of them does to the others. Numbers are rows of the fault list."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from tars_core import AllBackendsFailed, Completion, InferenceEngine, StreamInterrupted, TextDelta
from tars_core.plugin import (
    BackendEvent,
    CancelFlag,
    Finished,
    GenerateRequest,
    LoadedModel,
    ModelRef,
    ProbeReport,
    Usage,
    hookimpl,
)
from tars_core.testing.fake import BackendScript, Finish, Kill, KillLater, Raise, Say, Script, Wait
from tars_core.testing.processes import alive
from tars_core.testing.watching import of, told, until
from tars_core.types.observed import CircuitChanged, LoadEnded, Observed, RequestStarted, WorkerEnded, WorkerStarted

MakeEngine = Callable[..., InferenceEngine]
T = TypeVar("T")
E = TypeVar("E", bound=Observed)
DEAF = (Say("a"), Wait(60, deaf=True), Finish())


def first_text(stream: Iterator[object]) -> None:
    assert any(isinstance(event, TextDelta) for event in stream)


def running(engine: InferenceEngine, backend: str) -> int:
    return sum(status.running for status in engine.loaded() if status.backend == backend)


def pid_of(engine: InferenceEngine, backend: str) -> int:
    (pid,) = (status.pid for status in engine.loaded() if status.backend == backend)
    assert pid is not None
    return pid


def rewrite(engine: InferenceEngine, **backends: BackendScript) -> None:
    """Let the fakes do something else from their next load on."""
    model = engine.settings.model or ""
    Path(model.removeprefix("fake:")).write_bytes(msgspec.json.encode(Script(backends=backends)))


# ---- 43: a cancel and the neighbours -----------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_43_the_neighbours_of_a_request_that_is_cancelled_in_a_long_step_finish(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, *, batched: bool
) -> None:
    monkeypatch.setattr("tars_core.worker.host._CANCEL_GRACE_S", 0.1)
    steps = (Say("a"), Wait(0.5, deaf=True), Say("b"), Finish())
    engine = make_engine(alpha=BackendScript(generate=steps, batched=batched), beta=BackendScript())
    events = told(engine)
    pid = engine.load().pid
    streams = [engine.stream("hi") for _ in range(4)]
    for stream in streams:
        first_text(stream)
    streams[0].close()
    rest = ["".join(event.text for event in stream if isinstance(event, TextDelta)) for stream in streams[1:]]
    assert rest == ["b", "b", "b"]
    assert engine.load().pid == pid
    engine.close()
    assert of(events, CircuitChanged) == []
    assert [ended.failure for ended in of(events, WorkerEnded)] == [None]


def test_43_a_worker_that_is_silent_for_everybody_is_ended_and_that_is_no_incident(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars_core.worker.host._CANCEL_GRACE_S", 0.1)
    engine = make_engine(alpha=BackendScript(generate=DEAF))
    events = told(engine)
    for _ in range(4):
        streams = [engine.stream("hi") for _ in range(2)]
        for stream in streams:
            first_text(stream)
        pid = pid_of(engine, "alpha")
        for stream in streams:
            stream.close()
        until(lambda pid=pid: not alive(pid))  # type: ignore[misc]
    engine.close()
    assert of(events, CircuitChanged) == []
    reasons = [ended.failure.message for ended in of(events, WorkerEnded) if ended.failure]
    assert reasons == ["alpha did not stop within 0.1 s of a cancel"] * 4


def test_43_a_request_that_waits_behind_one_that_ignores_its_cancel_is_answered(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars_core.worker.host._CANCEL_GRACE_S", 0.1)
    engine = make_engine(alpha=BackendScript(concurrency=1, generate=DEAF), limits={"load_s": 30})
    events = told(engine)
    stream = engine.stream("hi")
    first_text(stream)
    rewrite(engine, alpha=BackendScript(generate=(Say("at last"), Finish())))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.complete, "hi")
        until(lambda: len(of(events, RequestStarted)) == 2)
        stream.close()
        completion = waiting.result()
    assert completion.text == "at last"
    assert [attempt.failure for attempt in completion.attempts] == [None]


# ---- 44: one incident --------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_44_a_worker_that_dies_with_four_requests_in_it_is_one_incident(
    make_engine: MakeEngine, death: signal.Signals, *, batched: bool
) -> None:
    silent = BackendScript(generate=(*[Wait(0.01)] * 6000, Finish()), batched=batched)
    engine = make_engine(alpha=silent, beta=BackendScript(), limits={"first_token_s": 1.5, "load_s": 30})
    events = told(engine)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):  # the third one opens the circuit; were each request counted, the first one did
            asked = [pool.submit(engine.complete, "hi") for _ in range(4)]
            until(lambda: running(engine, "alpha") == 4)
            os.kill(pid_of(engine, "alpha"), death)
            assert [future.result().backend for future in asked] == ["beta"] * 4
    engine.close()
    assert [(change.backend, change.state) for change in of(events, CircuitChanged)] == [("alpha", "open")]
    assert len(of(events, WorkerStarted, "alpha")) == 3


def test_44_a_load_that_fails_for_four_requests_is_one_incident(make_engine: MakeEngine) -> None:
    broken = BackendScript(load=(Wait(0.7), Raise("LoadFailed", "no")))
    engine = make_engine(alpha=broken, beta=BackendScript())
    events = told(engine)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: engine.complete("hi"), range(4)))
    assert {completion.backend for completion in answers} == {"beta"}
    engine.close()
    assert len(of(events, LoadEnded, "alpha")) == 1
    assert of(events, CircuitChanged) == []


class Unsteady(LoadedModel):
    """A batched model whose step fails as a whole once four requests are in it."""

    def __init__(self) -> None:
        super().__init__(device="cpu", context_length=512, concurrency=4)
        self._running: list[int] = []

    @hookimpl
    def tars_probe(self, model: ModelRef | None) -> ProbeReport | None:
        return ProbeReport(available=True) if model is None or model.scheme == "fake" else None

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return self

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        return request

    def submit(self, request_id: int, prepared: GenerateRequest) -> None:
        del prepared
        self._running.append(request_id)

    def step(self) -> list[tuple[int, BackendEvent]]:
        if len(self._running) == 4:
            self._running.clear()
            raise RuntimeError("the device is lost")
        return []

    def cancel(self, request_id: int) -> None:
        self._running.remove(request_id)


def test_44_a_step_that_fails_for_four_requests_is_one_incident(write_script: Callable[..., str]) -> None:
    model = write_script(beta=BackendScript())
    plugins = {"unsteady": Unsteady()}
    with (
        InferenceEngine(model=model, plugins="beta", prefer=["unsteady", "beta"], extra_plugins=plugins) as engine,
        ThreadPoolExecutor(4) as pool,
    ):
        events = told(engine)
        for _ in range(2):
            answers = list(pool.map(lambda _: engine.complete("hi"), range(4)))
            assert [[attempt.backend for attempt in answer.attempts] for answer in answers] == [
                ["unsteady", "beta"]
            ] * 4
    assert of(events, CircuitChanged) == []


# ---- 47: a queue before a backend that crashes -------------------------------------------------


def twelve(engine: InferenceEngine) -> list[Future[Completion]]:
    with ThreadPoolExecutor(12) as pool:
        return [pool.submit(engine.complete, "hi") for _ in range(12)]


@pytest.mark.parametrize("crash", ["with a request in it", "right after it has loaded"])
def test_47_requests_that_queue_for_a_backend_that_crashes_cause_few_loads(make_engine: MakeEngine, crash: str) -> None:
    if crash == "with a request in it":
        alpha = BackendScript(concurrency=1, generate=(Wait(0.2), Kill()))
    else:
        alpha = BackendScript(concurrency=1, load=(KillLater(0.02),), generate=(Wait(60), Finish()))
    engine = make_engine(alpha=alpha, beta=BackendScript())
    events = told(engine)
    assert {future.result().backend for future in twelve(engine)} == {"beta"}
    engine.close()
    assert len(of(events, LoadEnded, "alpha")) == 3  # so many failures open the circuit
    assert len(of(events, LoadEnded, "beta")) == 1


@pytest.mark.parametrize("crash", ["with a request in it", "right after it has loaded"])
def test_47_where_nobody_else_is_left_the_loads_end_with_the_quarantine(make_engine: MakeEngine, crash: str) -> None:
    if crash == "with a request in it":
        alpha = BackendScript(concurrency=1, generate=(Wait(0.1), Kill()))
    else:
        alpha = BackendScript(concurrency=1, load=(KillLater(0.02),), generate=(Wait(60), Finish()))
    engine = make_engine(alpha=alpha)
    events = told(engine)
    failures = [future.exception() for future in twelve(engine)]
    assert {type(failure) for failure in failures} == {AllBackendsFailed}
    assert any("quarantine" in str(failure) for failure in failures)
    engine.close()
    assert len(of(events, LoadEnded, "alpha")) == 6  # more than five deaths in a minute


# ---- 52: unload beside a request, in this process -----------------------------------------------


class Guest(LoadedModel):
    """A model in this process: a request stays inside it until the test lets it go."""

    def __init__(self) -> None:
        super().__init__(device="cpu", context_length=512, concurrency=2)
        self.inside = threading.Event()
        self.let_go = threading.Event()
        self.course: list[str] = []

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return self

    @hookimpl
    def tars_generate(self, cancel: CancelFlag) -> Iterator[BackendEvent]:
        self.course.append("in")
        yield TextDelta(text="a")
        self.inside.set()
        self.let_go.wait(60)
        self.course.append("out")
        yield Finished(
            finish_reason="cancelled" if cancel.is_set() else "stop", usage=Usage(prompt_tokens=1, completion_tokens=1)
        )

    @hookimpl
    def tars_unload(self) -> None:
        self.course.append("unloaded")


class BatchedGuest(Guest):
    """The same, stuck in a step."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[tuple[int, Iterator[BackendEvent]]] = []

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        return request

    def submit(self, request_id: int, prepared: GenerateRequest) -> None:
        del prepared
        self._running.append((request_id, self.tars_generate(threading.Event())))

    def step(self) -> list[tuple[int, BackendEvent]]:
        return [(number, event) for number, events in self._running if (event := next(events, None)) is not None]

    def cancel(self, request_id: int) -> None:
        """Only after the step."""


@pytest.mark.parametrize("kind", [Guest, BatchedGuest])
@pytest.mark.parametrize("end", ["close", "unload", "stream"])
def test_52_a_model_in_this_process_is_unloaded_when_the_request_has_left_it(kind: type[Guest], end: str) -> None:
    guest = kind()
    engine = InferenceEngine(model="guest:x", plugins="guest", extra_plugins={"guest": guest})
    with ThreadPoolExecutor(1) as pool, engine:
        stream = engine.stream("hi")
        assert guest.inside.wait(10)
        if end == "close":
            engine.close()  # does not wait for what cannot be ended
        elif end == "unload":
            unloading = pool.submit(engine.unload)
        else:
            stream.close()
            unloading = pool.submit(engine.unload)
        assert guest.course == ["in"]
        guest.let_go.set()
        until(lambda: "unloaded" in guest.course)
        assert guest.course == ["in", "out", "unloaded"]
        if end != "close":
            unloading.result(30)


def test_52_what_was_answered_before_the_unload_is_whole(make_engine: MakeEngine) -> None:
    engine = make_engine(
        alpha=BackendScript(generate=(Say("a"), *[Wait(0.01)] * 50, Say("b"), Finish())), options={"isolation": "none"}
    )
    stream = engine.stream("hi")
    first_text(stream)
    engine.unload()
    assert [event.text for event in stream if isinstance(event, TextDelta)] == ["b"]
    assert engine.loaded() == ()


def test_52_a_hang_in_this_process_is_left_behind_and_a_new_load_answers(make_engine: MakeEngine) -> None:
    engine = make_engine(
        alpha=BackendScript(generate=DEAF),
        beta=BackendScript(),
        options={"isolation": "none"},
        limits={"between_tokens_s": 0.5},
    )
    with pytest.raises(StreamInterrupted):
        engine.generate("hi")
    rewrite(engine, alpha=BackendScript(generate=(Say("a new one"), Finish())), beta=BackendScript())
    assert engine.generate("hi") == "a new one"
