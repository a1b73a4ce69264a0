"""The state machine of attempts and circuits, with a clock and dice of the tests' own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tars_core.runtime.circuits import CircuitPolicy, Circuits
from tars_core.runtime.failover import Attempts, Limits
from tars_core.types.errors import (
    DeadlineExceeded,
    GenerationFailed,
    LoadFailed,
    OutOfMemory,
    StreamInterrupted,
    TarsError,
    WorkerDied,
)
from tars_core.types.failures import AllBackendsFailed, Attempt
from tars_core.types.models import ModelRef
from tars_core.types.reports import ProbeReport
from tars_core.types.results import Candidate

MODEL = ModelRef(scheme="demo", rest="")
POLICY = CircuitPolicy(
    failures=2, cooldown_s=10, cooldown_max_s=80, deaths=3, death_period_s=100, quarantine_s=50, quarantine_max_s=400
)
TOTAL_S = 100.0
LIMITS = Limits(load_s=30, first_token_s=20, between_tokens_s=5, total_s=TOTAL_S)
SERIALS = itertools.count(1)
"""Worker's numbers: one for each incident."""


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - jitter


def candidate(name: str) -> Candidate:
    return Candidate(backend=name, model=MODEL, report=ProbeReport(available=True))


def key(name: str) -> tuple[str, ModelRef]:
    return name, MODEL


def new_circuits(policy: CircuitPolicy = POLICY) -> Circuits:
    return Circuits(policy, dice(0))


def request(circuits: Circuits, *names: str, now: float = 0, limits: Limits = LIMITS) -> Attempts:
    return Attempts([candidate(name) for name in names], limits, circuits, now=now)


def fail_once(circuits: Circuits, name: str, now: float, error: TarsError | None = None) -> None:
    """Send a request of its own to ``name``, and let it fail before any text."""
    attempts = request(circuits, name, now=now)
    attempts.next(now)
    attempts.loaded()
    attempts.failed(error or GenerationFailed("no"), now, incident=next(SERIALS))


def opened(name: str, now: float = 0) -> Circuits:
    """Return circuits of which the one for ``name`` has just opened."""
    circuits = new_circuits()
    for _ in range(POLICY.failures):
        fail_once(circuits, name, now)
    assert not circuits.closed(key(name), now)
    return circuits


def pause_s(circuits: Circuits, name: str, now: float) -> float:
    """Measure how long ``name`` is still paused, to a sixteenth of a second."""
    return next(step / 16 for step in range(10**6) if circuits.closed(key(name), now + step / 16))


def kinds(attempts: Sequence[Attempt]) -> list[tuple[str, str | None]]:
    return [(a.backend, a.failure.kind if a.failure else None) for a in attempts]


# ---- one request -------------------------------------------------------------------------------


def test_the_first_candidate_is_tried_first_and_its_answer_ends_the_request() -> None:
    attempts = request(new_circuits(), "a", "b")
    assert attempts.next(1).backend == "a"
    attempts.loaded()
    attempts.delivered("hello ")
    attempts.delivered("world")
    done = attempts.finished(4)
    assert attempts.text == "hello world"
    assert [(a.backend, a.stage, a.duration_s, a.failure) for a in done] == [("a", "done", 3, None)]


def test_a_failure_before_text_moves_on_and_is_recorded_with_stage_and_cause() -> None:
    attempts = request(new_circuits(), "a", "b", "c")
    attempts.next(0)
    attempts.failed(OutOfMemory("6 GiB short", hint="buy some"), 2, incident=1)
    attempts.next(2)
    attempts.loaded()
    attempts.failed(GenerationFailed("garbled"), 5, incident=2)
    assert attempts.next(5).backend == "c"
    attempts.loaded()
    first, second, third = attempts.finished(6)
    assert (first.stage, first.duration_s, second.stage, second.duration_s) == ("load", 2, "prompt", 3)
    assert first.failure is not None
    assert (first.failure.kind, first.failure.message, first.failure.hint) == (
        "OutOfMemory",
        "6 GiB short",
        "buy some",
    )
    assert (third.backend, third.stage, third.failure) == ("c", "done", None)


def test_36_when_all_fail_the_error_has_every_attempt_in_order_with_cause_and_hint() -> None:
    attempts = request(new_circuits(), "a", "b")
    for name in ("a", "b"):
        attempts.next(0)
        attempts.failed(LoadFailed(f"{name} broke", hint=f"mend {name}"), 1, incident=next(SERIALS))
    with pytest.raises(AllBackendsFailed) as failed:
        attempts.next(1)
    assert kinds(failed.value.attempts) == [("a", "LoadFailed"), ("b", "LoadFailed")]
    for word in ("a broke", "b broke", "mend a", "mend b"):
        assert word in str(failed.value)


