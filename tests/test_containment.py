"""What backends' processes may do to the program, and an upgrade to both. Numbers are rows of the fault list."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import tars_core
from tars_core import AllBackendsFailed, InferenceEngine
from tars_core.system import memory
from tars_core.testing.fake import Act, BackendScript, Exit, Finish, Kill, Raise, Say, Start, Wait
from tars_core.testing.processes import alive, workers
from tars_core.testing.watching import until
from tars_core.worker.channel import ProcessChannel

MakeEngine = Callable[..., InferenceEngine]
WriteScript = Callable[..., str]
T = TypeVar("T")


# ---- 50: a process that cannot be killed -------------------------------------------------------


left_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Of a process that still runs when its object goes, Python says so."""


@pytest.fixture
def unkillable(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let no signal reach alpha's workers, as where they wait inside the kernel for a device or a network's disk.

    Returns the backend's name. There is no public way to such a process, hence the patch.
    """
    before, stuck = set(workers(os.getpid())), set[int]()
    signalled = ProcessChannel._signal

    def lost(channel: ProcessChannel, number: signal.Signals) -> None:
        if channel._name == "alpha" and channel.pid is not None:
            stuck.add(channel.pid)
        else:
            signalled(channel, number)

    with monkeypatch.context() as patch:
        patch.setattr(ProcessChannel, "_signal", lost)
        yield "alpha"
    for pid in stuck & (set(workers(os.getpid())) - before):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, stuck)))


@left_behind
@pytest.mark.parametrize("stage", ["load", "generate"])
def test_50_failover_does_not_wait_for_a_worker_that_cannot_be_killed(
    make_engine: MakeEngine, unkillable: str, stage: str
) -> None:
    stuck = (Kill("SIGSTOP"), Finish())
    hangs = BackendScript(load=stuck) if stage == "load" else BackendScript(generate=stuck)
    limits = {"load_s": 1.0, "first_token_s": 1.0} if stage == "load" else {"first_token_s": 1.0}
    engine = make_engine(alpha=hangs, beta=BackendScript(), limits=limits)
    before = set(workers(os.getpid()))
    completion = engine.complete("hi")
    assert completion.backend == "beta"
    assert completion.attempts[0].failure is not None
    assert completion.attempts[0].failure.kind == "DeadlineExceeded"
    assert len(set(workers(os.getpid())) - before) == 2  # it is still there
    assert completion.attempts[1].duration_s < 3  # which is how long a worker has for its end


@left_behind
def test_50_a_load_that_needs_its_memory_waits_for_it_only_so_long(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, unkillable: str
) -> None:
    monkeypatch.setattr("tars_core.runtime.pool._END_S", 0.3)
    monkeypatch.setattr(memory, "free_bytes", lambda: 2**30 if workers(os.getpid()) else 2**34)
    monkeypatch.setattr(memory, "total_bytes", lambda: 2**34)
    big = 2**33
    engine = make_engine(
        alpha=BackendScript(memory_bytes=big, generate=(Kill("SIGSTOP"), Finish())),
        beta=BackendScript(memory_bytes=big),
        limits={"first_token_s": 1.0},
    )
    assert engine.complete("hi").backend == "beta"


@left_behind
def test_50_unload_and_close_return_although_a_worker_cannot_be_killed(
    make_engine: MakeEngine, unkillable: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(alpha=BackendScript())
    pid = engine.load().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    engine.unload()
    engine.close()
    assert f"process {pid} of alpha does not end although it was killed" in caplog.text


@left_behind
def test_50_discovery_does_not_wait_for_a_plugin_that_cannot_be_killed(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch, write_script: WriteScript
) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    (tmp_path / "stuck_plugin.py").write_text(code)
    plant(tmp_path, "stuck", "stuck_plugin")
    monkeypatch.syspath_prepend(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        patch.setattr(os, "kill", lambda *_: None)
        limits = {"import_s": 4.0}
        with InferenceEngine(model=write_script(alpha=BackendScript()), plugins="alpha,stuck", limits=limits) as engine:
            assert engine.generate("hi") == "hello"
    os.kill(started(pid_file), signal.SIGKILL)


# ---- 51: what a worker has started -------------------------------------------------------------


def started(pid_file: Path) -> int:
    """Return the id of the program that a worker started, once it runs."""
    return int(until(lambda: pid_file.exists() and pid_file.read_text().strip()))


@pytest.mark.parametrize("kind", ["group", "session", "daemon"])
@pytest.mark.parametrize("end", ["hang", "crash", "exit", "close", "unload", "load fails", "load hangs"])
def test_51_what_a_worker_has_started_ends_with_it(
    make_engine: MakeEngine, tmp_path: Path, kind: str, end: str
) -> None:
    pid_file = tmp_path / "pid"
    start = Start(str(pid_file), kind)  # type: ignore[arg-type]  # one of the three
    acts: dict[str, tuple[Act, ...]] = {
        "hang": (Wait(60, deaf=True),),
        "crash": (Kill("SIGSEGV"),),
        "exit": (Exit(3),),
    }
    loading: dict[str, tuple[Act, ...]] = {
        "load fails": (Raise("LoadFailed", "no"),),
        "load hangs": (Wait(60, deaf=True),),
    }
    script = BackendScript(load=(start, *loading.get(end, ())), generate=acts.get(end, (Say("a"), Finish())))
    engine = make_engine(alpha=script, limits={"first_token_s": 0.5, "load_s": 1.0} if "hang" in end else {})
    if end in ("close", "unload"):
        engine.generate("hi")
    else:
        with pytest.raises(AllBackendsFailed):
            engine.generate("hi")
    pid = started(pid_file)
    if end == "unload":
        engine.unload()
    elif end == "close":
        engine.close()
    try:
        until(lambda: not alive(pid), within_s=10)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


PLUGIN_THAT_STARTS_A_PROGRAM = """
import os, subprocess, sys, time
from tars_core.plugin import ProbeReport, hookimpl
if os.getppid() == {host}:  # only in the first import's process
    subprocess.Popen(["sh", "-c", "echo $$ > {pid_file}; exec sleep 60"], start_new_session={session})
    while not os.path.exists({pid_file!r}) or not open({pid_file!r}).read(): time.sleep(0.01)
    {then}
@hookimpl
def tars_probe(): return ProbeReport(available=True)
"""


@pytest.mark.parametrize("then", ["time.sleep(60)", "os._exit(3)", "pass"])
@pytest.mark.parametrize("session", [False, True])
def test_51_what_a_plugin_starts_on_its_first_import_ends_with_that(
    tmp_path: Path,
    plant: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    then: str,
    *,
    session: bool,
) -> None:
    pid_file = tmp_path / "pid"
    code = PLUGIN_THAT_STARTS_A_PROGRAM.format(host=os.getpid(), pid_file=str(pid_file), then=then, session=session)
    (tmp_path / "starter.py").write_text(code)
    plant(tmp_path, "starter", "starter")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "starter", raising=False)
    with InferenceEngine(plugins="starter", limits={"import_s": 2.0}) as engine:
        engine.backends()
    pid = started(pid_file)
    try:
        until(lambda: not alive(pid), within_s=10)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


# ---- 53: an upgrade under a running program ----------------------------------------------------

UPGRADED = """
import pathlib, shutil, sys
from tars_core import InferenceEngine
model, ours, theirs = sys.argv[1:]
with InferenceEngine(model=model, plugins="alpha", limits={"import_s": 30.0}) as engine:
    print(engine.generate("hi"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    print(engine.generate("hi"))  # what is loaded goes on
    engine.unload()
    try:
        print(engine.generate("hi"))
    except Exception as error:
        print(type(error).__name__, error)
"""
FIELD = ("worker/protocol.py", "    request_id: int\n    prompt: str\n", "    request_id: int\n    text: str\n")
"""A field of a frame with another name."""


def copied(folder: Path, version: str, *changes: tuple[str, str, str]) -> Path:
    """Return a copy of tars_core of another ``version``, with texts in its files replaced."""
    package = folder / "tars_core"
    shutil.copytree(Path(tars_core.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "_version.py").write_text(f'__version__ = "{version}"\n')
    for file, old, new in changes:
        text = (package / file).read_text()
        assert old in text
        (package / file).write_text(text.replace(old, new))
    return package


def upgraded(tmp_path: Path, model: str, *changes: tuple[str, str, str]) -> list[str]:
    """Run a program whose tars_core is replaced by a newer one while it runs; return its output."""
    ours, theirs = copied(tmp_path / "ours", "7.0"), copied(tmp_path / "theirs", "8.0", *changes)
    path = os.pathsep.join([str(ours.parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", UPGRADED, model, str(ours), str(theirs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_53_after_an_upgrade_under_a_running_program_the_error_names_both_versions(
    tmp_path: Path, write_script: WriteScript
) -> None:
    first, loaded, *error = upgraded(tmp_path, write_script(alpha=BackendScript()), FIELD)
    assert (first, loaded) == ("hello", "hello")
    told = "\n".join(error)
    assert f"tars-core 7.0 from {tmp_path}" in told
    assert f"8.0 from {tmp_path}" in told
    assert "restart" in told
    assert "exit code" not in told


def test_53_an_upgrade_that_leaves_the_frames_alone_does_no_harm(tmp_path: Path, write_script: WriteScript) -> None:
    assert upgraded(tmp_path, write_script(alpha=BackendScript())) == ["hello"] * 3


def test_53_an_upgrade_that_is_half_done_is_told_in_its_own_words(tmp_path: Path, write_script: WriteScript) -> None:
    broken = ("worker/serving.py", "import threading\n", "import threading, not_there_yet\n")
    told = "\n".join(upgraded(tmp_path, write_script(alpha=BackendScript()), broken)[2:])
    assert "No module named 'not_there_yet'" in told


def test_53_another_interpreter_with_another_tars_core_is_named(
    tmp_path: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = copied(tmp_path / "theirs", "8.0", FIELD)
    python = tmp_path / "python3"
    path = os.pathsep.join([str(theirs.parent), os.environ["PYTHONPATH"]])
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(AllBackendsFailed) as caught:
        make_engine(alpha=BackendScript(), options={"python": str(python)}).generate("hi")
    assert f"8.0 from {theirs}" in str(caught.value)
    assert "python" in str(caught.value).partition("→")[2]
