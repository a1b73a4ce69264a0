"""What a request needs and what a backend can do; the contracts of batched models, of embeddings and of tokens."""

from __future__ import annotations

import asyncio
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from tars_core import (
    AllBackendsFailed,
    ContractError,
    Embeddings,
    Finished,
    Image,
    InferenceEngine,
    Message,
    ProbeReport,
    ReasoningDelta,
    RequestError,
    SamplingParams,
    Started,
    StreamEvent,
    StreamInterrupted,
    Text,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    EmbedRequest,
    GenerateRequest,
    LoadedModel,
    LoadOptions,
    hookimpl,
)
from tars_core.plugin import Finished as BackendFinished
from tars_core.testing.fake import BackendScript, Echo, Finish, Mark, Raise, Say, Wait
from tars_core.testing.watching import until
from tars_core.types.features import FEATURES
from tars_core.types.observed import CircuitChanged, LoadEnded, Observed

MakeEngine = Callable[..., InferenceEngine]
WriteScript = Callable[..., str]
ALL = tuple(sorted(FEATURES.keys() - {"tokenize", "renders_chat", "embeddings", "rerank"}))
"""Everything that a scripted backend may claim."""


def observed(engine: InferenceEngine) -> list[Observed]:
    events: list[Observed] = []
    engine.observe(events.append)
    return events


def without(feature: str, *, guessed: bool = True, **script: Any) -> BackendScript:  # noqa: ANN401 - of any field
    """Return a backend that can do everything but one thing, and says so before it is loaded, or only then."""
    features = tuple(f for f in ALL if f != feature)
    return BackendScript(features=features, guessed_features=features if guessed else ALL, **script)


def able(**script: Any) -> BackendScript:  # noqa: ANN401 - of any field
    return BackendScript(features=ALL, guessed_features=ALL, **script)


# ---- what a request needs ------------------------------------------------------------------------

CALL = ToolCall(id="1", name="clock", arguments="{}")
ASKED = Message(role="user", content="What time is it?")
NEEDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "a prompt": ("chat", {"prompt": "hi"}),
    "messages": ("chat", {"messages": [ASKED]}),
    "a raw prompt": ("raw", {"prompt": "hi", "raw": True}),
    "a seed": ("seed", {"prompt": "hi", "seed": 0}),
    "an answer begun": ("continue", {"messages": [ASKED, {"role": "assistant", "content": "It is"}]}),
    "a tool's answer": (
        "tools",
        {
            "messages": [
                ASKED,
                Message(role="assistant", content="", tool_calls=(CALL,)),
                Message(role="tool", content="noon", tool_call_id="1"),
            ]
        },
    ),
    "a tool's answer as a dictionary": (
        "tools",
        {
            "messages": [
                {"role": "user", "content": "What time is it?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "noon", "tool_call_id": "1"},
            ]
        },
    ),
    "a picture beside text": (
        "images",
        {
            "messages": [
                Message(role="user", content=(Text(text="What is it?"), Image(data=b"P", media_type="image/png")))
            ]
        },
    ),
    "a picture alone": (
        "images",
        {"messages": [Message(role="user", content=(Image(data=b"P", media_type="image/png"),))]},
    ),
}


@pytest.mark.parametrize(("feature", "request_"), NEEDS.values(), ids=NEEDS)
def test_a_request_that_needs_a_feature_goes_to_who_declares_it(
    make_engine: MakeEngine, feature: str, request_: Mapping[str, Any]
) -> None:
    engine = make_engine(alpha=without(feature), beta=able())
    events = observed(engine)
    completion = engine.complete(**request_)
    assert completion.backend == "beta"
    assert [candidate.backend for candidate in completion.decision.candidates] == ["beta"]
    (rejection,) = (r for r in completion.decision.rejected if r.backend == "alpha")
    assert feature in rejection.reason
    assert [attempt.backend for attempt in completion.attempts] == ["beta"]
    started, *_ = engine.stream(**request_)
    assert isinstance(started, Started)
    assert started.decision == completion.decision
    engine.close()
    assert [event.backend for event in events if isinstance(event, LoadEnded)] == ["beta"]