def test_without_candidates_all_have_failed() -> None:
    with pytest.raises(AllBackendsFailed):
        request(new_circuits()).next(0)


def test_failover_stops_once_text_was_emitted() -> None:
    attempts = request(new_circuits(), "a", "b")
    attempts.next(0)
    attempts.loaded()
    attempts.delivered("half an ")
    cause = WorkerDied(returncode=-11)
    with pytest.raises(StreamInterrupted) as interrupted:
        attempts.failed(cause, 1, incident=1)
    assert interrupted.value.partial_text == "half an "
    assert interrupted.value.backend == "a"
    assert interrupted.value.cause is cause
    assert interrupted.value.__cause__ is cause


# ---- time --------------------------------------------------------------------------------------


def test_each_stage_has_its_own_limit() -> None:
    attempts = request(new_circuits(), "a")
    attempts.next(0)
    waits = [attempts.wait_s(0)]
    errors = [attempts.expired(0)]
    attempts.loaded()
    waits.append(attempts.wait_s(0))
    errors.append(attempts.expired(0))
    attempts.delivered("x")
    waits.append(attempts.wait_s(0))
    errors.append(attempts.expired(0))
    assert waits == [30, 20, 5]
    assert [(e.stage, e.limit_s) for e in errors] == [("load", 30), ("first token", 20), ("between tokens", 5)]


def test_4_one_deadline_covers_all_attempts() -> None:
    attempts = request(new_circuits(), "a", "b", now=1000)
    attempts.next(1000)
    attempts.failed(LoadFailed("no"), 1090, incident=1)
    attempts.next(1090)
    attempts.loaded()
    assert attempts.total_left(1090) == 10
    assert attempts.wait_s(1090) == 10
    assert attempts.total_left(1200) == 0
    expired = attempts.expired(1100)
    assert (expired.stage, expired.limit_s) == ("total", 100)


def test_when_the_whole_time_is_up_nobody_else_is_tried() -> None:
    attempts = request(new_circuits(), "a", "b")
    attempts.next(0)
    with pytest.raises(AllBackendsFailed) as failed:
        attempts.failed(attempts.expired(100), 100, incident=1)
    assert kinds(failed.value.attempts) == [("a", "DeadlineExceeded")]
    assert isinstance(failed.value.__cause__, DeadlineExceeded)


def test_a_new_attempt_begins_with_the_limit_for_loading_again() -> None:
    attempts = request(new_circuits(), "a", "b")
    attempts.next(0)
    attempts.loaded()
    attempts.failed(GenerationFailed("no"), 1, incident=1)
    attempts.next(1)
    assert attempts.expired(2).stage == "load"


def test_17_only_differences_of_the_clock_count() -> None:
    for start in (0.0, 1e9):
        attempts = request(new_circuits(), "a", now=start)
        attempts.next(start)
        assert attempts.total_left(start + 1) == 99
        assert attempts.expired(start + 99).stage == "load"
        assert attempts.expired(start + 100).stage == "total"


# ---- circuits ----------------------------------------------------------------------------------


def test_a_circuit_opens_after_so_many_failures_in_a_row() -> None:
    circuits = new_circuits()
    fail_once(circuits, "a", 0)
    assert circuits.closed(key("a"), 0)
    fail_once(circuits, "a", 0)
    assert not circuits.closed(key("a"), 0)


def test_an_answer_in_between_starts_the_count_anew() -> None:
    circuits = new_circuits()
    fail_once(circuits, "a", 0)
    attempts = request(circuits, "a")
    attempts.next(0)
    attempts.finished(1)
    fail_once(circuits, "a", 1)
    assert circuits.closed(key("a"), 1)


def test_a_circuit_is_for_one_backend_with_one_form_of_the_model() -> None:
    circuits = opened("a")
    assert circuits.closed(key("b"), 0)
    assert circuits.closed(("a", ModelRef(scheme="path", rest="m.gguf")), 0)


def test_a_paused_backend_is_passed_over_and_the_result_says_so() -> None:
    attempts = request(opened("a"), "a", "b")
    assert attempts.next(0).backend == "b"
    assert kinds(attempts.finished(1)) == [("a", "Skipped"), ("b", None)]
    failure = attempts.attempts[0].failure
    assert failure is not None
    assert "paused" in failure.message


