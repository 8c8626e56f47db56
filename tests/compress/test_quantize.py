"""The quantization stage, end to end on small models: what is written is what the codes say, and bad input is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EVERY_FAMILY, SENTENCES
from tokenizers import Tokenizer

from compress.ladder import measure_quality
from compress.quantize import main
from compress.quantizing.rtn import round_to_nearest
from models.checkpoint import load_decoder, open_checkpoint
from models.network.cache import KVCache
from models.network.quantized import TensorFormat


def quantize(checkpoint, out, *options) -> int:
    return main([str(checkpoint), "-o", str(out), *map(str, options)])


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family(family, tiny_checkpoint, tmp_path):
    """Each matrix becomes its own rounding and nothing else changes; PyTorch computes with the codes' values."""
    assert quantize(tiny_checkpoint(family), tmp_path / "q", "--bits", 4, "--group", 32) == 0
    before, after = open_checkpoint(tiny_checkpoint(family)), open_checkpoint(tmp_path / "q")
    assert after.config == before.config and set(after.quantization.tensors) == set(before.modules())
    linears = {name for name, module in load_decoder(tiny_checkpoint(family)).named_modules()
               if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and not name.endswith((".router", "embed_positions"))}
    assert set(before.modules()) == linears
    decoder = load_decoder(tmp_path / "q").state_dict()
    for name in before.names():
        module = name.removesuffix(".weight")
        expected = before.read(name)
        if module in before.modules():
            eight = module in ("model.embed_tokens", "lm_head", "model.per_layer_embed") or len(expected) == 4      # a row a recurrent head
            expected = round_to_nearest(expected.float().contiguous(), TensorFormat(8, 0) if eight else TensorFormat(4, 32))
            assert torch.equal(after.quantized(module).codes, expected.codes)
            expected = expected.dequantize()
            assert torch.equal(after.weight(module), expected)
        assert torch.equal(decoder[name], expected), name


ANATOMIES = ("gemma2", "olmo2", "lfm2_moe", "qwen3_5", "granite4_tiny", "gemma4")           # each kind of block, norm and table


@pytest.mark.parametrize("family", ANATOMIES)
def test_calibration_of_every_kind_of_block(family, tiny_checkpoint, tmp_path):
    """Folded and calibrated, at a size of its own for each: nearer to the model than rounding to nearest at the same bits, and what is
    written is what the codes say."""
    source = tiny_checkpoint(family)
    (tmp_path / "text.txt").write_text("".join(SENTENCES) * 40)
    ids = torch.tensor(Tokenizer.from_file(str(source / "tokenizer.json")).encode("".join(SENTENCES) * 40).ids[7:135]).view(2, 64)
    common = ("--bits", 3, "--embedding-bits", 0, "--data", tmp_path / "text.txt", "--windows", 6, "--length", 48)
    assert quantize(source, tmp_path / "rtn", *common) == 0
    assert quantize(source, tmp_path / "q", *common, "--method", "gptq", "--fold", "awq") == 0
    assert quantize(source, tmp_path / "mixed", "--method", "clip", *common[4:], "--target-bpw", 11) == 0
    config, errors = open_checkpoint(source).config, {}
    with torch.no_grad():
        exact = load_decoder(source)(ids)
        for name in ("rtn", "q", "mixed"):
            after = open_checkpoint(tmp_path / name)
            assert after.config == config and set(after.modules()) - set(after.quantization.tensors) <= {"model.embed_tokens", "lm_head",
                                                                                                     "model.per_layer_embed"}
            errors[name] = float((load_decoder(tmp_path / name)(ids) - exact).std())
    assert errors["q"] < errors["rtn"] and errors["mixed"] < errors["rtn"], errors


@pytest.mark.parametrize("family", ("lfm2_moe", "granite4_tiny", "gemma4"))
def test_stored_scales_stand_where_they_are_read(family, tiny_checkpoint, tmp_path):
    """Of keys and values: in the layers that keep some; of inputs: where linears read them. The model runs with them."""
    source, text = tiny_checkpoint(family), "".join(SENTENCES) * 40
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor([Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids[:48]])
    assert quantize(source, tmp_path / "q", "--bits", 8, "--method", "clip", "--fold", "smooth", "--activations", 8, "--activation-scales",
                    "static", "--kv-cache", "channel", "--backend", "pytorch", "--data", tmp_path / "text.txt", "--windows", 4, "--length", 48) == 0
    after = open_checkpoint(tmp_path / "q")
    kept = {name for name in after.names() if name.endswith("k_scale")}
    assert kept == {f"model.layers.{number}.self_attn.k_scale" for number, layer in enumerate(after.config.layers)
                    if after.config.cache_heads(layer)}
    decoder, exact = load_decoder(tmp_path / "q"), load_decoder(source)(ids)
    cache = KVCache(decoder.config, 1, 48, scales=decoder.cache_scales)
    with torch.no_grad():
        assert (decoder(ids, cache=cache) - exact).std() < 0.2 * exact.std()


