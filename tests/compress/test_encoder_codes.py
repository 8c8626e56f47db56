"""Quantized encoders: codes chosen as a decoder's, stored, and written into the graphs value for value."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from encoder_fixtures import tiny
from onnx import numpy_helper
from safetensors.torch import load_file

from compress import quantize
from compress.encoders.moments import second_moments
from export import onnx as export_onnx
from models.encoders.network import load, quantized_tensors, read_quantized
from runtime import Encoder, verify


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "bert", "text-classification")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join("the quick brown fox jumps over a lazy dog"[n % 9:] for n in range(40)) + "\n")
    return file


@pytest.mark.parametrize("bits, group, symmetric", [(8, 0, True), (4, 32, False)])
def test_codes_value_for_value(model, tmp_path, capsys, bits, group, symmetric):
    assert quantize.main([str(model), "-o", str(tmp_path / "q"), "--bits", str(bits), "--group", str(group),
                          *([] if symmetric else ["--no-symmetric"])]) == 0
    assert export_onnx.main([str(tmp_path / "q"), "-o", str(tmp_path / "out")]) == 0
    assert verify.main([str(tmp_path / "out"), "--threads", "1"]) == 0 and "fast: 1 - cosine" in capsys.readouterr().out
    codes, dense = quantized_tensors(tmp_path / "q", read_quantized(tmp_path / "q")), load(model, "text-classification").state_dict()
    assert len(codes) == 2 * 6 + 1                            # the linears of two layers, and the table
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    wanted = sorted(tuple(sorted(one.codes.flatten().tolist())) for one in codes.values())
    found = sorted(tuple(sorted((stored[node.input[0]].astype(int) + (128 if stored[node.input[0]].dtype == np.int8 else 8)).flatten().tolist()))
                   for node in made)
    assert found == wanted
    for name, one in codes.items():
        weight = dense[f"{name}.weight"]
        step = one.scales.float().repeat_interleave(weight.shape[1] // one.scales.shape[1], 1)
        assert ((one.dequantize() - weight).abs() <= step * 0.51).all()
    with Encoder(tmp_path / "out", threads=1, provider="cpu") as fast, Encoder(tmp_path / "out", threads=1, provider="cpu", role="portable") as exact:
        assert fast.role == "fast"
        for a, b in zip(fast.outputs(["abc", "the fox"]), exact.outputs(["abc", "the fox"])):
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999
    assert (tmp_path / "out" / "weights.bin").stat().st_size < 0.4 * sum(t.nbytes for t in dense.values())


def test_gptq_loses_less_on_what_it_saw(model, text, tmp_path):
    """The loss that it minimizes, of the layers' outputs on the text, is far below that of rounding to nearest."""
    from compress.encoders.text import encoded_texts
    network = load(model, "text-classification")
    linears = {name: part for name, part in network.named_modules() if isinstance(part, torch.nn.Linear) and ".layer." in name}
    options = quantize.Options(checkpoint=model, out=tmp_path)
    moments = second_moments(network, linears, encoded_texts(model, network.config, options, (str(text),), 40, 64))
    lost = {}
    for method in ("rtn", "gptq"):
        assert quantize.main([str(model), "-o", str(tmp_path / method), "--bits", "4", "--group", "32", "--method", method,
                              *(["--data", str(text)] if method == "gptq" else [])]) == 0
        codes = quantized_tensors(tmp_path / method, read_quantized(tmp_path / method))
        lost[method] = sum(float(((error := part.weight.detach() - codes[name].dequantize()) @ moments[name] * error).sum())
                           for name, part in linears.items())
    assert lost["gptq"] < 0.5 * lost["rtn"]
    assert "classifier.weight" in load_file(tmp_path / "gptq" / "model.safetensors")         # the head stays


def test_what_is_skipped_keeps_its_weights(model, tmp_path):
    assert quantize.main([str(model), "-o", str(tmp_path / "q"), "--bits", "8", "--group", "0", "--skip", "*.layer.0.*"]) == 0
    stored, dense = load_file(tmp_path / "q" / "model.safetensors"), load(model, "text-classification").state_dict()
    for name in ("attention.self.query", "output.dense"):
        assert torch.equal(stored[f"bert.encoder.layer.0.{name}.weight"], dense[f"bert.encoder.layer.0.{name}.weight"])
        assert f"bert.encoder.layer.1.{name}.codes" in stored and f"bert.encoder.layer.1.{name}.weight" not in stored


def test_refused_in_words(model, text, tmp_path, capsys):
    for argv, sentence in ((["--bits", "3"], "give 4 or 8"), (["--method", "hqq", "--no-symmetric"], "give rtn, clip or gptq"),
                           (["--kind", "levels"], "are int with fp16 scales"), (["--activations", "8"], "--activations is for decoders"),
                           (["--embedding-bits", "4"], "an encoder's table has 8"),
                           (["--skip", "nothing.*"], "matches no linear of the layers"),
                           (["--method", "gptq", "--data", text, "--task", "qa"], "--task qa is for decoders"),
                           (["--method", "gptq", "--data", text, "--deduplicate"], "--deduplicate cleans texts for decoders"),
                           (["--target-size", "1MB", "--data", text], "an encoder's linears have one format")):
        assert quantize.main([str(model), "-o", str(tmp_path / "o"), *map(str, argv)]) == 2
        assert sentence in capsys.readouterr().err, argv
    assert not (tmp_path / "o").exists()