def test_the_last_candidate_is_never_ejected_by_an_open_circuit() -> None:
    assert request(opened("a"), "a").next(0).backend == "a"


def test_a_candidate_that_was_passed_over_is_tried_when_it_is_the_last_one_left() -> None:
    attempts = request(opened("a"), "a", "b")
    assert attempts.next(0).backend == "b"
    attempts.failed(LoadFailed("no"), 0, incident=next(SERIALS))
    assert attempts.next(0).backend == "a"
    assert kinds(attempts.finished(1)) == [("b", "LoadFailed"), ("a", None)]


def test_where_all_are_paused_they_are_tried_in_order() -> None:
    circuits = opened("a")
    for _ in range(POLICY.failures):
        fail_once(circuits, "b", 0)
    attempts = request(circuits, "a", "b")
    assert attempts.next(0).backend == "a"
    attempts.failed(LoadFailed("no"), 0, incident=next(SERIALS))
    assert attempts.next(0).backend == "b"


def test_after_the_pause_one_trial_is_let_through_and_the_others_go_elsewhere() -> None:
    circuits = opened("a")
    later = pause_s(circuits, "a", 0)
    asked = [request(circuits, "a", "b", now=later) for _ in range(3)]
    assert [attempts.next(later).backend for attempts in asked] == ["a", "b", "b"]


def test_a_trial_that_succeeds_closes_the_circuit() -> None:
    circuits = opened("a")
    later = pause_s(circuits, "a", 0)
    trial = request(circuits, "a", "b", now=later)
    trial.next(later)
    trial.finished(later + 1)
    assert [request(circuits, "a", "b").next(later + 1).backend for _ in range(3)] == ["a", "a", "a"]
    fail_once(circuits, "a", later + 1)
    assert circuits.closed(key("a"), later + 1)


def test_a_paused_backend_that_answers_nevertheless_is_taken_back_at_once() -> None:
    circuits = opened("a")
    last_resort = request(circuits, "a")
    last_resort.next(0)
    last_resort.finished(1)
    assert request(circuits, "a", "b").next(1).backend == "a"


def test_a_trial_that_fails_opens_it_again_for_longer() -> None:
    circuits = opened("a")
    first = pause_s(circuits, "a", 0)
    fail_once(circuits, "a", first)
    assert pause_s(circuits, "a", first) >= 2 * POLICY.cooldown_s


def test_a_trial_that_says_nothing_leaves_the_trial_to_the_next() -> None:
    circuits = opened("a")
    later = pause_s(circuits, "a", 0)
    trial = request(circuits, "a", "b", now=later)
    trial.next(later)
    trial.undecided()
    assert request(circuits, "a", "b", now=later).next(later).backend == "a"


def test_a_request_from_before_the_pause_does_not_end_the_trial_under_way() -> None:
    circuits = new_circuits()
    old = request(circuits, "a", "b")
    old.next(0)
    for _ in range(POLICY.failures):
        fail_once(circuits, "a", 0)
    later = pause_s(circuits, "a", 0)
    assert request(circuits, "a", "b", now=later).next(later).backend == "a"
    old.undecided()
    assert request(circuits, "a", "b", now=later).next(later).backend == "b"


def test_a_request_with_no_other_choice_does_not_take_the_trial_over() -> None:
    circuits = opened("a")
    later = pause_s(circuits, "a", 0)
    assert request(circuits, "a", "b", now=later).next(later).backend == "a"
    no_choice = request(circuits, "a", now=later)
    no_choice.next(later)
    no_choice.undecided()
    assert request(circuits, "a", "b", now=later).next(later).backend == "b"


def test_after_an_answer_the_next_pause_is_a_first_one_again() -> None:
    circuits = opened("a")
    now = pause_s(circuits, "a", 0)
    fail_once(circuits, "a", now)
    now += pause_s(circuits, "a", now)
    trial = request(circuits, "a", now=now)
    trial.next(now)
    trial.finished(now)
    for _ in range(POLICY.failures):
        fail_once(circuits, "a", now)
    assert pause_s(circuits, "a", now) <= POLICY.cooldown_s * 1.25 + 1 / 16


def test_each_pause_is_twice_the_last_up_to_a_bound_with_jitter_up_to_a_quarter() -> None:
    circuits = opened("a")
    now, expected = 0.0, [10, 20, 40, 80, 80, 80]
    for base in expected:
        pause = pause_s(circuits, "a", now)
        assert base <= pause <= base * 1.25 + 1 / 16
        now += pause
        fail_once(circuits, "a", now)


