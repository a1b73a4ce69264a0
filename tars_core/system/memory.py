"""How much memory there is: of this machine, or of the container this process runs in. Linux; unknown elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from tars_core.system import cgroups
from tars_core.system.cgroups import SYSTEM, Group, Roots

_KIB = 1024
_UNLIMITED = 2**62
"""Version 1 writes "no limit" as the largest number of whole pages below 2**63 bytes."""


class _Files(NamedTuple):
    limits: tuple[str, ...]
    used: str
    cache: tuple[str, ...]
    """Entries of ``memory.stat`` that are part of what is used, and that the kernel takes back before it swaps."""


# Both lists of file pages count, and reclaimable kernel memory, as they do in the kernel's own MemAvailable: a model
# file that was read twice is "active" and can still be dropped. Kubernetes' working set, which is about eviction,
# leaves out only inactive pages. Beyond memory.high nothing is killed, but the kernel reclaims and stops the group's
# processes so often that a model there is of no use. Version 1's soft limit holds only while the machine is short.
_FILES = {
    1: _Files(
        limits=("memory.limit_in_bytes",),
        used="memory.usage_in_bytes",
        cache=("total_inactive_file", "total_active_file"),
    ),
    2: _Files(
        limits=("memory.max", "memory.high"),
        used="memory.current",
        cache=("inactive_file", "active_file", "slab_reclaimable"),
    ),
}


def free_bytes(*, roots: Roots = SYSTEM) -> int | None:
    """Return the bytes a new process could take without swapping; ``None`` where the system does not tell.

    This is what the machine has available, or what is left in the tightest cgroup of this process. File cache that
    can be dropped counts as free.
    """
    available = _meminfo("MemAvailable", roots)
    known = [_left(group, limit) for group, limit in _limits(roots)]
    return min(known if available is None else [available, *known], default=None)


def total_bytes(*, roots: Roots = SYSTEM) -> int | None:
    """Return the bytes this process may use at most: the machine's memory, or the tightest limit of a cgroup.

    ``None`` where the system does not tell.
    """
    total = _meminfo("MemTotal", roots)
    known = [limit for _, limit in _limits(roots)]
    return min(known if total is None else [total, *known], default=None)


def resident_bytes(pid: int, *, roots: Roots = SYSTEM) -> int | None:
    """Return the bytes of memory that process ``pid`` occupies; ``None`` where it is gone or the system does not tell.

    Pages shared with other processes count in full, those of a mapped model file among them.
    """
    fields = cgroups.read(roots.proc / str(pid) / "statm").split()
    pages = cgroups.number(fields[1]) if len(fields) > 1 else None
    return None if pages is None else pages * os.sysconf("SC_PAGE_SIZE")


def _meminfo(name: str, roots: Roots) -> int | None:
    kib = cgroups.table(cgroups.read(roots.proc / "meminfo")).get(name)
    return None if kib is None else kib * _KIB


def _limits(roots: Roots) -> Iterator[tuple[Group, int]]:
    for group in cgroups.enclosing("memory", roots):
        for file in _FILES[group.version].limits:
            limit = cgroups.number(cgroups.read(group.folder / file))
            if limit is not None and 0 <= limit < _UNLIMITED:
                yield group, limit


def _left(group: Group, limit: int) -> int:
    files = _FILES[group.version]
    used = cgroups.number(cgroups.read(group.folder / files.used)) or 0  # unknown: the limit still holds
    stat = cgroups.table(cgroups.read(group.folder / "memory.stat"))
    cache = sum(stat.get(name, 0) for name in files.cache)
    return max(0, limit - max(0, used - cache))
