"""What processes there are, for tests that leave none behind. Linux only."""

from __future__ import annotations

from tars_core.system import processes


def workers(host: int) -> list[int]:
    """Return the ids of the living worker processes that ``host`` started."""
    return [
        process.pid
        for process in processes.listed()
        if process.parent == host
        and process.state != "Z"
        and any("tars_core.worker.child" in word for word in processes.command_line(process.pid))
    ]


def alive(pid: int) -> bool:
    """Say whether the process exists and is no zombie."""
    return any(process.pid == pid and process.state != "Z" for process in processes.listed())