def test_pauses_differ_so_that_hosts_do_not_try_in_step() -> None:
    pauses = set()
    for seed in range(8):
        circuits = Circuits(POLICY, dice(seed))
        for _ in range(POLICY.failures):
            fail_once(circuits, "a", 0)
        pauses.add(pause_s(circuits, "a", 0))
    assert len(pauses) > 4


def test_requests_that_fail_together_open_the_circuit_for_one_pause_not_for_many() -> None:
    circuits = new_circuits()
    together = [request(circuits, "a") for _ in range(20)]
    for attempts in together:
        attempts.next(0)
        attempts.loaded()
    for attempts in together:
        attempts.failed(GenerationFailed("no"), 0, incident=1)
    assert pause_s(circuits, "a", 0) <= POLICY.cooldown_s * 1.25 + 1 / 16


# ---- incidents ---------------------------------------------------------------------------------


def fail_together(error: Callable[[], TarsError], *, loaded: bool, now: float = 1) -> Circuits:
    """Let ten requests fail by what happened to the one worker they share."""
    circuits = new_circuits()
    together = [request(circuits, "a", "b") for _ in range(10)]
    serial = next(SERIALS)
    for attempts in together:
        attempts.next(0)
        if loaded:
            attempts.loaded()
    for attempts in together:
        attempts.failed(error(), now, incident=serial)
    return circuits


@pytest.mark.parametrize(
    ("error", "loaded"),
    [
        (lambda: WorkerDied(returncode=-11), True),
        (lambda: WorkerDied(returncode=-9), False),
        (lambda: LoadFailed("no"), False),
        (lambda: DeadlineExceeded(stage="load", limit_s=30), False),
        (lambda: DeadlineExceeded(stage="first token", limit_s=20), True),
        (lambda: DeadlineExceeded(stage="between tokens", limit_s=5), True),
    ],
    ids=["death", "death on load", "load", "hang on load", "hang in the prompt", "hang in the stream"],
)
def test_one_incident_counts_once_however_many_requests_it_ends(
    error: Callable[[], TarsError], *, loaded: bool
) -> None:
    assert fail_together(error, loaded=loaded).closed(key("a"), 1)


def test_failures_of_single_requests_on_one_living_worker_count_each() -> None:
    assert not fail_together(lambda: GenerationFailed("no"), loaded=True).closed(key("a"), 1)


def test_a_second_incident_counts_again() -> None:
    circuits = new_circuits()
    for _ in range(2):
        fail_once(circuits, "a", 0, WorkerDied(returncode=-11))
    assert not circuits.closed(key("a"), 0)


def test_a_request_out_of_time_does_not_hide_the_later_death_of_its_worker() -> None:
    circuits = new_circuits()
    late = request(circuits, "a")
    late.next(0)
    with pytest.raises(AllBackendsFailed):
        late.failed(late.expired(100), 100, incident=7)
    other = request(circuits, "a", now=99)
    other.next(99)
    other.failed(WorkerDied(returncode=-11), 101, incident=7)
    for _ in range(POLICY.failures - 1):
        fail_once(circuits, "a", 101)
    assert not circuits.closed(key("a"), 101)


def test_a_request_that_runs_out_of_its_whole_time_says_nothing_about_the_backend() -> None:
    circuits = new_circuits()
    for _ in range(20):
        late = request(circuits, "a")
        late.next(0)
        with pytest.raises(AllBackendsFailed):
            late.failed(late.expired(100), 100, incident=next(SERIALS))
    assert circuits.closed(key("a"), 100)


def test_a_request_that_ends_undecided_never_counts() -> None:
    circuits = new_circuits()
    for _ in range(20):
        attempts = request(circuits, "a")
        attempts.next(0)
        attempts.undecided()
    assert circuits.closed(key("a"), 0)


# ---- quarantine --------------------------------------------------------------------------------


def die(circuits: Circuits, name: str, times: int, now: float) -> None:
    for _ in range(times):
        fail_once(circuits, name, now, WorkerDied(returncode=-11))


def test_35_a_worker_that_dies_too_often_is_not_tried_even_as_the_last_candidate() -> None:
    circuits = new_circuits()
    die(circuits, "a", POLICY.deaths, 0)
    assert not circuits.quarantined(key("a"), 0)
    die(circuits, "a", 1, 0)
    assert circuits.quarantined(key("a"), 0)
    with pytest.raises(AllBackendsFailed) as failed:
        request(circuits, "a").next(0)
    assert kinds(failed.value.attempts) == [("a", "Skipped")]
    assert "quarantine" in str(failed.value)


