"""What plugins are asked, how long that may take, and who waits for it. Numbers are rows of the fault list."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import pydantic
import pytest

from tars_core import BackendUnavailable, InferenceEngine, TarsError, TextDelta
from tars_core.plugin import (
    BackendEvent,
    Finished,
    LoadedModel,
    ModelRef,
    OfferedModel,
    ProbeReport,
    Usage,
    hookimpl,
)
from tars_core.testing.fake import BackendScript, Script, Wait
from tars_core.testing.watching import until
from tars_core.types.observed import Observed

MakeEngine = Callable[..., InferenceEngine]
T = TypeVar("T")
E = TypeVar("E", bound=Observed)
LATE = BackendScript(probe=(Wait(1.5, deaf=True),))


def rewrite(engine: InferenceEngine, **backends: BackendScript) -> None:
    """Let the fakes do something else from now on; a loaded one, from its next load on."""
    model = engine.settings.model or ""
    path = Path(model.removeprefix("fake:"))
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(Script(backends=backends)))
    new.replace(path)


@pytest.fixture
def never_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each request find its decision outdated, as after half a minute."""
    monkeypatch.setattr("tars_core.runtime.decisions._FRESH_S", 0.0)


# ---- 42: a probe that is late ------------------------------------------------------------------


@pytest.mark.usefixtures("never_fresh")
def test_42_a_loaded_model_goes_on_answering_while_its_probe_is_late(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(), limits={"probe_s": 0.2})
    pid = engine.load().pid
    rewrite(engine, alpha=BackendScript(probe=(Wait(4, deaf=True),)))
    assert [candidate.backend for candidate in engine.plan().candidates] == ["alpha"]
    for _ in range(5):
        assert engine.complete("hi").timings.load_s is None
    rewrite(engine, alpha=BackendScript(device="npu"))
    until(lambda: engine.plan().candidates[0].report.device == "npu")  # and then the fresh answer counts
    assert engine.load().pid == pid


@pytest.mark.usefixtures("never_fresh")
def test_42_a_backend_whose_probe_is_late_is_passed_over_and_asked_again(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=LATE, beta=BackendScript(), limits={"probe_s": 0.3})
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    (late,) = (rejection for rejection in completion.decision.rejected if rejection.backend == "alpha")
    assert late.reason == "its probe gave no answer within 0.3 s"
    assert "asked again" in (late.hint or "")
    assert all(status.quarantined is None for status in engine.backends())
    rewrite(engine, alpha=BackendScript(), beta=BackendScript())
    until(lambda: engine.complete("hi").backend == "alpha")


def test_42_where_only_late_backends_could_answer_they_get_more_time(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(probe=(Wait(0.6, deaf=True),)), limits={"probe_s": 0.3})
    assert engine.generate("hi") == "hello"


@pytest.mark.usefixtures("never_fresh")
def test_42_a_probe_that_hangs_holds_one_thread_however_often_it_is_asked(make_engine: MakeEngine) -> None:
    before = set(threading.enumerate())
    engine = make_engine(
        alpha=BackendScript(probe=(Wait(8, deaf=True),)), beta=BackendScript(), limits={"probe_s": 0.1}
    )
    for _ in range(6):
        assert engine.plan().candidates[0].backend == "beta"
    asking = [t for t in threading.enumerate() if t not in before and "'tars_probe', 'alpha', ModelRef" in t.name]
    assert len(asking) == 1


# ---- 48: decisions that nobody waits for any more ----------------------------------------------


