"""How a model comes into the daemon's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
import pytest
from ollama_stand_in import Client, Request, StandIn, answering, replay, sending

from tars_core import AllBackendsFailed, InferenceEngine, LoadFailed, ModelNotFound, ModelRef, OutOfMemory, Overloaded
from tars_core.plugin import LoadOptions
from tars_core.testing.fake import Finish, Say
from tars_ollama import plugin
from tars_ollama.model import OllamaModel

MakeEngine = Callable[..., InferenceEngine]


def load(name: str = "ollama:tiny", *, told: list[str] | None = None, **options: object) -> OllamaModel:
    notes = [] if told is None else told
    loaded = plugin.tars_load(
        model=ModelRef.parse(name),
        options=msgspec.convert(options, LoadOptions),
        progress=lambda _, note: notes.append(note),
        cancel=threading.Event(),
    )
    assert isinstance(loaded, OllamaModel)
    plugin.tars_unload(loaded=loaded)
    return loaded


def contexts(daemon: StandIn) -> list[int]:
    return [body["options"]["num_ctx"] for body in daemon.bodies("load")]


def show(context: int, **more: object) -> dict[str, object]:
    return {"model_info": {"general.architecture": "llama", "llama.context_length": context}, **more}


class TestTheContext:
    def test_is_what_the_daemon_says_it_is(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering({}))
        loaded = load(context_length=4096)
        assert (loaded.context_length, loaded.context_shrunk) == (256, True)
        assert contexts(daemon) == [4096]

    def test_is_the_models_own_up_to_8192(self, daemon: StandIn) -> None:
        daemon.on("/api/ps", "ps-empty")
        for trained in (2048, 8192, 131072):
            daemon.on("/api/show", answering(show(trained)))
            assert load().context_length == min(trained, 8192)
        assert contexts(daemon) == [2048, 8192, 8192]

    def test_of_a_model_that_somebody_uses_already_is_left_as_it_is(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering(show(8192)))
        loaded = load()
        assert contexts(daemon) == [256]
        assert (loaded.context_length, loaded.context_shrunk) == (256, False)

    def test_that_is_asked_for_is_asked_for(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering(show(8192)))
        load(context_length=1000)
        assert contexts(daemon) == [1000]

    def test_shrinks_where_memory_is_short_then_the_cpu_is_tried(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering(show(8192)))
        daemon.on("/api/ps", "ps-empty")
        daemon.on("load", "load-oom-500", "load-oom-500", "crash-real-while-loading", "load-empty-prompt")
        loaded = load()
        assert contexts(daemon) == [8192, 4096, 2048, 2048]
        assert [body["options"].get("num_gpu") for body in daemon.bodies("load")] == [None, None, None, 0]
        assert (loaded.context_length, loaded.context_shrunk) == (2048, True)

    def test_never_shrinks_onto_the_cpu_where_a_gpu_is_required(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering(show(4096)))
        daemon.on("/api/ps", "ps-empty")
        daemon.on("load", "load-oom-500")
        with pytest.raises(OutOfMemory, match="out of memory"):
            load(device="gpu")
        assert all("num_gpu" not in body["options"] for body in daemon.bodies("load"))


def test_a_load_answers_with_one_body_though_a_stream_was_asked_for(daemon: StandIn) -> None:
    daemon.on("load", "load-empty-prompt-stream")
    assert load().context_length == 256


class TestALoadThatFails:
    def test_gives_the_daemons_words(self, daemon: StandIn) -> None:
        daemon.on("load", "load-failure-500")
        with pytest.raises(LoadFailed, match="fake corrupt tensor"):
            load()

    def test_for_want_of_the_model_gives_the_command_that_fetches_it(self, daemon: StandIn) -> None:
        daemon.on("/api/show", "model-404-chat")
        with pytest.raises(ModelNotFound) as caught:
            load("ollama:nope")
        assert caught.value.hint == "ollama pull nope"

    def test_for_a_damaged_store_says_how_to_mend_it(self, daemon: StandIn) -> None:
        daemon.on("load", "blob-missing-generate")
        with pytest.raises(LoadFailed) as caught:
            load()
        assert caught.value.hint == "ollama pull tiny downloads it again"

    def test_for_a_model_that_writes_nothing_says_so(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering({"capabilities": ["embedding"]}))
        with pytest.raises(LoadFailed, match="embedding"):
            load()

    @pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", b"\0" * 9, b""])
    def test_for_what_is_no_ollama_is_typed(self, daemon: StandIn, sent: bytes) -> None:
        daemon.on("/api/show", sending(sent))
        with pytest.raises(LoadFailed):
            load()

    def test_hands_over(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("load", "load-failure-500")
        completion = make_engine(fallback=(Say("hello"), Finish())).complete("hi")
        assert (completion.text, completion.attempts[0].stage) == ("hello", "load")


class TestADaemonThatIsBusy:
    def test_is_asked_again(self, daemon: StandIn) -> None:
        daemon.on("load", "busy-503", "load-empty-prompt")
        load()
        assert len(daemon.bodies("load")) == 2

    def test_for_long_is_given_up(self, daemon: StandIn) -> None:
        daemon.on("load", "busy-503")
        began = time.monotonic()
        with pytest.raises(Overloaded, match="maximum pending requests"):
            load()
        assert len(daemon.bodies("load")) == 5
        assert time.monotonic() - began < 8

    def test_is_left_alone_for_as_long_as_it_says(self, daemon: StandIn) -> None:
        head = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"
        daemon.on("load", lambda client, _: client.send(head), replay("load-empty-prompt"))
        began = time.monotonic()
        load()
        assert time.monotonic() - began > 1

    def test_for_longer_than_it_is_worth_is_given_up_at_once(self, daemon: StandIn) -> None:
        head = b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\nRetry-After: 3600\r\n\r\n"
        daemon.on("load", lambda client, _: client.send(head))
        with pytest.raises(Overloaded):
            load()
        assert len(daemon.bodies("load")) == 1


class TestAModelThatIsNotThere:
    def test_is_pulled_only_where_that_is_allowed(self, daemon: StandIn) -> None:
        daemon.on("/api/show", "model-404-generate", "show")
        daemon.on("/api/pull", "pull-ok-fresh")
        told: list[str] = []
        load(allow_download=True, told=told)
        assert "success" in told

    @pytest.mark.parametrize("name", ["pull-unknown-model", "crash-mid-stream", "load-empty-prompt"])
    def test_is_a_failure_where_the_pull_does_not_succeed(self, daemon: StandIn, name: str) -> None:
        daemon.on("/api/show", "model-404-generate")
        daemon.on("/api/pull", name)
        with pytest.raises(LoadFailed):
            load(allow_download=True)


class TestALoadThatTakesLong:
    def test_is_waited_for(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        def slow(client: Client, request: Request) -> None:
            client.gone(within_s=1.0)
            replay("load-empty-prompt")(client, request)

        daemon.on("load", slow)
        daemon.on("answer", "generate-stream")
        completion = make_engine(limits={"first_token_s": 0.5}).complete("hi", raw=True, max_tokens=9)
        assert completion.text == "The drum is red."
        assert completion.timings.load_s is not None

    def test_is_stopped_with_its_connection_where_it_exceeds_the_limit(
        self, daemon: StandIn, make_engine: MakeEngine
    ) -> None:
        daemon.on("load", "load-aborted-by-client")
        with pytest.raises(AllBackendsFailed, match=r"load"):
            make_engine(limits={"load_s": 0.5}).complete("hi", raw=True)
        assert daemon.hung_up.wait(5)


def test_a_task_that_it_cannot_do_is_refused(daemon: StandIn) -> None:
    with pytest.raises(LoadFailed, match="ollama does not support the task 'embed'"):
        load(task="embed")
    assert daemon.received == []


def test_requests_run_one_at_a_time_unless_the_daemon_is_said_to_take_more(daemon: StandIn) -> None:
    assert load().concurrency == 1
    assert load(backend_settings='{"parallel": 3}').concurrency == 3
    assert load(backend_settings='{"parallel": 9}', concurrency=4).concurrency == 4


@pytest.mark.parametrize(("keep", "sent"), [("-1", -1.0), ('"1h30m"', "1h30m"), ("0", 0.0), ('"90"', 90.0)])
def test_keep_alive_is_passed_on_in_the_forms_that_ollama_takes(daemon: StandIn, keep: str, sent: object) -> None:
    load(backend_settings=f'{{"keep_alive": {keep}}}')
    assert daemon.bodies("load")[0]["keep_alive"] == sent


def test_without_keep_alive_the_daemon_decides(daemon: StandIn) -> None:
    load()
    assert "keep_alive" not in daemon.bodies("load")[0]
