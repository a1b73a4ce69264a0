"""What recorded answers of a real Ollama become on the engine's side."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from ollama_stand_in import RECORDINGS, Behaviour, Client, Request, StandIn, answering, replay, sending

from tars_core import (
    AllBackendsFailed,
    Completion,
    ContextLengthExceeded,
    Finished,
    InferenceEngine,
    ReasoningDelta,
    RequestError,
    StreamInterrupted,
    TextDelta,
)
from tars_core.testing.fake import Finish, Say
from tars_ollama import wire

MakeEngine = Callable[..., InferenceEngine]

STREAMS = {
    "generate-stream": "stop",
    "generate-length": "length",
    "generate-stop-string": "stop",
    "generate-stop-multi-token": "stop",
    "generate-stop-unmatched-prefix": "stop",
    "empty-output": "stop",
    "thinking-stream": "stop",
    "line-separators": "stop",
    "unicode-nel-ls-real": "stop",
    "unicode-split-emoji": "stop",
    "unicode-cut-in-emoji": "length",
    "unicode-invalid-bytes": "length",
    "escapes-html": "stop",
    "fake-plain-stream": "stop",
}
"""What a recorded stream ends with."""

BROKEN = {
    "stream-without-done": "without its last message",
    "runner-error-event": "without its last message",
    "repeat-abort-real": "without its last message",
    "crash-mid-stream": "illegal memory access",
    "crash-real-mid-stream": "unexpected EOF",
    "runner-connection-dropped": "unexpected EOF",
    "runner-junk-event": "error unmarshalling",
    "server-killed-mid-stream": "connection broke",
}
"""Streams that break after their first text, and what is said of it."""


def _recorded(name: str) -> list[dict[str, object]]:
    chunks = json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))["response"]["chunks"]
    return [json.loads(chunk["data"]) for chunk in chunks]


def _text(name: str) -> str:
    return "".join(str(line.get("response", "")) for line in _recorded(name))


def _show_trained_for(context: int) -> Behaviour:
    show = _recorded("show")[0]
    info = show["model_info"]
    assert isinstance(info, dict)
    return answering({**show, "model_info": {**info, "llama.context_length": context}})


def _ask(engine: InferenceEngine) -> Completion:
    return engine.complete("What colour is the red apple?", raw=True, max_tokens=24)


def test_a_recorded_stream_becomes_its_text_usage_and_speed(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "generate-stream")
    completion = _ask(make_engine())
    assert (completion.text, completion.finish_reason) == ("The drum is red.", "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (15, 6)
    assert completion.timings.decode_tokens_per_s == pytest.approx(5 / 2.101e-3)
    assert (completion.backend, completion.device) == ("ollama", "cpu")


@pytest.mark.parametrize("name", STREAMS)
def test_every_recorded_stream_gives_all_its_text_and_counters(
    daemon: StandIn, make_engine: MakeEngine, name: str
) -> None:
    daemon.on("answer", name, replay(name, in_pieces_of=1))
    engine = make_engine()
    last = _recorded(name)[-1]
    for completion in (_ask(engine), _ask(engine)):  # as recorded, and with a chunk border after every byte
        assert completion.text == _text(name)
        assert completion.finish_reason == STREAMS[name] == last["done_reason"]
        assert completion.usage.prompt_tokens == last.get("prompt_eval_count", 0)
        assert completion.usage.completion_tokens == last.get("eval_count", 0)


def test_thinking_comes_as_such(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "thinking-stream")
    events = list(make_engine().stream("x", raw=True))
    assert [e.text for e in events if isinstance(e, ReasoningDelta)] == ["hm"]
    assert isinstance(events[-1], Finished)
    assert (events[-1].completion.reasoning, events[-1].completion.text) == ("hm", "ans")


def test_an_answer_of_one_token_has_no_speed(daemon: StandIn, make_engine: MakeEngine) -> None:
    one = {"response": "Hi", "done": True, "done_reason": "length", "eval_count": 1, "eval_duration": 1000}
    daemon.on("answer", answering(one))
    assert make_engine().complete("x", raw=True, max_tokens=1).timings.decode_tokens_per_s is None


def test_thinking_is_no_text(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "thinking-stream")
    assert [e.text for e in make_engine().stream("x", raw=True) if isinstance(e, TextDelta)] == ["ans"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_breaks_is_an_interruption_with_its_text_and_never_an_end(
    daemon: StandIn, make_engine: MakeEngine, name: str
) -> None:
    daemon.on("answer", name)
    with pytest.raises(StreamInterrupted, match=BROKEN[name]) as caught:
        _ask(make_engine(fallback=()))
    assert caught.value.partial_text == _text(name)
    assert len(daemon.bodies("answer")) == 1


@pytest.mark.parametrize(
    "name",
    ["crash-before-first", "crash-real-before-first", "crash-on-connect", "runner-500", "manifest-broken-generate"],
)
def test_a_crash_before_the_first_text_is_asked_again_once(daemon: StandIn, make_engine: MakeEngine, name: str) -> None:
    daemon.on("answer", name, "crash-real-next-request")
    completion = _ask(make_engine())
    assert completion.text == _text("crash-real-next-request")
    assert [attempt.stage for attempt in completion.attempts] == ["done"]


def test_a_crash_that_repeats_itself_fails_with_the_daemons_words(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "crash-on-connect")
    with pytest.raises(AllBackendsFailed, match="illegal memory access"):
        _ask(make_engine())
    assert len(daemon.bodies("answer")) == 2


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>no</html>", "sent an invalid line"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{"response":NaN,"done"', "sent an invalid line"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"response":3}\n', "sent an invalid line"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"error": "42"}\n', "Ollama: 42"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n{"error": {"message":[]}}', "Ollama: "),
        (b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 3\r\n\r\n123", "Ollama: 123"),
        (b'HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 5\r\n\r\n["a"]', "a"),
        (b"HTTP/1.1 502 Bad\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "no reason given"),
        (
            b"HTTP/1.1 301 Go\r\nConnection: close\r\nLocation: http://example.com\r\nContent-Length: 0\r\n\r\n",
            "redirects",
        ),
        (b"garbage\r\n\r\n", "connection broke"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "connection broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "without its last message"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 36\r\n\r\n{"done":true,"done_reason":"unload"}', "'unload'"),
    ],
)
def test_what_is_no_answer_is_a_failure_of_the_backend(
    daemon: StandIn, make_engine: MakeEngine, sent: bytes, reason: str
) -> None:
    daemon.on("answer", sending(sent))
    with pytest.raises(AllBackendsFailed, match=reason) as caught:
        _ask(make_engine())
    (attempt,) = caught.value.attempts
    assert attempt.failure is not None
    assert attempt.failure.kind == "GenerationFailed"


def test_a_line_of_many_mebibytes_is_given_up(daemon: StandIn, make_engine: MakeEngine) -> None:
    def endless(client: Client, request: Request) -> None:
        client.begin_stream()
        while not client.gone():
            client.send_chunk(b" " * 2**20)

    daemon.on("answer", endless)
    with pytest.raises(AllBackendsFailed, match="16 MiB"):
        _ask(make_engine(limits={"first_token_s": 20.0}))


@pytest.mark.parametrize("name", ["runner-400", "sampling-refused", "option-wrong-type", "format-bad-type"])
def test_a_callers_mistake_is_told_unwrapped_and_goes_nowhere_else(
    daemon: StandIn, make_engine: MakeEngine, name: str
) -> None:
    daemon.on("answer", name)
    with pytest.raises(RequestError) as caught:
        _ask(make_engine(fallback=()))
    assert "{" not in caught.value.message
    assert len(daemon.bodies("answer")) == 1


@pytest.mark.parametrize("name", ["overflow-truncate-false", "overflow-truncate-false-stream", "native-chat-overflow"])
def test_a_prompt_that_is_refused_as_too_long_gives_both_numbers(
    daemon: StandIn, make_engine: MakeEngine, name: str
) -> None:
    daemon.on("answer", name)
    with pytest.raises(ContextLengthExceeded) as caught:
        _ask(make_engine(fallback=()))
    assert (caught.value.prompt_tokens, caught.value.context_length) == (410, 256)


def test_older_words_for_a_prompt_too_long_are_understood(daemon: StandIn, make_engine: MakeEngine) -> None:
    daemon.on("answer", "overflow-shift-false")
    with pytest.raises(ContextLengthExceeded) as caught:
        _ask(make_engine())
    assert caught.value.context_length == 256


class TestWhatIsSent:
    def test_is_every_sampling_value_and_never_a_leave_to_truncate(
        self, daemon: StandIn, make_engine: MakeEngine
    ) -> None:
        daemon.on("answer", "generate-stream")
        make_engine().complete("Hi", raw=True, seed=7, stop=["x"], max_tokens=9, min_p=0.1)
        (body,) = daemon.bodies("answer")
        assert body["raw"] is body["stream"] is True
        assert body["truncate"] is False
        assert body["options"] == {
            "num_ctx": 256,
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.1,
            "typical_p": 1.0,
            "repeat_penalty": 1.1,
            "repeat_last_n": 64,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": 7,
            "stop": ["x", "User:", "Usuario:"],
            "num_predict": 9,
            "num_keep": 4,
        }

    def test_starts_no_process_anew_the_options_of_the_load_come_with_every_request(
        self, daemon: StandIn, make_engine: MakeEngine
    ) -> None:
        daemon.on("answer", "generate-stream")
        engine = make_engine(threads=2, gpu_layers=-1, context_length=256)
        for _ in range(2):
            engine.complete("Hi", raw=True, max_tokens=9)
        launch = {"num_ctx": 256, "num_thread": 2, "num_gpu": 999}
        assert [body["options"] for body in daemon.bodies("load")] == [launch]
        assert all(body["options"].items() >= launch.items() for body in daemon.bodies("answer"))

    def test_is_a_seed_that_draws_none(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("answer", "generate-stream")
        make_engine().complete("Hi", raw=True, seed=2**32 - 1, max_tokens=9)
        assert daemon.bodies("answer")[0]["options"]["seed"] == 0

    def test_goes_over_one_connection(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("answer", "generate-stream")
        engine = make_engine()
        _ask(engine)
        before = daemon.connections
        for _ in range(5):
            _ask(engine)
        assert daemon.connections == before


class TestThePromptsLength:
    def test_is_counted_where_the_answer_might_not_fit_and_bounds_it(
        self, daemon: StandIn, make_engine: MakeEngine
    ) -> None:
        daemon.on("answer", "generate-stream")
        daemon.on("count", answering({"done": True, "prompt_eval_count": 180, "eval_count": 1}))
        make_engine().complete("red " * 50, raw=True, max_tokens=200)
        assert daemon.bodies("answer")[0]["options"]["num_predict"] == 256 - 180
        assert daemon.bodies("count")[0]["options"]["num_predict"] == 1

    def test_that_is_plainly_short_enough_is_not_counted(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("answer", "generate-stream")
        make_engine().complete("red " * 10, raw=True, max_tokens=200)
        assert not daemon.bodies("count")

    def test_is_refused_where_the_daemon_refuses_it(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("count", "overflow-truncate-false")
        with pytest.raises(ContextLengthExceeded):
            make_engine(fallback=()).complete("red " * 410, raw=True)
        assert not daemon.bodies("answer")

    def test_is_refused_where_an_older_daemon_cuts_it_silently(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        # It keeps num_keep tokens and the newest of the rest; 130 is what a real one left of 410 at 256.
        def cutting(client: Client, request: Request) -> None:
            keep = request.body["options"]["num_keep"]
            client.send_json({"done": True, "prompt_eval_count": 256 - (256 - keep) // 2, "eval_count": 1})

        daemon.on("count", "overflow-raw-default", cutting)
        with pytest.raises(ContextLengthExceeded):
            make_engine(fallback=()).complete("red " * 410, raw=True)
        assert [body["options"]["num_keep"] for body in daemon.bodies("count")] == [4, 12]

    def test_is_not_known_where_the_count_breaks_off(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("count", "nonstream-without-done")
        with pytest.raises(AllBackendsFailed, match="without its last message"):
            make_engine().complete("red " * 65, raw=True)

    def test_may_by_chance_be_what_a_cut_would_leave(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("answer", "generate-stream")
        daemon.on("count", answering({"done": True, "prompt_eval_count": 130, "eval_count": 1}))
        assert make_engine().complete("red " * 65, raw=True, max_tokens=24).text == "The drum is red."

    def test_grows_a_context_that_somebody_else_had_chosen(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("/api/show", _show_trained_for(4096))
        daemon.on("count", "overflow-truncate-false", answering({"done": True, "prompt_eval_count": 410}))
        daemon.on("answer", "generate-stream")
        assert make_engine().complete("red " * 410, raw=True, max_tokens=200).text == "The drum is red."
        assert [body["options"]["num_ctx"] for body in daemon.bodies("load")] == [256, 1024]
        assert daemon.bodies("answer")[0]["options"]["num_ctx"] == 1024

    def test_grows_one_that_was_asked_for_only_where_that_is_set(
        self, daemon: StandIn, make_engine: MakeEngine
    ) -> None:
        daemon.on("/api/show", _show_trained_for(4096))
        daemon.on("count", "overflow-truncate-false", answering({"done": True, "prompt_eval_count": 410}))
        daemon.on("answer", "generate-stream")
        with pytest.raises(ContextLengthExceeded):
            make_engine(context_length=256).complete("red " * 410, raw=True)
        daemon.on("count", "overflow-truncate-false", answering({"done": True, "prompt_eval_count": 410}))
        engine = make_engine(context_length=256, backends={"ollama": {"grow_context": True}})
        assert engine.complete("red " * 410, raw=True).text == "The drum is red."

    def test_never_grows_beyond_what_the_model_was_trained_for(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("count", "overflow-truncate-false")
        engine = make_engine(backends={"ollama": {"grow_context": True}})
        with pytest.raises(ContextLengthExceeded):
            engine.complete("red " * 410, raw=True)
        assert len(daemon.bodies("load")) == 1

    def test_that_the_memory_cannot_hold_hands_over(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("/api/show", _show_trained_for(4096))
        daemon.on("count", "overflow-truncate-false")
        daemon.on("load", "load-empty-prompt", "load-oom-500")
        completion = make_engine(fallback=(Say("hello"), Finish())).complete("red " * 410, raw=True)
        assert (completion.text, completion.backend) == ("hello", "fallback")


class TestWhatIsReadFromShow:
    def test_is_what_the_model_is(self) -> None:
        show = wire.decode(json.dumps(_recorded("show")[0]).encode(), wire.Show)
        assert show.trained_context == 256
        assert show.stops == ("<|im_start|>", "<|im_end|>")
        assert show.weights is not None
        assert show.weights[0].endswith(show.weights[1])
        assert (show.generates, show.adapted, show.system) == (True, False, "")

    def test_of_a_derived_model_is_its_own_system_prompt(self) -> None:
        show = wire.decode(json.dumps(_recorded("show-derived")[0]).encode(), wire.Show)
        assert show.system
        assert "." in show.stops

    def test_may_be_an_adapter(self) -> None:
        assert wire.Show(modelfile="FROM /x/blobs/sha256-0\nADAPTER /x/blobs/sha256-1").adapted

    def test_may_be_nothing(self) -> None:
        show = wire.decode(b"{}", wire.Show)
        assert (show.trained_context, show.weights, show.stops, show.generates) == (None, None, (), True)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tiny", "tiny:latest", True),
        ("Tiny", "registry.ollama.ai/library/tiny:latest", True),
        ("tiny:q4", "tiny", False),
        ("host:5000/a/b", "host:5000/a/b:latest", True),
    ],
)
def test_two_names_of_one_model_are_known_for_the_same(one: str, other: str, same: bool) -> None:  # noqa: FBT001
    assert (wire.canonical(one) == wire.canonical(other)) is same


def test_the_key_goes_to_this_machine_with_every_question(
    daemon: StandIn, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "sesame")
    daemon.on("answer", "generate-stream")
    _ask(make_engine())
    assert {request.headers.get("authorization") for request in daemon.received} == {"Bearer sesame"}


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1", "nonsense://x:y"])
def test_proxies_stand_between_nobody_and_the_daemon(
    daemon: StandIn, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, proxy)
    daemon.on("answer", "generate-stream")
    assert _ask(make_engine()).text == "The drum is red."
