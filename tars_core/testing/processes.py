"""What processes there are, for tests that leave none behind. Linux only."""

from __future__ import annotations

import contextlib
from pathlib import Path


def workers(host: int) -> list[int]:
    """Return the ids of the living worker processes that ``host`` started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            # After the name in parentheses, which may hold anything: state and parent.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            is_worker = b"tars_core.worker.child" in (entry / "cmdline").read_bytes()
            if is_worker and int(parent) == host and state != "Z":
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    """Say whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
