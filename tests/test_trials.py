"""Backends that failed and are tried again, behind the callers' backs. Numbers are rows of the fault list."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from tars_core import InferenceEngine
from tars_core.plugin import (
    ModelRef,
    ProbeReport,
)
from tars_core.runtime.circuits import CircuitPolicy, Circuits
from tars_core.runtime.failover import Attempts, Limits
from tars_core.testing.fake import BackendScript, Finish, Kill, Raise, Say, Script, Wait
from tars_core.testing.watching import of, told, until
from tars_core.types.errors import GenerationFailed
from tars_core.types.observed import CircuitChanged, LoadEnded, Observed, WorkerEnded, WorkerStarted
from tars_core.types.results import Candidate

MakeEngine = Callable[..., InferenceEngine]
T = TypeVar("T")
E = TypeVar("E", bound=Observed)
BAD = BackendScript(generate=(Raise("GenerationFailed", "bad weights"),))
SLOWLY_BAD = msgspec.structs.replace(BAD, load=(Wait(0.4),))


def rewrite(engine: InferenceEngine, **backends: BackendScript) -> None:
    """Let the fakes do something else from now on; a loaded one, from its next load on."""
    model = engine.settings.model or ""
    path = Path(model.removeprefix("fake:"))
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(Script(backends=backends)))
    new.replace(path)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pauses of circuits be short."""
    policy = functools.partial(CircuitPolicy, cooldown_s=0.2, cooldown_max_s=0.4)
    monkeypatch.setattr("tars_core.runtime.driver.CircuitPolicy", policy)


MODEL = ModelRef(scheme="demo", rest="")
POLICY = CircuitPolicy(failures=2, cooldown_s=10, deaths=3, death_period_s=100, quarantine_s=50, decay_s=1000)


def pure(*names: str, policy: CircuitPolicy = POLICY) -> tuple[Circuits, Callable[[float], Attempts]]:
    """Return circuits, and what makes a request to the backends ``names`` at a given time."""
    circuits = Circuits(policy, random.Random(0))  # noqa: S311 - jitter
    report = ProbeReport(available=True)
    candidates = [Candidate(backend=name, model=MODEL, report=report) for name in names]
    return circuits, lambda now: Attempts(candidates, Limits(), circuits, now=now)


def test_45_a_request_does_not_go_to_a_backend_on_trial_while_another_one_is_warm() -> None:
    circuits, request = pure("a", "b")
    for serial in (1, 2):
        circuits.failed(("a", MODEL), object(), 0, incident=serial, died=False)
    for warm, chosen, on_trial in (({"b"}, "b", ["a"]), ({"a", "b"}, "a", []), (set(), "a", [])):
        attempts = request(20)
        assert attempts.next(20, {(name, MODEL) for name in warm}).backend == chosen
        assert [candidate.backend for candidate in attempts.for_trial] == on_trial
        attempts.undecided()


def test_45_a_backend_on_trial_is_still_the_last_resort() -> None:
    circuits, request = pure("a", "b")
    for serial in (1, 2):
        circuits.failed(("a", MODEL), object(), 0, incident=serial, died=False)
    attempts = request(20)
    assert attempts.next(20, {("b", MODEL)}).backend == "b"
    attempts.failed(GenerationFailed("no"), 21, incident=3)
    assert attempts.next(21, set()).backend == "a"


def test_44_incidents_of_two_workers_count_once_each_in_whatever_order_they_are_told() -> None:
    """One generates, the other one embeds: the same backend with the same model, and one circuit."""
    for incidents, is_closed in (([7, 7, 7], True), ([7, 5], False), ([5, 7], False)):
        circuits, _ = pure("a")
        for incident in incidents:
            circuits.failed(("a", MODEL), object(), 0, incident=incident, died=True)
        assert circuits.closed(("a", MODEL), 0) == is_closed


def test_45_a_quarantine_grows_and_is_forgotten_with_time() -> None:
    circuits, _ = pure("a")
    serial = 0

    def lasts_s(now: float) -> float:
        nonlocal serial
        for _ in range(POLICY.deaths + 1):
            serial += 1
            circuits.failed(("a", MODEL), object(), now, incident=serial, died=True)
        return next(s for s in range(10_000) if not circuits.quarantined(("a", MODEL), now + s))

    assert [lasts_s(now) for now in (0, 60, 200)] == [50, 100, 200]
    assert lasts_s(500 + 2 * POLICY.decay_s) == 100  # 400 it were, halved twice
    assert [lasts_s(day * 86_400.0) for day in range(1, 8)] == [50] * 7


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("bad", [SLOWLY_BAD, BackendScript(load=(Wait(0.4), Raise("LoadFailed", "no"))),
                                 BackendScript(generate=(Kill(),))], ids=["generate", "load", "death"])  # fmt: skip
