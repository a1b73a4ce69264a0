"""How a child Python process is started, how it guards its pipes, and how it is ended with all it started.

Used by the worker and by the first import of a plugin nobody has seen before.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tars_core.types.errors import ConfigError

_PARENT_POLL_S = 0.5
_PYTHON = re.compile(r"python|pypy|graalpy", re.IGNORECASE)
_PROC = Path("/proc")
_MARK = "_TARS_CHILD"


def interpreter() -> str:
    """Return the Python that runs this program, to run a child with.

    Raises :class:`~tars_core.types.errors.ConfigError` in a frozen program, and where ``sys.executable`` is not Python
    (a server or an application that embeds it): a child would be that program once more.
    """
    frozen = bool(getattr(sys, "frozen", False))
    if not frozen and sys.executable and _PYTHON.match(Path(sys.executable).name):
        return sys.executable
    what = "this program is frozen" if frozen else "Python is embedded in this program"
    raise ConfigError(
        f"{what} (sys.executable is {sys.executable!r}), so no backend can run in a process of its own",
        hint="set python (TARS_PYTHON) to an interpreter that has tars-core and its plugins, or isolation='none'",
    )


def command(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """Return the command line that runs ``module`` as a program.

    In this interpreter it finds modules where this program finds them; ``python`` is another one, with what is
    installed there. The current directory is no place to import from: a stray ``json.py`` there would be run. ``-P``
    does this only since Python 3.11.
    """
    paths = "[p for p in sys.path if p]" if python else repr(_import_paths())
    code = (
        f"import sys; sys.path[:] = {paths};"
        f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [python or interpreter(), "-c", code, *arguments]


def _import_paths() -> list[str]:
    paths = [os.fspath(path) for path in sys.path if path]
    with contextlib.suppress(FileNotFoundError):  # the current directory was removed
        paths = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - keeps "..", which a link may rely on
    return [path for path in paths if os.path.isabs(path)]  # noqa: PTH117


def claim_stdio() -> tuple[int, int]:
    """Keep fd 0 and fd 1 for frames; return their private duplicates ``(read, write)``.

    Afterwards fd 0 is the null device and fd 1 is fd 2: a native library that prints or reads cannot touch frames.
    """
    read, write = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return read, write


def exit_with_parent() -> None:
    """End this process when its parent is gone, whatever it is doing.

    The end of the pipe is not enough: a process the parent forked may hold the other end open. The kernel's signal
    (Linux) also reaches native code that holds the GIL; elsewhere a thread watches the parent's id.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(0)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(0)

    threading.Thread(target=watch, name="tars-parent-watch", daemon=True).start()


class Process(NamedTuple):
    """A process as the kernel lists it."""

    pid: int
    parent: int
    state: str
    age_s: float


def listed() -> Iterator[Process]:
    """Yield every process (Linux; nothing elsewhere)."""
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended while we looked
            # After the name in parentheses, which may hold anything: state, parent, …; see proc_pid_stat(5).
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the system's start
            age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
            yield Process(int(entry.name), int(fields[1]), fields[0], age_s)


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; none where it is gone, or not ours to see."""
    try:
        data = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in data.split(b"\0")[:-1]]


def descendants(pid: int) -> list[int]:
    """Return the ids of all that ``pid`` has started, and what these have started."""
    children: dict[int, list[int]] = {}
    for process in listed():
        children.setdefault(process.parent, []).append(process.pid)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def marked_environment(mark: str) -> dict[str, str]:
    """Return an environment by which a child, and all that it starts, is found again wherever it has gone."""
    return {**os.environ, _MARK: mark}


def kill_family(leader: int, mark: str, others: Iterable[int] = ()) -> None:
    """Kill what is left of the process group of ``leader``, what else has its ``mark``, and ``others``.

    The leader itself may be gone: its id is not given to another process while its group has members. What has left
    the group, as daemons do, has the mark (Linux), unless it has written its title over its environment; so the
    leader's :func:`descendants` are to be given where it still lives.
    """
    if os.name != "posix":
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for pid in {*others, *_marked(mark)}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> Iterator[int]:
    variable = os.fsencode(f"{_MARK}={mark}")
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is not ours
            if variable in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
