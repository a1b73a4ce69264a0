"""Memory and processors of a container: cgroups of both versions, as the kernel lays their files out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tars_core.system import memory, processors
from tars_core.system.cgroups import Roots

MIB = 2**20
GIB = 2**30
V1_NO_LIMIT = "9223372036854771712"
MEMINFO = f"MemTotal:       {16 * GIB // 1024} kB\nMemFree:         1024 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"

Write = Callable[[dict[str, object]], Roots]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes files below ``proc`` and ``cgroup``; the machine has 8 of 16 GiB and 16 processors.

    A file whose contents are ``None`` is left out.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))

    def write(files: dict[str, object]) -> Roots:
        for name, contents in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if contents is not None:
                path.write_bytes(contents if isinstance(contents, bytes) else f"{contents}\n".encode())
        return Roots(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup")

    return write


def v2(path: str, folder: str = "cgroup", **files: object) -> dict[str, object]:
    """Return the files of version 2: this process is in ``path``, and ``folder`` has ``files`` (``memory_max``, …)."""
    return {
        "proc/self/cgroup": f"0::{path}",
        "cgroup/cgroup.controllers": "cpuset cpu io memory pids",
        **{f"{folder}/{name.replace('_', '.', 1)}": contents for name, contents in files.items()},
    }


# ---- the machine alone -------------------------------------------------------------------------


def test_without_cgroups_the_machine_counts(system: Write) -> None:
    roots = system({})
    assert memory.free_bytes(roots=roots) == 8 * GIB
    assert memory.total_bytes(roots=roots) == 16 * GIB
    assert processors.usable(roots=roots) == 16


def test_a_system_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    roots = Roots(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup")
    assert memory.free_bytes(roots=roots) is None
    assert memory.total_bytes(roots=roots) is None
    assert memory.resident_bytes(1, roots=roots) is None
    assert processors.usable(roots=roots) >= 1


def test_the_processors_a_process_is_bound_to_count(system: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5, 7})
    assert processors.usable(roots=system({})) == 3
    assert processors.usable(roots=system(v2("/", cpu_max="1600000 100000"))) == 3
    assert processors.usable(roots=system(v2("/", cpu_max="200000 100000"))) == 2


def test_where_affinity_is_unknown_the_machines_processors_count(
    system: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processors.usable(roots=system({})) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors.usable(roots=system({})) == 1


# ---- version 2 ---------------------------------------------------------------------------------


def test_55_what_is_left_of_a_limit_is_free(system: Write) -> None:
    roots = system(v2("/", memory_max=2 * GIB, memory_current=GIB))
    assert memory.free_bytes(roots=roots) == GIB
    assert memory.total_bytes(roots=roots) == 2 * GIB


def test_55_cache_that_can_be_dropped_is_free(system: Write) -> None:
    stat = f"anon {600 * MIB}\nfile {400 * MIB}\nshmem 0\ninactive_file {100 * MIB}\nactive_file {200 * MIB}"
    stat += f"\nslab_reclaimable {50 * MIB}\nslab_unreclaimable {30 * MIB}"
    roots = system(v2("/", memory_max=2 * GIB, memory_current=GIB, memory_stat=stat))
    assert memory.free_bytes(roots=roots) == GIB + 350 * MIB


def test_cache_that_changed_since_the_use_was_read_frees_no_more_than_the_limit(system: Write) -> None:
    roots = system(v2("/", memory_max=GIB, memory_current=MIB, memory_stat=f"inactive_file {2 * MIB}"))
    assert memory.free_bytes(roots=roots) == GIB


def test_a_group_beyond_its_limit_has_nothing_free(system: Write) -> None:
    roots = system(v2("/", memory_max=GIB, memory_current=2 * GIB))
    assert memory.free_bytes(roots=roots) == 0


def test_where_the_kernel_begins_to_slow_a_group_down_is_a_limit_too(system: Write) -> None:
    roots = system(v2("/", memory_max=4 * GIB, memory_high=3 * GIB, memory_current=GIB))
    assert memory.free_bytes(roots=roots) == 2 * GIB
    assert memory.total_bytes(roots=roots) == 3 * GIB


def test_a_limit_that_is_larger_than_the_machine_changes_nothing(system: Write) -> None:
    roots = system(v2("/", memory_max=64 * GIB, memory_current=GIB, cpu_max="6400000 100000"))
    assert memory.free_bytes(roots=roots) == 8 * GIB
    assert memory.total_bytes(roots=roots) == 16 * GIB
    assert processors.usable(roots=roots) == 16


def test_max_is_no_limit(system: Write) -> None:
    roots = system(v2("/", memory_max="max", memory_high="max", memory_current=GIB, cpu_max="max 100000"))
    assert memory.free_bytes(roots=roots) == 8 * GIB
    assert memory.total_bytes(roots=roots) == 16 * GIB
    assert processors.usable(roots=roots) == 16


@pytest.mark.parametrize(
    ("quota", "processors_usable"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("100001 100000", 2),
        ("100000 100000", 1),
        ("1000 100000", 1),
        ("0 100000", 1),
        ("20000 10000", 2),
        ("900000 100000", 9),
    ],
)
def test_55_a_quota_is_rounded_up_to_whole_processors(system: Write, quota: str, processors_usable: int) -> None:
    assert processors.usable(roots=system(v2("/", cpu_max=quota))) == processors_usable


@pytest.mark.parametrize("folder", ["cgroup/pod/app/tars", "cgroup/pod/app", "cgroup/pod"])
def test_55_the_limit_of_any_enclosing_group_holds(system: Write, folder: str) -> None:
    system(v2("/pod/app/tars", "cgroup/pod/app/tars", memory_max="max", cpu_max="max 100000"))
    limited = v2("/pod/app/tars", folder, memory_max=3 * GIB, memory_current=GIB, cpu_max="300000 100000")
    roots = system(limited)
    assert memory.free_bytes(roots=roots) == 2 * GIB
    assert memory.total_bytes(roots=roots) == 3 * GIB
    assert processors.usable(roots=roots) == 3


def test_the_group_with_least_left_decides_not_the_one_with_the_lowest_limit(system: Write) -> None:
    system(v2("/pod/app", "cgroup/pod/app", memory_max=2 * GIB, memory_current=0))
    roots = system(v2("/pod/app", "cgroup/pod", memory_max=4 * GIB, memory_current=3 * GIB))
    assert memory.free_bytes(roots=roots) == GIB
    assert memory.total_bytes(roots=roots) == 2 * GIB


def test_the_groups_of_others_do_not_count(system: Write) -> None:
    system(v2("/", "cgroup/other", memory_max=MIB, cpu_max="100000 100000"))
    roots = system(v2("/pod", "cgroup/pod/child", memory_max=MIB, cpu_max="100000 100000"))
    assert memory.free_bytes(roots=roots) == 8 * GIB
    assert processors.usable(roots=roots) == 16


@pytest.mark.parametrize("path", ["/docker/0cf8a9cc", "/../../system.slice/tars", "/tars (deleted)"])
def test_55_where_the_named_group_is_not_mounted_the_mounts_root_is_the_group(system: Write, path: str) -> None:
    system(v2(path, "cgroup/docker", memory_max=MIB, cpu_max="100000 100000"))  # a group of the container's own
    roots = system(v2(path, memory_max=2 * GIB, memory_current=GIB, cpu_max="200000 100000"))
    assert memory.free_bytes(roots=roots) == GIB
    assert processors.usable(roots=roots) == 2


# ---- version 1, and both -----------------------------------------------------------------------

V1 = {
    "proc/self/cgroup": "12:pids:/app\n5:memory:/app\n4:cpu,cpuacct:/app\n1:name=systemd:/other",
    "cgroup/memory/app/memory.limit_in_bytes": 2 * GIB,
    "cgroup/memory/app/memory.usage_in_bytes": GIB,
    "cgroup/memory/app/memory.stat": f"inactive_file 1\nactive_file 1\ntotal_inactive_file {64 * MIB}\n"
    f"total_active_file {32 * MIB}",
    "cgroup/memory/memory.limit_in_bytes": V1_NO_LIMIT,
    "cgroup/memory/memory.usage_in_bytes": 3 * GIB,
    "cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": 250000,
    "cgroup/cpu,cpuacct/app/cpu.cfs_period_us": 100000,
    "cgroup/cpu,cpuacct/cpu.cfs_quota_us": -1,
    "cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
}


def test_55_version_1_is_read(system: Write) -> None:
    roots = system(dict(V1))
    assert memory.free_bytes(roots=roots) == GIB + 96 * MIB
    assert memory.total_bytes(roots=roots) == 2 * GIB
    assert processors.usable(roots=roots) == 3


def test_no_limit_of_version_1_is_no_limit_even_where_the_machine_tells_nothing(system: Write) -> None:
    roots = system(
        {
            **V1,
            "proc/meminfo": "",
            "cgroup/memory/app/memory.limit_in_bytes": V1_NO_LIMIT,
            "cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": -1,
        }
    )
    assert memory.free_bytes(roots=roots) is None
    assert memory.total_bytes(roots=roots) is None
    assert processors.usable(roots=roots) == 16


def test_a_controller_may_be_mounted_under_its_own_name(system: Write) -> None:
    renamed = {name.replace("cgroup/cpu,cpuacct/", "cgroup/cpu/"): contents for name, contents in V1.items()}
    assert processors.usable(roots=system(renamed)) == 3


def test_an_outer_group_of_version_1_counts(system: Write) -> None:
    roots = system(
        {
            **V1,
            "cgroup/memory/memory.limit_in_bytes": 3 * GIB + 5 * MIB,
            "cgroup/cpu,cpuacct/cpu.cfs_quota_us": 50000,
        }
    )
    assert memory.free_bytes(roots=roots) == 5 * MIB
    assert processors.usable(roots=roots) == 1


def test_55_in_a_container_of_version_1_the_mounts_root_is_the_group(system: Write) -> None:
    roots = system(
        {
            "proc/self/cgroup": "5:memory:/docker/0cf8\n4:cpu,cpuacct:/docker/0cf8",
            "cgroup/memory/memory.limit_in_bytes": 2 * GIB,
            "cgroup/memory/memory.usage_in_bytes": GIB,
            "cgroup/cpu,cpuacct/cpu.cfs_quota_us": 200000,
            "cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
        }
    )
    assert memory.free_bytes(roots=roots) == GIB
    assert processors.usable(roots=roots) == 2


def test_55_of_a_hybrid_system_both_versions_count(system: Write) -> None:
    roots = system(
        {
            **V1,
            "proc/self/cgroup": "5:memory:/app\n0::/app",
            "cgroup/unified/cgroup.controllers": "cpu",
            "cgroup/unified/app/cpu.max": "400000 100000",
        }
    )
    assert memory.free_bytes(roots=roots) == GIB + 96 * MIB
    assert processors.usable(roots=roots) == 4


# ---- what cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize("garbled", ["", "\n", "lots", "12 garbage", "1e9", b"\xff\xfe\x00", b"9" * 5000, None])
@pytest.mark.parametrize("file", ["memory.max", "memory.high", "cpu.max", "cgroup.controllers"])
def test_a_limit_that_cannot_be_read_is_no_limit(system: Write, file: str, garbled: object) -> None:
    roots = system({**v2("/"), f"cgroup/{file}": garbled})
    assert memory.free_bytes(roots=roots) == 8 * GIB
    assert memory.total_bytes(roots=roots) == 16 * GIB
    assert processors.usable(roots=roots) == 16


@pytest.mark.parametrize("quota", ["200000", "200000 0", "200000 -5", "-1 100000", "200000 max", "max", "two hundred"])
def test_a_quota_that_cannot_be_meant_is_no_limit(system: Write, quota: str) -> None:
    assert processors.usable(roots=system(v2("/", cpu_max=quota))) == 16


@pytest.mark.parametrize("garbled", ["", "lots", b"\xff", None])
def test_the_limit_itself_holds_where_the_use_cannot_be_read(system: Write, garbled: object) -> None:
    roots = system(v2("/", memory_max=2 * GIB, memory_current=garbled, memory_stat=garbled))
    assert memory.free_bytes(roots=roots) == 2 * GIB


@pytest.mark.parametrize(
    "listed", ["", "garbage", ":::", "0::", "0::\x00/a", "x:memory", "5:memory:/a\n\n0:", b"\xff\xfe::\xff", None]
)
def test_a_list_of_groups_that_cannot_be_read_is_no_limit(system: Write, listed: object) -> None:
    roots = system({"proc/self/cgroup": listed})
    assert memory.free_bytes(roots=roots) == 8 * GIB
    assert processors.usable(roots=roots) == 16


@pytest.mark.parametrize("meminfo", ["", "MemAvailable", "MemAvailable: lots kB\nMemTotal: kB", b"\xff\xff", None])
def test_where_the_machines_memory_cannot_be_read_the_limit_counts(system: Write, meminfo: object) -> None:
    roots = system({**v2("/", memory_max=2 * GIB, memory_current=GIB), "proc/meminfo": meminfo})
    assert memory.free_bytes(roots=roots) == GIB
    assert memory.total_bytes(roots=roots) == 2 * GIB


def test_a_folder_in_place_of_a_file_is_no_error(system: Write, tmp_path: Path) -> None:
    for name in ("proc/self/cgroup", "cgroup/memory.max", "cgroup/cpu.max"):
        (tmp_path / name).mkdir(parents=True)
    assert memory.free_bytes(roots=system({})) == 8 * GIB
    assert processors.usable(roots=system({})) == 16


# ---- this system -------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_system_the_tests_run_on_is_read() -> None:
    free, total = memory.free_bytes(), memory.total_bytes()
    assert free is not None
    assert total is not None
    assert 0 <= free <= total
    assert 1 <= processors.usable() <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_memory_of_a_process_is_what_it_holds() -> None:
    code = "held = bytearray(b'x') * 2**26; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        resident = memory.resident_bytes(child.pid)
        child.communicate(b"\n")
    assert resident is not None
    assert 2**26 <= resident <= 2**26 + 2**26
    assert memory.resident_bytes(child.pid) is None
