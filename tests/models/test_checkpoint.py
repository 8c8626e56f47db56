"""Checkpoints against transformers and safetensors: what is read and written, and what interrupts it."""

import errno
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EVERY_FAMILY
from transformers import AutoModelForCausalLM

from compress import quantize
from models.formats import lineage
from models.checkpoint import check_output, load_decoder, open_checkpoint, write_checkpoint
from models.network.config import ModelConfig
from models.network.decoder import Decoder
from models.network.quantized import Quantization, QuantizedTensor
from runtime.errors import UserError

STAGE = lineage.stage("test", {}, {})
IDS = torch.arange(40)[None] * 9 % 384


@torch.no_grad()
def logits(folder) -> torch.Tensor:
    """What transformers computes, in the dtype it finds in the folder."""
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def rewrite(source, out, **changes):
    """Write what was read, with changes to config.json."""
    checkpoint = open_checkpoint(source)
    tensors = ((name, checkpoint.read(name)) for name in checkpoint.names())
    write_checkpoint(out, checkpoint.config.to_hf() | changes, tensors, source, STAGE)


def same(ours: torch.Tensor, theirs: torch.Tensor, family: str) -> None:
    """To the bit, but where factors are folded into weights and taken out of them again."""
    folded = EVERY_FAMILY[family][0].startswith(("gemma", "granite", "lfm2_moe"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if folded else 0)


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "checkpoint")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_what_is_written_opens_in_transformers_with_equal_logits(family, tiny_checkpoint, tmp_path):
    rewrite(tiny_checkpoint(family), tmp_path / "out")
    same(logits(tmp_path / "out"), logits(tiny_checkpoint(family)), family)
    published = set(load_file(tiny_checkpoint(family) / "model.safetensors"))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == published


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_trained_decoder_is_written_from_its_state(family, tiny_checkpoint, tmp_path):
    """Weights that PyTorch holds, not a file: the way of training; a tied head is not written."""
    decoder = load_decoder(tiny_checkpoint(family))
    write_checkpoint(tmp_path / "out", decoder.config.to_hf(), decoder.state_dict().items(), None, STAGE)
    same(logits(tmp_path / "out"), logits(tiny_checkpoint(family)), family)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert ("lm_head.weight" in names) != decoder.config.tied_embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_the_tensors(dtype, tiny_checkpoint, tmp_path):
    source = open_checkpoint(tiny_checkpoint("qwen3"))
    write_checkpoint(tmp_path / "half", source.hf_config, ((n, source.read(n).to(dtype)) for n in source.names()),
                     source.path, STAGE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == dtype
    assert load_decoder(tmp_path / "half").model.norm.weight.dtype == torch.float32
    assert load_decoder(tmp_path / "half", dtype).model.norm.weight.dtype == dtype
    rewrite(tmp_path / "half", tmp_path / "again")
    for name in source.names():
        assert torch.equal(open_checkpoint(tmp_path / "again").read(name), source.read(name).to(dtype))
        assert torch.equal(open_checkpoint(tmp_path / "again").read(name).float(),
                           load_decoder(tmp_path / "half").state_dict()[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shards(family, tiny_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, parts = open_checkpoint(tiny_checkpoint(family)), open_checkpoint(tmp_path / "shards")
    assert set(whole.names()) == set(parts.names())
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.names())


def test_gpt2_as_the_hub_has_it(tiny_checkpoint, tmp_path):
    """Names without a prefix, causal masks stored as buffers."""
    folder = shutil.copytree(tiny_checkpoint("gpt2"), tmp_path / "gpt2")
    tensors = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}
    save_file(tensors, folder / "model.safetensors")
    ours, theirs = load_decoder(folder).state_dict(), load_decoder(tiny_checkpoint("gpt2")).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


HEAD, TABLES = "lm_head.weight", ("model.embed_tokens.weight", "transformer.wte.weight")


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gpt2"])
@pytest.mark.parametrize("stored, shards", [("both", 1), ("head", 1), ("head", 3), ("table, no prefix", 1), ("head, no prefix", 1)])
def test_a_tied_model_has_its_table_under_either_name(family, stored, shards, tiny_checkpoint, tmp_path):
    source, folder = tiny_checkpoint(family), tmp_path / "again"
    want, tensors = logits(source), load_file(source / "model.safetensors")
    shutil.copytree(source, folder, ignore=lambda *_: ["model.safetensors"])
    (table,) = set(TABLES) & set(tensors)
    if "table" not in stored:
        tensors[HEAD] = tensors[table].clone()
    if "head" in stored:
        del tensors[table]
    if "no prefix" in stored:
        tensors = {name.removeprefix("model.").removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"part-{number}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names[number::shards], file)
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.testing.assert_close(logits(folder), want)                # the oracle reads it so
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(folder)(IDS), want, rtol=1e-4, atol=1e-4)
    rewrite(folder, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), want)


@pytest.mark.parametrize("family", ["smollm2", "gpt2"])
def test_layers_of_different_shapes(family, tiny_checkpoint, tmp_path):
    config = open_checkpoint(tiny_checkpoint(family)).config
    layers = [{"heads": 2, "kv_heads": 2, "mlp_size": 96}, {"heads": 4, "kv_heads": 4, "mlp_size": 64}]
    decoder = Decoder(ModelConfig.from_dict(config.to_dict() | {"layers": layers}))
    write_checkpoint(tmp_path / "out", decoder.config.to_hf(), decoder.state_dict().items(), None, STAGE)
    again = load_decoder(tmp_path / "out")
    assert again.config == decoder.config
    with torch.no_grad():
        assert torch.equal(again(IDS), decoder(IDS))


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen2", "qwen3"])
def test_a_uniformly_pruned_model_opens_in_transformers(family, tiny_checkpoint, tmp_path):
    """Half of the heads and fewer neurons in every layer, head_dim as it was: the family's own keys say it."""
    config = open_checkpoint(tiny_checkpoint(family)).config
    decoder = Decoder(ModelConfig.from_dict(config.to_dict() | {
        "layers": [{"heads": 2, "kv_heads": 1, "mlp_size": 96}] * 2}))
    write_checkpoint(tmp_path / "out", decoder.config.to_hf(), decoder.state_dict().items(), None, STAGE)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), decoder(IDS), atol=1e-5, rtol=0)