def test_35_a_quarantined_backend_leaves_the_request_to_the_others() -> None:
    circuits = new_circuits()
    die(circuits, "a", POLICY.deaths + 1, 0)
    assert request(circuits, "a", "b").next(0).backend == "b"


def test_35_deaths_that_lie_far_apart_are_no_crash_loop() -> None:
    circuits = new_circuits()
    for n in range(20):
        die(circuits, "a", 1, n * POLICY.death_period_s / POLICY.deaths * 1.01)
    assert not circuits.quarantined(key("a"), 20 * POLICY.death_period_s)


def test_35_one_death_seen_by_many_requests_is_one_death() -> None:
    circuits = fail_together(lambda: WorkerDied(returncode=-11), loaded=True)
    assert not circuits.quarantined(key("a"), 1)


def test_35_each_quarantine_is_twice_the_last_up_to_a_bound() -> None:
    circuits = new_circuits()
    now = 0.0
    for expected in (50, 100, 200, 400, 400):
        die(circuits, "a", POLICY.deaths + 1, now)
        assert circuits.quarantined(key("a"), now + expected - 0.01)
        now += expected
        assert not circuits.quarantined(key("a"), now)


# ---- properties --------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
ERRORS = st.sampled_from(
    [
        LoadFailed("no"),
        GenerationFailed("no"),
        WorkerDied(returncode=-9),
        DeadlineExceeded(stage="first token", limit_s=20),
    ]
)
STEPS = st.lists(st.sampled_from(["text", "fail", "finish", "undecided", "wait"]), max_size=12)


@given(st.lists(STEPS, min_size=1, max_size=6), ERRORS, st.floats(0, 40), st.permutations(NAMES))
def test_every_request_has_one_outcome_and_tries_nobody_twice(
    courses: list[list[str]], error: TarsError, pace_s: float, names: list[str]
) -> None:
    circuits = new_circuits()
    now = 0.0
    for course in courses:
        attempts, began, steps = request(circuits, *names, now=now), now, iter(course)
        outcomes: list[str] = []
        tried: list[str] = []
        delivered = ""
        while not outcomes:
            try:
                tried.append(attempts.next(now).backend)
                attempts.loaded()
                assert not delivered  # nobody goes on where another one's text was delivered
                for step in itertools.chain(steps, ["finish"]):
                    now += pace_s
                    if step == "text":
                        attempts.delivered("x")
                        delivered += "x"
                    elif step == "fail":
                        attempts.failed(error, now, incident=next(SERIALS))
                        assert now < began + TOTAL_S
                        break
                    elif step == "undecided":
                        attempts.undecided()
                        outcomes.append("cancelled")
                        break
                    elif step == "finish":
                        done = attempts.finished(now)
                        assert done[-1].backend == tried[-1]
                        outcomes.append("answer")
                        break
            except StreamInterrupted as interrupted:
                assert interrupted.partial_text == delivered != ""  # noqa: PT017 - one of several outcomes
                outcomes.append("interrupted")
            except AllBackendsFailed as failed:
                assert not delivered
                recorded = {a.backend for a in failed.attempts}
                assert recorded == set(names) or now >= began + TOTAL_S
                outcomes.append("failed")
            assert attempts.text == delivered
        assert len(outcomes) == 1
        assert len(tried) == len(set(tried))


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans()), min_size=1, max_size=40), st.integers(0, 2**32))
def test_a_pause_never_outlasts_its_bound_whatever_happened_before(
    history: list[tuple[float, bool]], seed: int
) -> None:
    circuits = Circuits(POLICY, dice(seed))
    now = 0.0
    for gap, fails in history:
        now += gap
        attempts = request(circuits, "a", now=now)
        attempts.next(now)
        if fails:
            attempts.failed(GenerationFailed("no"), now, incident=next(SERIALS))
        else:
            attempts.finished(now)
            assert circuits.closed(key("a"), now)
    assert circuits.closed(key("a"), now + POLICY.cooldown_max_s * 1.25)


