"""Checkpoints as people have them, against transformers: shards of bfloat16, a text part among others, older keys and names."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EVERY_FAMILY, SIZES, tiny_model, write_padded
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from models import get
from models.checkpoint import load_decoder, open_checkpoint
from models.network.config import ModelConfig
from runtime.errors import UserError

IDS = torch.arange(3, 103)[None]                    # more than any window, and than phi3's border
HEAD, TABLE, ABSENT = "lm_head.weight", "model.embed_tokens.weight", object()


@torch.no_grad()
def same(folder, model=None) -> None:
    """Our logits are those of transformers' reading of the folder, or of `model`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if model is None else model
    torch.testing.assert_close(load_decoder(folder)(IDS), model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def edit(folder, tensors=None, **config):
    """Change a folder's tensors, by a function of them by name, and keys of its config.json."""
    if tensors:
        held = load_file(folder / "model.safetensors")
        save_file(tensors(held), folder / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in hf.items() if value is not ABSENT}))
    return folder


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return lambda family, *tensors, **config: edit(shutil.copytree(tiny_checkpoint(family), tmp_path / family), *tensors, **config)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_shards_of_bfloat16(family, tmp_path):
    tiny_model(family).bfloat16().save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(tmp_path)


TIED = ("gemma2", "gemma3", "gemma4", "granite", "granite4_h", "lfm2", "qwen3_5")       # most of whose tables are multiplied while reading


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("kept", [(HEAD, TABLE), (HEAD,)])
def test_a_tied_head_that_is_stored_all_the_same(family, kept, copy, tiny_checkpoint):
    folder = copy(family, lambda held: {name: held[name] for name in held if name != TABLE} | {name: held[TABLE].clone() for name in kept})
    same(folder, AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)))


@pytest.mark.parametrize("family", TIED)
def test_a_head_that_is_not_tied(family, copy):
    folder = copy(family, lambda held: held | {HEAD: held[TABLE].flip(0)}, tie_word_embeddings=False, tie_embedding=ABSENT)
    same(folder)
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match="holds lm_head.weight beside .* with other values, while config.json ties the two"):
        open_checkpoint(folder)


@pytest.mark.parametrize("family", ["gemma3", "granite", "lfm2", "qwen3_5"])
def test_more_rows_than_the_tokenizer_has_tokens(family, tiny_checkpoint, tmp_path):
    folder = write_padded(tiny_checkpoint(family), tmp_path / "padded", 400)
    same(folder)
    assert get.main([str(folder), "-o", str(tmp_path / "out")]) == 0
    same(tmp_path / "out", AutoModelForCausalLM.from_pretrained(folder))


# The text part of a multimodal checkpoint

_SEES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
WHOLE = {   # text family: the whole's model_type, its vision part's, that part's sizes, more keys of the whole
    "gemma3": ("gemma3", "siglip_vision_model", _SEES, {"mm_tokens_per_image": 4}),
    "qwen3_5": ("qwen3_5", "qwen3_5", dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64,
                                           num_position_embeddings=16, patch_size=4), {}),
    "mistral": ("mistral3", "pixtral", _SEES | {"head_dim": 8}, {}),
    "ministral3": ("mistral3", "pixtral", _SEES | {"head_dim": 8}, {}),
    "gemma4": ("gemma4", "gemma4_vision", _SEES | {"head_dim": 8, "num_key_value_heads": 2, "global_head_dim": 8}, {"audio_config": None})}


def multimodal(family):
    """A random model that sees images too, whose text part is a tiny one of `family`."""
    model_type, own = EVERY_FAMILY[family]
    whole, seeing, sizes, more = WHOLE[family]
    text = AutoConfig.for_model(model_type, **SIZES | own).to_dict()
    config = AutoConfig.for_model(whole, text_config=text, vision_config={"model_type": seeing, **sizes}, image_token_id=383,
                                  tie_word_embeddings=text["tie_word_embeddings"], **more)
    model, random = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.1 if weight.ndim == 1 or "embed" in name else weight.shape[-1] ** -0.5
            weight.copy_(spread * torch.randn(weight.shape, generator=random) + (weight.ndim == 1 and name.endswith("weight")))
    return model