@pytest.mark.parametrize(("feature", "request_"), NEEDS.values(), ids=NEEDS)
def test_a_request_that_nobody_can_answer_is_refused_with_each_backends_reason_and_loads_nothing(
    make_engine: MakeEngine, feature: str, request_: Mapping[str, Any]
) -> None:
    engine = make_engine(alpha=without(feature), beta=without(feature))
    with pytest.raises(RequestError) as refused:
        engine.complete(**request_)
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["alpha", "beta"]
    assert all(feature in line for line in lines[1:3])
    with pytest.raises(RequestError, match=feature):
        asyncio.run(engine.acomplete(**request_))
    assert engine.loaded() == ()


def test_a_reason_names_all_that_is_missing(make_engine: MakeEngine) -> None:
    plain = BackendScript(features=("chat",), guessed_features=("chat",))
    engine = make_engine(alpha=plain)
    with pytest.raises(RequestError, match=r"features continue, seed\b"):
        engine.complete(messages=[ASKED, Message(role="assistant", content="It is")], seed=1)
    assert engine.generate("hi") == "hello"


def test_without_a_need_the_order_is_as_ever(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=without("seed"), beta=able())
    assert engine.complete("hi").backend == "alpha"
    assert engine.complete("hi", seed=1).backend == "beta"
    assert engine.complete("hi").backend == "alpha"


# ---- a guess, and a fact -------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [ALL, None])
def test_a_model_that_lacks_what_was_guessed_is_passed_over_and_not_paused(
    make_engine: MakeEngine, guess: tuple[str, ...] | None
) -> None:
    plain = BackendScript(features=("chat", "raw"), guessed_features=guess)
    engine = make_engine(alpha=plain, beta=able())
    events = observed(engine)
    first = engine.complete("hi", seed=1)
    assert [(a.backend, a.failure and a.failure.kind) for a in first.attempts] == [
        ("alpha", "BackendUnavailable"),
        ("beta", None),
    ]
    assert first.attempts[0].failure is not None
    assert "seed" in first.attempts[0].failure.message
    for _ in range(5):
        later = engine.complete("hi", seed=1)
        assert [attempt.backend for attempt in later.attempts] == ["beta"], "what it lacks is known by now"
        assert "seed" in next(r.reason for r in later.decision.rejected if r.backend == "alpha")
    assert engine.complete("hi").backend == "alpha"
    engine.close()
    assert not any(isinstance(event, CircuitChanged) for event in events)


def test_a_model_that_can_more_than_was_guessed_is_used_once_that_is_known(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(features=ALL, guessed_features=("chat",)), beta=able())
    assert engine.complete("hi", seed=1).backend == "beta"
    engine.load()
    assert engine.complete("hi", seed=1).backend == "alpha"


def test_what_was_known_of_a_model_is_a_guess_again_when_it_is_unloaded(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(features=ALL, guessed_features=("chat",)), beta=able())
    engine.load()
    engine.unload()
    assert engine.complete("hi", seed=1).backend == "beta"


def test_where_every_fact_falls_short_the_request_is_refused_with_each_reason(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=without("seed", guessed=False), beta=without("seed", guessed=False))
    for _ in range(4):
        with pytest.raises(RequestError, match=r"(?s)alpha: .*seed.*beta: .*seed"):
            engine.complete("hi", seed=1)
    assert engine.complete("hi").backend == "alpha"


def test_features_are_shown_before_and_after_loading(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(features=("chat", "raw"), guessed_features=("chat", "seed")))
    (candidate,) = engine.plan().candidates
    assert candidate.report.features == frozenset({"chat", "seed"})
    assert engine.load().features == ("chat", "raw")
    assert engine.loaded()[0].features == ("chat", "raw")


# ---- a plugin that does what a test tells it -----------------------------------------------------


