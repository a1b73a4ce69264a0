"""The control groups (cgroups) of this process, whose limits a container, a pod or a systemd unit has.

Versions 1 and 2 of the kernel's interface, and both at once (hybrid). What is missing, unreadable or garbled reads as
"no limit known": a wrong limit would be worse than none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Roots(NamedTuple):
    """Where the kernel's files are."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")


SYSTEM = Roots()


class Group(NamedTuple):
    """One cgroup."""

    folder: Path
    version: int
    """1 or 2: which files there are in ``folder``."""


def enclosing(controller: str, roots: Roots = SYSTEM) -> list[Group]:
    """Return the cgroups that may limit this process by ``controller`` (``memory``, ``cpu``), the innermost first.

    Each of them counts, up to the root: an outer group may have the tighter limit.
    """
    groups: list[Group] = []
    for line in read(roots.proc / "self" / "cgroup").split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            hybrid = not os.path.exists(roots.cgroup / "cgroup.controllers")  # noqa: PTH110 - Path.exists may raise
            mount = roots.cgroup / "unified" if hybrid else roots.cgroup
            groups += [Group(folder, 2) for folder in _up(mount, path)]
        elif controller in controllers.split(","):
            mount = roots.cgroup / controllers  # "cpu,cpuacct"; without the usual link "cpu" in some containers
            mount = mount if os.path.isdir(mount) else roots.cgroup / controller  # noqa: PTH112 - see above
            groups += [Group(folder, 1) for folder in _up(mount, path)]
    return groups


def read(file: Path) -> str:
    """Return the text of a kernel's file; an empty one where it cannot be read."""
    try:
        return file.read_text("utf-8", "surrogateescape")
    except (OSError, ValueError):  # ValueError: a null byte in a path of /proc/self/cgroup
        return ""


def number(text: str) -> int | None:
    """Return the number that ``text`` is; ``None`` where it is not one (``max``, nothing, garbage)."""
    try:
        return int(text)
    except ValueError:
        return None


def table(text: str) -> dict[str, int]:
    """Return the numbers of a file with one ``name number`` or ``name: number kB`` per line (the unit is ignored)."""
    words = (line.split() for line in text.split("\n"))
    found = ((pair[0].rstrip(":"), number(pair[1])) for pair in words if len(pair) > 1)
    return {name: value for name, value in found if value is not None}


def _up(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part]
    # In a container the path may be the one outside, of which only the innermost group is mounted. A path with ".."
    # leads out of the cgroup namespace, and out of the mount.
    if ".." in parts or not os.path.isdir(mount.joinpath(*parts)):  # noqa: PTH112 - Path.is_dir may raise
        parts = []
    return [mount.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]
