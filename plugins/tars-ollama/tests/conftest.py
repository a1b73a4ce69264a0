"""A daemon and an engine of each test's own, on a machine without settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tars_core import InferenceEngine
from tars_core.testing import fake

sys.path.insert(0, str(Path(__file__).parent))  # for the stand-in

from ollama_live import live_daemon
from ollama_stand_in import StandIn

QUICK = {"load_s": 10.0, "first_token_s": 5.0, "between_tokens_s": 5.0, "total_s": 20.0, "probe_s": 1.0}

MakeEngine = Callable[..., InferenceEngine]


@pytest.fixture(scope="session", autouse=True)
def _own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith(("TARS_", "OLLAMA_"))]:
            patch.delenv(variable)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        yield


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Run a stand-in that knows and loads the recorded model ``tiny``; what it answers is each test's business."""
    with StandIn() as server:
        server.on("/api/version", "version")
        server.on("/api/tags", "tags")
        server.on("/api/show", "show")
        server.on("/api/ps", "ps-loaded")
        server.on("load", "load-empty-prompt")
        monkeypatch.setenv("OLLAMA_HOST", server.address)
        yield server


@pytest.fixture(scope="session")
def demo_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Run a stand-in that really answers, as ``tars-demo``."""
    with live_daemon(tmp_path_factory.mktemp("ollama")) as server:
        yield server


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """Return a function that makes an engine for ``tiny``; with a ``fallback`` script, a fake backend comes next."""
    engines: list[InferenceEngine] = []

    def make(
        *, fallback: tuple[fake.Act, ...] | None = None, limits: dict[str, float] | None = None, **settings: object
    ) -> InferenceEngine:
        refs = ["ollama:tiny"]
        extra = {}
        if fallback is not None:
            script = tmp_path / "script.json"
            backends = {"fallback": fake.BackendScript(generate=fallback)}
            script.write_bytes(msgspec.json.encode(fake.Script(backends=backends)))
            refs.append(f"fake:{script}")
            extra["fallback"] = fake.FakeBackend("fallback")
        # In this process: quick, and seen by whoever measures coverage. The tests of whole flows take the other way.
        defaults: dict[str, object] = {"isolation": "none", "plugins": "ollama", "model": "it", "models": {"it": refs}}
        engine = InferenceEngine({**defaults, **settings, "limits": {**QUICK, **(limits or {})}}, extra_plugins=extra)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
