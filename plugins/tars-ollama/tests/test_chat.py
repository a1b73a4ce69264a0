"""Conversations with a model whose template only Ollama has: recorded answers of its chat."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from ollama_stand_in import RECORDINGS, StandIn, answering

from tars_core import (
    AllBackendsFailed,
    Completion,
    ContextLengthExceeded,
    InferenceEngine,
    Message,
    StreamInterrupted,
)

MakeEngine = Callable[..., InferenceEngine]


def _lines(name: str) -> list[dict[str, dict[str, str]]]:
    chunks = json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))["response"]["chunks"]
    return [json.loads(chunk["data"]) for chunk in chunks]


def _text(name: str) -> str:
    return "".join(line.get("message", {}).get("content", "") for line in _lines(name))


def _ask(engine: InferenceEngine) -> Completion:
    return engine.complete("What colour is the red apple?", "Be brief.", max_tokens=24)


@pytest.fixture(autouse=True)
def _large(daemon: StandIn) -> None:
    """Give the model a context in which nothing has to be counted first."""
    daemon.on("/api/ps", answering({"models": [{"name": "tiny:latest", "context_length": 4096}]}))


@pytest.mark.parametrize(("name", "tokens"), [("chat-stream", (23, 6)), ("thinking-chat", (7, 4))])
def test_a_recorded_answer_gives_its_text_and_counters(
    daemon: StandIn, make_engine: MakeEngine, name: str, tokens: tuple[int, int]
) -> None:
    daemon.on("answer", name)
    completion = _ask(make_engine())
    assert (completion.text, completion.finish_reason) == (_text(name), "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == tokens


def test_thinking_comes_as_such(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "thinking-chat")
    completion = _ask(make_engine())
    assert (completion.reasoning, completion.text) == ("hm", "ans")


def test_the_templates_own_stop_strings_are_kept_and_each_is_sent_once(
    daemon: StandIn, make_engine: MakeEngine
) -> None:
    daemon.on("answer", "chat-stream")
    make_engine().complete("Hi", max_tokens=9, stop=["<|im_end|>", "x"])
    assert daemon.bodies("answer")[0]["options"]["stop"] == ["<|im_end|>", "x", "<|im_start|>"]


@pytest.mark.parametrize("name", ["crash-mid-stream-chat", "repeat-abort-chat"])
def test_a_recorded_break_is_an_interruption(daemon: StandIn, make_engine: MakeEngine, name: str) -> None:
    daemon.on("answer", name)
    with pytest.raises(StreamInterrupted) as caught:
        _ask(make_engine())
    assert caught.value.partial_text == _text(name)


def test_a_history_too_long_is_refused_with_both_numbers(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("/api/ps", "ps-loaded")
    daemon.on("count", "overflow-chat-truncate-false")
    with pytest.raises(ContextLengthExceeded) as caught:
        make_engine().complete("red " * 300, "Be brief.")
    assert caught.value.context_length == 256 <= caught.value.prompt_tokens


class TestAConversationThatEndsWithTheAssistant:
    MESSAGES = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="What colour is the red apple?"),
        Message(role="assistant", content="The drum"),
    )

    def test_is_continued_behind_what_ollama_renders(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("render", "render-chat")
        daemon.on("answer", "continue-raw-prefill")
        make_engine().chat(self.MESSAGES, max_tokens=24)
        (rendered,) = [body for body in daemon.bodies("render") if body["messages"]]
        assert [turn["role"] for turn in rendered["messages"]] == ["system", "user"]
        (body,) = daemon.bodies("answer")
        assert body["raw"] is True
        assert body["prompt"] == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat colour is the red apple?<|im_end|>\n"
            "<|im_start|>assistant\nThe drum"
        )

    def test_is_refused_by_a_daemon_that_does_not_render(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("render", answering({"message": {"content": "x"}, "done": True}))
        with pytest.raises(AllBackendsFailed, match="cannot continue a text"):
            make_engine().chat(self.MESSAGES)
        assert daemon.bodies("render")[0]["options"]["num_predict"] == 1


def test_a_model_with_a_system_prompt_of_its_own_is_left_to_ollama(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("/api/show", "show-derived")
    daemon.on("answer", "chat-stream")
    make_engine().complete("Hi", max_tokens=9)
    assert daemon.received[-1].path == "/api/chat"
