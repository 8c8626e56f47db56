"""The decoder against transformers: every family, with and without a cache, ragged batches, uneven layers, gradients."""

import pytest
import torch
from tiny import EVERY_FAMILY, SENTENCES, VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from models.checkpoint import load_decoder
from models.network.config import LayerConfig, ModelConfig
from models.network.cache import KVCache
from models.network.decoder import Decoder

TOLERANCE = 1e-4


@pytest.fixture(params=EVERY_FAMILY)
def pair(request, tiny_checkpoint):
    """(our decoder, transformers' model) of the same weights."""
    folder = tiny_checkpoint(request.param)
    return load_decoder(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE * max(1, float(theirs.abs().max()) / 5), rtol=0)      # of float32's noise


@torch.no_grad()
def test_prefill(pair):
    decoder, oracle = pair
    ids = tokens(3, 100)            # six times mistral's window
    assert_close(decoder(ids), oracle(ids).logits)


@torch.no_grad()
def test_cached_decoding(pair):
    """A prompt, a chunk on top of it, and single tokens give what one pass over everything gives."""
    decoder, oracle = pair
    ids = tokens(2, 60)
    theirs = oracle(ids).logits
    cache = KVCache(decoder.config, rows=2, capacity=64)
    for start, stop in [(0, 30), (30, 41), *((i, i + 1) for i in range(41, 60))]:
        assert_close(decoder(ids[:, start:stop], cache=cache), theirs[:, start:stop])
        cache.lengths += stop - start


@torch.no_grad()
def test_ragged_rows_give_what_each_gives_alone(pair):
    """Right-padded prompts of different lengths, then steps of one token at different slots."""
    decoder, oracle = pair
    lengths, total = torch.tensor([5, 33, 18]), 48
    ids = tokens(3, total)
    padded = torch.where(torch.arange(33) < lengths[:, None], ids[:, :33], 7)
    cache = KVCache(decoder.config, rows=3, capacity=total)
    alone = [oracle(row[None]).logits[0] for row in ids]
    bare, cached = decoder(padded), decoder(
        padded, cache=cache, write_index=torch.zeros(3, dtype=torch.int64), counts=lengths)
    for row, length in enumerate(lengths):
        assert_close(bare[row, :length], alone[row][:length])
        assert_close(cached[row, :length], alone[row][:length])
    for step in range(total - 33):
        at = lengths + step
        logits = decoder(ids.gather(1, at[:, None]), position_ids=at[:, None], cache=cache, write_index=at)
        for row in range(3):
            assert_close(logits[row, 0], alone[row][at[row]])


@torch.no_grad()
def test_logits_positions(pair):
    decoder, _ = pair
    ids, wanted = tokens(2, 20), torch.tensor([[19, 0, 3], [7, 7, 18]])
    everything = decoder(ids)
    expected = torch.stack([everything[row, wanted[row]] for row in range(2)])
    torch.testing.assert_close(decoder(ids, logits_positions=wanted), expected, atol=1e-5, rtol=0)


def test_gradients(pair):
    decoder, oracle = pair
    ids = tokens(2, 40)
    decoder(ids).logsumexp(-1).sum().backward()
    oracle(ids).logits.logsumexp(-1).sum().backward()
    ours = decoder.model.embed_tokens.weight.grad
    table = oracle.get_input_embeddings().weight
    theirs = table.grad / float(decoder.model.embed_tokens.weight[0, 0] / table[0, 0])          # the factor that is folded in
    torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=0)
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@torch.no_grad()
def test_layers_of_different_shapes():
    """Taking out a group of heads and some neurons of one layer is what silencing them is in transformers."""
    oracle = tiny_model("smollm2")
    state = {name: tensor.clone() for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    uniform = ModelConfig.from_hf(oracle.config.to_dict())
    size = uniform.head_dim
    attention, mlp = oracle.model.layers[0].self_attn, oracle.model.layers[1].mlp
    attention.o_proj.weight[:, 2 * size:] = 0        # heads 2 and 3 of layer 0: key/value head 1
    mlp.down_proj.weight[:, 100:] = 0                # neurons 100.. of layer 1
    for name, rows in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        key = f"model.layers.0.self_attn.{name}.weight"
        state[key] = state[key][:rows * size]
    state["model.layers.0.self_attn.o_proj.weight"] = state["model.layers.0.self_attn.o_proj.weight"][:, :2 * size]
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.1.mlp.{name}.weight"] = state[f"model.layers.1.mlp.{name}.weight"][:100]
    state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"][:, :100]
    layers = [{"heads": 2, "kv_heads": 1, "mlp_size": 128}, {"heads": 4, "kv_heads": 2, "mlp_size": 100}]
    decoder = Decoder(ModelConfig.from_dict(uniform.to_dict() | {"layers": layers}))
    decoder.load_state_dict(state)
    ids = tokens(2, 50)
    theirs = oracle(ids).logits
    assert_close(decoder(ids), theirs)
    cache = KVCache(decoder.config, rows=2, capacity=50)
    decoder(ids[:, :-1], cache=cache)
    cache.lengths += 49
    assert_close(decoder(ids[:, -1:], cache=cache), theirs[:, -1:])


@torch.no_grad()
def test_a_full_cache_is_refused():
    config = ModelConfig("llama", 16, 8, (LayerConfig(2, 1, 8),), head_dim=4, context_length=8)
    cache = KVCache(config, rows=1, capacity=4)
    with pytest.raises(ValueError, match="slot 4 is beyond the cache's capacity of 4"):
        Decoder(config)(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


@torch.no_grad()
def test_half_precision_keeps_rope_in_float32():
    """bfloat16 weights at position 5,000: angles in bfloat16 would be off by radians."""
    config = ModelConfig("llama", 64, 32, (LayerConfig(4, 2, 48),) * 2, head_dim=8, context_length=8192)
    torch.manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            parameter.mul_(20)
    decoder.to(torch.bfloat16)
    ids, positions = tokens(1, 32) % 64, torch.arange(5000, 5032)[None]
    half = decoder(ids, positions)
    full = decoder.float()(ids, positions)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.std()


@pytest.mark.real
@torch.no_grad()
def test_the_real_model(smollm2):
    decoder = load_decoder(smollm2)
    oracle = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode("\n".join(SENTENCES)).ids
    ids = torch.tensor([ids[:96], ids[40:136]])         # random tokens amplify rounding tenfold
    theirs = oracle(ids).logits
    assert_close(decoder(ids), theirs)
    cache = KVCache(decoder.config, rows=2, capacity=96)
    for start, stop in [(0, 90), *((i, i + 1) for i in range(90, 96))]:
        assert_close(decoder(ids[:, start:stop], cache=cache), theirs[:, start:stop])
        cache.lengths += stop - start
