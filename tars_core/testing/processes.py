"""What processes there are, for tests that leave none behind. Linux only."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tars_core.system import processes


def workers(host: int) -> list[int]:
    """Return the ids of the living worker processes that ``host`` started."""
    found = []
    for process in processes.listed():
        with contextlib.suppress(OSError):  # it ended while we looked
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if process.parent == host and process.state != "Z" and b"tars_core.worker.child" in command:
                found.append(process.pid)
    return found


def alive(pid: int) -> bool:
    """Say whether the process exists and is no zombie."""
    return any(process.pid == pid and process.state != "Z" for process in processes.listed())