class Actor:
    """A plugin in this process. ``model`` is what it loads; each of its hooks can be replaced."""

    def __init__(
        self,
        model: Callable[[LoadOptions], LoadedModel],
        *,
        answer: Callable[[GenerateRequest], Iterator[BackendEvent]] | None = None,
        embed: Callable[[EmbedRequest], object] | None = None,
        features: frozenset[str] | None = None,
    ) -> None:
        self._model = model
        self._answer = answer
        self._embed = embed
        self._features = features
        self.tasks: list[str] = []

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True, features=self._features)

    @hookimpl
    def tars_load(self, options: LoadOptions) -> LoadedModel:
        self.tasks.append(options.task)
        return self._model(options)

    @hookimpl
    def tars_generate(self, request: GenerateRequest) -> Iterator[BackendEvent]:
        assert self._answer is not None
        return self._answer(request)

    @hookimpl
    def tars_embed(self, request: EmbedRequest) -> object:
        return self._embed(request) if self._embed else None


def engine_of(actor: object, **settings: object) -> InferenceEngine:
    return InferenceEngine(settings, model="any:thing", plugins="actor", extra_plugins={"actor": actor})


def plain_model(*features: str, **facts: Any) -> Callable[[LoadOptions], LoadedModel]:  # noqa: ANN401 - of any field
    fields = {"device": "cpu", "context_length": 512, "features": BASIC_FEATURES | set(features), **facts}
    return lambda _options: LoadedModel(**fields)


def finished(tokens: int = 1) -> BackendFinished:
    return BackendFinished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=tokens))


def test_backends_show_their_features_and_where_they_differ() -> None:
    class Candid:
        @hookimpl
        def tars_probe(self) -> ProbeReport:
            return ProbeReport(
                available=True, features=frozenset({"seed", "chat"}), deviations=("rounds the temperature",)
            )

        @hookimpl
        def tars_load(self) -> LoadedModel:
            raise AssertionError("nobody loads")

        @hookimpl
        def tars_generate(self) -> Iterator[BackendEvent]:
            raise AssertionError("nobody asks")

    with engine_of(Candid()) as engine:
        (status,) = (status for status in engine.backends() if status.name == "actor")
        assert (status.features, status.deviations) == (("chat", "seed"), ("rounds the temperature",))
        assert engine.plan().candidates[0].report.features == frozenset({"seed", "chat"})


# ---- backends that tell thoughts and calls from the text themselves -----------------------------


def think_and_call(_: GenerateRequest) -> Iterator[BackendEvent]:
    yield ReasoningDelta(text="They ask ", token_ids=(1, 2))
    yield ReasoningDelta(text="for the time.", token_ids=(3,))
    yield TextDelta(text="Let me ")
    yield ToolCallDelta(index=0, id="call-0", name="clock")
    yield ToolCallDelta(index=1, id="call-1", name="weather", arguments='{"city": ')
    yield ToolCallDelta(index=0, arguments="{}")
    yield TextDelta(text="look.")
    yield ToolCallDelta(index=1, arguments='"Lima"}')
    usage = Usage(prompt_tokens=1, completion_tokens=9, reasoning_tokens=3)
    yield BackendFinished(finish_reason="tool_calls", usage=usage)


def test_thoughts_and_calls_reach_stream_and_completion_and_are_no_part_of_the_text() -> None:
    with engine_of(Actor(plain_model("parses"), answer=think_and_call)) as engine:
        started, *deltas, end = engine.stream("What time is it?")
        assert isinstance(started, Started)
        assert deltas == list(think_and_call(GenerateRequest(sampling=SamplingParams())))[:-1]
        assert isinstance(end, Finished)
        for completion in (end.completion, engine.complete("What time is it?")):
            assert completion.text == "Let me look."
            assert completion.reasoning == "They ask for the time."
            assert completion.tool_calls == (
                ToolCall(id="call-0", name="clock", arguments="{}"),
                ToolCall(id="call-1", name="weather", arguments='{"city": "Lima"}'),
            )
            assert completion.finish_reason == "tool_calls"
            assert completion.usage.reasoning_tokens == 3
        assert engine.generate("What time is it?") == "Let me look."


def test_thoughts_and_calls_reach_an_async_stream() -> None:
    async def read(engine: InferenceEngine) -> list[StreamEvent]:
        return [event async for event in engine.astream("What time is it?")]

    with engine_of(Actor(plain_model("parses"), answer=think_and_call)) as engine:
        events = asyncio.run(read(engine))
    assert [type(event).__name__ for event in events] == [
        "Started",
        "ReasoningDelta",
        "ReasoningDelta",
        "TextDelta",
        "ToolCallDelta",
        "ToolCallDelta",
        "ToolCallDelta",
        "TextDelta",
        "ToolCallDelta",
        "Finished",
    ]


