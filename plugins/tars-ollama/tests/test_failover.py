"""Another backend takes over where Ollama fails; and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from ollama_stand_in import Behaviour, Client, Request, StandIn, replay

from tars_core import EngineClosed, InferenceEngine, StreamInterrupted, TextDelta
from tars_core.testing.fake import Act, Finish, Say

MakeEngine = Callable[..., InferenceEngine]

OTHER: tuple[Act, ...] = (Say("the other one"), Finish())


def _without_a_byte(client: Client, request: Request) -> None:
    del request
    client.drop()


def _by_a_reset(client: Client, request: Request) -> None:
    del request
    client.reset()


def _by_silence(client: Client, request: Request) -> None:
    del request
    client.hang()


def _byte_by_byte(client: Client, request: Request) -> None:
    del request
    client.begin_stream()
    while not client.gone(within_s=0.05):
        client.send_chunk(b" ")
    client.server.hung_up.set()


@pytest.mark.parametrize(
    "failing",
    [
        _without_a_byte,
        _by_a_reset,
        "crash-before-first",
        "runner-503",
        "model-404-generate",
        "host-header-403",
        "load-oom-500",
        "generate-on-embedding-model",
    ],
)
def test_a_failure_before_the_first_text_hands_over(
    daemon: StandIn, make_engine: MakeEngine, failing: Behaviour | str
) -> None:
    daemon.on("answer", failing)
    completion = make_engine(fallback=OTHER).complete("hi", raw=True)
    assert (completion.text, completion.backend) == ("the other one", "fallback")
    assert [attempt.backend for attempt in completion.attempts] == ["ollama", "fallback"]


@pytest.mark.parametrize("stalling", [_by_silence, _byte_by_byte, replay("slow-first-byte", paced=True)])
def test_a_stall_before_the_first_text_hands_over_in_time(
    daemon: StandIn, make_engine: MakeEngine, stalling: Behaviour
) -> None:
    daemon.on("answer", stalling)
    began = time.monotonic()
    completion = make_engine(fallback=OTHER, limits={"first_token_s": 0.5}).complete("hi", raw=True)
    assert completion.text == "the other one"
    assert time.monotonic() - began < 5
    assert daemon.hung_up.wait(5), "the connection was left open"


def test_a_daemon_that_goes_away_between_two_requests_hands_over(make_engine: MakeEngine, daemon: StandIn) -> None:
    daemon.on("answer", "generate-stream")
    engine = make_engine(fallback=OTHER)
    assert engine.complete("hi", raw=True, max_tokens=9).backend == "ollama"
    daemon.__exit__(None, None, None)
    assert engine.complete("hi", raw=True, max_tokens=9).text == "the other one"


def test_a_stall_after_text_is_an_interruption_with_that_text(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "hang-real-mid-stream")
    engine = make_engine(fallback=OTHER, limits={"between_tokens_s": 0.5})
    with pytest.raises(StreamInterrupted, match="between tokens") as caught:
        engine.complete("hi", raw=True)
    assert caught.value.partial_text
    assert daemon.hung_up.wait(5), "the connection was left open"


def test_a_pause_within_the_limit_is_none_of_that(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", replay("stall-mid-stream", paced=True))
    assert make_engine(limits={"between_tokens_s": 4.5}).complete("hi", raw=True).finish_reason == "stop"


def _until_closed(engine: InferenceEngine) -> None:
    with pytest.raises(EngineClosed):
        engine.complete("hi", raw=True)


class TestLeavingAStream:
    def test_closes_its_connection_while_text_comes(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("answer", "client-disconnect", "generate-stream")
        engine = make_engine()
        with engine.stream("hi", raw=True) as events:
            next(event for event in events if isinstance(event, TextDelta))
        assert daemon.hung_up.wait(2), "the connection was left open"
        assert engine.complete("hi", raw=True, max_tokens=9).text == "The drum is red."

    def test_closes_its_connection_while_nothing_comes(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("answer", _by_silence, "generate-stream")
        engine = make_engine()
        engine.load()
        asked = threading.Thread(target=_until_closed, args=(engine,))
        asked.start()
        until = time.monotonic() + 5
        while not daemon.bodies("answer") and time.monotonic() < until:
            time.sleep(0.01)
        began = time.monotonic()
        engine.close()
        assert daemon.hung_up.wait(2), "the connection was left open"
        assert time.monotonic() - began < 2
        asked.join(5)
        assert not asked.is_alive()


def test_closing_the_engine_leaves_no_thread_and_no_connection(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "generate-stream")
    before = set(threading.enumerate())
    engine = make_engine()
    engine.complete("hi", raw=True, max_tokens=9)
    engine.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("tars-"):
            thread.join(5)
            assert not thread.is_alive(), thread.name
