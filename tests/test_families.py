"""The whole road of every family, and the README's tables of what works."""

import families
import pytest

roads = {}
REFUSED = {"gemma2": {"TensorRT builds": "soft"}}           # family -> step -> what the refusal names


@pytest.mark.parametrize("family", families.EVERY_FAMILY)
def test_the_whole_road(family, tmp_path):
    roads[family] = families.walk(family, tmp_path)
    for step, found in roads[family].items():
        assert found == "yes" or REFUSED.get(family, {}).get(step, "\0") in found, (step, found)
    if family == "smollm2":
        roads["hardware"] = families.hardware(tmp_path / "bundle")


def test_the_readmes_tables_are_what_happened():
    if set(roads) != {*families.EVERY_FAMILY, "hardware"}:
        pytest.skip("not every family's road was walked in this run")
    machine = roads.pop("hardware")
    assert families.shown("families") == families.table(roads), "run python -m tests.families --write"
    claimed = dict(row.strip("| ").split(" | ", 1) for row in families.shown("hardware").splitlines()[2:])
    assert set(claimed) == set(machine)
    for engine, result in machine.items():           # a machine shows what it has; what it lacks was shown by another
        assert result != "yes" or claimed[engine] == "yes", engine