@pytest.mark.parametrize("family", WHOLE)
def test_the_text_part_of_a_multimodal_checkpoint(family, tiny_checkpoint, tmp_path, capsys):
    model = multimodal(family)
    model.save_pretrained(tmp_path / "in")
    same(tmp_path / "in", model)
    note, = re.findall("note: .*", capsys.readouterr().err)
    assert note.startswith(f"note: {tmp_path / 'in'} holds more than a decoder (") and note.endswith("; its text part is taken")
    assert "visual" in note or "vision_tower" in note
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint("smollm2") / name, tmp_path / "in" / name)
    assert get.main([str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    with torch.no_grad():                            # what is left is the text model alone, for transformers too
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(input_ids=IDS).logits,
                                   atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family, old, new", [
    ("gemma3", "language_model.model.", "model.language_model."), ("mistral", "language_model.model.", "model.language_model."),
    ("qwen3_5", "model.language_model.", "language_model.model.")])
def test_other_names_of_the_text_part(family, old, new, tmp_path):
    model = multimodal(family)
    model.save_pretrained(tmp_path)
    same(edit(tmp_path, lambda held: {name.replace(old, new).replace("language_model.lm_head", "lm_head"): tensor
                                      for name, tensor in held.items()}), model)


def test_what_the_whole_says_comes_before_its_text_part(tiny_checkpoint):
    """As transformers has it: of a head that is tied or not, and of the tokens that end a reply."""
    inner = json.loads((tiny_checkpoint("gemma3") / "config.json").read_text()) | {"eos_token_id": 1, "tie_word_embeddings": True}
    config = ModelConfig.from_hf({"model_type": "gemma3", "text_config": inner, "eos_token_id": [1, 106], "tie_word_embeddings": False})
    assert (config.family, config.eos_token_ids, config.tied_embeddings) == ("gemma3_text", (1, 106), False)
    assert ModelConfig.from_hf({"model_type": "gemma3", "text_config": inner}).eos_token_ids == (1,)


def test_a_gemma_3_that_leaves_out_what_transformers_knows():
    """As google/gemma-3-4b-it is published."""
    config = ModelConfig.from_hf({"model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {}, "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}})
    theirs = AutoConfig.for_model("gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024,
                                  rope_scaling={"factor": 8.0, "rope_type": "linear"}).to_dict()
    assert config == ModelConfig.from_hf(theirs | {"eos_token_id": [1, 106], "bos_token_id": None, "pad_token_id": None})
    assert (config.vocab_size, config.layers[0].heads, len(config.layers)) == (262208, 8, 34)
    assert config.rope(config.layers[0]).theta == 1e4 and config.rope(config.layers[5]).scaling == {"rope_type": "linear", "factor": 8.0}


