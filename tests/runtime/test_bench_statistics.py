"""Medians, intervals, ratios, tables, and what is read of the machine."""

import json

import numpy as np
import pytest
from scipy import stats

from runtime.benching import conditions, report
from runtime.benching.conditions import Conditions
from runtime.benching.statistics import estimate, percentiles, ratio


@pytest.mark.parametrize("count", [5, 12, 40])
def test_the_interval_is_scipys(count):
    values = np.random.default_rng(count).lognormal(3, .4, count)
    found = estimate(list(values))
    assert found.median == np.median(values)
    want = stats.bootstrap((values,), np.median, method="percentile", n_resamples=20000, random_state=1).confidence_interval
    scale = values.max() - values.min()
    assert found.low == pytest.approx(want.low, abs=.03 * scale) and found.high == pytest.approx(want.high, abs=.03 * scale)
    assert estimate(list(values)) == found                        # the same each time


def test_the_interval_holds_the_median_as_often_as_it_says():
    """Of a distribution whose median is known, in about 95 of 100 samples."""
    random = np.random.default_rng(0)
    held = [found.low <= 0 <= found.high for found in (estimate(random.normal(size=25)) for _ in range(300))]
    assert .9 < np.mean(held) < .99


def test_ratios_are_those_of_pairs():
    """What changes from round to round, by the same factor for both, cancels."""
    weather = np.array([1, 3, .5, 2, 1.5])
    assert ratio(list(20 * weather), list(10 * weather)) == (2, 2, 2)
    with pytest.raises(ValueError):
        ratio([1, 2], [1])


def test_percentiles_of_nothing_are_none():
    assert percentiles("x", []) == {} and percentiles("x", [3.0]) == {"x_p50": 3, "x_p95": 3, "x_p99": 3}


SAMPLES = {"ours": {"speed": [20.0, 22.0, 24.0], "load_ms": [7.0]}, "theirs|": {"speed": [10.0, 11.0, 12.0], "odd": [1.0]}}


def test_tables_of_one_and_of_several():
    one, = report.rows({"ours": {"speed": [1.0, 2.0, 9.0]}})
    assert one == {"": "speed", "median": "2.00", "min": "1.00", "max": "9.00", "95% interval": "1.00 to 9.00"}
    speed, load, odd = report.rows(SAMPLES)
    assert speed == {"": "speed", "ours": "22.00", "theirs|": "11.00", "ours / theirs|": "2.00 (2.00 to 2.00)"}
    assert load["theirs|"] == load["ours / theirs|"] == odd["ours"] == ""
    told = report.markdown(SAMPLES, {"machine": "a"}).splitlines()
    assert told[0] == "- machine: a" and "theirs\\|" in told[2] and len({line.replace("\\|", "").count("|") for line in told[2:]}) == 1
    found = json.loads(json.dumps(report.as_json(SAMPLES, {"machine": "a"})))
    assert found["speed"] == 22 and found["systems"]["theirs|"]["figures"]["odd"] == 1 and found["machine"] == "a"
    assert found["ratios"]["ours / theirs|"] == {"speed": {"median": 2, "low": 2, "high": 2}}


def test_conditions_are_read_from_the_system(tmp_path, monkeypatch):
    """100 s of CPU time pass: 10 stolen, 20 idle, 40 of this process."""
    for name in ("proc/self", "sys/devices/system/cpu/cpu0/cpufreq", "sys/class/powercap/intel-rapl:0", "sys/class/powercap/intel-rapl:0:0"):
        (tmp_path / name).mkdir(parents=True)
    stat = tmp_path / "proc/stat"
    monkeypatch.setattr(conditions, "HERTZ", 100)
    monkeypatch.setattr(conditions.os, "times", lambda: (0, 0, 0, 0, 0))
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1\n")
    clock = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    clock.write_text("2000000\n")
    watch = Conditions(tmp_path)
    stat.write_text("cpu  5000 0 2000 1900 100 0 0 1000 0 0\n")
    clock.write_text("3000000\n")
    monkeypatch.setattr(conditions.os, "times", lambda: (30, 5, 4, 1, 0))
    assert watch.told() == {"conditions": "steal 10.0%, other programs 30% of the machine's CPUs, clock 2.00 to 3.00 GHz"}
    assert conditions.energy_joules(tmp_path / "none") is None and Conditions(tmp_path / "none").told() == {}
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("5000000\n")
    (tmp_path / "sys/class/powercap/intel-rapl:0:0/energy_uj").write_text("7\n")           # a part of the same package
    assert conditions.energy_joules(tmp_path) == 5
    (tmp_path / "proc/self/status").write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert conditions.resident_mb(root=tmp_path) == 1 and conditions.resident_mb(field="VmHWM", root=tmp_path) == 2
    assert conditions.resident_mb(5, root=tmp_path) is None
