"""Calibrated quantization end to end on small models: codes, sizes, resuming, and every bad input."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from compress.quantizing import calibrated as module
from compress.quantizing.mixed import bundle_extras
from compress.quantize import main
from export.onnx import main as export
from models.checkpoint import load_decoder, open_checkpoint, write_checkpoint
from models.formats import lineage
from models.network.quantized import Quantization, TensorFormat

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. 今天天气很好。 def add(a, b): return a + b\n" * 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def quantize(checkpoint, out, text, *options) -> int:
    cache = out.parent / "cache"
    return main([str(checkpoint), "-o", str(out), "--data", str(text), "--cache", str(cache), "--windows", "24", "--length", "64",
                 "--sensitivity-windows", "8", *map(str, options)])


def text_ids(checkpoint):
    tokens = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids
    return torch.tensor(tokens[20:20 + 8 * 60]).view(8, 60)


def divergence(path, reference, ids):
    with torch.no_grad():
        p, q = (torch.log_softmax(load_decoder(folder)(ids), -1) for folder in (reference, path))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "smollm2", "mistral", "qwen2", "qwen3", "gpt2"])
def test_calibration_keeps_more_of_the_model(family, tiny_checkpoint, text, tmp_path):
    """Nearer to the model as a whole at 5 bits. Coarser codes leave nothing of a random model either way, so there the
    outputs of the first linears, whose inputs nothing has disturbed, are held against the original's."""
    source, ids, found = tiny_checkpoint(family), text_ids(tiny_checkpoint(family)), {}
    for method, bits in (("rtn", 5), ("gptq", 5), ("rtn", 3), ("gptq", 3)):
        out = tmp_path / f"{method}{bits}"
        assert quantize(source, out, text, "--method", method, "--bits", bits, "--embedding-bits", 0) == 0
        found[method, bits] = divergence(out, source, ids) if bits == 5 else first_error(out, source, ids)
    assert found["gptq", 5] < 0.8 * found["rtn", 5]
    assert found["gptq", 3] < 0.8 * found["rtn", 3]
    assert not list(tmp_path.glob(".*"))                       # the finished layers are gone


@pytest.mark.parametrize("family", ["smollm2", "qwen3_moe"])
def test_gptq_is_told_how_far_the_quantized_model_has_come_off(family, tiny_checkpoint, tmp_path):
    """The last down_proj of an attention's layer, against hooks on both models whole; experts, whose tokens differ, are told nothing."""
    checkpoint = open_checkpoint(tiny_checkpoint(family))
    ids, told = text_ids(checkpoint.path), []

    def spy(weight, hessian, form, negative, cross):
        told.append((hessian, cross))
        return module.clip(weight, hessian, form, negative)
    plan = Quantization({name: TensorFormat(3, 32) for name in checkpoint.modules() if name.startswith("model.layers.")})
    tensors = dict(module.calibrated(checkpoint, ids, plan, spy, tmp_path / "work", corrected=True))
    if family == "qwen3_moe":
        assert any(cross is None for _, cross in told) and any(cross is not None for _, cross in told)
        return
    write_checkpoint(tmp_path / "q", checkpoint.hf_config | {"quantization_config": plan.to_dict()}, iter(tensors.items()), checkpoint.path,
                     lineage.stage("test", {}, {}))
    inputs = []
    for folder in (tmp_path / "q", checkpoint.path):
        decoder = load_decoder(folder)
        decoder.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda linear, x: inputs.append(x[0].flatten(0, 1)))
        with torch.no_grad():
            decoder(ids)
    x, y = inputs
    expected = (y - x).T @ x / (len(x) + 4 * x.shape[1])                 # of which so many are taken for undisturbed
    assert (told[-1][1] - expected).norm() < 0.03 * expected.norm() and expected.norm() > 0.01 * told[-1][0].norm()
    told.clear()
    dict(module.calibrated(checkpoint, ids, plan, spy, tmp_path / "once more"))
    assert all(cross is None for _, cross in told)


