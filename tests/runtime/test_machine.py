"""What a container or a taskset leaves of the machine."""

import os
import subprocess
import sys

import pytest

from runtime import machine


def system(tmp_path, cgroup, files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize("quota, cpus", [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1),
                                         ("99900000 100000", 8)])
def test_quota_of_cgroup_v2(tmp_path, quota, cpus):
    assert machine.available_cpus(system(tmp_path, "0::/app\n", {"app/cpu.max": quota})) == cpus


def test_a_parents_quota_holds_too(tmp_path):
    root = system(tmp_path, "0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"})
    assert machine.available_cpus(root) == 3


def test_quota_of_cgroup_v1(tmp_path):
    root = system(tmp_path, "3:cpu,cpuacct:/x\n2:memory:/x\n", {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"})
    (tmp_path / "sys/fs/cgroup/cpu").rename(tmp_path / "sys/fs/cgroup/cpu,cpuacct")
    (tmp_path / "sys/fs/cgroup/cpu").symlink_to("cpu,cpuacct")
    assert machine.available_cpus(root) == 4


def test_no_cgroup_at_all(tmp_path):
    assert machine.available_cpus(tmp_path) == 8 and machine.available_memory(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_of_this_process():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from runtime.machine import available_cpus; print(available_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_memory(tmp_path):
    files = {"app/memory.max": "3000000", "app/memory.current": "1000000"}
    assert machine.available_memory(system(tmp_path / "a", "0::/app\n", files)) == 2000000
    assert machine.available_memory(system(tmp_path / "b", "0::/app\n", files | {"app/memory.max": "max"})) == 5000 * 1024


def test_this_machine():
    assert machine.available_cpus() >= 1 and machine.cpu_name()
    # In a process of its own: the peak of this one may be far above what it holds now.
    code = ("from runtime.machine import peak_rss_mb; before = peak_rss_mb(); block = bytearray(160 << 20); "
            "block[::4096] = bytes([1]) * len(block[::4096]); print(peak_rss_mb() - before)")
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 100 < grown < 200
