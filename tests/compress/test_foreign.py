"""Checkpoints of others: what the reader makes of them against plain loops and neural-compressor's packing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.foreign import AWQ_ORDER, main
from compress.rtn import minmax_grid
from models.checkpoint import load_decoder, open_checkpoint
from models.quantized import TensorFormat

BITS, GROUP = 4, 32


def pack_loop(codes, order=None):
    """uint8 [R, C] -> int32 [R, C / 8], eight 4-bit codes a word; order[i] is the code in nibble i."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column in range(codes.shape[1] // 8):
        for nibble in range(8):
            place = nibble if order is None else order[nibble]
            words[:, column] |= codes[:, column * 8 + place].long() << (4 * nibble)
    return words.to(torch.int32)


def gptq_tensors(name, codes, zeros, scales, columns):
    return {f"{name}.qweight": pack_loop(codes).T.contiguous(), f"{name}.qzeros": pack_loop((zeros.T - 1) % 16),
            f"{name}.scales": scales.half().T.contiguous(), f"{name}.g_idx": (torch.arange(columns) // GROUP).int()}


def awq_tensors(name, codes, zeros, scales, columns):
    return {f"{name}.qweight": pack_loop(codes.T, AWQ_ORDER), f"{name}.qzeros": pack_loop(zeros.T, AWQ_ORDER),
            f"{name}.scales": scales.half().T.contiguous()}


def compressed_tensors(name, codes, zeros, scales, columns):
    return {f"{name}.weight_packed": pack_loop(codes), f"{name}.weight_scale": scales.bfloat16(),
            f"{name}.weight_shape": torch.tensor(codes.shape)}


KINDS = {
    "gptq": (gptq_tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "awq": (awq_tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "compressed-tensors": (compressed_tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized",
                           "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": GROUP}}}}),
}


def make(source, out, kind, symmetric):
    """A checkpoint in another project's format, and the dense weights its codes stand for."""
    build, config = KINDS[kind]
    shutil.copytree(source, out)
    tensors, dense = load_file(out / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight, name = tensors.pop(key), key.removesuffix(".weight")
        grid = minmax_grid(weight.float(), TensorFormat(BITS, GROUP, symmetric))
        if kind == "compressed-tensors":
            grid = grid.with_scales(grid.scales.bfloat16().float())
        codes = grid.codes(weight.float()).to(torch.uint8)
        dense[key] = grid.values(codes.float())
        tensors |= build(name, codes, grid.zeros.to(torch.uint8).long(), grid.scales, weight.shape[1])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((out / "config.json").read_text()) | {"quantization_config": config}
    (out / "config.json").write_text(json.dumps(whole))
    return dense


@pytest.mark.parametrize("kind, symmetric", [("gptq", True), ("gptq", False), ("awq", False), ("awq", True),
                                             ("compressed-tensors", True)])
@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
def test_codes_are_kept(kind, symmetric, family, tiny_checkpoint, tmp_path):
    dense = make(tiny_checkpoint(family), tmp_path / "theirs", kind, symmetric)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 0
    ours, decoder = open_checkpoint(tmp_path / "ours"), load_decoder(tmp_path / "ours").state_dict()
    assert {form.symmetric for form in ours.quantization.tensors.values()} == {symmetric}
    for name, weight in dense.items():
        assert torch.equal(decoder[name], weight), name
    original = open_checkpoint(tiny_checkpoint(family))
    assert torch.equal(decoder["model.embed_tokens.weight"], original.weight("model.embed_tokens"))


def test_reads_what_neural_compressor_packs(tiny_checkpoint, tmp_path):
    modules = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.modules")
    source = tmp_path / "theirs"
    shutil.copytree(tiny_checkpoint("smollm2"), source)
    tensors, dense = load_file(source / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight, name = tensors.pop(key), key.removesuffix(".weight")
        grid = minmax_grid(weight.float(), TensorFormat(4, 32, False))
        packed = modules.INCWeightOnlyLinear(weight.shape[1], weight.shape[0], bits=4, group_size=32, zp=True,
                                             scale_dtype=torch.float16, use_optimum_format=True)
        packed.pack(grid.codes(weight.float()).int(), grid.scales, grid.zeros.int(), None)
        dense[key] = grid.values(grid.codes(weight.float()))
        tensors |= {f"{name}.{part}": getattr(packed, part).contiguous() for part in ("qweight", "qzeros", "scales")}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": KINDS["gptq"][1]}
    (source / "config.json").write_text(json.dumps(config))
    assert main([str(source), "-o", str(tmp_path / "ours")]) == 0
    decoder = load_decoder(tmp_path / "ours").state_dict()
    for name, weight in dense.items():
        assert torch.equal(decoder[name], weight), name


@pytest.mark.parametrize("change, words", [
    ({"quant_method": "bitsandbytes"}, "not known"), ({"bits": 3}, "bits 2, 4 and 8"), ({"group_size": 48}, "do not fit"),
    ({"quant_method": "edgewright"}, "one of ours"), (None, "is not quantized")])
def test_other_formats_are_refused(change, words, tiny_checkpoint, tmp_path, capsys):
    make(tiny_checkpoint("smollm2"), tmp_path / "theirs", "gptq", True)
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = change and config["quantization_config"] | change
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    if words == "do not fit":
        save_file({n: t for n, t in tensors.items() if not n.endswith("g_idx")}, tmp_path / "theirs" / "model.safetensors")
    file.write_text(json.dumps(config))
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_groups_out_of_place_and_lost_tensors_are_refused(tiny_checkpoint, tmp_path, capsys):
    make(tiny_checkpoint("smollm2"), tmp_path / "theirs", "gptq", True)
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.g_idx"
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, file)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert "groups out of place" in capsys.readouterr().err
    save_file({n: t for n, t in tensors.items() if not n.endswith("up_proj.scales")}, file)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert "lacks model.layers.0.mlp.up_proj.scales" in capsys.readouterr().err
    file.unlink()
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert "no safetensors" in capsys.readouterr().err and not (tmp_path / "ours").exists()