@pytest.mark.parametrize(
    "said", [ReasoningDelta(text="Hm."), ToolCallDelta(index=0, id="c", name="clock", arguments='{"zone": ')]
)
def test_nobody_takes_over_when_thoughts_or_calls_are_out(said: BackendEvent) -> None:
    """A reader who gets the next one's calls behind the first one's has arguments that are no JSON."""

    def fail(_: GenerateRequest) -> Iterator[BackendEvent]:
        yield said
        raise ValueError("torn")

    actors = {
        name: Actor(plain_model("parses"), answer=answer)
        for name, answer in (("first", fail), ("second", think_and_call))
    }
    seen: list[StreamEvent] = []
    with InferenceEngine(
        model="any:thing", plugins="first,second", prefer=("first", "second"), extra_plugins=actors
    ) as engine:
        with pytest.raises(StreamInterrupted, match="torn") as interrupted:
            seen.extend(engine.stream("What time is it?"))
        assert interrupted.value.partial_text == ""
    assert seen[1:] == [said]


def test_an_answer_may_be_a_call_and_nothing_else() -> None:
    def only_call(_: GenerateRequest) -> Iterator[BackendEvent]:
        yield ToolCallDelta(index=0, id="c", name="clock", arguments="{}")
        yield BackendFinished(finish_reason="tool_calls", usage=Usage(prompt_tokens=1, completion_tokens=4))

    with engine_of(Actor(plain_model("parses"), answer=only_call)) as engine:
        completion = engine.complete("What time is it?")
        assert (completion.text, completion.tool_calls) == ("", (ToolCall(id="c", name="clock", arguments="{}"),))
        assert completion.timings.ttft_s is not None
        assert engine.generate("What time is it?") == ""


@pytest.mark.parametrize(
    "event",
    [ReasoningDelta(text=""), TextDelta(text=""), ToolCallDelta(index=cast("int", "0"))],
    ids=["thought", "text", "call"],
)
def test_an_event_that_breaks_a_rule_is_named(event: BackendEvent) -> None:
    def answer(_: GenerateRequest) -> Iterator[BackendEvent]:
        yield event
        yield finished()

    with engine_of(Actor(plain_model("parses"), answer=answer)) as engine:
        with pytest.raises(AllBackendsFailed, match=type(event).__name__) as failed:
            engine.generate("hi")
        assert failed.value.attempts[0].failure is not None
        assert failed.value.attempts[0].failure.kind == "ContractError"


# ---- batched models ------------------------------------------------------------------------------


class Batch(LoadedModel):
    """Says the words of its prompt, one a step. ``prepared`` is called where a prompt is prepared."""

    def __init__(self, prepared: Callable[[str], object] = lambda _: None, **facts: Any) -> None:  # noqa: ANN401
        super().__init__(**{"device": "cpu", "context_length": 512, "concurrency": 4, **facts})
        self._prepared = prepared
        self._running: dict[int, list[str]] = {}
        self.calls: list[tuple[str, int, object]] = []

    def _note(self, call: str, about: object) -> None:
        self.calls.append((call, threading.get_ident(), about))

    def prepare(self, request: GenerateRequest) -> tuple[str, ...]:
        self._note("prepare", request)
        self._prepared(request.prompt)
        return tuple(request.prompt.split())

    def submit(self, request_id: int, prepared: tuple[str, ...]) -> None:
        self._note("submit", prepared)
        if "unsubmittable" in prepared:
            raise ValueError("no submitting")
        self._running[request_id] = list(prepared)

    def step(self) -> Sequence[tuple[int, BackendEvent | Exception]]:
        self._note("step", None)
        brought: list[tuple[int, BackendEvent | Exception]] = []
        for request_id, words in list(self._running.items()):
            if not words:
                brought.append((request_id, finished()))
                del self._running[request_id]
                continue
            word = words.pop(0)
            if word == "trip":
                raise ValueError("tripped")
            if word == "alone":
                brought.append((request_id, ValueError("on my own")))
                del self._running[request_id]
            elif word == "rest":
                words.insert(0, word)
                time.sleep(0.005)
            else:
                brought.append((request_id, TextDelta(text=f"{word} ")))
        return brought

    def cancel(self, request_id: int) -> None:
        self._note("cancel", request_id)
        if request_id in self._running:
            self._running[request_id] = []  # its end comes with the next step


