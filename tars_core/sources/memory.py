"""How much memory a model may take."""

from __future__ import annotations


def free_bytes() -> int | None:
    """Return the memory a new process could take without swapping, where the system tells (Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a kernel interface, not a file
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
