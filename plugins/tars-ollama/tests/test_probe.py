"""What is told of the daemon before anything is asked of it: on, off, wedged, without the model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from ollama_stand_in import Client, Request, StandIn, answering, sending

from tars_core import BackendUnavailable, ConfigError, InferenceEngine, ModelRef, ProbeReport
from tars_core.plugin import ProbeLimits
from tars_core.testing.fake import Finish, Say
from tars_ollama import plugin

MakeEngine = Callable[..., InferenceEngine]

LIMITS = ProbeLimits(deadline_s=1.0)


def probe(name: str | None = None, settings: str = "{}") -> ProbeReport:
    model = None if name is None else ModelRef.parse(name)
    report = plugin.tars_probe(model=model, limits=LIMITS, backend_settings=settings)
    assert report is not None
    return report


@pytest.fixture
def nothing_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point at a port where nobody listens, and nobody will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*bound.getsockname())
        monkeypatch.setenv("OLLAMA_HOST", address)
        yield address


class TestADaemonThatIsOff:
    def test_is_found_out_in_a_moment_with_the_command_that_starts_it(self, nothing_there: str) -> None:
        probe()  # what is imported once is paid once
        began = time.monotonic()
        report = probe("ollama:tiny")
        assert time.monotonic() - began < 0.2
        assert not report.available
        assert report.hint == "ollama serve"
        assert report.reason == f"Ollama does not answer at http://{nothing_there}: nothing listens there"

    @pytest.mark.usefixtures("nothing_there")
    def test_is_found_out_in_a_moment_by_a_new_process_too(self) -> None:
        code = (
            "import time; from tars_core.plugin import ProbeLimits; from tars_ollama import plugin\n"
            "began = time.monotonic()\n"
            "report = plugin.tars_probe(model=None, limits=ProbeLimits(), backend_settings='{}')\n"
            "print(time.monotonic() - began, report.available)\n"
            "import sys; print(sorted({'httpx', 'pydantic', 'ollama'} & set(sys.modules)))"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        first, imported = ran.stdout.splitlines()
        seconds, available = first.split()
        assert float(seconds) < 0.2
        assert (available, imported) == ("False", "[]")

    @pytest.mark.usefixtures("nothing_there")
    def test_offers_no_models_and_is_no_error(self) -> None:
        assert plugin.tars_models(backend_settings="{}") == ()

    @pytest.mark.usefixtures("nothing_there")
    def test_is_listed_with_its_mend(self, make_engine: MakeEngine) -> None:
        (status,) = make_engine().backends()
        assert (status.name, status.available, status.hint) == ("ollama", False, "ollama serve")

    @pytest.mark.usefixtures("nothing_there")
    def test_leaves_unrelated_models_alone(self, make_engine: MakeEngine) -> None:
        completion = make_engine(fallback=(Say("hello"), Finish())).complete("hi")
        assert (completion.text, completion.backend) == ("hello", "fallback")
        assert "ollama serve" in {rejection.hint for rejection in completion.decision.rejected}


@pytest.mark.parametrize("model", [None, "ollama:tiny"])
def test_a_page_of_html_is_not_taken_for_ollama(daemon: StandIn, model: str | None) -> None:
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n"
    for path in ("/api/version", "/api/show"):
        daemon.on(path, sending(head + b"<!DOCTYPE HTML>"))
    report = probe() if model is None else probe(model)
    assert "what answers there is not Ollama" in (report.reason or "")
    assert "<" not in (report.reason or "")


class TestADaemonThatIsWedged:
    def test_is_unavailable_within_the_deadline(self, daemon: StandIn) -> None:
        daemon.on("/api/version", lambda client, _: client.hang())
        began = time.monotonic()
        report = probe()
        assert time.monotonic() - began < LIMITS.deadline_s
        assert report.reason is not None
        assert "no answer within" in report.reason
        assert daemon.hung_up.wait(5), "the connection was left open"

    def test_that_sends_its_head_a_byte_at_a_time_is_too(self, daemon: StandIn) -> None:
        def dripping(client: Client, request: Request) -> None:
            client.send(b"HTTP/1.1 200 OK\r\nX: ")
            while not client.gone(within_s=0.05):
                client.send(b"x")
            daemon.hung_up.set()

        daemon.on("/api/version", dripping)
        began = time.monotonic()
        assert not probe().available
        assert time.monotonic() - began < LIMITS.deadline_s
        assert daemon.hung_up.wait(5), "the thread was left behind"

    def test_is_not_quarantined_for_it(self, daemon: StandIn, make_engine: MakeEngine) -> None:
        daemon.on("/api/version", lambda client, _: client.hang())
        daemon.on("/api/tags", lambda client, _: client.hang())
        engine = make_engine()
        assert engine.models()[-1].name == ModelRef.parse("it")
        (status,) = engine.backends()
        assert (status.available, status.quarantined) == (False, None)


class TestADaemonThatIsUp:
    @pytest.mark.usefixtures("daemon")
    def test_is_available(self) -> None:
        assert probe().available

    @pytest.mark.usefixtures("daemon")
    def test_knows_a_models_facts(self) -> None:
        report = probe("ollama:tiny")
        assert (report.available, report.device, report.context_length) == (True, "cpu", 256)

    @pytest.mark.parametrize(("vram", "device"), [(0, "cpu"), (1111489, "gpu"), (1000, "gpu+cpu")])
    def test_tells_where_a_loaded_model_runs(self, daemon: StandIn, vram: int, device: str) -> None:
        entry = {"name": "tiny:latest", "size": 1111489, "size_vram": vram}
        daemon.on("/api/ps", answering({"models": [entry]}))
        assert probe("ollama:Tiny").device == device

    def test_may_keep_a_model_for_some_centuries(self, daemon: StandIn) -> None:
        daemon.on("/api/ps", "ps-keep-alive-minus-1")
        assert probe("ollama:tiny").device == "cpu"

    def test_does_not_guess_where_a_model_would_run(self, daemon: StandIn) -> None:
        daemon.on("/api/ps", "ps-empty")
        assert probe("ollama:tiny").device is None

    def test_without_the_model_gives_the_command_that_fetches_it(self, daemon: StandIn) -> None:
        daemon.on("/api/show", "model-404-generate")
        report = probe("ollama:nope")
        assert (report.available, report.hint) == (False, "ollama pull nope")

    @pytest.mark.parametrize("name", ["model-bad-name", "model-cloud-name", "host-header-403", "unknown-path-404"])
    def test_that_refuses_is_unavailable_with_a_reason(self, daemon: StandIn, name: str) -> None:
        daemon.on("/api/show", name)
        report = probe("ollama:x")
        assert not report.available
        assert report.reason

    @pytest.mark.parametrize(
        "sent", [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 99, b""]
    )
    def test_may_be_something_else(self, daemon: StandIn, sent: bytes) -> None:
        daemon.on("/api/show", sending(sent))
        assert not probe("ollama:x").available

    @pytest.mark.usefixtures("daemon")
    def test_lists_its_models(self) -> None:
        names = [str(model.name) for model in plugin.tars_models(backend_settings="{}")]
        assert names == ["ollama:tiny:latest", "ollama:tinysys:latest", "ollama:q:latest"]

    def test_lists_neither_embedders_nor_what_runs_in_a_cloud(self, daemon: StandIn) -> None:
        models = [
            {"name": "e:latest", "capabilities": ["embedding"]},
            {"name": "c:cloud", "capabilities": ["completion"], "remote_host": "https://example.com"},
        ]
        daemon.on("/api/tags", answering({"models": models}))
        assert plugin.tars_models(backend_settings="{}") == ()

    @pytest.mark.parametrize("name", ["tags-empty", "tags-with-damage", "unknown-path-404"])
    def test_lists_what_there_is_of_it(self, daemon: StandIn, name: str) -> None:
        daemon.on("/api/tags", name)
        assert len(plugin.tars_models(backend_settings="{}")) == (4 if name == "tags-with-damage" else 0)

    def test_refuses_an_embedding_model(self, daemon: StandIn) -> None:
        daemon.on("/api/show", answering({"capabilities": ["embedding"]}))
        assert probe("ollama:e").reason == "it writes no text; it can embedding"


def test_other_kinds_of_models_are_not_asked_about() -> None:
    assert plugin.tars_probe(model=ModelRef.parse("hf:a/b"), limits=LIMITS, backend_settings="{}") is None


@pytest.mark.usefixtures("daemon")
def test_a_blank_name_is_unavailable() -> None:
    assert probe("ollama: ").hint == "name one: ollama:llama3"


def test_another_scheme_than_http_is_unavailable_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "ftp://127.0.0.1:1")
    assert "not ftp" in str(probe().reason)


def test_the_setting_host_is_where_everything_goes(
    daemon: StandIn, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    daemon.on("answer", "generate-stream")
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1:"):
        make_engine().generate("hi")
    engine = make_engine(backends={"ollama": {"host": daemon.address}})
    assert engine.complete("hi", raw=True, max_tokens=9).text == "The drum is red."
    assert engine.backends()[0].available


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize("wrong", [{"hots": "x"}, {"keep_alive": "soon"}, {"parallel": 0}])
def test_a_setting_that_cannot_be_meant_is_an_error(make_engine: MakeEngine, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"backends\.ollama"):
        make_engine(backends={"ollama": wrong}).generate("hi")