def batch_engine(batch: LoadedModel, **settings: object) -> InferenceEngine:
    return engine_of(Actor(lambda _options: batch), **settings)


def test_what_prepare_returns_is_what_submit_gets_and_the_loop_is_one_thread() -> None:
    batch = Batch(chat_template="{% for m in messages %}[{{ m.content }}] {% endfor %}")
    with batch_engine(batch) as engine, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(engine.generate, ("one two", "three", "four five six", "seven")))
    assert answers == ["[one two]", "[three]", "[four five six]", "[seven]"]
    threads = {name: {thread for call, thread, _ in batch.calls if call == name} for name in ("prepare", "submit")}
    loop = {thread for call, thread, _ in batch.calls if call != "prepare"}
    assert len(loop) == 1
    assert not threads["prepare"] & loop
    requests = [about for call, _, about in batch.calls if call == "prepare" and isinstance(about, GenerateRequest)]
    assert {request.prompt.strip() for request in requests} == set(answers)
    assert all(request.sampling.seed is not None and not request.messages for request in requests)
    assert {about for call, _, about in batch.calls if call == "submit"} == {tuple(a.split()) for a in answers}


def test_a_prompt_that_is_prepared_for_long_delays_no_other_answer() -> None:
    gate, preparing = threading.Event(), threading.Event()

    def prepared(prompt: str) -> None:
        if "slow" in prompt:
            preparing.set()
            gate.wait(30)

    with batch_engine(Batch(prepared)) as engine, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engine.generate, "slow one")
        assert preparing.wait(30)
        for _ in range(10):
            assert engine.generate("quick one") == "quick one"
        assert not slow.done()
        gate.set()
        assert slow.result(30) == "slow one"


def gaps_beside(engine: InferenceEngine, other: Callable[[], object]) -> float:
    """Read a long stream; return the largest gap between its pieces while ``other`` ran beside it."""
    moments: list[float] = []
    with ThreadPoolExecutor(1) as pool, engine.stream("quick") as stream:
        beside = None
        for event in stream:
            if isinstance(event, TextDelta):
                moments.append(time.monotonic())
                if beside is None and len(moments) == 20:
                    beside = pool.submit(other)
                elif beside is not None and beside.done():
                    beside.result()
                    break
        assert beside is not None
        assert beside.done(), "the stream was too short"
    return max(after - before for before, after in itertools.pairwise(moments))


LONG_ANSWER = tuple(act for _ in range(3000) for act in (Say("a"), Wait(0.005)))


def test_a_prompt_that_is_prepared_for_two_seconds_leaves_no_gap_in_a_running_stream(make_engine: MakeEngine) -> None:
    """In a process of its own, where the loop and the preparing share the interpreter."""
    script = BackendScript(prepare=(Wait(2, deaf=True),), generate=(*LONG_ANSWER, Finish()), batched=True)
    engine = make_engine(alpha=script)

    def give_up_when_prepared() -> None:
        with engine.stream("quick") as stream:
            assert isinstance(next(stream), Started)
            assert isinstance(next(stream), TextDelta)

    assert gaps_beside(engine, give_up_when_prepared) < 1


SLOW_TEMPLATE = (
    "{% if messages[0].content == 'slow' %}{% for i in range(80000) %}{% for j in range(1000) %}{% endfor %}"
    "{% endfor %}{% endif %}{{ messages[0].content }}"
)


