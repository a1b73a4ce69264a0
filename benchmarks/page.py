"""The page a benchmark leaves in ``results/``: when, where, with which versions, and tables that fit 80 columns."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_COLUMNS = 80
_PACKAGES = ("tars-core", "llama-cpp-python", "xllamacpp")


def write(name: str, *parts: str, versions: Sequence[str] = ()) -> str:
    """Write ``results/NAME.md`` and return it. A part is a heading, a table or text; ``versions`` are others' lines."""
    installed = ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)
    now = dt.datetime.now(dt.timezone.utc)
    facts = [f"{now:%Y-%m-%d %H:%M} UTC", *_machine(), installed, *versions]
    listed = "\n".join(_filled(f"- {fact}", indent="  ") for fact in facts)
    page = "\n\n".join((f"# {name}", listed, *parts)) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page, "utf-8")
    return page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is one in a terminal too: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join((line(head), f"|{rule}|", *map(line, rows)))


def text(sentences: str) -> str:
    """Return a paragraph."""
    return _filled(sentences)


def spread(values: Sequence[float]) -> str:
    """Return the median, and the smallest and the largest value."""
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def number(value: float) -> str:
    """Return three digits: 3.52, 51.2, 203; and a thousand in full."""
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _filled(words: str, indent: str = "") -> str:
    return textwrap.fill(words, _COLUMNS, subsequent_indent=indent, break_on_hyphens=False)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[str]:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text("utf-8").splitlines() if cpu_info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        f"{model or platform.machine()}, {usable} of {os.cpu_count()} cores, {memory:.0f} GiB of memory",
        f"{platform.platform()}, Python {platform.python_version()}, load average {os.getloadavg()[0]:.1f}",
    ]
