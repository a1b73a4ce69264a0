"""Programs and machines that are not what one would expect. Numbers are rows of the fault list."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tars_core import AllBackendsFailed, BackendUnavailable, ConfigError, InferenceEngine
from tars_core.plugin import LoadOptions
from tars_core.system import memory, processes, processors
from tars_core.system.cgroups import Roots
from tars_core.testing.fake import BackendScript

MakeEngine = Callable[..., InferenceEngine]
T = TypeVar("T")


def children() -> set[int]:
    """Return the processes that this one has started."""
    return {process.pid for process in processes.listed() if process.parent == os.getpid()}


# ---- 54: other ways to run Python --------------------------------------------------------------

OWN_PLUGIN = """
from tars_core.plugin import *
@hookimpl
def tars_probe(): return ProbeReport(available=True)
@hookimpl
def tars_load(): return LoadedModel(device="cpu", context_length=100)
@hookimpl
def tars_generate():
    yield TextDelta(text="from afar")
    yield Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))
"""


@pytest.mark.parametrize("relative", [False, True])
def test_54_a_plugin_that_only_the_programs_own_path_knows_is_found_by_its_worker(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch, *, relative: bool
) -> None:
    (tmp_path / "own_plugin.py").write_text(OWN_PLUGIN)
    plant(tmp_path, "own", "own_plugin")
    monkeypatch.delitem(sys.modules, "own_plugin", raising=False)
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.syspath_prepend(tmp_path.name if relative else str(tmp_path))
    with InferenceEngine(model="own:x", plugins="own") as engine:
        assert engine.generate("hi") == "from afar"


@pytest.fixture(params=["frozen", "uwsgi", "nothing"])
def no_python(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this program not be Python's own; fails where the program is started once more."""
    started_again = tmp_path / "started again"
    program = tmp_path / "uwsgi"
    program.write_text(f"#!/bin/sh\ntouch '{started_again}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", "" if request.param == "nothing" else str(program))
    if request.param == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    yield
    assert not started_again.exists()


@pytest.mark.usefixtures("no_python")
def test_54_without_a_python_to_run_workers_one_error_says_what_to_set(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript())
    before = children()
    for question in (engine.backends, engine.plan, engine.load, lambda: engine.generate("hi")):
        with pytest.raises(ConfigError, match=r"TARS_PYTHON.*isolation"):
            question()
    assert children() <= before


@pytest.mark.usefixtures("no_python")
def test_54_backends_run_in_this_process_where_that_is_asked_for(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(), options={"isolation": "none"})
    before = children()
    assert engine.generate("hi") == "hello"
    assert [status.name for status in engine.backends() if status.available] == ["alpha", "beta", "gamma"]
    assert children() <= before


def test_54_a_python_that_is_named_runs_the_workers(
    request: pytest.FixtureRequest, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    engine = make_engine(alpha=BackendScript(), options={"python": python})
    assert engine.generate("hi") == "hello"
    assert engine.load().pid is not None


def test_54_a_python_that_is_named_and_does_not_exist_is_told(make_engine: MakeEngine, tmp_path: Path) -> None:
    python = str(tmp_path / "python3")
    engine = make_engine(alpha=BackendScript(), options={"python": python})
    with pytest.raises((AllBackendsFailed, BackendUnavailable), match="python3"):
        engine.generate("hi")


# ---- 55: limits of a container -----------------------------------------------------------------


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be a container with 2 of the machine's 64 GiB, and one and a half of its 16 processors."""
    files = {
        "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n",
        "proc/self/cgroup": "0::/",
        "cgroup/cgroup.controllers": "cpu memory",
        "cgroup/memory.max": str(2**31),
        "cgroup/memory.current": str(2**29),
        "cgroup/cpu.max": "150000 100000",
    }
    for name, text in files.items():
        path = tmp_path / "machine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    roots = Roots(proc=tmp_path / "machine" / "proc", cgroup=tmp_path / "machine" / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for module, name in ((memory, "free_bytes"), (memory, "total_bytes"), (processors, "usable")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), roots=roots))


@pytest.mark.usefixtures("container")
def test_55_a_model_that_the_containers_limit_cannot_hold_is_rejected_with_both_numbers(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(alpha=BackendScript(memory_bytes=2**31), beta=BackendScript(memory_bytes=2**30))
    decision = engine.plan()
    assert [candidate.backend for candidate in decision.candidates] == ["beta"]
    assert [r.reason for r in decision.rejected if r.backend == "alpha"] == ["needs 2.0 GiB, 1.5 free"]


@pytest.mark.usefixtures("container")
def test_55_threads_are_no_more_than_the_containers_quota() -> None:
    assert LoadOptions().cpu_threads == 1
    assert LoadOptions(threads=5).cpu_threads == 5