def test_a_template_that_takes_long_leaves_no_gap_in_a_running_stream(make_engine: MakeEngine) -> None:
    script = BackendScript(chat_template=SLOW_TEMPLATE, generate=(*LONG_ANSWER, Finish()), batched=True)
    engine = make_engine(alpha=script)
    rendering_s = 0.0

    def ask_slowly() -> None:
        nonlocal rendering_s
        began = time.monotonic()
        with engine.stream("slow") as stream:
            assert isinstance(next(stream), Started)
            assert isinstance(next(stream), TextDelta)
        rendering_s = time.monotonic() - began

    gap = gaps_beside(engine, ask_slowly)
    assert gap < rendering_s / 2, f"{gap:.2f} s beside a template that takes {rendering_s:.2f} s"


def test_a_request_that_is_cancelled_while_it_is_prepared_frees_its_place() -> None:
    gate, preparing = threading.Event(), threading.Event()

    def prepared(prompt: str) -> None:
        if "slow" in prompt:
            preparing.set()
            gate.wait(60)

    batch = Batch(prepared, concurrency=1)
    with batch_engine(batch) as engine:
        with engine.stream("slow") as stream:
            assert isinstance(next(stream), Started)
            assert preparing.wait(30)
        assert engine.generate("quick one") == "quick one"
        gate.set()
        assert engine.generate("quick two") == "quick two"
    assert [about for call, _, about in batch.calls if call == "submit"] == [("quick", "one"), ("quick", "two")]


def test_a_process_also_frees_the_place_of_who_gives_up_while_being_prepared(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    """The second waits for its own second of preparing, and not for the first's minute."""
    preparing = tmp_path / "preparing"
    script = BackendScript(prepare=(Mark(str(preparing)), Wait(1, deaf=True)), batched=True, concurrency=1)
    engine = make_engine(alpha=script)
    for _ in range(2):
        preparing.unlink(missing_ok=True)
        with engine.stream("hi") as stream:
            assert isinstance(next(stream), Started)
            until(preparing.exists, "it is not prepared")
    assert engine.generate("hi") == "hello"


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RequestError("not in this form"), None),
        (ValueError("torn"), "GenerationFailed"),
        (SystemExit(3), "ContractError"),
    ],
    ids=repr,
)
def test_a_prepare_that_raises_fails_only_its_own_request(raised: BaseException, kind: str | None) -> None:
    def prepared(prompt: str) -> None:
        if "bad" in prompt:
            raise raised

    with batch_engine(Batch(prepared)) as engine, engine.stream("first " + "rest") as running:
        assert isinstance(next(running), Started)
        assert isinstance(next(running), TextDelta)
        if kind is None:
            with pytest.raises(RequestError, match="not in this form"):
                engine.generate("bad")
        else:
            with pytest.raises(AllBackendsFailed) as failed:
                engine.generate("bad")
            assert failed.value.attempts[0].failure is not None
            assert failed.value.attempts[0].failure.kind == kind
        assert engine.generate("good") == "good"
        assert engine.loaded()[0].running == 1


def test_a_submit_that_raises_fails_only_its_own_request() -> None:
    with batch_engine(Batch()) as engine, engine.stream("first rest") as running:
        assert isinstance(next(running), Started)
        assert isinstance(next(running), TextDelta)
        with pytest.raises(AllBackendsFailed, match="no submitting"):
            engine.generate("unsubmittable")
        assert engine.generate("good") == "good"


def test_an_error_among_the_events_of_a_step_ends_its_own_request() -> None:
    with batch_engine(Batch()) as engine, engine.stream("first rest") as running:
        assert isinstance(next(running), Started)
        assert isinstance(next(running), TextDelta)
        with pytest.raises(AllBackendsFailed, match="on my own"):
            engine.generate("alone")
        assert engine.generate("good") == "good"


def test_a_step_that_raises_fails_whoever_is_in_it_and_the_model_goes_on() -> None:
    with batch_engine(Batch()) as engine:
        with pytest.raises(AllBackendsFailed, match="tripped"):
            engine.generate("trip")
        assert engine.generate("good") == "good"


