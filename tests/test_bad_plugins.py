"""Plugins that answer nonsense, in ways that a type checker would have told their authors."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tars_core import BackendUnavailable, ConfigError, InferenceEngine, RequestError, StreamInterrupted
from tars_core.plugin import (
    BackendEvent,
    Finished,
    GenerationFailed,
    LoadedModel,
    ModelRef,
    OfferedModel,
    ProbeReport,
    TextDelta,
    Usage,
    hookimpl,
)
from tars_core.testing.fake import BackendScript, Finish, Overflow, Raise, Say, Wait

MakeEngine = Callable[..., InferenceEngine]
END = Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))


class Plugin:
    """One that works; each test breaks a part of it."""

    report: Any = ProbeReport(available=True)
    loaded: Any = MappingProxyType({"device": "cpu", "context_length": 10})
    events: tuple[Any, ...] = (TextDelta(text="from the object"), END)
    models: Any = ()

    @hookimpl
    def tars_probe(self) -> ProbeReport | None:
        report: ProbeReport | None = self.report
        return report

    @hookimpl
    def tars_models(self) -> Sequence[OfferedModel]:
        models: Sequence[OfferedModel] = self.models
        return models

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return LoadedModel(**self.loaded)

    @hookimpl
    def tars_generate(self) -> Iterator[BackendEvent]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event


class UntoldError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class HalfBuiltError(GenerationFailed):
    def __init__(self) -> None:
        """Forget to call the base class."""


def answer(plugin: object, write_script: Callable[..., str], settings: dict[str, object] | None = None) -> str:
    model = write_script(alpha=BackendScript())
    with InferenceEngine(
        settings, model=model, plugins="alpha", extra_plugins={"object": plugin}, prefer=("object",)
    ) as engine:
        return engine.generate("hi")


def test_the_plugin_that_the_others_are_broken_copies_of_works(write_script: Callable[..., str]) -> None:
    assert answer(Plugin(), write_script) == "from the object"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("report", ProbeReport(available=True, memory_bytes="8 GB")),  # type: ignore[arg-type]
        ("report", ProbeReport(available=True, weights_id=["a"])),  # type: ignore[arg-type]
        ("loaded", {"device": "cpu", "context_length": 10, "concurrency": None}),
        ("loaded", {"device": None, "context_length": 10}),
        ("models", [OfferedModel(name=ModelRef(scheme="fake", rest="x"), refs=None)]),  # type: ignore[arg-type]
        ("models", 5),
        ("events", (TextDelta(text=b"bytes"), END)),  # type: ignore[arg-type]
        ("events", (TextDelta(text="x", token_ids=("1",)), END)),  # type: ignore[arg-type]
        ("events", (TextDelta(text="\ud800"), END)),
        ("events", (UntoldError(),)),
        ("events", (HalfBuiltError(),)),
    ],
    ids=str,
)
def test_33_an_answer_of_the_wrong_type_hands_over(part: str, value: object, write_script: Callable[..., str]) -> None:
    plugin = Plugin()
    setattr(plugin, part, value)
    assert answer(plugin, write_script) == "hello"


def test_settings_that_a_plugin_cannot_describe_put_it_aside(write_script: Callable[..., str]) -> None:
    class Describes(Plugin):
        @hookimpl
        def tars_settings(self) -> type[Any]:
            raise ImportError("no yaml here")

    assert answer(Describes(), write_script, {"backends": {"object": {"a": 1}}}) == "hello"


def test_28_an_object_whose_hooks_are_none_of_ours_is_put_aside(write_script: Callable[..., str]) -> None:
    class Misspelt(Plugin):
        @hookimpl
        def tars_probee(self) -> None:
            pass

    twice = Plugin()
    model = write_script(alpha=BackendScript())
    with InferenceEngine(
        model=model, plugins="alpha", extra_plugins={"bad": Misspelt(), "one": twice, "two": twice}
    ) as engine:
        statuses = {status.name: status for status in engine.backends()}
        assert engine.generate("hi") in ("hello", "from the object")
    assert statuses["bad"].quarantined == statuses["two"].quarantined == "register"
    assert "tars_probee" in (statuses["bad"].reason or "")


@pytest.mark.parametrize("given", [5, "alpha", [Plugin()]], ids=str)
def test_extra_plugins_that_are_no_mapping_are_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="extra_plugins"):
        InferenceEngine(extra_plugins=given)  # type: ignore[arg-type]


# ---- a batch: one request's fault is not the others' -------------------------------------------

BATCHED = """
import time
from tars_core.plugin import Finished, LoadedModel, ProbeReport, TextDelta, Usage, hookimpl

