"""Checkpoints of published shapes with random weights: their sizes are the published ones, and transformers computes the same."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import random_checkpoint
from models.checkpoint import load_decoder
from models.network.config import ModelConfig
from models.network.decoder import tensor_shapes
from models.random_checkpoint import SHAPES
from runtime.text import Tokenizer

PUBLISHED = {"gemma3-1b": 999_885_952, "lfm2-1.2b": 1_170_340_608}        # parameters
SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TWO_LAYERS = {"qwen3.5-0.8b": {"full_attention_interval": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
              "gemma3-1b": {"sliding_window_pattern": 2, "head_dim": 32, "sliding_window": 16},
              "lfm2-1.2b": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 32}}


@pytest.mark.parametrize("name", SHAPES)
def test_the_sizes_are_the_published_ones(name):
    count = sum(torch.Size(shape).numel() for shape in tensor_shapes(ModelConfig.from_hf(SHAPES[name])).values())
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert count == theirs.num_parameters() == PUBLISHED.get(name, count)


@pytest.mark.parametrize("name", SHAPES)
def test_two_layers_compute_what_transformers_does(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name] | SMALL | TWO_LAYERS[name] | {"num_hidden_layers": 3}))
    assert random_checkpoint.main([str(tmp_path / "config.json"), "-o", str(tmp_path / "out"), "--layers", "2"]) == 0
    model, ids = load_decoder(tmp_path / "out"), torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    assert len(model.config.layers) == 2 and len(set(model.config.layers)) == 2
    with torch.no_grad():
        ours, theirs = model(ids), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and 0.5 < theirs.std() < 2
    text = "A word, 123, é 🙂."
    ids = Tokenizer(tmp_path / "out" / "tokenizer.json").encode(text)
    assert list(ids) == AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] and max(ids) < 259


def test_a_shape_that_is_not_known(tmp_path, capsys):
    assert random_checkpoint.main(["lfm2-1b", "-o", str(tmp_path / "out")]) == 2
    assert "did you mean 'lfm2-1.2b'?" in capsys.readouterr().err and not (tmp_path / "out").exists()
