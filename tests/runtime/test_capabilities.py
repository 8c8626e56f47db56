"""The table of what a backend runs: what it lacks of a plan, and that the guide to compressing says the same."""

from pathlib import Path

import pytest

from runtime.capabilities import BACKENDS, check_runs, lacks
from runtime.errors import Unavailable

FORM = {"bits": 4, "group": 32, "symmetric": True}
PLAN = {"tensors": {"m": FORM}, "activations": {}, "kv_cache": None}
# (a plan, what is lacking in which backend)
CASES = [
    (PLAN, {}),
    (PLAN | {"tensors": {"m": FORM | {"bits": 3}}}, dict.fromkeys(("onnx", "tensorrt"), "3 bits")),
    (PLAN | {"tensors": {"m": FORM | {"symmetric": False}}}, {"tensorrt": "zero points"}),
    (PLAN | {"tensors": {"m": FORM | {"bits": 8, "kind": "e4m3"}}}, dict.fromkeys(("native", "tensorrt"), "8-bit floats")),
    (PLAN | {"tensors": {"m": FORM | {"kind": "levels"}}}, dict.fromkeys(("onnx", "tensorrt"), "tables of levels")),
    (PLAN | {"tensors": {"m": FORM | {"scale_bits": 8}}}, dict.fromkeys(("onnx", "tensorrt"), "scales of 8 bits")),
    (PLAN | {"activations": {"bits": 8, "per": "row"}}, {}),
    (PLAN | {"activations": {"bits": 8, "per": "tensor"}},
     dict.fromkeys(("native", "tensorrt"), "int8 activations with stored scales")),
    (PLAN | {"kv_cache": {"bits": 8, "per": "channel"}}, {"tensorrt": "int8 keys and values with stored scales"}),
]
ROWS = {"2, 3, 5, 6 bits": lambda able: {2, 3, 5, 6} <= set(able.bits), "zero points": lambda able: able.zeros,
        "negative scales": lambda able: able.negative_scales, "8-bit floats": lambda able: able.float8,
        "tables of levels": lambda able: able.levels, "scales of 8 bits": lambda able: 8 in able.scale_bits,
        "int8 activations, a scale for each row": lambda able: "row" in able.activations,
        "int8 activations, `--activation-scales static`": lambda able: "tensor" in able.activations,
        "int8 KV cache": lambda able: able.kv_cache}


@pytest.mark.parametrize("plan, expected", CASES)
def test_what_a_backend_lacks_is_named(plan, expected):
    found = {backend: [lack.what for lack in lacks(backend, plan)] for backend in BACKENDS}
    assert found == {backend: [expected[backend]] if backend in expected else [] for backend in BACKENDS}
    for backend in expected:
        with pytest.raises(Unavailable, match=f"^here: .*{expected[backend]}, which .* does not run"):
            check_runs(backend, plan, "here")


def test_the_guide_has_the_tables_answers():
    page = (Path(__file__).parents[2] / "docs" / "compressing.md").read_text("utf-8")
    for title, able in ROWS.items():
        row, = (line for line in page.splitlines() if line.startswith(f"| {title}"))
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        assert [not cell.startswith("no") for cell in cells] == [able(one) for one in BACKENDS.values()], row