def test_what_is_rounded_makes_up_for_half_of_the_error_before():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    y, weight = x + 0.1 * torch.randn(500, 64, generator=generator) + 0.1 * x.roll(1, 1), torch.randn(8, 64, generator=generator)
    hessian = (x.T @ x / 500).double()
    steady = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    wanted = weight.double() @ (torch.eye(64) + 0.5 * ((y - x).T @ x / 500).double() @ torch.linalg.inv(steady))
    found = module.gptq_descended(weight, hessian.float(), TensorFormat(8, 32), cross=(y - x).T @ x / 500).dequantize()
    plain = module.gptq_descended(weight, hessian.float(), TensorFormat(8, 32)).dequantize()
    off = [float(((w - wanted) @ hessian * (w - wanted)).sum()) for w in (found.double(), plain.double())]
    assert off[0] < 0.05 * off[1]


def first_error(path, reference, ids):
    """Mean square error of the outputs of layer 0's q, k and v on the original's inputs."""
    original, inputs = load_decoder(reference), []
    hook = original.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    with torch.no_grad():
        original(ids)
        hook.remove()
        changed = load_decoder(path).model.layers[0].self_attn
        return sum(float((getattr(changed, name)(inputs[0]) - getattr(original.model.layers[0].self_attn, name)(inputs[0])).square().mean())
                   for name in ("q_proj", "k_proj", "v_proj"))


def test_a_target_size_is_met_and_mixed_precision_pays(tiny_checkpoint, text, tmp_path, capsys):
    source, ids = tiny_checkpoint("smollm2"), text_ids(tiny_checkpoint("smollm2"))
    assert quantize(source, tmp_path / "even", text, "--method", "gptq", "--bits", 5, "--embedding-bits", 5) == 0
    even = open_checkpoint(tmp_path / "even")
    size = sum(even.nbytes(name) for name in even.names()) + bundle_extras(open_checkpoint(source))
    kept = tmp_path / "sensitivity.safetensors"
    assert quantize(source, tmp_path / "mixed", text, "--method", "gptq", "--target-size", f"{size}B", "--sensitivity", kept) == 0
    mixed = open_checkpoint(tmp_path / "mixed")
    assert export([str(tmp_path / "mixed"), "-o", str(tmp_path / "bundle")]) == 0
    assert 0.97 * size < (tmp_path / "bundle/weights.bin").stat().st_size <= size
    assert len(set(mixed.quantization.tensors.values())) > 1
    assert divergence(tmp_path / "mixed", source, ids) < divergence(tmp_path / "even", source, ids)
    stamp = kept.stat().st_mtime_ns
    assert quantize(source, tmp_path / "onnx", text, "--method", "clip", "--target-bpw", 6, "--backend", "onnx",
                    "--sensitivity", kept) == 0
    assert kept.stat().st_mtime_ns == stamp                    # measured once
    assert {form.bits for form in open_checkpoint(tmp_path / "onnx").quantization.tensors.values()} == {4, 8}


def test_an_interrupted_run_goes_on_where_it_stopped(tiny_checkpoint, text, tmp_path, monkeypatch):
    source = tiny_checkpoint("smollm2")
    assert quantize(source, tmp_path / "whole", text, "--method", "gptq") == 0
    layer, visited = module._layer, []

    def stops(walk, loaded, number, *rest):
        visited.append(number)
        if number == 1 and visited.count(1) == 1:
            raise KeyboardInterrupt
        return layer(walk, loaded, number, *rest)
    monkeypatch.setattr(module, "_layer", stops)
    assert quantize(source, tmp_path / "resumed", text, "--method", "gptq") == 130
    assert not (tmp_path / "resumed").exists() and list(tmp_path.glob(".resumed.*.work"))
    assert quantize(source, tmp_path / "resumed", text, "--method", "gptq") == 0
    assert visited == [0, 1, 1]                                # layer 0 was not done again
    whole, resumed = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "resumed")
    for name in whole.names():
        assert torch.equal(whole.read(name), resumed.read(name)), name


def test_modules_left_out_stay_as_they_are(tiny_checkpoint, text, tmp_path):
    source = tiny_checkpoint("llama")
    assert quantize(source, tmp_path / "q", text, "--method", "gptq", "--skip", "*.q_proj", "--embedding-bits", 0) == 0
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "q")
    for name in before.names():
        if "q_proj" in name or "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(before.read(name), after.read(name)), name
    assert after.quantization.tensors["model.layers.1.mlp.down_proj"] == TensorFormat(4, 32)
    stage = json.loads((tmp_path / "q" / "lineage.json").read_text())["stages"][-1]
    assert set(stage["inputs"]) == {"checkpoint", "calibration"}


