"""Whole flows: the engine, a worker process, real HTTP, and a model that really answers behind it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ollama_live import GGUF, NAME, live_daemon
from ollama_stand_in import StandIn

from tars_core import (
    BackendUnavailable,
    ContextLengthExceeded,
    InferenceEngine,
    Message,
    StreamInterrupted,
    TextDelta,
)
from tars_core.plugin import BASIC_FEATURES
from tars_ollama import OllamaBackend

QUESTION = "¿Cuál es tu nombre?"


@pytest.fixture(scope="module")
def engine(demo_daemon: StandIn) -> Iterator[InferenceEngine]:
    with InferenceEngine(
        model=f"ollama:{NAME}", plugins="ollama", backends={"ollama": {"host": demo_daemon.address}}
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def direct() -> Iterator[InferenceEngine]:
    """Run the same file without Ollama."""
    with InferenceEngine(model=GGUF, backend="xllamacpp", threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    "messages",
    [
        [Message(role="user", content=QUESTION)],
        [Message(role="system", content="Responde brevemente."), Message(role="user", content="¿Qué es TARS?")],
        [
            Message(role="user", content="Hola"),
            Message(role="assistant", content="¡Hola!"),
            Message(role="user", content="What is TARS? 🙂"),
        ],
        [Message(role="user", content=QUESTION), Message(role="assistant", content="Me llamo")],
    ],
)
def test_a_conversation_gives_the_text_and_the_counts_that_the_file_gives_elsewhere(
    engine: InferenceEngine, direct: InferenceEngine, messages: list[Message]
) -> None:
    over, without = (e.complete(messages=messages, temperature=0) for e in (engine, direct))
    assert over.text == without.text
    assert over.usage == without.usage
    assert over.finish_reason == without.finish_reason
    assert (over.backend, over.device) == ("ollama", "cpu")


def test_the_prompt_goes_raw_with_the_models_own_template(engine: InferenceEngine, demo_daemon: StandIn) -> None:
    engine.complete(QUESTION, temperature=0)
    body = demo_daemon.bodies("answer")[-1]
    assert body["raw"] is True
    assert body["prompt"].endswith("<|im_start|>assistant\n")
    assert body["options"]["stop"] == []


def test_the_core_splits_thoughts_where_ollama_does_not(engine: InferenceEngine) -> None:
    (candidate,) = engine.plan().candidates
    assert candidate.report.features == frozenset(engine.load().features) == BASIC_FEATURES


def test_the_same_weights_are_known_for_the_same(demo_daemon: StandIn) -> None:
    refs = [f"ollama:{NAME}", str(GGUF)]
    with InferenceEngine(
        model="both",
        models={"both": refs},
        plugins="ollama,xllamacpp",
        backends={"ollama": {"host": demo_daemon.address}},
    ) as engine:
        candidates = engine.plan().candidates
    assert {candidate.backend for candidate in candidates} == {"ollama", "xllamacpp"}
    assert not any(candidate.degraded for candidate in candidates)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: InferenceEngine) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.generate("palabra " * 3000)
    assert caught.value.prompt_tokens > caught.value.context_length == 512


def test_an_answer_ends_where_the_context_does(engine: InferenceEngine) -> None:
    unit = "<|im_end|>"
    completion = engine.complete(unit * 500, raw=True, temperature=10, top_k=0, top_p=1, max_tokens=2**40, seed=3)
    assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", 12)


def test_eight_threads_get_the_answers_they_would_get_alone(engine: InferenceEngine) -> None:
    questions = [QUESTION, "What is TARS?", "Hola", "Thank you"] * 2
    alone = [engine.generate(q, temperature=0) for q in questions[:4]] * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda q: engine.generate(q, temperature=0), questions)) == alone


def test_a_stream_left_early_is_stopped_at_the_daemon(engine: InferenceEngine, demo_daemon: StandIn) -> None:
    demo_daemon.hung_up.clear()
    for event in engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=400, seed=3):
        if isinstance(event, TextDelta):
            break
    assert demo_daemon.hung_up.wait(5)
    assert engine.generate(QUESTION, temperature=0)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine: InferenceEngine) -> None:
    def sample(seed: int) -> str:
        return engine.generate("Hola", temperature=5, top_k=0, top_p=1, max_tokens=20, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4


class TestAModelWhoseTemplateOnlyOllamaHas:
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[tuple[InferenceEngine, StandIn]]:
        with live_daemon(tmp_path) as server:
            for blob in (tmp_path / "blobs").iterdir():
                blob.unlink()
            host = {"ollama": {"host": server.address}}
            with InferenceEngine(model=f"ollama:{NAME}", plugins="ollama", backends=host) as engine:
                yield engine, server

    def test_is_asked_by_messages(self, engine: tuple[InferenceEngine, StandIn], direct: InferenceEngine) -> None:
        asking, server = engine
        completion = asking.complete(QUESTION, "Sé breve.", temperature=0)
        assert completion.text == direct.complete(QUESTION, "Sé breve.", temperature=0).text
        body = server.bodies("answer")[0]
        assert body["messages"] == [{"role": "system", "content": "Sé breve."}, {"role": "user", "content": QUESTION}]
        assert "prompt" not in body
        assert "User:" not in body["options"]["stop"]
        assert body["truncate"] is False

    def test_is_split_by_ollama(self, engine: tuple[InferenceEngine, StandIn]) -> None:
        (candidate,) = engine[0].plan().candidates
        features = frozenset(engine[0].load().features)
        assert candidate.report.features == features == BASIC_FEATURES | {"renders_chat", "parses"}

    def test_still_takes_a_raw_prompt_raw(self, engine: tuple[InferenceEngine, StandIn]) -> None:
        asking, server = engine
        asking.complete("Me llamo", raw=True, temperature=0, max_tokens=5)
        body = server.bodies("answer")[0]
        assert (body["raw"], body["prompt"]) == (True, "Me llamo")

    def test_continues_a_text_rendered_by_ollama(
        self, engine: tuple[InferenceEngine, StandIn], direct: InferenceEngine
    ) -> None:
        asking, server = engine
        messages = [Message(role="user", content=QUESTION), Message(role="assistant", content="Me llamo")]
        completion = asking.complete(messages=messages, temperature=0)
        assert completion.text == direct.complete(messages=messages, temperature=0).text
        assert server.bodies("answer")[0]["prompt"].endswith("<|im_start|>assistant\nMe llamo")


class TestTheBackendAlone:
    def test_is_loaded_and_continues_a_prompt(self, demo_daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OLLAMA_HOST", demo_daemon.address)
        with OllamaBackend(model=NAME) as backend:
            assert backend.loaded
            text = backend.generate("<|im_start|>user\nHola<|im_end|>\n<|im_start|>assistant\n", max_tokens=30)
            assert text
        assert not backend.loaded

    def test_says_what_to_pull(self, demo_daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OLLAMA_HOST", demo_daemon.address)
        with pytest.raises(BackendUnavailable, match="ollama pull llama3"):
            OllamaBackend(model="llama3")


def test_a_daemon_killed_mid_answer_leaves_the_partial_text(tmp_path: Path) -> None:
    with live_daemon(tmp_path) as server:
        host = {"ollama": {"host": server.address}}
        with InferenceEngine(model=f"ollama:{NAME}", plugins="ollama", backends=host) as engine:
            events = engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=400, seed=3)
            next(event for event in events if isinstance(event, TextDelta))
            server.closing.set()
            with pytest.raises(StreamInterrupted) as caught:
                list(events)
            assert caught.value.partial_text