def test_sizes_and_bits_per_weight(tiny_checkpoint, tmp_path, capsys):
    """The printed figures are those of the files."""
    source = tiny_checkpoint("smollm2")
    assert quantize(source, tmp_path / "q") == 0
    shapes = [tensor.shape for tensor in load_file(source / "model.safetensors").values()]
    weights = sum(shape.numel() for shape in shapes)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "q" / "model.safetensors").values())
    embedding, norms = 384 * 64, 5 * 64
    assert stored == (weights - embedding - norms) * (4 + 16 / 32) / 8 + embedding + 384 * 2 + norms * 4
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bits per weight"))
    assert row.split()[-2:] == ["32.00", f"{8 * stored / weights:.2f}"]
    stage = json.loads((tmp_path / "q" / "lineage.json").read_text())["stages"][-1]
    assert stage["stage"] == "compress.quantize" and stage["options"]["bits"] == 4
    assert stage["inputs"] == {"checkpoint": open_checkpoint(source).sha256()}
    assert stage["metrics"]["after"]["bytes"] == stored


def test_widths_groups_zero_points_and_patterns(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama")
    assert quantize(source, tmp_path / "q", "--bits", 3, "--group", 64, "--no-symmetric", "--embedding-bits", 6,
                    "--skip", "*.down_proj", "lm_head") == 0
    formats = open_checkpoint(tmp_path / "q").quantization.tensors
    assert formats["model.layers.1.self_attn.q_proj"] == TensorFormat(3, 64, False)
    assert formats["model.embed_tokens"] == TensorFormat(6, 64, True)
    assert not {name for name in formats if name.endswith(("down_proj", "lm_head"))}
    assert quantize(source, tmp_path / "r", "--bits", 8, "--group", 0, "--embedding-bits", 0) == 0
    formats = open_checkpoint(tmp_path / "r").quantization.tensors
    assert set(formats.values()) == {TensorFormat(8, 0, True)} and "lm_head" not in formats


def test_more_bits_are_nearer(tiny_checkpoint, tmp_path):
    """Output error falls by about half with every bit, whichever the family's arithmetic."""
    source = tiny_checkpoint("qwen3")
    ids = torch.randint(384, (2, 64), generator=torch.Generator().manual_seed(0))
    errors = []
    with torch.no_grad():
        exact = load_decoder(source)(ids)
        for bits in (3, 4, 5, 6, 8):
            assert quantize(source, tmp_path / str(bits), "--bits", bits) == 0
            errors.append(float((load_decoder(tmp_path / str(bits))(ids) - exact).std()))
    assert all(next_one < 0.7 * error for error, next_one in zip(errors, errors[1:]))


def test_memory_holds_one_tensor_at_a_time(tiny_checkpoint, tmp_path, monkeypatch):
    """No weight is alive when the next one is read."""
    import weakref

    from models.checkpoint import Checkpoint
    alive, read = [], Checkpoint.weight

    def watched(self, module):
        assert all(reference() is None for reference in alive)
        weight = read(self, module).clone()
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Checkpoint, "weight", watched)
    assert quantize(tiny_checkpoint("smollm2"), tmp_path / "q") == 0
    assert len(alive) == 14                     # and the token table, part by part


@pytest.mark.parametrize("options, words", [
    (["--skip", "*.nonesuch"], "--skip '*.nonesuch' matches no module"),
    (["--group", "128"], "model.layers.0.self_attn.q_proj: the group of 128 does not divide the 64 inputs"),
    (["--skip", "*", "--embedding-bits", "0"], "nothing to quantize"),
    (["--bits", "7"], "invalid choice"),
])
def test_bad_options(options, words, tiny_checkpoint, tmp_path, capsys):
    try:
        code = quantize(tiny_checkpoint("smollm2"), tmp_path / "q", *options)
    except SystemExit as error:             # refused by the command line itself
        code = error.code
    assert code == 2 and words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_codes_are_not_decided_twice(tiny_checkpoint, tmp_path, capsys):
    assert quantize(tiny_checkpoint("smollm2"), tmp_path / "q") == 0
    assert quantize(tmp_path / "q", tmp_path / "again") == 2
    assert "quantized already" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_weights_that_are_not_finite(tiny_checkpoint, tmp_path, capsys):
    broken = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    assert quantize(broken, tmp_path / "q") == 2
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_source_is_not_overwritten(tiny_checkpoint, capsys):
    source = tiny_checkpoint("smollm2")
    assert quantize(source, source) == 2
    assert "is the checkpoint being read" in capsys.readouterr().err
    assert open_checkpoint(source).quantization is None


@pytest.mark.real
def test_the_real_model(smollm2, smollm2_int4, shared_data):
    """Off the grid, 4 bits cost something and not the model's mind; the size is llama.cpp's Q4_0 class."""
    metrics = json.loads((smollm2_int4 / "lineage.json").read_text())["stages"][-1]["metrics"]
    before, after = metrics["before"], metrics["after"]
    assert before["bytes"] == 134_515_008 * 4 and after["bytes"] < 89e6
    texts = (str(shared_data / "text" / "wikitext2-valid.txt"),)
    assert 1.02 < measure_quality(smollm2_int4, None, texts, 4)["perplexity"] / measure_quality(smollm2, None, texts, 4)["perplexity"] < 1.5
