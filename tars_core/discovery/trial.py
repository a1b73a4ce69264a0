"""The first import of a plugin, in a process that may die of it.

A plugin that hangs, crashes or calls ``os._exit`` while it is imported or probed would take the application along.
So a plugin not seen before is imported and probed in a time-limited child first. What passed is remembered by its
files; what crashed or hung is remembered for an hour, or until something is installed. A plugin that merely raised
is harmless and asked again every time.

Run as a program (``python -m tars_core.discovery.trial NAME TARGET``) this module is that child.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Literal, TypeAlias

import msgspec

from tars_core import hookspecs
from tars_core.discovery import mistakes
from tars_core.system import processes
from tars_core.types.errors import PluginError, WorkerDied, told
from tars_core.types.reports import ProbeLimits

_log = logging.getLogger("tars_core.discovery.registry")
_REMEMBER_BAD_S = 3600.0
_KILL_GRACE_S = 1.0
_PROBING = b"probing"
"""The child's word for having come so far; its last line is the verdict."""
Stage: TypeAlias = Literal["import", "register", "probe"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. ``stage`` is ``None`` where all went well, else the stage that failed."""

    stage: Stage | None = None
    reason: str = ""
    dangerous: bool = False
    """It would have hurt the host: a crash, a hang, an exit."""


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin to be examined."""

    name: str
    target: str
    distribution: str
    version: str


class _Remembered(msgspec.Struct, frozen=True, kw_only=True):
    fingerprint: str
    verdict: Verdict
    written: float


class Memory:
    """Verdicts on disk, one small file a plugin. Without a writable folder it forgets, after one warning."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._warned = False

    def recall(self, suspect: Suspect, *, trust_bad: bool = True) -> Verdict | None:
        """Return the verdict on the plugin as it is installed now."""
        try:
            data = self._file(suspect).read_bytes()
            remembered = msgspec.json.decode(data, type=_Remembered)
        except (OSError, msgspec.DecodeError):
            return None
        age = time.time() - remembered.written
        fresh = not remembered.verdict.dangerous or (trust_bad and 0 <= age < _REMEMBER_BAD_S)
        return remembered.verdict if fresh and remembered.fingerprint == fingerprint(suspect) else None

    def keep(self, suspect: Suspect, verdict: Verdict) -> None:
        """Remember ``verdict``, unless it is a harmless failure."""
        if verdict.stage is not None and not verdict.dangerous:
            return
        entry = _Remembered(fingerprint=fingerprint(suspect), verdict=verdict, written=time.time())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Written beside and moved: two processes may come here at once.
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(msgspec.json.encode(entry))
            Path(file.name).replace(self._file(suspect))
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("%s is not writable (%s): plugins are checked anew each time", self._folder, error)

    def _file(self, suspect: Suspect) -> Path:
        place = hashlib.sha256(f"{suspect.name}\0{suspect.target}\0{sys.prefix}".encode()).hexdigest()[:16]
        return self._folder / f"{place}.json"


def fingerprint(suspect: Suspect) -> str:
    """Return a digest that changes with the plugin's files, the interpreter, or what is installed beside it."""
    facts = [suspect.name, suspect.target, suspect.distribution, suspect.version, sys.version, sys.executable]
    spec = importlib.util.find_spec(suspect.target.partition(":")[0].partition(".")[0])
    if spec is not None and spec.origin is not None:
        origin = Path(spec.origin)
        files: Iterable[Path] = origin.parent.rglob("*.py") if origin.name == "__init__.py" else (origin,)
        facts += [_state(file) for file in sorted(files)]
    # Installing or removing a distribution changes its folder's time, and with it what can be imported. The current
    # folder, which may have been removed, changes for other reasons.
    folders = {Path(entry) for entry in sys.path if entry}
    with contextlib.suppress(FileNotFoundError):
        folders.discard(Path.cwd())
    facts += [_state(folder) for folder in sorted(folders) if folder.is_dir()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # a link that leads nowhere, such as an editor's lock
        return f"{path}: none"
    return f"{path}:{found.st_size}:{found.st_mtime_ns}"


def examine(suspects: Sequence[Suspect], *, limit_s: float, python: str | None = None) -> dict[str, Verdict]:
    """Import and probe each plugin in a child of its own, all at once; return the verdicts by name.

    Raises :class:`~tars_core.types.errors.ConfigError` where there is no Python to do it.
    """
    verdicts: dict[str, Verdict] = {}
    commands = {
        s.name: processes.command("tars_core.discovery.trial", s.name, s.target, python=python) for s in suspects
    }

    def judge(suspect: Suspect) -> None:
        try:
            verdicts[suspect.name] = _judge(commands[suspect.name], limit_s)
        except (OSError, RuntimeError) as error:
            verdicts[suspect.name] = Verdict(stage="import", reason=f"no process could be started to try it: {error}")

    # A thread each: one that hangs must not use up the time of the others. Daemons: Ctrl-C does not wait for them.
    threads = [threading.Thread(target=judge, args=(suspect,), daemon=True) for suspect in suspects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


def _judge(command: Sequence[str], limit_s: float) -> Verdict:
    # Files, not pipes: something the plugin started may hold a pipe open long after the process has ended.
    with _scratch_file() as output, _scratch_file() as words:
        mark = secrets.token_hex(8)
        child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            env=processes.marked_environment(mark),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=words,
            start_new_session=True,
        )
        late = False
        started_by_it: list[int] = []
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            started_by_it = processes.descendants(child.pid)
        processes.kill_family(child.pid, mark, started_by_it)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may be stuck in the kernel
            child.wait(_KILL_GRACE_S)
        output.seek(0)
        words.seek(0)
        lines = output.read().splitlines()
        with contextlib.suppress(IndexError, msgspec.DecodeError):  # it did not come so far
            return msgspec.json.decode(lines[-1], type=Verdict)
        stage: Stage = "probe" if lines and lines[-1] == _PROBING else "import"
        what = {"import": "importing it", "probe": "its probe"}[stage]
        if late:
            return Verdict(stage=stage, reason=f"{what} took longer than {limit_s:g} s", dangerous=True)
        died = WorkerDied(returncode=child.returncode, stderr_tail=words.read().decode(errors="replace"))
        how = died.signal_name or f"exit code {died.exit_code}"
        return Verdict(stage=stage, reason=f"{what} ended the process ({how})", dangerous=True)


def _scratch_file() -> IO[bytes]:
    """Return a file without a name; in memory where the system can, since no folder may be writable."""
    return os.fdopen(os.memfd_create("tars"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def _try_out(name: str, target: str, output: int) -> Verdict:
    stage: Stage = "import"
    try:
        plugin = hookspecs.import_plugin(target)
        stage = "register"
        mistakes.check(plugin)
        manager = hookspecs.new_manager()
        manager.register(plugin, name)
        manager.check_pending()
        stage = "probe"
        os.write(output, _PROBING + b"\n")
        manager.hook.tars_probe(model=None, limits=ProbeLimits(), backend_settings="{}")
    except SystemExit as error:
        return Verdict(stage=stage, reason=f"it called sys.exit({error.code!r})")
    except PluginError as error:
        return Verdict(stage=stage, reason=error.message)
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises is the verdict
        return Verdict(stage=stage, reason=f"tars_probe: {told(error)}" if stage == "probe" else told(error))
    return Verdict()


def main() -> None:
    """Examine the plugin that the command line names; print how far it comes, and the verdict, on the real stdout."""
    _, write = processes.claim_stdio()
    processes.exit_with_parent()
    verdict = _try_out(sys.argv[1], sys.argv[2], write)
    os.write(write, msgspec.json.encode(verdict))
    os._exit(0)  # threads a plugin started, or its exit handlers, must not turn a good verdict into a hang


if __name__ == "__main__":
    main()
