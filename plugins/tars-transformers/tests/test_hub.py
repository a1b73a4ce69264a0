"""``hf:`` models: found in the cache without the network, fetched only where allowed. The hub is a stand-in."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tars_demo_model
from tars_core import AllBackendsFailed, InferenceEngine, ModelNotFound
from tars_core.plugin import ModelRef, ProbeLimits, ProbeReport
from tars_transformers import TransformersBackend, checkpoint, hub, plugin

WEIGHTS = tars_demo_model.WEIGHTS
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {file.name: file.read_bytes() for file in WEIGHTS.iterdir() if file.suffix != ".gguf"}
DANGEROUS = {"pytorch_model.bin": b"\x80\x04.", "modeling_evil.py": b"raise SystemExit"}


class StandIn(ThreadingHTTPServer):
    """Answers as the hub does; ``refusal`` is the status and error code it refuses a repository with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.refusal: tuple[int, str] | None = None
        self.cut: str | None = None  # a file whose connection breaks in the middle


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        files = FILES | DANGEROUS
        name = path.rpartition("/")[2]
        if self.server.refusal is not None:
            status, code = self.server.refusal
            self._answer(b"", status, {"X-Error-Code": code, "X-Error-Message": code})
        elif "/resolve/" in path:
            etag = hashlib.sha1(files[name], usedforsecurity=False).hexdigest()
            self._answer(
                files[name], 200, {"X-Repo-Commit": REVISION, "ETag": f'"{etag}"'}, cut=name == self.server.cut
            )
        elif "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in files.items()]
            self._answer(json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": n} for n in files]
            self._answer(json.dumps({"id": "org/name", "sha": REVISION, "siblings": siblings}).encode())

    def _answer(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _probe(name: str) -> ProbeReport | None:
    return plugin.tars_probe(model=ModelRef.parse(name), limits=ProbeLimits())


def _plant(cache: Path, revision: str = REVISION) -> Path:
    """Put the demo model into a cache as huggingface_hub lays it out."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for name, data in FILES.items():
        (snapshot / name).write_bytes(data)
    return snapshot


def _load(name: str, *, allow_download: bool) -> str:
    with InferenceEngine(backend="transformers", model=name, threads=1, allow_download=allow_download) as engine:
        return engine.generate("Hola", temperature=0)


class TestTheCache:
    @pytest.mark.parametrize(
        ("variable", "folder"),
        [
            ("HF_HOME", "hub"),
            ("HF_HUB_CACHE", ""),
            ("HUGGINGFACE_HUB_CACHE", ""),
            ("XDG_CACHE_HOME", "huggingface/hub"),
        ],
    )
    def test_is_where_the_hubs_own_client_has_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, folder: str
    ) -> None:
        for other in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(variable, str(tmp_path))
        snapshot = _plant(tmp_path / folder)
        assert hub.cached("org/name") == snapshot
        report = _probe("hf:org/name")
        assert report is not None
        assert report.weights_id == checkpoint.inspect(WEIGHTS).weights_id

    @pytest.mark.parametrize("revision", ["", "main", "../../../etc", "0" * 40, "\xff"])
    def test_with_a_reference_that_leads_nowhere_holds_nothing(self, home: Path, revision: str) -> None:
        _plant(home / "hub", revision)
        assert hub.cached("org/name") is None

    def test_with_pickles_alone_is_refused_for_that(self, home: Path) -> None:
        snapshot = _plant(home / "hub")
        (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
        report = _probe("hf:org/name")
        assert report is not None
        assert "pickle checkpoints can run code" in str(report.reason)

    @pytest.mark.parametrize("name", ["hf:../../etc", "hf:org/name:model.gguf", "hf:/etc", "hf:", "hf:a/b/c"])
    def test_is_not_asked_for_what_is_no_repository(self, name: str) -> None:
        assert _probe(name) is None


class TestWithoutAllowDownload:
    def test_nothing_is_fetched_and_the_error_says_how(self, server: StandIn) -> None:
        report = _probe("hf:org/name")
        assert report is not None
        assert report.available
        with pytest.raises(AllBackendsFailed, match="hf:org/name is not on this machine") as caught:
            _load("hf:org/name", allow_download=False)
        assert "hf download org/name" in str(caught.value)
        assert server.asked == []

    @pytest.mark.usefixtures("home")
    def test_the_backend_alone_takes_a_repository_for_one(self) -> None:
        with pytest.raises(ModelNotFound, match="hf:microsoft/phi-2 is not on this machine"):
            TransformersBackend(model_name="microsoft/phi-2", device="cuda")


class TestDownload:
    def test_brings_weights_and_tokenizer_and_nothing_that_could_run(self, server: StandIn) -> None:
        assert _load("hf:org/name", allow_download=True)
        fetched = {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}
        assert fetched == FILES.keys()
        report = _probe("hf:org/name")
        assert report is not None
        assert report.weights_id == checkpoint.inspect(WEIGHTS).weights_id

    @pytest.mark.parametrize(
        ("refusal", "words"),
        [
            ((403, "GatedRepo"), "given only to those who accepted its terms"),
            ((404, "RepoNotFound"), "there is no hf:org/name"),
            ((500, "Broken"), "hf:org/name cannot be fetched"),
        ],
    )
    def test_that_is_refused_says_why(self, server: StandIn, refusal: tuple[int, str], words: str) -> None:
        server.refusal = refusal
        with pytest.raises(AllBackendsFailed, match=words):
            _load("hf:org/name", allow_download=True)

    def test_that_breaks_off_is_no_model_and_can_be_taken_up_again(self, server: StandIn) -> None:
        server.cut = "model.safetensors"
        with pytest.raises(AllBackendsFailed, match="hf:org/name cannot be fetched"):
            _load("hf:org/name", allow_download=True)
        assert hub.cached("org/name") is None
        report = _probe("hf:org/name")
        assert report is not None
        assert report.available