class Slow(LoadedModel):
    """A plugin whose probe takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(device="cpu", context_length=512, concurrency=16)
        self.seconds = seconds
        self.asked: list[ModelRef] = []
        self.at_once = 0
        """Threads that decided, one of which may just have been about to end."""
        self._before = set(threading.enumerate())

    @hookimpl
    def tars_probe(self, model: ModelRef | None) -> ProbeReport:
        if model is not None:
            self.asked.append(model)
            deciding = [t for t in threading.enumerate() if t.name == "tars-decide" and t not in self._before]
            self.at_once = max(self.at_once, len(deciding))
            time.sleep(self.seconds)
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return self

    @hookimpl
    def tars_generate(self) -> Iterator[BackendEvent]:
        yield TextDelta(text="here")
        yield Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))


def test_48_callers_who_give_up_leave_one_decision_to_those_who_come_after_them() -> None:
    slow = Slow(0.8)
    with InferenceEngine(model="slow:x", plugins="slow", extra_plugins={"slow": slow}) as engine:
        engine.backends()

        async def ask() -> str:
            for _ in range(12):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(engine.agenerate("hi"), 0.02)
            return await engine.agenerate("hi")

        assert asyncio.run(ask()) == "here"
    assert len(slow.asked) == 1
    assert slow.at_once <= 2


def test_48_callers_who_ask_at_once_share_one_decision() -> None:
    slow = Slow(0.3)
    with (
        InferenceEngine(model="slow:x", plugins="slow", extra_plugins={"slow": slow}) as engine,
        ThreadPoolExecutor(12) as pool,
    ):
        assert list(pool.map(lambda _: engine.generate("hi"), range(12))) == ["here"] * 12
    assert len(slow.asked) == 1


def test_48_callers_of_many_models_who_give_up_leave_no_threads() -> None:
    slow = Slow(0.1)
    with InferenceEngine(plugins="slow", extra_plugins={"slow": slow}) as engine:
        engine.backends()

        async def ask() -> str:
            for number in range(12):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(engine.agenerate("hi", model=f"slow:{number}"), 0.01)
            return await engine.agenerate("hi", model="slow:last")

        assert asyncio.run(ask()) == "here"
    assert slow.at_once <= 2


@pytest.mark.usefixtures("never_fresh")
def test_48_a_decision_is_refreshed_behind_the_back_of_those_whose_model_is_loaded() -> None:
    slow = Slow(0.0)
    with InferenceEngine(model="slow:x", plugins="slow", extra_plugins={"slow": slow}) as engine:
        engine.generate("hi")
        slow.seconds = 0.8
        for _ in range(20):
            assert engine.generate("hi") == "here"
    assert len(slow.asked) < 10  # had they waited, it were 21
    assert slow.at_once <= 2


# ---- 49: calls that hang -----------------------------------------------------------------------


class Gated:
    """A plugin whose hooks hang while its gate is shut, one by one."""

    def __init__(self, *hang: str) -> None:
        self._hang = hang
        self.gate = threading.Event()

    def _pass(self, hook: str) -> None:
        if hook in self._hang:
            self.gate.wait(60)

    @hookimpl
    def tars_models(self) -> Sequence[OfferedModel]:
        self._pass("tars_models")
        return ()

    @hookimpl
    def tars_settings(self) -> type[pydantic.BaseModel]:
        self._pass("tars_settings")
        outer = self

        class Own(pydantic.BaseModel):
            a: int

            @pydantic.field_validator("a")
            @classmethod
            def check(cls, value: int) -> int:
                outer._pass("validator")
                if "raises" in outer._hang:
                    raise RuntimeError("oops")
                return value

        return Own


@pytest.fixture
def beside(write_script: Callable[..., str]) -> Iterator[Callable[[Gated], InferenceEngine]]:
    """Return a function that makes an engine with a healthy backend beside the plugin given."""
    made: list[tuple[Gated, InferenceEngine]] = []

    def make(plugin: Gated) -> InferenceEngine:
        engine = InferenceEngine(
            {"backends": {"gated": {"a": 1}}},
            model=write_script(alpha=BackendScript()),
            plugins="alpha",
            extra_plugins={"gated": plugin},
            limits={"probe_s": 0.3, "total_s": 30.0, "import_s": 30.0},
        )
        made.append((plugin, engine))
        return engine

    yield make
    for plugin, engine in made:
        plugin.gate.set()
        engine.close()


@pytest.mark.parametrize("hook", ["tars_models", "tars_settings", "validator"])
def test_49_a_hook_that_hangs_holds_up_nobody_and_counts_again_when_it_answers(
    beside: Callable[[Gated], InferenceEngine], hook: str
) -> None:
    plugin = Gated(hook)
    engine = beside(plugin)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(engine.generate, "hi") for _ in range(2)]
        assert engine.loaded() is not None  # the loop goes on meanwhile
        assert engine.models() == ()
        assert [answer.result() for answer in answers] == ["hello", "hello"]
    reasons = {status.name: status.reason for status in engine.backends()}
    assert reasons["alpha"] is None
    if hook != "tars_models":
        assert "no answer within 0.3 s" in (reasons["gated"] or "")
    plugin.gate.set()
    until(lambda: "no answer" not in str({status.reason for status in engine.backends()}))


def test_49_settings_whose_check_raises_are_the_plugins_fault_alone(beside: Callable[[Gated], InferenceEngine]) -> None:
    engine = beside(Gated("raises"))
    assert engine.generate("hi") == "hello"
    (gated,) = (status for status in engine.backends() if status.name == "gated")
    assert gated.quarantined == "probe"
    assert "oops" in (gated.reason or "")


class Disk:
    """A plugin that runs files, and a mount below which every look hangs while it is dead."""

    def __init__(self, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = threading.Event()
        self.alive.set()
        for name in ("is_dir", "is_file"):
            look: Callable[[Path], bool] = getattr(Path, name)

            def patient(path: Path, look: Callable[[Path], bool] = look) -> bool:
                if path.is_relative_to(mount):
                    self.alive.wait(60)
                return look(path)

            monkeypatch.setattr(Path, name, patient)

    @hookimpl
    def tars_probe(self, model: ModelRef | None) -> ProbeReport | None:
        if model is None or model.path is None:
            return None
        return ProbeReport(available=model.path.is_file(), reason="it is not there")

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return Slow(0)

    @hookimpl
    def tars_generate(self) -> Iterator[BackendEvent]:
        yield TextDelta(text="from the disk")
        yield Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Disk, Path]]:
    path = tmp_path / "mount" / "m.bin"
    path.parent.mkdir()
    path.touch()
    disk = Disk(path.parent, monkeypatch)
    yield disk, path
    disk.alive.set()


def test_49_a_model_on_a_dead_mount_holds_up_no_other_model(
    mount: tuple[Disk, Path], write_script: Callable[..., str]
) -> None:
    disk, path = mount
    disk.alive.clear()
    other = write_script(alpha=BackendScript())
    limits = {"probe_s": 0.3, "import_s": 30.0}
    with InferenceEngine(model=path, plugins="alpha,disk", extra_plugins={"disk": disk}, limits=limits) as engine:
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match=r"no answer within 0\.3 s"):
                engine.generate("hi")
        assert engine.generate("hi", model=other) == "hello"
        assert {status.name for status in engine.backends()} >= {"alpha"}
        disk.alive.set()
        until(lambda: _answers(engine) == "from the disk")


@pytest.mark.usefixtures("never_fresh")
def test_49_a_loaded_model_answers_on_while_its_mount_is_dead(mount: tuple[Disk, Path]) -> None:
    disk, path = mount
    limits = {"probe_s": 0.1}
    with InferenceEngine(model=path, plugins="disk", extra_plugins={"disk": disk}, limits=limits) as engine:
        assert engine.generate("hi") == "from the disk"
        disk.alive.clear()
        for _ in range(3):
            assert engine.plan().candidates[0].backend == "disk"
            assert engine.complete("hi").timings.load_s is None


def _answers(engine: InferenceEngine) -> str | None:
    try:
        return engine.generate("hi")
    except TarsError:
        return None
