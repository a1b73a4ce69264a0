"""``tars ps``: the models in memory on this machine, of every program that uses TARS."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from tars_core.cli import output
from tars_core.cli.plain import dump
from tars_core.system import memory, processes
from tars_core.types.public import Public

_MIB = 2**20
_WORKER = "tars_core.worker.child"


class Running(Public, frozen=True, kw_only=True):
    """One worker process."""

    pid: int
    backend: str
    model: str
    memory_bytes: int | None
    """Resident, files it has mapped included."""
    started_s: float
    """Seconds since it was started."""
    program: str
    """The command line that uses it."""
    program_pid: int


def found() -> list[Running]:
    """Return the workers of all programs whose processes this user may look at, the newest first."""
    running = []
    for process in processes.listed():
        match processes.command_line(process.pid):
            case [_, "-c", code, backend, model] if _WORKER in code and process.state != "Z":
                pass
            case _:
                continue
        running.append(
            Running(
                pid=process.pid,
                backend=backend,
                model=model,
                memory_bytes=memory.resident_bytes(process.pid),
                started_s=process.age_s,
                program=" ".join(" ".join(processes.command_line(process.parent)).split()),
                program_pid=process.parent,
            )
        )
    return sorted(running, key=lambda worker: worker.started_s)


def show(*, as_json: bool) -> None:
    """Print a table, or JSON."""
    running = found()
    if as_json:
        output.write(dump(running))
        return
    if not running:
        click.echo("no model is loaded", err=True)
        return
    rows = [("BACKEND", "MODEL", "MEMORY", "SINCE", "PROGRAM"), *map(_row, running)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    room = shutil.get_terminal_size().columns
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        output.write(line[:room] + "\n")


def _row(worker: Running) -> tuple[str, str, str, str, str]:
    size = "-" if worker.memory_bytes is None else f"{worker.memory_bytes / _MIB:.0f} MiB"
    model = Path(worker.model).name if "/" in worker.model else worker.model
    return worker.backend, model, size, _since(worker.started_s), f"{worker.program_pid} {worker.program}"


def _since(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