@pytest.mark.parametrize("options, words", [
    (["--method", "gptq", "--windows", 0], "--windows is 0"),
    (["--method", "gptq", "--length", 100000, "--data", "short.txt"], "less than one window"),
    (["--target-size", "1kB"], "the smallest possible"),
    (["--target-size", "many"], "should be a size such as 92MB"),
    (["--target-size", "9" * 400 + "GB"], "should be a size such as 92MB"),
    (["--target-size", "92"], "write 92MB"),
    (["--target-size", "1MB", "--target-bpw", 4], "say the same thing twice"),
    (["--target-bpw", -1], "should be above 0"),
    (["--bits", 3, "--backend", "onnx"], "3 bits do not run in onnx: choose 4 or 8 bits, or choose --backend pytorch or native"),
    (["--no-symmetric", "--backend", "tensorrt"], "zero points do not run in tensorrt: leave out --no-symmetric, or choose --backend pytorch"),
    (["--method", "gptq", "--group", 128], "does not divide the 64 inputs"),
    (["--method", "gptq", "--data", "empty.txt"], "holds no records"),
    (["--method", "clip", "--activations", 8, "--activation-scales", "static"], "with stored scales do not run in native: choose "
                                                                               "--backend pytorch"),
    (["--method", "clip", "--kv-cache", "channel", "--backend", "tensorrt"], "int8 keys and values with stored scales do not run"),
    (["--kv-cache", "channel", "--backend", "onnx"], "--kv-cache looks at calibration text"),
    (["--bits", 8, "--group", 0, "--kind", "e4m3"], "8-bit floats do not run in native: choose --backend pytorch or onnx"),
    (["--kind", "e4m3", "--backend", "onnx"], "give --method rtn --bits 8"),
    (["--kind", "levels", "--bits", 5], "--kind levels has 2 to 4 bits"),
    (["--kind", "levels", "--backend", "onnx"], "tables of levels do not run in onnx: choose --backend pytorch or native"),
    (["--scale-bits", 8, "--group", 0], "--scale-bits 8 is about the scales of groups"),
    (["--scale-bits", 8, "--backend", "onnx"], "scales of 8 bits do not run in onnx: choose --backend pytorch or native"),
    (["--scale-bits", 8, "--method", "hqq"], "--method hqq has even steps and fp16 scales"),
    (["--activation-scales", "static", "--method", "clip"], "give --activations 8"),
])
def test_bad_input(options, words, tiny_checkpoint, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("A few words.")
    options = [str(tmp_path / o) if o in ("empty.txt", "short.txt") else o for o in options]
    arguments = [str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "q"), "--cache", str(tmp_path / "cache"), "--length", "64",
                 "--sensitivity-windows", "2", *map(str, options)]
    assert main(arguments if "--data" in options else [*arguments, "--data", str(text)]) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "q").exists()


def test_data_is_asked_for(tiny_checkpoint, tmp_path, capsys):
    for options in (["--method", "gptq"], ["--target-size", "1MB"]):
        assert main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "q"), *options]) == 2
        assert "give --data FILES" in capsys.readouterr().err


def test_tensorrt_gets_no_negative_scale(tiny_checkpoint, text, tmp_path):
    """Its parser refuses them; elsewhere they serve groups whose largest weight is positive."""
    for backend in ("tensorrt", "onnx"):
        assert quantize(tiny_checkpoint("smollm2"), tmp_path / backend, text, "--method", "gptq", "--backend", backend) == 0
        found = open_checkpoint(tmp_path / backend)
        least = min(float(found.quantized(module).scales.min()) for module in found.quantization.tensors)
        assert (least > 0) == (backend == "tensorrt")


def test_dead_and_broken_layers_are_named(tiny_checkpoint, text, tmp_path, capsys):
    for value, words in ((0.0, "mlp.gate_proj.* all zero"), (float("nan"), "post_attention_layernorm.weight holds values that are not finite")):
        broken = tmp_path / f"broken{value}"
        shutil.copytree(tiny_checkpoint("smollm2"), broken)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.1.post_attention_layernorm.weight"].fill_(value)
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        assert quantize(broken, tmp_path / "q", text, "--method", "clip", "--embedding-bits", 0) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"model\.layers\.1\.{words}", error)
        assert not (tmp_path / "q").exists()