class Model(LoadedModel):
    def __init__(self):
        super().__init__(device="cpu", context_length=99, concurrency=4)
        self.running = {}
    def prepare(self, request):
        return request

    def submit(self, request_id, request):
        self.running[request_id] = [0, request.prompt]
    def step(self):
        time.sleep(0.02)
        events = []
        for request_id, state in list(self.running.items()):
            state[0] += 1
            if state[0] == 3 and "surrogate" in state[1]:
                events.append((request_id, TextDelta(text="\\ud800")))
            elif state[0] == 3 and "tokens" in state[1]:
                events.append((request_id, TextDelta(text="x", token_ids=(1.5,))))
            elif state[0] < 30:
                events.append((request_id, TextDelta(text="a")))
            else:
                del self.running[request_id]
                usage = Usage(prompt_tokens=1, completion_tokens=29)
                events.append((request_id, Finished(finish_reason="stop", usage=usage)))
        return events
    def cancel(self, request_id):
        del self.running[request_id]
        raise KeyError(request_id)

@hookimpl
def tars_probe(model): return ProbeReport(available=True)
@hookimpl
def tars_load(model): return Model()
"""


@pytest.fixture
def batched(tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceEngine]:
    (tmp_path / "batched_plugin.py").write_text(BATCHED)
    plant(tmp_path, "batched", "batched_plugin")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    with InferenceEngine(plugins="batched", model="any:x") as engine:
        engine.load()
        yield engine
    sys.modules.pop("batched_plugin", None)


@pytest.mark.parametrize("fault", ["surrogate", "tokens", "cancel"])
def test_33_in_a_batch_the_fault_of_one_request_leaves_the_others_alone(batched: InferenceEngine, fault: str) -> None:
    answers: list[str] = []
    innocent = threading.Thread(target=lambda: answers.append(batched.generate("innocent")))
    innocent.start()
    time.sleep(0.1)
    stream = batched.stream(fault)
    next(stream)
    next(stream)
    if fault == "cancel":
        stream.close()
    else:
        with pytest.raises(StreamInterrupted, match="invalid TextDelta"):
            list(stream)
    innocent.join(10)
    assert answers == ["a" * 29]


# ---- discovery ---------------------------------------------------------------------------------


HOOK = """
from tars_core.plugin import hookimpl

@hookimpl
def tars_models():
    return ()
"""


@pytest.fixture
def planted(tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that installs a plugin ``planted`` with the code given; it returns its module."""

    def install(code: str) -> Path:
        """Install ``code`` with a hook behind it, so that it is a plugin."""
        module = tmp_path / "site" / "planted_plugin" / "__init__.py"
        module.parent.mkdir(parents=True)
        module.write_text(code + HOOK)
        plant(tmp_path / "site", "planted", "planted_plugin")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
        monkeypatch.delitem(sys.modules, "planted_plugin", raising=False)
        return module

    return install


def test_29_what_a_plugin_starts_and_leaves_behind_does_not_hold_discovery_up(
    planted: Callable[[str], Path], write_script: Callable[..., str]
) -> None:
    planted("import os\nif os.fork() == 0:\n    os.execvp('sleep', ['sleep', '20'])\n")
    began = time.monotonic()
    with InferenceEngine(model=write_script(alpha=BackendScript()), plugins="alpha,planted") as engine:
        assert engine.generate("hi") == "hello"
    assert time.monotonic() - began < 10


