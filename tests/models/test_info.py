"""models.info: numbers against the files and transformers."""

import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from models import info

from models.formats import lineage
from models.checkpoint import open_checkpoint, write_checkpoint
from models.network.config import LayerConfig, ModelConfig
from models.network.decoder import Decoder
from models.network.quantized import Quantization, QuantizedTensor, TensorFormat
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_every_family(family, tiny_checkpoint):
    folder = tiny_checkpoint(family)
    checkpoint, model = open_checkpoint(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert info.parameters(checkpoint.config) == sum(p.numel() for p in model.parameters())
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(10)[None], past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 10 * info.kv_bytes_per_token(checkpoint.config, 4) == held
    row, = info.storage(checkpoint)
    assert row["bytes"] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert row["stored as"] == "F32" and row["bits per weight"] == 32.0


def test_memory_at_each_context(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2", max_position_embeddings=8192))
    rows = info.memory(checkpoint)
    assert [row["context"] for row in rows] == [1024, 4096, 8192]
    assert rows[1]["fp32 cache MiB"] == 4096 * (2 * 2 * 2 * 16 * 4) / 2**20       # layers, k and v, heads, head_dim, bytes
    assert rows[1]["fp16 cache MiB"] == rows[1]["fp32 cache MiB"] / 2
    weights = os.path.getsize(checkpoint.path / "model.safetensors") / 2**20
    assert rows[2]["with fp32 cache MiB"] == pytest.approx(weights + 8192 * 512 / 2**20, abs=0.1)
    short = open_checkpoint(tiny_checkpoint("smollm2"))                            # a context of 256: one row
    assert [row["context"] for row in info.memory(short)] == [256]


def test_bits_per_weight_of_a_quantized_checkpoint(tiny_checkpoint, tmp_path):
    source = open_checkpoint(tiny_checkpoint("smollm2"))
    module, form = "model.layers.0.mlp.up_proj", TensorFormat(4, 32)
    shape = source.shape(f"{module}.weight")
    codes = QuantizedTensor(torch.randint(0, 16, shape, dtype=torch.uint8),
                            torch.ones(shape[0], shape[1] // 32, dtype=torch.float16), None, 4, 32, True)
    tensors = {name: source.read(name) for name in source.names()}
    del tensors[f"{module}.weight"]
    tensors |= codes.tensors(module)
    hf_config = source.hf_config | {"quantization_config": Quantization({module: form}).to_dict()}
    write_checkpoint(tmp_path / "out", hf_config, tensors.items(), source.path, lineage.stage("test", {}, {}))
    checkpoint = open_checkpoint(tmp_path / "out")
    rows = {row["stored as"]: row for row in info.storage(checkpoint)}
    assert rows["4-bit group 32"] == {"stored as": "4-bit group 32", "tensors": 1, "weights": math.prod(shape),
                                      "bytes": math.prod(shape) * 9 // 16, "bits per weight": 4.5}
    assert rows["all"]["weights"] == info.parameters(checkpoint.config)
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert rows["all"]["bytes"] == sum(tensor.nbytes for tensor in stored)


def test_the_command_prints_it(tiny_checkpoint, capsys):
    assert info.main([str(tiny_checkpoint("smollm2"))]) == 0
    out = capsys.readouterr().out
    assert "llama, 2 layers" in out and "4 heads, 2 key/value heads, MLP 128" in out and "512 bytes a token in fp32" in out


def test_layers_of_different_shapes_are_listed(tmp_path, capsys):
    config = ModelConfig(family="llama", vocab_size=32, hidden_size=32, head_dim=8, context_length=64,
                         layers=(LayerConfig(4, 2, 48), LayerConfig(2, 1, 16)))
    write_checkpoint(tmp_path / "out", config.to_hf(), Decoder(config).state_dict().items(), None,
                     lineage.stage("test", {}, {}))
    assert info.main([str(tmp_path / "out")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "4", "2", "48"] in lines and ["1", "2", "1", "16"] in lines


def test_bad_input(tiny_checkpoint, tmp_path, capsys):
    assert info.main([str(tmp_path / "none")]) == 2
    folder = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "in")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    assert info.main([str(folder)]) == 2
    assert "truncated" in capsys.readouterr().err
