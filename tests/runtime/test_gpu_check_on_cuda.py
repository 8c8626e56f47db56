"""What `make gpu-check` says of a bundle on CUDA, over a double of the GPU: its path there is not that of its trial on the CPU."""

import pytest
from cuda_double import cuda_is_there, opened

from gpu_check import decode
from gpu_check.place import SMALL, Place
from gpu_check.prepare import prepare


@pytest.fixture(scope="module")
def work(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    list(prepare(Place(folder, "cpu", str(tiny_checkpoint("smollm2")))))
    return folder


@pytest.fixture
def place(work, monkeypatch):
    monkeypatch.setattr(Place, "sizes", SMALL)
    return Place(work, "cuda")


@pytest.mark.parametrize("dtype, role, recorded", [("fp16", "cuda", True), ("fp16", "fast", False), ("fp32", "portable", False)])
def test_a_rung(place, monkeypatch, dtype, role, recorded):
    monkeypatch.setattr(decode, "CudaBackend", lambda bundle, **options: opened(bundle, **options)[0])
    rows = {row.what: row for row in decode.rung(place, dtype, role)}
    assert rows["explained"].value.startswith("Double, the step recorded" if recorded else "Double, the step not recorded")
    assert rows["decode"].value > 0 and rows["prefill of 24"].value > 0
    if role == "cuda":                       # the others round activations to int8 on the CPU, where the double runs them; CUDA does not
        assert rows["KL to the exact CPU run"].ok and rows["same likeliest token"].ok


def test_the_ids_that_the_device_chose_are_the_logits(place, monkeypatch):
    with cuda_is_there():
        rows = {row.what: row for row in decode.engine(place, "fp16")}
        assert "runs cuda.onnx (Double, the step recorded)" in rows["explained"].value
        assert rows["greedy ids behind the largest logit, at most"].ok is True
        true = decode.step
        monkeypatch.setattr(decode, "step", lambda *given: -true(*given))
        rows = {row.what: row for row in decode.engine(place, "fp16")}
        assert rows["greedy ids behind the largest logit, at most"].ok is False
