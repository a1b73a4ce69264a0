"""An engine that is closed, forgotten, forked, cancelled or called back at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tars_core import EngineClosed, InferenceEngine, TarsError, TextDelta
from tars_core.plugin import OfferedModel, hookimpl
from tars_core.testing.fake import BackendScript, Finish, Kill, Mark, Raise, Say, Wait
from tars_core.testing.processes import workers
from tars_core.testing.watching import of, told, until
from tars_core.types.observed import CircuitChanged

MakeEngine = Callable[..., InferenceEngine]
SLOW_PROBE = BackendScript(probe=(Wait(1.0, deaf=True),))


class SlowLister:
    """A plugin that takes its time to name its models."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @hookimpl
    def tars_models(self) -> tuple[OfferedModel, ...]:
        time.sleep(self._seconds)
        return ()


def outcome(call: Callable[[], object]) -> list[object]:
    """Run ``call`` in a thread; the list holds its result, or its exception, once there is one."""
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(call())
        except Exception as error:  # noqa: BLE001 - it is what the test looks at
            outcomes.append(error)

    threading.Thread(target=run, daemon=True).start()
    return outcomes


def settled(outcomes: list[object], *, within_s: float = 5.0) -> object:
    until = time.monotonic() + within_s
    while not outcomes and time.monotonic() < until:
        time.sleep(0.01)
    assert outcomes, "the caller was left waiting"
    return outcomes[0]


@pytest.fixture
def no_workers_left() -> Iterator[None]:
    before = set(workers(os.getpid()))
    yield
    until(lambda: set(workers(os.getpid())) <= before, "a worker is left")


# ---- closing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["plan", "load", "backends", "models", "generate"])
@pytest.mark.usefixtures("no_workers_left")
def test_closing_while_a_decision_is_made_releases_who_waits_for_it(make_engine: MakeEngine, call: str) -> None:
    engine = make_engine(alpha=SLOW_PROBE)
    question = {"generate": lambda: engine.generate("hi")}.get(call) or getattr(engine, call)
    before = set(threading.enumerate())
    outcomes = outcome(question)
    until(lambda: outcomes or any(t.name.startswith("tars-ask-") for t in set(threading.enumerate()) - before))
    engine.close()
    answer = settled(outcomes)
    assert isinstance(answer, EngineClosed) or call in ("backends", "models")  # these may just have been ready


@pytest.mark.usefixtures("no_workers_left")
def test_closing_while_another_load_begins_leaves_no_worker(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(alpha=BackendScript(load=(Mark(str(tmp_path / "loading")), Wait(20))))
    outcomes = [outcome(engine.load) for _ in range(3)]
    until((tmp_path / "loading").exists)
    engine.close()
    assert all(isinstance(settled(waiting), EngineClosed) for waiting in outcomes)


@pytest.mark.usefixtures("no_workers_left")
def test_a_second_close_returns_when_the_first_has_ended_the_workers(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Mark(str(tmp_path / "asked")), Wait(60, deaf=True), Finish())))
    outcome(lambda: engine.generate("hi"))
    until((tmp_path / "asked").exists)
    (own,) = [status.pid for status in engine.loaded()]
    first = outcome(engine.close)
    engine.close()
    assert own not in workers(os.getpid())
    settled(first)


def test_a_closed_engine_does_not_pass_for_one_without_backends(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    assert engine.generate("hi") == "hello"
    engine.close()
    with pytest.raises(EngineClosed):
        engine.list_available_backends()
    with pytest.raises(EngineClosed):
        engine.get_active_backend()


@pytest.mark.usefixtures("no_workers_left")
def test_an_engine_that_is_forgotten_ends_its_workers_and_its_thread(write_script: Callable[..., str]) -> None:
    before = set(threading.enumerate())
    engine = InferenceEngine(model=write_script(alpha=BackendScript()), plugins="alpha")
    engine.generate("hi")
    (own,) = [t for t in threading.enumerate() if t.name == "tars-engine" and t not in before]
    del engine
    gc.collect()
    own.join(5)
    assert not own.is_alive()


@pytest.mark.usefixtures("no_workers_left")
def test_56_an_owner_whose_method_is_a_callback_of_its_engine_is_collected_when_it_is_forgotten(
    write_script: Callable[..., str],
) -> None:
    class Owner:
        def __init__(self) -> None:
            model = write_script(alpha=BackendScript())
            self.engine = InferenceEngine(model=model, plugins="alpha", on_load=self.note)
            self.engine.observe(lambda _: self.note())

        def note(self, *_: object) -> None:
            """Take part in a cycle of references."""

    before = set(threading.enumerate())
    owner = Owner()
    owner.engine.generate("hi")
    threads = [t for t in threading.enumerate() if t.name in ("tars-engine", "tars-observers") and t not in before]
    reference = weakref.ref(owner)
    del owner
    for thread in threads:
        gc.collect()  # an observer may just have been called, which holds it for that long
        thread.join(5)
    assert reference() is None
    assert [thread for thread in threads if thread.is_alive()] == []


def test_a_callback_may_ask_the_engine_and_close_it(write_script: Callable[..., str]) -> None:
    told: list[object] = []
    closed = threading.Event()

    def on_load(backend: str, fraction: float, note: str) -> None:
        del backend, note
        if fraction == 1:
            told.append(engine.generate("hi"))
            engine.close()
            closed.set()

    engine = InferenceEngine(model=write_script(alpha=BackendScript()), plugins="alpha", on_load=on_load)
    with contextlib.suppress(EngineClosed):  # the callback may be that quick
        engine.load()
    assert closed.wait(30)
    assert told == ["hello"]


def test_an_engine_whose_thread_could_not_be_started_can_be_asked_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = make_engine(alpha=BackendScript())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(TarsError, match="cannot start its thread"):
            engine.generate("hi")
    assert engine.generate("hi") == "hello"


def test_a_program_whose_event_loops_are_uvloops_gets_its_answers(write_script: Callable[..., str]) -> None:
    script = """
import asyncio, sys, uvloop
from tars_core import InferenceEngine
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

async def ask():
    async with InferenceEngine(model=sys.argv[1], plugins="alpha,beta", prefer=("alpha", "beta")) as engine:
        print((await engine.acomplete("hi")).backend)

asyncio.new_event_loop().run_until_complete(ask())
"""
    model = write_script(alpha=BackendScript(generate=(Kill(),)), beta=BackendScript())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, model], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("beta\n", 0), done.stderr