class ManyRequests(RuleBasedStateMachine):
    """Requests that overlap in time and share circuits and workers, the way an engine runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.running: list[tuple[Attempts, str, int]] = []
        self.serials = dict.fromkeys(NAMES, 0)
        self.serial = 0
        self.counted: dict[str, int] = dict.fromkeys(NAMES, 0)
        """Incidents in a row that count against each backend: an upper bound."""
        self.deaths: dict[str, int] = dict.fromkeys(NAMES, 0)

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.circuits = Circuits(POLICY, dice(seed))
        for name in NAMES:
            self._new_worker(name)

    def _new_worker(self, name: str) -> None:
        self.serial += 1
        self.serials[name] = self.serial

    def _ask(self, attempts: Attempts) -> None:
        allowed = [name for name in NAMES if not self.circuits.quarantined(key(name), self.now)]
        closed = [name for name in NAMES if self.circuits.closed(key(name), self.now)]
        tried = [a.backend for a in attempts.attempts if a.failure is None or a.failure.kind != "Skipped"]
        try:
            name = attempts.next(self.now).backend
        except AllBackendsFailed as failed:
            assert not attempts.text
            missing = set(NAMES) - {a.backend for a in failed.attempts}
            assert not missing
            # Nobody was left out because of a pause: who was not tried is in quarantine.
            assert set(allowed) <= set(tried)
            return
        assert name in allowed
        assert name not in tried
        left = [other for other in closed if other not in tried]
        assert name in left or not left  # a paused one only where nothing better is left
        if left:
            assert name == left[0] or any(a.backend == left[0] for a in attempts.attempts)
        self.running.append((attempts, name, self.serials[name]))

    @rule(seconds=st.sampled_from([0.5, 3.0, 12.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def a_request_comes(self) -> None:
        self._ask(Attempts([candidate(n) for n in NAMES], Limits(total_s=1e9), self.circuits, now=self.now))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_makes_progress(self, data: st.DataObject) -> None:
        attempts, _, _ = data.draw(st.sampled_from(self.running))
        attempts.loaded()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_delivers_text(self, data: st.DataObject) -> None:
        attempts, _, _ = data.draw(st.sampled_from(self.running))
        attempts.delivered("x")

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_finishes(self, data: st.DataObject) -> None:
        attempts, name, _ = self._take(data)
        assert attempts.finished(self.now)[-1].backend == name
        self.counted[name] = 0
        assert self.circuits.closed(key(name), self.now) or self.circuits.quarantined(key(name), self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_is_cancelled_or_was_the_callers_mistake(self, data: st.DataObject) -> None:
        attempts, name, _ = self._take(data)
        before = self.circuits.closed(key(name), self.now)
        attempts.undecided()
        assert self.circuits.closed(key(name), self.now) >= before  # it never counts against the backend

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_fails_alone(self, data: st.DataObject) -> None:
        attempts, name, serial = self._take(data)
        self.counted[name] += 1
        self._fail(attempts, GenerationFailed("no"), serial)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), returncode=st.sampled_from([-9, -11, 3]))
    def a_worker_dies_and_with_it_all_its_requests(self, data: st.DataObject, returncode: int) -> None:
        _, name, serial = data.draw(st.sampled_from(self.running))
        victims = [entry for entry in self.running if entry[1:] == (name, serial)]
        self.running = [entry for entry in self.running if entry[1:] != (name, serial)]
        self._new_worker(name)
        self.counted[name] += 1
        self.deaths[name] += 1
        for attempts, _, _ in victims:
            self._fail(attempts, WorkerDied(returncode=returncode), serial)

    def _take(self, data: st.DataObject) -> tuple[Attempts, str, int]:
        entry = data.draw(st.sampled_from(self.running))
        self.running.remove(entry)
        return entry

    def _fail(self, attempts: Attempts, error: TarsError, serial: int) -> None:
        try:
            attempts.failed(error, self.now, incident=serial)
        except StreamInterrupted as interrupted:
            assert interrupted.partial_text == attempts.text != ""  # noqa: PT017 - one of two outcomes
            return
        assert not attempts.text  # after text nobody else goes on
        self._ask(attempts)

    @invariant()
    def a_circuit_is_open_only_after_enough_incidents(self) -> None:
        for name in NAMES:
            if self.counted[name] < POLICY.failures and self.deaths[name] <= POLICY.deaths:
                assert self.circuits.closed(key(name), self.now)

    @invariant()
    def a_quarantine_follows_only_after_too_many_deaths(self) -> None:
        for name in NAMES:
            if self.deaths[name] <= POLICY.deaths:
                assert not self.circuits.quarantined(key(name), self.now)


ManyRequests.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestManyRequests = ManyRequests.TestCase
