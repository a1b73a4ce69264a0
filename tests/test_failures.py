"""What can go wrong with a backend, and what must happen then. Numbers are rows of the fault list."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tars_core import (
    AllBackendsFailed,
    BackendUnavailable,
    ContextLengthExceeded,
    Finished,
    InferenceEngine,
    RequestError,
    StreamInterrupted,
    TextDelta,
    WorkerDied,
)
from tars_core.testing.fake import (
    BackendScript,
    Complain,
    Echo,
    Exit,
    Finish,
    Fork,
    Kill,
    Overflow,
    Print,
    Raise,
    ReadPrompt,
    Say,
    Wait,
    YieldJunk,
)
from tars_core.testing.processes import alive, workers
from tars_core.testing.watching import until

MakeEngine = Callable[..., InferenceEngine]
ANSWERS = BackendScript(generate=(Say("from beta"), Finish()))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("death", [Kill("SIGSEGV"), Kill("SIGKILL"), Kill("SIGABRT"), Exit(3)])
def test_1_2_a_worker_that_dies_before_text_hands_over(
    make_engine: MakeEngine, death: Kill | Exit, *, batched: bool
) -> None:
    engine = make_engine(
        alpha=BackendScript(generate=(Complain("stack smashed\n"), death), batched=batched), beta=ANSWERS
    )
    completion = engine.complete("hi")
    assert (completion.text, completion.backend) == ("from beta", "beta")
    failure = completion.attempts[0].failure
    assert failure is not None
    assert failure.kind == "WorkerDied"
    assert (death.signal if isinstance(death, Kill) else "exit code 3") in failure.message
    assert "stack smashed" in failure.message


@pytest.mark.parametrize("signal_name", ["SIGSEGV", "SIGKILL"])
def test_1_2_a_worker_that_dies_mid_answer_gives_the_partial_text_and_the_next_call_works(
    make_engine: MakeEngine, tmp_path: Path, signal_name: str
) -> None:
    script = BackendScript(generate=(Say("so "), Say("far"), Kill(signal_name, once=str(tmp_path / "died")), Finish()))
    engine = make_engine(alpha=script, beta=ANSWERS)
    with pytest.raises(StreamInterrupted) as caught:
        engine.generate("hi")
    assert caught.value.partial_text == "so far"
    assert isinstance(caught.value.cause, WorkerDied)
    assert caught.value.cause.signal_name == signal_name
    assert engine.generate("hi") == "so far"


def test_2_a_worker_that_keeps_dying_is_put_in_quarantine(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Kill(),)))
    messages = []
    for _ in range(8):
        with pytest.raises(AllBackendsFailed) as caught:
            engine.generate("hi")
        messages.append(str(caught.value))
    assert "SIGKILL" in messages[0]
    assert "quarantine" in messages[-1]
    assert sum("SIGKILL" in message for message in messages) == 6


def test_3_out_of_memory_on_load_hands_over(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(load=(Raise("OutOfMemory", "5.1 GiB do not fit"),)), beta=ANSWERS)
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    assert completion.attempts[0].failure is not None
    assert completion.attempts[0].failure.message == "5.1 GiB do not fit"


def test_4_a_load_that_hangs_is_ended_and_hands_over(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(load=(Wait(60, deaf=True),)), beta=ANSWERS, limits={"load_s": 1.0})
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    assert completion.attempts[0].stage == "load"
    assert "no progress within 1 s (load)" in (completion.attempts[0].failure or pytest.fail("no failure")).message


@pytest.mark.parametrize("hang", [Wait(60, deaf=True), Kill("SIGSTOP")])
def test_5_a_hang_in_the_prompt_is_ended_and_hands_over(make_engine: MakeEngine, hang: Wait | Kill) -> None:
    script = BackendScript(generate=(ReadPrompt(1), hang, Say("too late"), Finish()))
    engine = make_engine(alpha=script, beta=ANSWERS, limits={"first_token_s": 1.0})
    completion = engine.complete("hi")
    assert completion.text == "from beta"
    assert completion.attempts[0].stage == "prompt"


def test_5_progress_while_the_prompt_is_read_counts_as_a_sign_of_life(make_engine: MakeEngine) -> None:
    reading = [act for n in range(6) for act in (ReadPrompt(n), Wait(0.5))]
    engine = make_engine(alpha=BackendScript(generate=(*reading, Say("read"), Finish())), limits={"first_token_s": 1.5})
    assert engine.generate("hi") == "read"


def test_6_a_hang_mid_stream_is_interrupted_with_the_partial_text(make_engine: MakeEngine) -> None:
    script = BackendScript(generate=(Say("so far"), Wait(60, deaf=True), Finish()))
    engine = make_engine(alpha=script, beta=ANSWERS, limits={"between_tokens_s": 1.0})
    with pytest.raises(StreamInterrupted, match="between tokens") as caught:
        engine.generate("hi")
    assert caught.value.partial_text == "so far"


def test_the_whole_time_covers_all_attempts(make_engine: MakeEngine) -> None:
    slow = BackendScript(generate=(Wait(60), Finish()))
    engine = make_engine(alpha=slow, beta=slow, gamma=slow, limits={"total_s": 2.5, "first_token_s": 1.5})
    began = time.monotonic()
    with pytest.raises(AllBackendsFailed) as caught:
        engine.generate("hi")
    assert time.monotonic() - began < 6
    assert [a.backend for a in caught.value.attempts] == ["alpha", "beta"]


def test_22_a_prompt_that_is_too_long_is_the_callers_mistake_and_does_not_hand_over(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Overflow(600),)), beta=ANSWERS)
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.generate("hi")
    assert (caught.value.prompt_tokens, caught.value.context_length) == (600, 512)


def test_22_an_overflow_of_a_context_that_memory_shrank_hands_over(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Overflow(600),), context_shrunk=True), beta=ANSWERS)
    assert engine.complete("hi").backend == "beta"


def test_a_request_error_of_a_backend_does_not_hand_over(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Raise("RequestError", "no such voice"),)), beta=ANSWERS)
    with pytest.raises(RequestError, match="no such voice"):
        engine.generate("hi")


def test_30_what_native_code_prints_stays_out_of_the_frames_and_off_stdout(
    make_engine: MakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    script = BackendScript(
        load=(Print("loading...\n" * 50),), generate=(Print("\x00\xff junk\n"), Say("clean"), Finish())
    )
    assert make_engine(alpha=script).generate("hi") == "clean"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("acts", "rule"),
    [
        ((YieldJunk(), Finish()), "not 'junk' (str)"),
        ((Say(""), Finish()), "must not be empty"),
        ((Raise("KeyboardInterrupt"),), "raised KeyboardInterrupt"),
        ((Raise("SystemExit"),), "raised SystemExit"),
    ],
)
def test_33_a_plugin_that_breaks_a_rule_is_named_with_the_rule(
    make_engine: MakeEngine, acts: tuple[object, ...], rule: str, *, batched: bool
) -> None:
    engine = make_engine(alpha=BackendScript(generate=acts, batched=batched))  # type: ignore[arg-type]
    with pytest.raises(AllBackendsFailed) as caught:
        engine.generate("hi")
    assert rule in str(caught.value)
    assert "alpha" in str(caught.value)


@pytest.mark.parametrize("acts", [(), (Say("x"),)])
def test_33_an_answer_without_finished_is_a_broken_rule_and_never_a_stop(
    make_engine: MakeEngine, acts: tuple[Say, ...]
) -> None:
    engine = make_engine(alpha=BackendScript(generate=acts))
    with pytest.raises((AllBackendsFailed, StreamInterrupted), match="without Finished"):
        engine.generate("hi")


def test_33_an_event_after_finished_is_a_broken_rule(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Finish(), Say("more"))), beta=ANSWERS)
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    assert "after Finished" in (completion.attempts[0].failure or pytest.fail("no failure")).message


def test_33_a_generate_that_returns_no_iterator_is_a_broken_rule(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(returns="7"), beta=ANSWERS)
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    assert "iterator" in (completion.attempts[0].failure or pytest.fail("no failure")).message


def test_33_one_request_that_breaks_a_rule_leaves_the_others_alone(make_engine: MakeEngine) -> None:
    script = BackendScript(generate=(Echo(), Finish()), batched=True)
    engine = make_engine(alpha=script)
    slow = engine.stream("a long one")
    next(slow)
    assert engine.generate("short") == "short"
    assert "".join(e.text for e in slow if isinstance(e, TextDelta)) == "a long one"


_ORPHANS = """
import sys, time
from tars_core import InferenceEngine, TextDelta
for event in InferenceEngine(model=sys.argv[1], plugins="alpha").stream("hi"):
    if isinstance(event, TextDelta):
        print("streaming", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("forked", [False, True])
def test_34_workers_end_within_a_second_of_the_hosts_death(write_script: Callable[..., str], *, forked: bool) -> None:
    acts = (Fork(5), Say("x"), Wait(60, deaf=True), Finish()) if forked else (Say("x"), Wait(60, deaf=True), Finish())
    model = write_script(alpha=BackendScript(generate=acts))
    with subprocess.Popen([sys.executable, "-c", _ORPHANS, model], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "streaming\n"
        (worker,) = workers(host.pid)
        assert alive(worker)
        host.kill()
    died = time.monotonic()
    until(lambda: not alive(worker))
    assert time.monotonic() - died < 5, "within a second, if the machine is not busy"


def test_36_when_all_fail_one_error_carries_every_cause_and_hint(make_engine: MakeEngine) -> None:
    engine = make_engine(
        alpha=BackendScript(generate=(Kill("SIGSEGV"),)),
        beta=BackendScript(load=(Raise("RuntimeError", "no such symbol"),)),
        gamma=BackendScript(generate=(YieldJunk(),)),
    )
    with pytest.raises(AllBackendsFailed) as caught:
        engine.generate("hi")
    assert [a.backend for a in caught.value.attempts] == ["alpha", "beta", "gamma"]
    for part in ("SIGSEGV", "no such symbol", "not 'junk' (str)", "report it to the authors of gamma"):
        assert part in str(caught.value)


def test_where_nothing_can_run_the_error_gives_each_reason_and_a_mend(make_engine: MakeEngine) -> None:
    off = BackendScript(available=False, reason="its daemon is off", hint="start it")
    heavy = BackendScript(memory_bytes=2**50)
    with pytest.raises(BackendUnavailable) as caught:
        make_engine(alpha=off, beta=heavy).generate("hi")
    assert caught.value.reasons["alpha"] == "its daemon is off"
    assert "GiB" in caught.value.reasons["beta"]
    assert caught.value.hint == "start it"


def test_a_probe_that_hangs_is_put_aside_and_the_others_answer(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(probe=(Wait(60, deaf=True),)), beta=ANSWERS, limits={"probe_s": 0.5})
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    aside = {r.backend: r.reason for r in completion.decision.rejected}
    assert "no answer within 0.5 s" in aside["alpha"]


def test_a_probe_that_raises_is_put_aside_and_the_others_answer(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(probe=(Raise("RuntimeError", "oops"),)), beta=ANSWERS)
    assert engine.complete("hi").backend == "beta"


def test_an_answer_from_other_weights_is_marked(make_engine: MakeEngine) -> None:
    engine = make_engine(
        alpha=BackendScript(weights_id="a", generate=(Kill(),)),
        beta=BackendScript(weights_id="b", generate=(Say("x"), Finish())),
        gamma=BackendScript(weights_id="a", generate=(Kill(),)),
    )
    events = list(engine.stream("hi"))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.completion.degraded


@pytest.mark.parametrize("first", ["missing", "broken"])
def test_an_answer_in_place_of_an_aliass_first_model_is_marked_and_says_why(
    write_script: Callable[..., str], tmp_path: Path, first: str
) -> None:
    broken = write_script(alpha=BackendScript(available=False, reason="it is cut short"))
    refs = [{"missing": str(tmp_path / "absent.gguf"), "broken": broken}[first], write_script(alpha=BackendScript())]
    with InferenceEngine(models={"mine": refs}, model="mine", plugins="alpha") as engine:
        completion = engine.complete("hi")
    assert completion.degraded
    assert refs[0].removeprefix("fake:") in (completion.decision.notice or "")
    assert {"missing": "there is no file", "broken": "it is cut short"}[first] in (completion.decision.notice or "")


def test_a_backend_that_ignores_a_cancel_is_ended_and_the_next_request_works(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars_core.worker.host._CANCEL_GRACE_S", 0.5)
    engine = make_engine(alpha=BackendScript(generate=(Say("x"), Wait(30, deaf=True), Finish()), concurrency=1))
    for _ in range(2):
        for event in engine.stream("hi"):
            if isinstance(event, TextDelta):
                break


_REPEATED_FAILURES = """
import os, sys, threading
from tars_core import InferenceEngine
from tars_core.testing.processes import workers

def fail():
    with InferenceEngine(model=sys.argv[1], plugins="alpha,beta", prefer=("alpha", "beta")) as engine:
        assert engine.complete("hi").backend == "beta"
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(workers(os.getpid()))

print(fail() == fail() == fail())
"""


def test_nothing_is_left_behind_after_failures(write_script: Callable[..., str]) -> None:
    """In a program of its own: what other tests leave behind for a moment is not counted."""
    model = write_script(alpha=BackendScript(generate=(Kill(),)), beta=ANSWERS)
    done = subprocess.run(
        [sys.executable, "-c", _REPEATED_FAILURES, model], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
