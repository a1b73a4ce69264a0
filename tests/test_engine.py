"""What the engine promises where nothing fails."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tars_core import EngineClosed, Finished, InferenceEngine, Message, Overloaded, RequestError, Started, TextDelta
from tars_core.testing.fake import BackendScript, Echo, Finish, Say, Seed, Wait

MakeEngine = Callable[..., InferenceEngine]


def test_generate_returns_the_text_without_white_space_around_it(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("  hello\n"), Finish())))
    assert engine.generate("hi") == "hello"


def test_a_completion_keeps_the_text_exactly_and_says_how_it_came_about(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("  hello\n"), Finish()), device="npu"))
    completion = engine.complete("hi there")
    assert completion.text == "  hello\n"
    assert (completion.backend, completion.device, completion.finish_reason) == ("alpha", "npu", "stop")
    assert completion.usage.prompt_tokens == 2
    assert [a.failure for a in completion.attempts] == [None]
    assert completion.timings.load_s is not None
    assert completion.timings.ttft_s is not None
    assert not completion.degraded


def test_a_second_request_finds_the_model_loaded(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    engine.generate("hi")
    assert engine.complete("hi").timings.load_s is None


def test_a_stream_begins_with_the_decision_and_ends_with_the_completion(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("one "), Say("two"), Finish())))
    started, *texts, finished = engine.stream("hi")
    assert isinstance(started, Started)
    assert started.decision.candidates[0].backend == "alpha"
    assert [t.text for t in texts if isinstance(t, TextDelta)] == ["one ", "two"]
    assert isinstance(finished, Finished)
    assert finished.completion.text == "one two"


def test_a_system_prompt_and_the_prompt_both_reach_a_model_without_a_template(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish())))
    assert engine.generate("hi", "be brief") == "be brief\n\nhi"


def test_a_conversation_goes_through_the_models_template(make_engine: MakeEngine) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish()), chat_template=template))
    turns: list[Message | dict[str, str]] = [
        Message(role="user", content="a"),
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert engine.chat(turns).text == "[user] a\n[assistant] b\n[user] c\n>"


def test_a_raw_prompt_skips_the_template(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish()), chat_template="never"))
    assert engine.complete("as it is", raw=True).text == "as it is"


def test_a_seed_reaches_the_backend_and_without_one_each_request_draws_its_own(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Seed(), Finish())))
    assert engine.generate("hi", seed=7) == "7"
    assert engine.generate("hi") != engine.generate("hi")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": ""}, "blank"),
        ({"prompt": " \n\t"}, "blank"),
        ({}, "no prompt and no messages"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": 3}, "must be text"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "hi", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "hi", "temperature": float("nan")}, "temperature"),
        ({"prompt": "hi", "temprature": 1}, "temprature"),
        ({"prompt": "hi", "stop": [""]}, "stop string"),
        ({"prompt": "hi", "messages": [{"role": "user", "content": "x"}]}, "either"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user"}]}, "has the keys"),
        ({"messages": [{"role": "user", "content": " "}]}, "blank"),
        ({"prompt": "hi", "raw": True, "system_prompt": "x"}, "raw"),
    ],
)
def test_a_bad_request_is_refused_before_anything_starts(
    make_engine: MakeEngine, arguments: dict[str, object], says: str
) -> None:
    engine = make_engine(alpha=BackendScript())
    with pytest.raises(RequestError, match=says):
        engine.complete(**arguments)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(RequestError, match=says):
        engine.stream(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("batched", [False, True])
def test_sixteen_threads_get_sixteen_right_answers(make_engine: MakeEngine, *, batched: bool) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish()), batched=batched))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: engine.generate(f"question {n}"), range(16)))
    assert answers == [f"question {n}" for n in range(16)]


@pytest.mark.parametrize("batched", [False, True])
def test_sixteen_tasks_get_sixteen_right_answers(make_engine: MakeEngine, *, batched: bool) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish()), batched=batched))

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(engine.agenerate(f"question {n}") for n in range(16)))

    assert asyncio.run(ask_all()) == [f"question {n}" for n in range(16)]


def test_streams_of_several_tasks_do_not_mix(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish()), batched=True))

    async def read(number: int) -> str:
        return "".join([e.text async for e in engine.astream(f"stream {number}") if isinstance(e, TextDelta)])

    async def read_all() -> list[str]:
        return await asyncio.gather(*(read(n) for n in range(8)))

    assert asyncio.run(read_all()) == [f"stream {n}" for n in range(8)]


def test_requests_beyond_the_queue_are_told_at_once(make_engine: MakeEngine) -> None:
    slow = BackendScript(generate=(Say("x"), Wait(20), Finish()), concurrency=1)
    engine = make_engine(alpha=slow, options={"max_queue": 2})
    streams = [engine.stream("hi"), engine.stream("hi")]
    for stream in streams:
        next(stream)
    with pytest.raises(Overloaded, match="max_queue is 2"):
        engine.generate("hi")
    for stream in streams:
        stream.close()


def test_leaving_a_stream_early_frees_its_place(make_engine: MakeEngine) -> None:
    script = BackendScript(generate=(Say("x"), Wait(20), Say("y"), Finish()), concurrency=1)
    engine = make_engine(alpha=script)
    for _ in range(3):
        for event in engine.stream("hi"):
            if isinstance(event, TextDelta):
                break
    assert engine.get_active_backend() == "alpha"


def test_cancelling_a_task_frees_its_place(make_engine: MakeEngine) -> None:
    script = BackendScript(generate=(Say("x"), Wait(20), Finish()), concurrency=1)
    engine = make_engine(alpha=script)

    async def give_up_twice() -> None:
        for _ in range(2):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(engine.acomplete("hi"), 1.5)

    asyncio.run(give_up_twice())


def test_the_engine_works_inside_a_running_loop(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())

    async def as_in_a_notebook() -> str:
        return engine.generate("hi")

    assert asyncio.run(as_in_a_notebook()) == "hello"


def test_a_closed_engine_says_so_and_may_be_closed_again(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    engine.generate("hi")
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.generate("hi")


def test_closing_ends_a_request_under_way(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("x"), Wait(20), Finish())))
    stream = engine.stream("hi")
    assert isinstance(next(stream), Started)
    assert isinstance(next(stream), TextDelta)
    closer = threading.Timer(0.1, engine.close)
    closer.start()
    with pytest.raises(EngineClosed):
        next(stream)
    closer.join()


def test_closing_leaves_no_thread_behind(make_engine: MakeEngine) -> None:
    before = set(threading.enumerate())
    engine = make_engine(alpha=BackendScript())
    engine.generate("hi")
    engine.close()
    left = [t for t in set(threading.enumerate()) - before if not t.name.startswith("waitpid")]
    assert left == []


def test_the_active_backend_is_the_first_in_rank_until_one_has_answered(make_engine: MakeEngine) -> None:
    failing = BackendScript(available=False, reason="not today")
    engine = make_engine(alpha=failing, beta=BackendScript(), gamma=BackendScript())
    assert engine.list_available_backends() == ["beta", "gamma"]
    assert engine.get_active_backend() == "beta"


def test_a_benchmark_gives_seconds_or_none(make_engine: MakeEngine) -> None:
    broken = BackendScript(available=False, reason="not today")
    seconds = make_engine(alpha=BackendScript(), beta=broken).benchmark()
    assert seconds["alpha"] is not None
    assert 0 < seconds["alpha"] < 10
    assert seconds["beta"] is None


def test_an_object_that_is_no_entry_point_runs_in_this_process(write_script: Callable[..., str]) -> None:
    from tars_core.testing.fake import FakeBackend  # noqa: PLC0415

    model = write_script(here=BackendScript(generate=(Echo(), Finish())))
    with InferenceEngine(
        model=model, backend="here", plugins="alpha", extra_plugins={"here": FakeBackend("here")}
    ) as engine:
        assert engine.generate("hi") == "hi"


def test_isolation_can_be_turned_off(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Echo(), Finish())), options={"isolation": "none"})
    assert engine.generate("hi") == "hi"


_AFTER_FORK = """
import os, sys
from tars_core import InferenceEngine
engine = InferenceEngine(model=sys.argv[1], plugins="alpha")
assert engine.generate("one") == "one"
if os.fork() == 0:
    ok = engine.generate("two") == "two"
    engine.close()
    os._exit(0 if ok else 1)
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 0
print(engine.generate("three"))
"""


def test_a_forked_child_starts_anew_and_the_parent_goes_on(write_script: Callable[..., str]) -> None:
    model = write_script(alpha=BackendScript(generate=(Echo(), Finish())))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _AFTER_FORK, model],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "three\n"), done.stderr


def test_a_program_may_end_without_closing_its_engine(write_script: Callable[..., str]) -> None:
    code = (
        "import sys; from tars_core import InferenceEngine;"
        "print(InferenceEngine(model=sys.argv[1], plugins='alpha').generate('x'))"
    )
    model = write_script(alpha=BackendScript())
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_a_shorter_context_than_was_asked_for_is_told(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    make_engine(options={"context_length": 10**9}, alpha=BackendScript()).generate("hi")
    assert "alpha has a context of" in caplog.text


def test_who_asked_for_a_gpu_is_told_that_the_model_runs_on_the_cpu(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    make_engine(options={"device": "gpu"}, alpha=BackendScript(device="cuda0"), beta=BackendScript()).generate("hi")
    assert "CPU" not in caplog.text
    make_engine(options={"device": "gpu"}, alpha=BackendScript()).generate("hi")
    assert "alpha runs on the CPU, not on a GPU" in caplog.text
