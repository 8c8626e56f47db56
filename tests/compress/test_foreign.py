"""Checkpoints of others: what the reader makes of them against plain loops and neural-compressor's packing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AwqConfig, GPTQConfig

from compress.foreign import AWQ_ORDER, main
from compress.quantizing.rtn import minmax_grid
from models.checkpoint import load_decoder, open_checkpoint
from models.network.quantized import TensorFormat

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


def test_a_family_with_names_of_its_own_is_refused(tiny_checkpoint, tmp_path, capsys):
    make(tiny_checkpoint("gemma3"), tmp_path / "theirs", "gptq", True)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert "linears of a gemma3_text are stored under other names" in capsys.readouterr().err and not (tmp_path / "ours").exists()


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
    assert "has neither model.safetensors" in capsys.readouterr().err and not (tmp_path / "ours").exists()


def reconfigured(folder, **changes):
    """Change quantization_config: GROUP.KEY reaches into the one group of compressed-tensors, WEIGHTS.KEY into its weights."""
    whole = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        into = whole["quantization_config"]
        if "__" in key:
            group, key = key.split("__")
            into = into["config_groups"]["group_0"]
            into = into["weights"] if group == "weights" else into
        if value is LEFT_OUT:
            into.pop(key)
        else:
            into[key] = value
    (folder / "config.json").write_text(json.dumps(whole))


LEFT_OUT = object()


@pytest.mark.parametrize("kind, changes, words", [
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"), ("gptq", {"pack_dtype": "int8"}, "pack_dtype 'int8'"),
    ("gptq", {"dynamic": {"+:.*up_proj.*": {"bits": 8}}}, "dynamic"), ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
    ("gptq", {"rotation": "hadamard"}, "rotation 'hadamard'"), ("gptq", {"adapter": {"name": "eora"}}, "adapter"),
    ("gptq", {"future_key": 3}, "future_key 3"), ("gptq", {"bits": True}, "bits True"), ("gptq", {"group_size": -5}, "group_size -5"),
    ("gptq", {"checkpoint_format": "gptq_v2", "format": "gptq"}, "which mean the same"),
    ("awq", {"version": "gemv"}, "version 'gemv'"), ("awq", {"version": "gemv_fast"}, "gemv_fast"), ("awq", {"backend": "llm-awq"}, "llm-awq"), ("awq", {"format": "gemv"}, "format 'gemv'"),
    ("awq", {"zero_point": False}, "zero_point False"), ("awq", {"zero_point": LEFT_OUT}, "lacks zero_point"),
    ("awq", {"desc": 1}, "desc 1"), ("compressed-tensors", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ("compressed-tensors", {"format": "naive-quantized"}, "format 'naive-quantized'"), ("compressed-tensors", {"format": LEFT_OUT}, "lacks format"),
    ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("compressed-tensors", {"quantization_status": "calibration"}, "quantization_status 'calibration'"),
    ("compressed-tensors", {"config_groups": {}}, "config_groups"), ("compressed-tensors", {"group__input_activations": {"num_bits": 8}}, "input_activations"),
    ("compressed-tensors", {"group__output_activations": {"num_bits": 8}}, "output_activations"), ("compressed-tensors", {"group__format": "marlin-24"}, "marlin-24"),
    ("compressed-tensors", {"weights__symmetric": False}, "symmetric False"), ("compressed-tensors", {"weights__type": "float"}, "type 'float'"),
    ("compressed-tensors", {"weights__dynamic": True}, "dynamic True"), ("compressed-tensors", {"weights__strategy": "channel"}, "strategy 'channel'"),
    ("compressed-tensors", {"weights__strategy": "block"}, "strategy 'block'"), ("compressed-tensors", {"weights__block_structure": [8, 8]}, "block_structure"),
    ("compressed-tensors", {"weights__actorder": "group"}, "has no weight_g_idx"), ("compressed-tensors", {"weights__actorder": "sideways"}, "actorder 'sideways'"), ("compressed-tensors", {"weights__group_size": 16}, "do not fit groups of 16"),
])
def test_keys_that_are_not_understood_are_refused_by_name(kind, changes, words, tiny_checkpoint, tmp_path, capsys):
    make(tiny_checkpoint("smollm2"), tmp_path / "theirs", kind, True)
    reconfigured(tmp_path / "theirs", **changes)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind, changes", [
    ("gptq", {"desc_act": True, "sym": True, "true_sequential": True, "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32",
              "meta": {"quantizer": ["gptqmodel:2.0"]}, "damp_percent": 0.1, "dynamic": {"-:.*head.*": {}}, "is_marlin_format": False}),
    ("awq", {"version": "GEMM", "modules_to_not_convert": ["lm_head"], "do_fuse": False, "backend": "autoawq"}),
    ("gptq", GPTQConfig(bits=4, group_size=GROUP, dataset=["a"]).to_dict()), ("awq", AwqConfig(bits=4, group_size=GROUP).to_dict()),
    ("gptq", {"method": "gptq", "format": "gptq", "autoround_version": "0.3", "train_bs": 4, "scale_dtype": "torch.float16"}), ("awq", {"method": "awq", "format": "gemm", "checkpoint_format": "gemm"}),
    ("compressed-tensors", {"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", "transform_config": {},
                            "sparsity_config": {}, "global_compression_ratio": 1.9, "version": "0.9", "group__targets": ["re:.*proj"],
                            "group__input_activations": None, "weights__actorder": "static", "weights__strategy": "group",
                            "weights__symmetric": True, "weights__dynamic": False, "weights__observer_kwargs": {"a": 1}}),
    ("compressed-tensors", {"quantization_status": "frozen", "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"}})])
def test_keys_as_others_write_them_are_read(kind, changes, tiny_checkpoint, tmp_path):
    dense = make(tiny_checkpoint("smollm2"), tmp_path / "theirs", kind, True)
    reconfigured(tmp_path / "theirs", **changes)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 0
    decoder = load_decoder(tmp_path / "ours").state_dict()
    assert all(torch.equal(decoder[name], weight) for name, weight in dense.items())


def test_the_second_gptq_format_keeps_its_zeros(tiny_checkpoint, tmp_path):
    dense = make(tiny_checkpoint("smollm2"), tmp_path / "theirs", "gptq", False)
    file = tmp_path / "theirs/model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("qzeros")]:
        nibbles = torch.stack([(tensors[name].long() >> shift) + 1 & 15 for shift in range(0, 32, 4)], -1).flatten(1)
        tensors[name] = pack_loop(nibbles)
    save_file(tensors, file)
    reconfigured(tmp_path / "theirs", checkpoint_format="gptq_v2")
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 0
    decoder = load_decoder(tmp_path / "ours").state_dict()
    assert all(torch.equal(decoder[name], weight) for name, weight in dense.items())


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("kind, more, words", [
    ("compressed-tensors", {f"{NAME}.weight_g_idx": (torch.arange(64) % 2).int()}, "weight_g_idx: it was quantized in activation order"),
    ("compressed-tensors", {f"{NAME}.weight_g_idx": (torch.arange(64) // 32).int()}, None),
    ("compressed-tensors", {f"{NAME}.weight_g_idx": torch.full((64,), -1).int()}, None),
    ("compressed-tensors", {f"{NAME}.weight_shape": torch.tensor([128, 72])}, "weight_shape says [128, 72]"),
    ("compressed-tensors", {f"{NAME}.weight_shape": torch.tensor([[128, 64]])}, "a list of int32"),
    ("gptq", {f"{NAME}.qweight": torch.zeros(8)}, "a matrix of int32"),
    ("compressed-tensors", {f"{NAME}.weight_zero_point": torch.zeros(16, 2).int()}, "packed zero points"),
    ("compressed-tensors", {f"{NAME}.input_scale": torch.ones(1)}, "input_scale, which is not understood"),
    ("gptq", {f"{NAME}.bias": torch.zeros(128)}, None), ("gptq", {f"{NAME}.bias": torch.ones(128)}, "up_proj.bias, which is not understood"),
    ("gptq", {f"{NAME}.scales": torch.full((2, 128), 1e-9)}, "which fp16 cannot hold"),
    ("gptq", {"model.norm.weight": torch.ones(63)}, "where config.json asks for [64] floats"),
    ("awq", {"rotation.weight": torch.eye(8)}, "rotation.weight, which is not understood"),
    ("gptq", {"lm_head.weight": torch.ones(384, 64)}, "with other values, while config.json ties the two")])
def test_every_tensor_is_used_or_refused(kind, more, words, tiny_checkpoint, tmp_path, capsys):
    make(tiny_checkpoint("smollm2"), tmp_path / "theirs", kind, True)
    file = tmp_path / "theirs/model.safetensors"
    save_file(load_file(file) | more, file)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == (2 if words else 0)
    assert (words or "") in capsys.readouterr().err and (tmp_path / "ours").exists() == (words is None)


def test_a_tied_table_under_the_heads_name(tiny_checkpoint, tmp_path):
    make(tiny_checkpoint("smollm2"), tmp_path / "theirs", "gptq", True)
    file = tmp_path / "theirs/model.safetensors"
    tensors = load_file(file)
    table = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 0
    assert torch.equal(open_checkpoint(tmp_path / "ours").weight("model.embed_tokens"), table)
