"""What this machine gives the process: CPUs, memory, and what to call them in a report.

A container's quota and an affinity mask count, the host's processors do not: a pool of more threads than CPUs waits on
itself. Linux is read exactly (/proc, cgroup v1 and v2); elsewhere the number of processors is used, and the free
memory is unknown (None).
"""

import ctypes
import numbers
import os
import platform
import sys
from pathlib import Path

from .errors import UserError, shown


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs this process may use: the affinity mask, lowered to the cgroup's quota rounded up; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders(root, "cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([affinity, *(int(-(-quota // 1)) for quota in quotas)]))


def cpu_threads(asked: int | None) -> int:
    """How many threads to run: `asked`, or one for each available CPU. Raises UserError for more than those (a pool of more
    waits on itself) and for what is no number of threads."""
    cpus = available_cpus()
    if asked is None:
        return cpus
    if not isinstance(asked, numbers.Integral) or isinstance(asked, bool) or not 1 <= asked <= cpus:
        raise UserError(f"threads is {shown(asked)}; this process may use {cpus} CPUs, so give a whole number from 1 to {cpus}")
    return int(asked)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated: the kernel's estimate, lowered to what the cgroup leaves. None: unknown."""
    try:
        meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return None
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free.append(max(0, limit - used))
    return min(free)


def cpu_name() -> str:
    """The processor's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def has_vnni() -> bool:
    """Whether an x86 processor is known to multiply 8-bit integers with 32-bit sums (AVX-512 VNNI or AVX-VNNI)."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; "" where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def peak_rss_mb() -> float:
    """Largest resident memory of this program so far, in MiB (mapped files that are in memory included)."""
    try:                                # Linux: since exec; ru_maxrss would count what the parent held when it forked
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def release_free_memory() -> None:
    """Give the system back what the C library's heap keeps of freed memory: loading a model leaves holes in it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):          # another C library than glibc
        pass


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and its parents, v2 and v1; a limit in any of them holds."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        folders += [group, *(p for p in group.parents if p.is_relative_to(mount))]
    return folders


def _cpu_quota(folder: Path) -> float | None:
    """CPUs' worth of time per period that the group may use, or None where it is not limited."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return quota / period if quota and period and quota > 0 else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):                 # absent, or "max"
        return None
