"""Plugins are found; one that is broken hurts nobody but itself. Numbers are rows of the fault list."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tars_core import BackendStatus, BackendUnavailable, ConfigError, InferenceEngine

ROOT = Path(__file__).parents[1]
GOOD = ["alpha", "prints"]


@pytest.fixture(scope="session")
def broken_plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and install every distribution of tests/plugins_bad and examples, as a user would."""
    folder = tmp_path_factory.mktemp("broken")
    sources = [p.parent for p in sorted((ROOT / "tests" / "plugins_bad").glob("*/pyproject.toml"))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, *sources, ROOT / "examples" / "tars-echo"], check=True)
    return folder


@pytest.fixture
def with_broken_plugins(broken_plugins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(broken_plugins))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken_plugins), os.environ["PYTHONPATH"]]))
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("bad_", "tars_echo")):
            del sys.modules[name]


def _statuses(only: str, **limits: float) -> dict[str, BackendStatus]:
    with InferenceEngine(plugins=only, limits={"import_s": 30.0, **limits}) as engine:
        return {status.name: status for status in engine.backends()}


@pytest.mark.usefixtures("with_broken_plugins")
@pytest.mark.parametrize(
    ("name", "stage", "reason"),
    [
        ("raises", "import", "for another machine (bad_raises.py, line 3)"),
        ("misses-dependency", "import", "No module named 'a_package_nobody_has'"),
        ("calls-sys-exit", "import", "sys.exit('no GPU, no service')"),
        ("calls-os-exit", "import", "exit code 7"),
        ("crashes", "import", "SIGSEGV"),
        ("wrong-arguments", "register", "gpu"),
        ("unknown-hook", "register", "tars_prob"),
        ("probe-crashes", "probe", "its probe ended the process (SIGSEGV)"),
        ("probe-returns-junk", "probe", "must return ProbeReport"),
    ],
)
def test_28_29_a_broken_plugin_is_put_aside_with_stage_reason_and_mend(name: str, stage: str, reason: str) -> None:
    statuses = _statuses(f"alpha,{name}")
    assert statuses["alpha"].available
    assert statuses[name].quarantined == stage
    assert reason in (statuses[name].reason or "")
    assert statuses[name].hint


@pytest.mark.usefixtures("with_broken_plugins")
def test_29_a_plugin_that_hangs_on_import_costs_its_limit_once_and_is_remembered() -> None:
    began = time.monotonic()
    first = _statuses("hangs", import_s=2.0)["hangs"]
    assert 2 <= time.monotonic() - began < 6
    assert "importing it took longer than 2 s" in (first.reason or "")
    with InferenceEngine(plugins="hangs", model="fake:x", limits={"import_s": 20.0}) as engine:
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match="importing it took longer than 2 s"):
            engine.generate("hi")
        assert time.monotonic() - began < 2


@pytest.mark.usefixtures("with_broken_plugins")
def test_29_a_plugin_that_hangs_does_not_use_up_the_time_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nobody was imported before
    statuses = _statuses("alpha,hangs,prints", import_s=5.0)
    assert statuses["hangs"].quarantined == "import"
    assert statuses["alpha"].available
    assert statuses["prints"].quarantined is None


@pytest.mark.usefixtures("with_broken_plugins")
def test_32_a_plugin_of_another_generation_is_reported_and_never_imported() -> None:
    status = _statuses("alpha")["next-generation"]
    assert status.quarantined == "generation"
    assert "tars.plugins.v2" in (status.reason or "")
    assert "upgrade" in (status.hint or "")


@pytest.mark.usefixtures("with_broken_plugins")
def test_with_every_broken_plugin_installed_the_good_ones_still_answer(write_script: Callable[..., str]) -> None:
    from tars_core.testing.fake import BackendScript  # noqa: PLC0415

    model = write_script(alpha=BackendScript())
    with InferenceEngine(model=model, limits={"import_s": 8.0}) as engine:
        assert engine.generate("hi") == "hello"
        states = {status.name: status for status in engine.backends()}
    assert states["raises"].quarantined == states["hangs"].quarantined == "import"


@pytest.mark.usefixtures("with_broken_plugins")
def test_a_plugin_built_and_installed_separately_is_found_and_answers() -> None:
    with InferenceEngine(model="echo:", plugins="echo") as engine:
        assert engine.list_available_backends() == ["echo"]
        assert engine.generate("hello there") == "hello there"
        assert engine.complete("one two three", max_tokens=2).finish_reason == "length"


@pytest.mark.usefixtures("with_broken_plugins")
def test_30_a_plugin_that_prints_on_import_leaves_the_output_of_commands_clean() -> None:
    command = [sys.executable, "-m", "tars_core.cli", "backends", "--json"]
    done = subprocess.run(command, env=os.environ | {"TARS_PLUGINS": "prints"}, capture_output=True, check=True)
    assert "prints" in [status["name"] for status in json.loads(done.stdout)]
    assert b"welcome to my plugin" in done.stderr


def test_31_of_two_plugins_with_one_name_the_first_distribution_wins_and_the_other_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    plant(tmp_path, "alpha", "tars_core.testing.fake:beta", distribution="zz-alpha")
    monkeypatch.syspath_prepend(str(tmp_path))
    with InferenceEngine(plugins="alpha") as engine:
        statuses = engine.backends()
    winner, loser = sorted(statuses, key=lambda s: s.quarantined or "")
    assert (winner.distribution, winner.available) == ("tars-alpha", True)
    assert (loser.distribution, loser.quarantined) == ("zz-alpha", "discovery")
    assert "taken by tars-alpha" in (loser.reason or "")


def test_a_denied_plugin_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    (tmp_path / "leaves_a_mark.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    plant(tmp_path, "marked", "leaves_a_mark")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    for only in ("alpha", "-marked"):
        _statuses(only)
    assert not (tmp_path / "mark").exists()
    _statuses("marked")
    assert (tmp_path / "mark").exists()


def test_18_a_cache_that_cannot_be_written_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "inside"))
    assert _statuses("alpha,beta")["alpha"].available
    assert sum("not writable" in record.message for record in caplog.records) == 1


def test_with_no_backend_installed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", importlib.metadata.EntryPoints)
    with InferenceEngine() as engine:
        assert engine.list_available_backends() == []
        assert engine.get_active_backend() is None
        with pytest.raises(BackendUnavailable, match="pip install"):
            engine.generate("hi")


def test_a_backend_that_is_not_installed_is_named_with_the_nearest_that_is() -> None:
    with InferenceEngine(plugins="alpha", backend="alfa") as engine, pytest.raises(ConfigError, match="alpha"):
        engine.generate("hi")


def test_discovery_and_probing_import_no_runtime() -> None:
    code = (
        "import sys; from tars_core import InferenceEngine; e = InferenceEngine(); e.backends(); e.plan(); e.close();"
        "print(sorted({'torch', 'transformers', 'llama_cpp', 'xllamacpp', 'ollama'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