def test_heads_that_guess_further_tokens_are_left(copy, capsys, tiny_checkpoint):
    folder = copy("qwen3_5", lambda held: held | {f"mtp.{name}": torch.zeros(4, 4) for name in (
        "fc.weight", "norm.weight", "layers.0.self_attn.q_proj.weight")}, mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)
    same(folder, AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3_5")))
    assert re.findall("note: .*", capsys.readouterr().err) == [f"note: {folder} holds more than a decoder (mtp); its text part is taken"]


def test_keys_and_values_of_layers_that_read_anothers(copy, tiny_checkpoint):
    """Gemma 4's files have them, and nobody reads them."""
    random = {f"model.layers.{n}.self_attn.{name}.weight": torch.randn(size) for n in (4, 5) for name, size in (
        ("k_proj", (64, 64)), ("v_proj", (64, 64)), ("k_norm", (32,)))}
    same(copy("gemma4", lambda held: random | {name: held[name] for name in held if name not in random}),
         AutoModelForCausalLM.from_pretrained(tiny_checkpoint("gemma4")))


# Keys in their older and newer forms

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}
LINEAR = {"rope_type": "linear", "factor": 8.0}
FORMS = [
    ("gemma2", {"rope_theta": 500.0, "layer_types": ABSENT}), ("gemma2", {}),
    ("gemma3", {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": LINEAR}),
    ("gemma3", {}), ("gemma3", {"rope_scaling": LINEAR}), ("gemma3", {"layer_types": ABSENT, "sliding_window_pattern": 2}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 77.0}}}),
    ("gemma4", {}), ("gemma4", {"per_layer_config": ABSENT, "global_head_dim": 64}),
    ("phi3", {"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"} | LONG}),
    ("phi3", {"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "rope_scaling": None}),
    ("qwen2", {"rope_scaling": {"type": "yarn"} | YARN}), ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("qwen3", {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn"} | YARN}),
    ("qwen3", {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn"} | YARN}),
    ("qwen3_moe", {"rope_theta": 500.0, "rope_scaling": {"type": "yarn"} | YARN}),
    ("qwen3_5", {}), ("qwen3_5", {"rope_theta": 500.0, "partial_rotary_factor": 0.25}),
    ("qwen3_5", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25,
                                     "mrope_section": [2, 1, 1], "mrope_interleaved": True}}),
    ("ministral3", {"rope_parameters": EVERY_FAMILY["ministral3"][1]["rope_parameters"] | {"type": "yarn"}}),
    ("olmo2", {"rope_theta": 500.0}), ("olmo3", {"rope_theta": 5e5, "rope_scaling": None}),
    ("olmo3", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "attention_factor": 1.2} | YARN}),
    ("olmo3", {"rope_scaling": {"rope_type": "yarn"} | YARN, "layer_types": ABSENT}),
    ("exaone4", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | YARN}),
    ("exaone4", {"layer_types": ABSENT, "sliding_window_pattern": 2}),
    ("hunyuan", {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
                                                         "mscale": 1.0, "mscale_all_dim": 0.0}}),
    ("ernie4_5", {"rope_theta": 500.0}), ("smollm3", {"rope_theta": 500.0, "no_rope_layers": ABSENT}),
    ("granite", {"rope_theta": 500.0}), ("granite4_tiny", {"rope_theta": 500.0, "layer_types": ["mamba", "attention", "mamba"]}),
    ("lfm2", {"rope_theta": 500.0, "layer_types": ABSENT, "full_attn_idxs": [1]}),
    ("lfm2", {"tie_word_embeddings": ABSENT, "tie_embedding": True}), ("lfm2_moe", {"rope_theta": 500.0}), ("olmoe", {"rope_theta": 500.0})]


@pytest.mark.parametrize("family, keys", FORMS)
def test_older_and_newer_keys_are_read_as_transformers_reads_them(family, keys, copy):
    same(copy(family, **{"rope_parameters": ABSENT} | keys))


def test_forms_that_transformers_5_does_not_read_any_more(tiny_checkpoint):
    """Phi-3's "su" was LongRoPE; a "type" in Gemma 3's rope_scaling was its rope_type."""
    def read(family, **keys):
        hf = json.loads((tiny_checkpoint(family) / "config.json").read_text()) | keys
        return ModelConfig.from_hf({key: value for key, value in hf.items() if key != "rope_parameters"})
    phi = {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert read("phi3", **phi, rope_scaling={"type": "su"} | LONG) == read("phi3", **phi, rope_scaling={"type": "longrope"} | LONG)
    assert read("gemma3", rope_scaling={"type": "linear", "factor": 8.0}) == read("gemma3", rope_scaling=LINEAR)


@pytest.mark.parametrize("family, keys, words", [
    ("gemma3", {"rope_parameters": LINEAR}, "this family's rope_parameters are told by full_attention and sliding_attention"),
    ("gemma4", {"rope_theta": 500.0}, "rope_theta is not supported here: this family's"),
    ("gemma3", {"rope_theta": 500.0}, "rope_theta is 500.0 and within rope_parameters 10000.0"),
    ("olmo3", {"rope_scaling": LINEAR}, "rope_parameters and rope_scaling disagree in rope_type"),
])
def test_forms_that_say_two_things(family, keys, words, copy):
    with pytest.raises(UserError, match=words):
        open_checkpoint(copy(family, **keys))