@pytest.mark.parametrize("missing", ["prepare", "submit", "step", "cancel"])
def test_a_batched_model_that_lacks_a_part_is_told_which(missing: str) -> None:
    parts = {name: getattr(Batch, name) for name in ("prepare", "submit", "step", "cancel") if name != missing}
    half = type("Half", (LoadedModel,), parts)
    with batch_engine(half(device="cpu", context_length=512)) as engine:
        with pytest.raises(ContractError, match=rf"Half has .*, but not {missing}\b"):
            engine.load()
        with pytest.raises(AllBackendsFailed, match=f"not {missing}"):
            engine.generate("hi")


def test_a_batched_backend_in_a_process_can_refuse_a_request_while_it_prepares(make_engine: MakeEngine) -> None:
    script = BackendScript(prepare=(Raise("RequestError", "not in this form"),), batched=True)
    engine = make_engine(alpha=script, beta=BackendScript())
    for _ in range(4):
        with pytest.raises(RequestError, match="not in this form"):
            engine.generate("hi")
    failing = make_engine(
        alpha=BackendScript(prepare=(Raise("RuntimeError", "torn"),), batched=True), beta=BackendScript()
    )
    assert failing.complete("hi").backend == "beta"


# ---- embeddings ----------------------------------------------------------------------------------


def lengths(request: EmbedRequest) -> Embeddings:
    """Return for each text the vector (its length, 1)."""
    data = b"".join(struct.pack("<2f", len(text), 1) for text in request.texts)
    usage = Usage(prompt_tokens=sum(map(len, request.texts)), completion_tokens=0)
    return Embeddings(data=data, count=len(request.texts), dimensions=2, usage=usage)


def test_texts_become_vectors_in_their_order() -> None:
    actor = Actor(plain_model("embeddings"), embed=lengths)
    with engine_of(actor) as engine:
        found = engine.embed(["a", "bbb", ""])
        assert (found.count, found.dimensions, found.usage.prompt_tokens) == (3, 2, 4)
        assert struct.unpack("<6f", found.data) == (1, 1, 3, 1, 0, 1)
        assert engine.loaded()[0].task == "embed"
    assert actor.tasks == ["embed"]


def test_one_model_is_loaded_once_for_answers_and_once_for_vectors() -> None:
    """llama.cpp, for one, fixes what a context is for when it is made."""

    def model(options: LoadOptions) -> LoadedModel:
        features = BASIC_FEATURES if options.task == "generate" else frozenset({"embeddings"})
        return LoadedModel(device="cpu", context_length=512, features=features)

    def answer(_: GenerateRequest) -> Iterator[BackendEvent]:
        yield TextDelta(text="well")
        yield finished()

    actor = Actor(model, answer=answer, embed=lengths, features=BASIC_FEATURES | {"embeddings"})
    with engine_of(actor) as engine:
        for _ in range(2):
            assert engine.generate("hi") == "well"
            assert engine.embed(["hi"]).count == 1
            assert engine.complete("hi", seed=1).text == "well"
        assert {status.task for status in engine.loaded()} == {"generate", "embed"}
    assert sorted(actor.tasks) == ["embed", "generate"]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([[1.0, 2.0]], "Embeddings, not list"),
        (None, "Embeddings, not NoneType"),
        (lambda request: lengths(EmbedRequest(texts=(*request.texts, "more"))), "2 texts were asked for"),
        (
            lambda _: Embeddings(
                data=b"1234", count=2, dimensions=2, usage=Usage(prompt_tokens=1, completion_tokens=0)
            ),
            "in 4 bytes",
        ),
    ],
    ids=["a list", "nothing", "too many", "too few bytes"],
)
def test_vectors_that_break_the_contract_are_told(returned: object, says: str) -> None:
    embed = returned if callable(returned) else lambda _: returned
    with engine_of(Actor(plain_model("embeddings"), embed=embed)) as engine:
        with pytest.raises(AllBackendsFailed, match=says) as failed:
            engine.embed(["a", "b"])
        (attempt,) = failed.value.attempts
        assert attempt.failure is not None
        assert attempt.failure.kind == "ContractError"
        assert "tars_embed" in attempt.failure.message


def test_an_error_of_an_embedding_backend_is_told_and_its_refusal_is_the_callers_mistake() -> None:
    def embed(request: EmbedRequest) -> Embeddings:
        raise RequestError("too long") if "long" in request.texts else ValueError("torn")

    with engine_of(Actor(plain_model("embeddings"), embed=embed)) as engine:
        with pytest.raises(RequestError, match="too long"):
            engine.embed(["long"])
        with pytest.raises(AllBackendsFailed, match="torn"):
            engine.embed(["a"])


