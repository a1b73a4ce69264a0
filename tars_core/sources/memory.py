"""How much memory a model may take."""

from __future__ import annotations

from tars_core.sources.gguf import GGUFHeader

SMALLEST_CONTEXT = 512
"""Tokens; with fewer a model is of no use."""

_SHARE = 0.8


def free_bytes() -> int | None:
    """Return the memory a new process could take without swapping, where the system tells (Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a kernel interface, not a file
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def fitting_context(header: GGUFHeader, wanted: int, sequences: int) -> int:
    """Halve ``wanted`` until the cache for all ``sequences`` fits the free memory beside the weights."""
    free = free_bytes()
    context = wanted
    while free is not None and context > SMALLEST_CONTEXT:
        if header.tensor_bytes + header.kv_bytes(context) * sequences <= free * _SHARE:
            break
        context //= 2
    return context
