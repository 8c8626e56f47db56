"""What else was going on while something was measured, as far as the system tells (Linux): time that the hypervisor took, time
that other programs took, clocks, energy. What cannot be read is left out."""

import os
import time
from pathlib import Path

HERTZ = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Conditions:
    """Watch from the time it is made until `told`. root: where /proc and /sys are."""

    def __init__(self, root: Path = Path("/")):
        self._root, self._start, self._own, self._watch = root, _cpu_seconds(root), sum(os.times()[:4]), time.monotonic()
        self._clocks = [clock_mhz(root)]

    def told(self, others: str = "other programs") -> dict[str, str]:
        """{"conditions": one line}; nothing where nothing can be read. others: what to call the programs that are not ours."""
        now, own, said = _cpu_seconds(self._root), sum(os.times()[:4]) - self._own, []
        if self._start and now and (whole := sum(now.values()) - sum(self._start.values())) > 0:
            passed = {name: now[name] - self._start[name] for name in now}
            busy = whole - passed["idle"] - passed["iowait"] - passed["steal"]
            said += [f"steal {passed['steal'] / whole:.1%}", f"{others} {max(0, busy - own) / whole:.0%} of the machine's CPUs"]
        clocks = [clock for clock in [*self._clocks, clock_mhz(self._root)] if clock]
        said += [f"clock {' to '.join(f'{clock / 1000:.2f}' for clock in sorted(clocks))} GHz"] if clocks else []
        return {"conditions": ", ".join(said)} if said else {}


def clock_mhz(root: Path) -> float | None:
    """Mean clock of the processors now; None: not told."""
    scaled = [int(file.read_text()) / 1000 for file in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    lines = scaled or [float(line.split(":")[1]) for line in _lines(root / "proc/cpuinfo") if line.startswith("cpu MHz")]
    return sum(lines) / len(lines) if lines else None


def energy_joules(root: Path = Path("/")) -> float | None:
    """What the processor packages have used since some time (RAPL: Intel's, and AMD's since Zen); None: not to be read, as for
    everyone but root on most systems. It starts over at a limit, within hours."""
    files = [file for file in (root / "sys/class/powercap").glob("*-rapl:*/energy_uj") if file.parent.name.count(":") == 1]
    try:
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except OSError:
        return None


def resident_mb(pid: int | str = "self", field: str = "VmRSS", root: Path = Path("/")) -> float | None:
    """MiB of a process's memory that are resident (VmHWM: the most so far); None: not to be read."""
    line = next((line for line in _lines(root / f"proc/{pid}/status") if line.startswith(f"{field}:")), None)
    return int(line.split()[1]) / 1024 if line else None


def _cpu_seconds(root: Path) -> dict[str, float]:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    line = next((line for line in _lines(root / "proc/stat") if line.startswith("cpu ")), "")
    return {name: int(ticks) / HERTZ for name, ticks in zip(names, line.split()[1:])}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):
        return []
