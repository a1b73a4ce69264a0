"""Models that need one another's memory. Numbers are rows of the fault list."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from tars_core import AllBackendsFailed, InferenceEngine, TextDelta
from tars_core.system import memory
from tars_core.testing.fake import BackendScript, Finish, Kill, Raise, Say, Script, Wait
from tars_core.testing.processes import workers
from tars_core.testing.watching import of, told, until
from tars_core.types.observed import LoadEnded, Observed, RequestStarted, WorkerEnded, WorkerStarted

MakeEngine = Callable[..., InferenceEngine]
T = TypeVar("T")
E = TypeVar("E", bound=Observed)
GIB = 2**30


def first_text(stream: Iterator[object]) -> None:
    assert any(isinstance(event, TextDelta) for event in stream)


def running(engine: InferenceEngine, backend: str) -> int:
    return sum(status.running for status in engine.loaded() if status.backend == backend)


def rewrite(engine: InferenceEngine, **backends: BackendScript) -> None:
    """Let the fakes do something else from their next load on."""
    model = engine.settings.model or ""
    Path(model.removeprefix("fake:")).write_bytes(msgspec.json.encode(Script(backends=backends)))


@pytest.fixture
def sixteen_gib(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Make this a machine of 16 GiB, of which each worker takes 10; the list gets how many there were at a time."""
    before = set(workers(os.getpid()))
    counts: list[int] = []
    stopped = threading.Event()

    def ours() -> int:
        return len(set(workers(os.getpid())) - before)

    def count() -> None:
        while not stopped.wait(0.01):
            counts.append(ours())

    monkeypatch.setattr(memory, "total_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(memory, "free_bytes", lambda: 16 * GIB - 10 * GIB * ours())
    counting = threading.Thread(target=count)
    counting.start()
    yield counts
    stopped.set()
    counting.join()


@pytest.mark.parametrize("end", [Kill(), Raise("GenerationFailed", "bad")])
def test_46_the_successor_fits_since_the_first_one_is_unloaded_before_it_loads(
    make_engine: MakeEngine, sixteen_gib: list[int], end: Kill | Raise
) -> None:
    big = BackendScript(memory_bytes=9 * GIB)
    engine = make_engine(alpha=big, beta=big)
    assert [candidate.backend for candidate in engine.plan().candidates] == ["alpha", "beta"]
    assert engine.complete("hi").backend == "alpha"
    assert [candidate.backend for candidate in engine.plan().candidates] == ["alpha", "beta"]
    engine.unload()
    rewrite(engine, alpha=msgspec.structs.replace(big, generate=(end,)), beta=big)
    assert engine.complete("hi").backend == "beta"
    assert max(sixteen_gib) == 1


def test_46_a_second_model_waits_for_the_busy_first_one_and_then_takes_its_memory(
    make_engine: MakeEngine, write_script: Callable[..., str], tmp_path: Path, sixteen_gib: list[int]
) -> None:
    go_on = [Wait(0.01)] * 100
    big = BackendScript(memory_bytes=9 * GIB, generate=(Say("first"), *go_on, Finish()))
    engine = make_engine(alpha=big)
    events = told(engine)
    second = write_script(alpha=msgspec.structs.replace(big, generate=(Say("second"), Finish())))
    stream = engine.stream("hi")
    first_text(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, "hi", model=second)
        until(lambda: len(of(events, RequestStarted)) == 2)
        assert [event for event in stream if isinstance(event, TextDelta)] == []
        assert waiting.result() == "second"
    assert [status.name for status in engine.loaded()] == [second]
    assert max(sixteen_gib) == 1


def test_46_a_model_that_nobody_waits_for_any_more_displaces_nobody(
    make_engine: MakeEngine, write_script: Callable[..., str]
) -> None:
    answers = BackendScript(generate=(Say("first"), *[Wait(0.01)] * 50, Finish()))
    engine = make_engine(alpha=answers, options={"max_loaded": 1})
    events = told(engine)
    second = write_script(alpha=BackendScript())
    stream = engine.stream("hi")
    first_text(stream)
    other = engine.stream("hi", model=second)
    next(other)
    other.close()
    assert [event for event in stream if isinstance(event, TextDelta)] == []
    until(lambda: len(of(events, LoadEnded)) == 2)
    assert engine.complete("hi").timings.load_s is None
    assert engine.generate("hi", model=second) == "hello"  # and who asks again gets it


@pytest.mark.parametrize("limit", ["memory", "max_loaded"])
def test_46_two_models_that_are_asked_for_at_once_are_loaded_one_after_the_other(
    make_engine: MakeEngine, write_script: Callable[..., str], sixteen_gib: list[int], limit: str
) -> None:
    big = BackendScript(memory_bytes=9 * GIB if limit == "memory" else None, load=(Wait(0.5),))
    engine = make_engine(alpha=big, options={"max_loaded": 1 if limit == "max_loaded" else None})
    events = told(engine)
    models = [None, write_script(alpha=big)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda model: engine.generate("hi", model=model), models))
    assert answers == ["hello", "hello"]
    engine.close()
    course = [type(event) for event in events if isinstance(event, WorkerStarted | WorkerEnded)]
    assert course == [WorkerStarted, WorkerEnded] * 2
    if limit == "memory":
        assert max(sixteen_gib) == 1


def test_46_a_load_that_fails_lets_the_one_that_waits_for_its_memory_go_on(
    make_engine: MakeEngine, write_script: Callable[..., str], sixteen_gib: list[int]
) -> None:
    big = BackendScript(memory_bytes=9 * GIB)
    engine = make_engine(alpha=msgspec.structs.replace(big, load=(Wait(0.7), Raise("LoadFailed", "no"))))
    events = told(engine)
    with ThreadPoolExecutor(2) as pool:
        broken = pool.submit(engine.generate, "hi")
        until(lambda: workers(os.getpid()))
        assert pool.submit(engine.generate, "hi", model=write_script(alpha=big)).result() == "hello"
        assert isinstance(broken.exception(), AllBackendsFailed)
    assert max(sixteen_gib) == 1
    engine.close()
    assert len(of(events, LoadEnded)) == 2


@pytest.mark.parametrize("wait", [Wait(0.3, deaf=True), Wait(60, deaf=True)])
@pytest.mark.parametrize("then", ["another model", "unload", "keep_alive"])
def test_46_a_model_whose_last_request_was_cancelled_makes_room(
    make_engine: MakeEngine,
    write_script: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    wait: Wait,
    then: str,
) -> None:
    """The request is over for its caller, and the model still works on it for a while."""
    monkeypatch.setattr("tars_core.worker.host._CANCEL_GRACE_S", 0.6)
    engine = make_engine(
        alpha=BackendScript(generate=(Say("a"), wait, Finish())),
        options={"max_loaded": 1, "keep_alive": 0.0 if then == "keep_alive" else None},
    )
    stream = engine.stream("hi")
    first_text(stream)
    stream.close()
    if then == "another model":
        assert engine.generate("hi", model=write_script(alpha=BackendScript())) == "hello"
    elif then == "unload":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(engine.unload).result(20)
        assert engine.loaded() == ()
    else:
        until(lambda: engine.loaded() == (), within_s=20)