def test_18_without_a_folder_for_temporary_files_plugins_are_found_all_the_same(
    planted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("")
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with InferenceEngine(plugins="planted") as engine:
        (status,) = engine.backends()
    assert status.quarantined is None


def test_29_a_probe_that_hangs_at_first_is_named_as_such(planted: Callable[[str], Path]) -> None:
    planted("import time\nfrom tars_core.plugin import hookimpl\n@hookimpl\ndef tars_probe(): time.sleep(60)\n")
    with InferenceEngine(plugins="planted", limits={"import_s": 2.0}) as engine:
        (status,) = engine.backends()
    assert (status.quarantined, status.reason) == ("probe", "its probe took longer than 2 s")


@pytest.mark.parametrize("choice", ["beta", "-alpha"])
def test_a_backend_that_the_setting_plugins_leaves_out_is_not_called_missing(choice: str) -> None:
    engine = InferenceEngine(plugins=choice, backend="alpha", model="fake:x")
    with engine, pytest.raises(ConfigError, match="leaves out alpha"):
        engine.plan()


def test_a_misspelt_name_in_the_setting_plugins_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = InferenceEngine(plugins="alpah", model="fake:x")
    with engine, pytest.raises(ConfigError, match="leaves out alpha, beta"):
        engine.plan()
    assert "alpah, which is not installed; did you mean alpha?" in caplog.text


def test_a_link_that_leads_nowhere_in_a_plugins_folder_is_no_matter(planted: Callable[[str], Path]) -> None:
    module = planted("")
    (module.parent / ".#__init__.py").symlink_to("somebody@a-host.1234")  # what Emacs leaves beside an open file
    with InferenceEngine(plugins="alpha,planted") as engine:
        assert {status.name for status in engine.backends()} == {"alpha", "planted"}


LEAVE = """
import os, sys, tars_core.engine, tars_core.cli.app, tars_core.cli.listing
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
"""


def without_a_folder(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    gone = tmp_path / "gone"
    gone.mkdir()
    return subprocess.run(
        [sys.executable, "-c", LEAVE + script, gone],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TARS_PLUGINS": "alpha", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        timeout=60,
    )


@pytest.mark.skipif(sys.version_info[:2] == (3, 13), reason="Python 3.13.0 cannot import an extension module there")
def test_discovery_works_where_the_current_folder_was_removed(tmp_path: Path) -> None:
    done = without_a_folder(
        "from tars_core import InferenceEngine; print([b.name for b in InferenceEngine().backends()])", tmp_path
    )
    assert done.stdout == "['alpha']\n", done.stderr


def test_the_command_line_says_that_the_current_folder_was_removed(tmp_path: Path) -> None:
    done = without_a_folder("sys.argv = ['tars', 'backends']; from tars_core.cli import main; main()", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: the current folder has been removed")


def test_where_no_process_can_be_started_the_plugin_is_put_aside_with_the_reason(
    planted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with InferenceEngine(plugins="planted") as engine:
        (status,) = engine.backends()
    assert status.quarantined == "import"
    assert "/no/such/python" in (status.reason or "")


def test_a_plugin_that_was_mended_is_found_again_by_the_next_listing(
    planted: Callable[[str], Path], tmp_path: Path
) -> None:
    crash = tmp_path / "crash"
    crash.touch()
    planted(f"import os\nfrom pathlib import Path\nif Path({str(crash)!r}).exists():\n    os._exit(5)\n")
    with InferenceEngine(plugins="planted") as engine:
        with pytest.raises(BackendUnavailable, match="exit code 5"):
            engine.plan()
        crash.unlink()
        (status,) = engine.backends()
    assert status.quarantined is None


# ---- in the midst of a request -----------------------------------------------------------------


def test_a_backend_put_aside_after_the_decision_is_passed_over(
    write_script: Callable[..., str], tmp_path: Path
) -> None:
    model = write_script(alpha=BackendScript(), beta=BackendScript())
    with InferenceEngine(model=model, plugins="alpha,beta", limits={"probe_s": 1.0}) as engine:
        assert len(engine.plan().candidates) == 2
        path = Path(model.removeprefix("fake:"))
        good = path.read_bytes()
        raises = BackendScript(probe=(Raise("RuntimeError", "no"),))
        path.write_bytes(Path(write_script(alpha=raises, beta=raises).removeprefix("fake:")).read_bytes())
        with pytest.raises(BackendUnavailable):
            engine.plan()
        path.write_bytes(good)
        with pytest.raises(BackendUnavailable, match="put aside"):
            engine.generate("hi")


def test_a_backend_that_finds_the_request_wrong_after_its_first_text_has_interrupted_it(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("so far"), Overflow())))
    with pytest.raises(StreamInterrupted) as caught:
        engine.generate("hi")
    assert caught.value.partial_text == "so far"


def test_without_isolation_all_who_share_a_hung_backend_are_told_the_reason(make_engine: MakeEngine) -> None:
    engine = make_engine(
        options={"isolation": "none"},
        limits={"between_tokens_s": 1.0},
        alpha=BackendScript(generate=(Say("a"), Wait(3.0, deaf=True), Finish())),
    )
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(StreamInterrupted) as caught:
            engine.generate("hi")
        told.append(caught.value.cause.message)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(20)
    assert told == ["no progress within 1 s (between tokens)"] * 2


def test_24_a_request_too_large_to_send_is_refused_and_its_neighbours_go_on(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("a"), Wait(4.0), Say("b"), Finish())))
    answers: list[str] = []
    neighbour = threading.Thread(target=lambda: answers.append(engine.generate("hi")))
    neighbour.start()
    huge = "x" * (60 * 2**20)
    with pytest.raises(RequestError, match="bytes"):
        engine.complete(messages=[{"role": "user", "content": huge}] * 5)
    neighbour.join(20)
    assert answers == ["ab"]
