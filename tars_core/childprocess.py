"""How a child Python process is started and how it guards its pipes.

Used by the worker and by the first import of a plugin nobody has seen before.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PARENT_POLL_S = 0.5


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs ``module`` as a program in this interpreter.

    The current directory is no place to import from: a stray ``json.py`` there would be run. ``-P`` does this
    only since Python 3.11.
    """
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p];"
        f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *arguments]


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