# ---- fork --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_37_a_forked_child_that_goes_on_with_a_stream_is_told_that_it_is_not_its_own(make_engine: MakeEngine) -> None:
    stream = make_engine(alpha=BackendScript(generate=(Say("a"), Wait(1.0), Say("b"), Finish()))).stream("hi")
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            for _ in stream:
                pass
        except EngineClosed:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert [event.text for event in stream if isinstance(event, TextDelta)] == ["a", "b"]


# ---- one worker in another's way ---------------------------------------------------------------


def test_a_worker_is_not_put_away_under_a_request_that_is_about_to_use_it(make_engine: MakeEngine) -> None:
    """While one request tries alpha again, which loads it, the others were sent to beta, which idles."""
    engine = make_engine(
        alpha=BackendScript(generate=(Raise("GenerationFailed", "bad weights"),)), beta=BackendScript()
    )
    events = told(engine)

    async def ask() -> None:
        for _ in range(4):
            assert (await engine.acomplete("hi")).backend == "beta"
        paused = of(events, CircuitChanged, "alpha")
        await asyncio.sleep(paused[-1].pause_s)
        completions = await asyncio.gather(*(engine.acomplete("hi") for _ in range(4)))
        assert {completion.backend for completion in completions} == {"beta"}
        kinds = {a.failure.kind for c in completions for a in c.attempts if a.failure is not None}
        assert kinds <= {"GenerationFailed", "Skipped"}

    asyncio.run(ask())


# ---- cancelling --------------------------------------------------------------------------------


def test_27_no_cancel_is_lost_while_text_comes_fast(make_engine: MakeEngine) -> None:
    """Before Python 3.12 ``asyncio.wait_for`` swallowed one that came together with an event."""
    flood = tuple(act for _ in range(3000) for act in (Say("a"), Wait(0.0003, deaf=True)))
    engine = make_engine(alpha=BackendScript(concurrency=1, generate=(*flood, Wait(20), Finish())))

    async def ask() -> None:
        await asyncio.to_thread(engine.load)
        for number in range(40):
            task = asyncio.ensure_future(engine.agenerate("hi"))
            await asyncio.sleep(0.1 + number * 0.0005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            began = time.monotonic()
            stream = engine.astream("hi")
            while not isinstance(await anext(stream), TextDelta):
                pass
            await stream.aclose()
            assert time.monotonic() - began < 10, "the place was not free"

    asyncio.run(ask())


def test_a_caller_who_gives_up_while_deciding_leaves_the_decision_to_the_next(write_script: Callable[..., str]) -> None:
    plugins = {"lister": SlowLister(1.0)}
    with InferenceEngine(model=write_script(alpha=BackendScript()), plugins="alpha", extra_plugins=plugins) as engine:

        async def ask() -> str:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(engine.agenerate("hi"), 0.5)
            return await engine.agenerate("hi")

        assert asyncio.run(ask()) == "hello"


def test_the_whole_time_covers_deciding_too(write_script: Callable[..., str]) -> None:
    with InferenceEngine(
        model=write_script(alpha=BackendScript()),
        plugins="alpha",
        extra_plugins={"lister": SlowLister(1.9)},
        limits={"total_s": 0.5},
    ) as engine:
        engine.backends()  # discovery may take longer than that
        began = time.monotonic()
        with pytest.raises(TarsError, match=r"0\.5 s"):
            engine.generate("hi")
        assert time.monotonic() - began < 1.5