def test_45_trials_of_a_broken_backend_delay_nobody_and_leave_the_one_that_answers_alone(
    make_engine: MakeEngine, bad: BackendScript
) -> None:
    engine = make_engine(alpha=bad, beta=BackendScript())
    events = told(engine)
    for _ in range(3):
        assert engine.complete("hi").backend == "beta"
    pids = [started.pid for started in of(events, WorkerStarted, "beta")]
    trials = len(of(events, LoadEnded, "alpha"))
    while len(of(events, LoadEnded, "alpha")) < trials + 3:
        completion = engine.complete("hi")
        assert (completion.backend, completion.timings.load_s) == ("beta", None)
        time.sleep(0.01)
    assert [status.pid for status in engine.loaded() if status.backend == "beta"] == pids[-1:]
    engine.close()
    ended = [event for event in of(events, WorkerEnded, "beta") if event.pid == pids[-1]]
    assert len(ended) == 1  # by close()


@pytest.mark.usefixtures("short_pauses")
def test_45_a_request_that_comes_during_a_trial_is_answered_before_the_trial_has_loaded(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(alpha=BAD, beta=BackendScript())
    events = told(engine)
    for _ in range(3):
        engine.complete("hi")
    loads = len(of(events, LoadEnded, "alpha"))
    rewrite(engine, alpha=BackendScript(load=(Wait(2),)), beta=BackendScript())
    deadline = time.monotonic() + 20
    answered = 0
    while len(of(events, LoadEnded, "alpha")) == loads:
        assert time.monotonic() < deadline
        answered += engine.complete("hi").backend == "beta"
    assert answered > 5
    # The trial went well: who was broken is in use again, and nobody has waited for it.
    while (completion := engine.complete("hi")).backend == "beta":
        assert time.monotonic() < deadline
    assert (completion.backend, completion.timings.load_s) == ("alpha", None)
    until(lambda: [change.state for change in of(events, CircuitChanged)] == ["open", "closed"])


@pytest.mark.usefixtures("short_pauses")
def test_45_where_only_one_model_may_be_loaded_the_one_that_answers_stays(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BAD, beta=BackendScript(), options={"max_loaded": 1})
    events = told(engine)
    for _ in range(3):
        engine.complete("hi")
    loads = len(of(events, LoadEnded))
    until(lambda: of(events, CircuitChanged))
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:  # six pauses long
        assert engine.complete("hi").timings.load_s is None
    engine.close()
    assert len(of(events, LoadEnded)) == loads


@pytest.mark.usefixtures("short_pauses")
def test_45_two_trials_at_once_do_not_displace_the_one_that_answers(make_engine: MakeEngine) -> None:
    answers = BackendScript(generate=(Wait(0.1), Say("hello"), Finish()))
    engine = make_engine(alpha=SLOWLY_BAD, beta=SLOWLY_BAD, gamma=answers, options={"max_loaded": 2})
    events = told(engine)
    for _ in range(3):
        assert engine.complete("hi").backend == "gamma"
    (pid,) = (status.pid for status in engine.loaded() if status.backend == "gamma")
    for _ in range(3):
        time.sleep(0.6)  # the pauses of both are over
        loads = len(of(events, LoadEnded))
        assert engine.complete("hi").backend == "gamma"
        until(lambda loads=loads: len(of(events, LoadEnded)) > loads)  # type: ignore[misc]
        completion = engine.complete("hi")
        assert (completion.backend, completion.timings.load_s) == ("gamma", None)
    assert [status.pid for status in engine.loaded() if status.backend == "gamma"] == [pid]


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("features", [("raw",), ("chat",)])
def test_45_a_backend_that_can_only_chat_or_only_continue_text_passes_its_trial_too(
    make_engine: MakeEngine, features: tuple[str, ...]
) -> None:
    can = BackendScript(features=features)
    engine = make_engine(alpha=msgspec.structs.replace(BAD, features=features), beta=BackendScript())
    events = told(engine)
    for _ in range(3):
        assert engine.complete("hi", raw=features == ("raw",)).backend == "beta"
    rewrite(engine, alpha=can, beta=BackendScript())
    until(lambda: engine.complete("hi", raw=features == ("raw",)).backend == "alpha")
    engine.close()
    assert [change.state for change in of(events, CircuitChanged, "alpha")] == ["open", "closed"]