def test_a_backend_without_embeddings_is_not_asked_for_vectors(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=able())
    with pytest.raises(RequestError, match="embeddings"):
        engine.embed(["a"])
    assert engine.loaded() == ()


@pytest.mark.parametrize("texts", ["a text", [], None, 3, [3], ["a", None], ["\ud800"]], ids=repr)
def test_what_is_no_list_of_texts_is_refused_before_anything_is_loaded(texts: Any) -> None:  # noqa: ANN401
    actor = Actor(plain_model("embeddings"), embed=lengths)
    with engine_of(actor) as engine, pytest.raises(RequestError, match=r"[Tt]ext"):
        engine.embed(texts)
    assert actor.tasks == []


def test_many_who_wait_for_their_vectors_are_no_hang() -> None:
    """The wait for a place in the model is bounded by the whole time alone, as it is for answers."""

    def embed(request: EmbedRequest) -> Embeddings:
        time.sleep(0.3)
        return lengths(request)

    actor = Actor(plain_model("embeddings", concurrency=1), embed=embed)
    with engine_of(actor, limits={"first_token_s": 1.0}) as engine, ThreadPoolExecutor(8) as pool:
        assert [found.count for found in pool.map(lambda _: engine.embed(["a"]), range(8))] == [1] * 8
    assert actor.tasks == ["embed"]


# ---- tokens --------------------------------------------------------------------------------------


class Letters(LoadedModel):
    """Each letter is a token."""

    def tokenize(self, text: str) -> Sequence[int]:
        return [ord(letter) for letter in text]


def letters(options: LoadOptions) -> LoadedModel:
    del options
    return Letters(
        device="cpu",
        context_length=100,
        features=BASIC_FEATURES | {"tokenize"},
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )


def test_tokens_are_those_that_the_model_would_read() -> None:
    requests: list[GenerateRequest] = []

    def answer(request: GenerateRequest) -> Iterator[BackendEvent]:
        requests.append(request)
        yield TextDelta(text="well")
        yield BackendFinished(finish_reason="stop", usage=Usage(prompt_tokens=len(request.prompt), completion_tokens=1))

    turns = [Message(role="system", content="S"), Message(role="user", content="U")]
    with engine_of(Actor(letters, answer=answer)) as engine:
        for arguments in ({"prompt": "hi"}, {"prompt": "hi", "raw": True}, {"messages": turns}):
            tokens = engine.tokenize(**arguments)
            completion = engine.complete(**arguments)
            assert "".join(map(chr, tokens)) == requests[-1].prompt
            assert len(tokens) == completion.usage.prompt_tokens
    assert [request.prompt for request in requests] == [
        "<user>hi<assistant>",
        "hi",
        "<system>S<user>U<assistant>",
    ]


def test_a_bad_question_for_tokens_is_refused() -> None:
    with engine_of(Actor(letters)) as engine:
        with pytest.raises(RequestError, match="blank"):
            engine.tokenize(" ")
        with pytest.raises(RequestError, match="no"):
            engine.tokenize()
        with pytest.raises(RequestError, match="either"):
            engine.tokenize("hi", messages=[ASKED])
        assert engine.loaded() == ()


def test_tokens_come_from_who_can_tell_them(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=able(generate=(Echo(), Finish())))
    with pytest.raises(RequestError, match="tokenize"):
        engine.tokenize("hi")
    assert engine.loaded() == ()
    assert engine.generate("hi") == "hi"


def test_a_tokenizer_that_fails_is_told() -> None:
    class Torn(Letters):
        def tokenize(self, text: str) -> Sequence[int]:
            raise ValueError(f"torn at {text}")

    features = BASIC_FEATURES | {"tokenize"}
    actor = Actor(lambda _: Torn(device="cpu", context_length=9, features=features))
    with engine_of(actor) as engine, pytest.raises(AllBackendsFailed, match="torn at hi"):
        engine.tokenize("hi")