def test_weights_are_mapped_and_the_file_is_safe(folder):
    """Loading allocates nothing; changing the loaded weights leaves file and other loads as they were."""
    before = open_checkpoint(folder).sha256()
    decoder = load_decoder(folder)
    with torch.no_grad():
        decoder.model.norm.weight.add_(1)
    assert open_checkpoint(folder).sha256() == before
    assert not torch.equal(load_decoder(folder).model.norm.weight, decoder.model.norm.weight)


def test_the_hash_names_configuration_and_weights(folder, tiny_checkpoint):
    first = open_checkpoint(folder).sha256()
    assert first == open_checkpoint(tiny_checkpoint("smollm2")).sha256()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = open_checkpoint(folder).sha256()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert len({first, second, open_checkpoint(folder).sha256()}) == 3


def test_companions_and_lineage_travel(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("smollm2")
    rewrite(source, tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()
    stages = lineage.read(tmp_path / "b")
    assert [stage["stage"] for stage in stages] == ["test", "test"]
    assert {"python", "torch", "numpy"} <= set(stages[0]["versions"])
    lineage.add_metrics(tmp_path / "b", {"perplexity": 1.5})
    assert lineage.read(tmp_path / "b")[-1]["metrics"] == {"perplexity": 1.5}


def test_tensors_are_streamed(tiny_checkpoint, tmp_path):
    """When a tensor is asked for, none of those before it is still held (GPT-2's q, k and v apart)."""
    source = open_checkpoint(tiny_checkpoint("llama"))
    alive = []

    def tensors():
        for name in source.names():
            assert all(reference() is None for reference in alive)
            tensor = source.read(name).clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_checkpoint(tmp_path / "out", source.hf_config, tensors(), source.path, STAGE)
    assert len(alive) == len(source.names()) == 21


# Interrupted writing

class Kill(BaseException):
    pass


def failing(source, error):
    """Half of the tensors, then `error`."""
    checkpoint = open_checkpoint(source)
    for number, name in enumerate(checkpoint.names()):
        if number == 10:
            raise error
        yield name, checkpoint.read(name)


@pytest.mark.parametrize("error, raised", [
    (Kill(), Kill), (KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), UserError)])
@pytest.mark.parametrize("replacing", [True, False])
def test_interrupted_half_way(error, raised, replacing, tiny_checkpoint, tmp_path):
    out, source = tmp_path / "out", tiny_checkpoint("smollm2")
    if replacing:
        rewrite(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if replacing else None
    with pytest.raises(raised, match="No space left.*nothing was changed" if raised is UserError else None):
        write_checkpoint(out, open_checkpoint(source).hf_config, failing(source, error), source, STAGE)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if replacing else [])
    if replacing:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_a_killed_run_left_is_cleared(tiny_checkpoint, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    rewrite(tiny_checkpoint("smollm2"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_targets_that_would_lose_something(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("smollm2")
    with pytest.raises(UserError, match="is the checkpoint being read"):
        rewrite(source, source / ".." / source.name)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-anna.txt").write_text("dear")
    for target in (tmp_path / "letters", tmp_path / "letters" / "to-anna.txt"):
        with pytest.raises(UserError, match="is not a checkpoint"):
            rewrite(source, target)
    assert (tmp_path / "letters" / "to-anna.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


@pytest.mark.parametrize("change", [
    lambda tensors: tensors[:-1], lambda tensors: tensors + [("model.extra.weight", torch.zeros(2))],
    lambda tensors: tensors + tensors[:1], lambda tensors: [(name, tensor[:1]) for name, tensor in tensors]])
def test_a_stage_that_writes_other_tensors_is_a_bug(change, tiny_checkpoint, tmp_path):
    source = open_checkpoint(tiny_checkpoint("smollm2"))
    with pytest.raises(ValueError):
        write_checkpoint(tmp_path / "out", source.hf_config, change([(n, source.read(n)) for n in source.names()]),
                         None, STAGE)
    assert not list(tmp_path.iterdir())


def test_quantized_tensors_round_trip(tiny_checkpoint, tmp_path):
    """Copying a quantized checkpoint tensor by tensor keeps every code."""
    quantized = tmp_path / "quantized"
    assert quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(quantized), "--no-symmetric"]) == 0
    source = open_checkpoint(quantized)
    write_checkpoint(tmp_path / "copy", source.hf_config, ((n, source.read(n)) for n in source.names()), quantized, STAGE)
    copy = open_checkpoint(tmp_path / "copy")
    assert isinstance(copy.quantization, Quantization) and copy.quantization == source.quantization
    for name in source.modules():
        ours, theirs = copy.quantized(name), source.quantized(name)
        assert isinstance(ours, QuantizedTensor) and torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales) and torch.equal(copy.weight(name), theirs.dequantize())


def test_a_broken_lineage_is_refused(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "a")
    for text, words in (("{", "cannot be read"), ('{"version": 9, "stages": []}', "version 9"), ("[]", "holds list")):
        (folder / "lineage.json").write_text(text)
        with pytest.raises(UserError, match=words):
            rewrite(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
