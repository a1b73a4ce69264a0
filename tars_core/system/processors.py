"""How many processors this process may really use."""

from __future__ import annotations

import os

from tars_core.system import cgroups
from tars_core.system.cgroups import SYSTEM, Group, Roots


def usable(*, roots: Roots = SYSTEM) -> int:
    """Return how many processors this process may use, at least 1.

    The processors it may run on (affinity, cpusets), or fewer where a cgroup's quota allows it less time; a part of a
    processor counts as a whole one.
    """
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(group) for group in cgroups.enclosing("cpu", roots)]
    return max(1, min([visible, *(quota for quota in quotas if quota is not None)]))


def _quota(group: Group) -> int | None:
    """Return how many processors the time of ``group`` amounts to, rounded up; ``None`` for no limit."""
    if group.version == 1:
        names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        words = [cgroups.read(group.folder / name) for name in names]
    else:
        words = cgroups.read(group.folder / "cpu.max").split()
    quota, period = [*map(cgroups.number, words), None, None][:2]
    if quota is None or period is None or quota < 0 or period <= 0:
        return None
    return -(-quota // period)
