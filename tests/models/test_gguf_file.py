"""GGUF files, against transformers: the model a file was made from, and transformers' own reading of the file."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from models.formats import gguf_file
from models.network.decoder import Decoder, tensor_shapes
from models.formats.gguf_file import PLAIN, GGUFFile, quantized_types, read_header
from runtime.errors import UserError
from tiny import EVERY_FAMILY, tiny_model, tiny_tokenizer
from tiny_gguf import SAID, encode, write_gguf

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES = SAID | {"llama": dict(rope_parameters=LLAMA3, head_dim=64, max_position_embeddings=16384)}
ABSENT, LONG = object(), torch.arange(3, 83)[None]                       # longer than any window
IDS = torch.tensor([[1, 57, 300, 12, 99, 41, 200, 5, 17, 350, 8, 2]])


def model_of(family, **config):
    return tiny_model(family, **SHAPES.get(family, {}), **config)


def read(path) -> Decoder:
    file = GGUFFile(path)
    decoder = Decoder(file.config)
    missing, extra = decoder.load_state_dict(dict(file.tensors()), strict=False)
    assert not missing and not extra
    return decoder


@torch.no_grad()
def logits(model, ids=IDS):
    out = model(ids)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_file_computes_what_the_model_it_was_made_from_computes(family, tmp_path):
    model = model_of(family)
    decoder = read(write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer()))
    torch.testing.assert_close(logits(decoder, LONG), logits(model, LONG), atol=1e-4, rtol=1e-4)


# Where llama.cpp has a constant of its own for a key that a file lacks, so have we
CONSTANTS = {"rope.freq_base": ("smollm2", "hunyuan"), "attention.temperature_scale": ("ministral3",), "rope.freq_base_swa": ("gemma3",),
             "attention.sliding_window": ("gemma2", "gemma3", "olmo3", "exaone4"), "final_logit_softcapping": ("gemma4",),
             "attention.sliding_window_pattern": ("olmo3", "exaone4"), "rope.scaling.finetuned": ("granite4_h", "granite4_tiny")}
ODD = [None, True, False, -1, 0, 1, 3, 10**6, 2**32, -2.5, float("nan"), float("inf"), "x", [], [1],
       [True] * 3, ["x"] * 3, [0] * 3, [-1, 2, 2]]


def opened(family, tmp_path, monkeypatch):
    """A function: the configuration of the family's file with changes to its metadata; and those metadata."""
    path = write_gguf(tmp_path / "model.gguf", model_of(family))
    metadata, tensors, parts = gguf_file.read_parts(path)

    def read_config(changes):
        changed = {key: value for key, value in (metadata | changes).items() if value is not ABSENT}
        monkeypatch.setattr(gguf_file, "read_parts", lambda _: (changed, tensors, parts))
        return GGUFFile(path).config
    return read_config, {key: value for key, value in metadata.items() if key.startswith(metadata["general.architecture"] + ".")}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_file_of_a_family_that_lacks_a_key_is_refused(family, tmp_path, monkeypatch):
    """By name, or by the tensor that does not fit; else the key said what is so without it."""
    read_config, metadata = opened(family, tmp_path, monkeypatch)
    whole, named = read_config({}), 0
    for key in metadata:
        short = key.partition(".")[2]
        try:
            config = read_config({key: ABSENT})
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            named += f"{key} is missing" in str(error)
        else:
            assert (config != whole) == (family in CONSTANTS.get(short, ())), key
    assert named >= 5


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_file_with_odd_values_opens_or_is_refused_in_a_sentence(family, tmp_path, monkeypatch):
    read_config, metadata = opened(family, tmp_path, monkeypatch)
    random = np.random.default_rng(len(family))
    for key, value in metadata.items():
        numbers = [value * 2, -value, value + 1] if isinstance(value, (int, float)) else []
        for odd in random.permutation(np.array([*ODD, *numbers, None], dtype=object))[:8]:
            try:
                read_config({key: odd})
            except UserError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("family", ["qwen3_yarn", "olmo3"])
def test_yarns_own_parameters(family, tmp_path):
    rope = EVERY_FAMILY[family][1]["rope_parameters"]
    more = {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}
    model = model_of(family, rope_parameters=rope | ({"full_attention": rope["full_attention"] | more} if family == "olmo3" else more))
    torch.testing.assert_close(logits(read(write_gguf(tmp_path / "model.gguf", model)), LONG), logits(model, LONG), atol=1e-4, rtol=1e-4)


def test_a_granite_4_without_mamba_layers(tmp_path):
    """The converter calls it a granite, and says of it what it says of those with such layers; its MLP is the shared one."""
    model = model_of("granite")
    path = write_gguf(tmp_path / "model.gguf", model, extra={"granite." + key: value for key, value in {
        "attention.head_count_kv": [2, 2], "expert_count": 0, "expert_used_count": 0, "expert_shared_feed_forward_length": 128,
        "feed_forward_length": 999, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.inner_size": 128,
        "ssm.time_step_rank": 4, "rope.scaling.finetuned": True}.items()})
    torch.testing.assert_close(logits(read(path), LONG), logits(model, LONG), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family, changes, words", [
    ("smollm2", {"llama.attention.scale": 0.5}, "llama.attention.scale 0.5 is not supported: it may change"),
    ("gemma3", {"gemma3.attention.causal": False}, "gemma3.attention.causal False is not supported"),
    ("qwen3", {"qwen3.attention.value_length": 16}, "qwen3.attention.value_length is 16"),
    ("lfm2_moe", {"lfm2moe.expert_gating_func": 1}, "expert_gating_func is 1, and only 2"),
    ("olmoe", {"olmoe.expert_used_count": 9}, "chooses 9 experts of 4"),
    ("qwen3_yarn", {"qwen3.rope.scaling.type": "spiral"}, "RoPE scaling 'spiral' is not supported"),
    ("qwen3_5", {"qwen35.attention.recurrent_layers": [True]}, r"recurrent_layers is \[True\], which should be true or false for each"),
    ("lfm2", {"lfm2.attention.head_count_kv": [0, 2]}, r"head_count_kv is \[0, 2\], which should be a number for each layer"),
    ("granite4_h", {"granitehybrid.ssm.time_step_rank": 3}, "mamba_n_heads 3 times mamba_d_head 42"),
    ("gemma4", {"gemma4.attention.shared_kv_layers": 6}, "num_kv_shared_layers is 6, of 6 layers"),
])
def test_what_a_file_says_that_cannot_be(family, changes, words, tmp_path, monkeypatch):
    read_config, _ = opened(family, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=words):
        read_config(changes)


def test_every_block_type_of_the_package_is_read():
    """Q8_1 and Q8_K are llama.cpp's inner formats; Q1_0 and the integers are what the package has no reading of."""
    assert set(gguf.GGMLQuantizationType.__members__) - {*PLAIN, *quantized_types()} == {
        "Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}


@pytest.mark.parametrize("kind", PLAIN + quantized_types())
def test_every_type_reads_as_transformers_reads_it(kind, tmp_path):
    width = 256                                              # a K-quant's block
    model = tiny_model("smollm2", hidden_size=width, intermediate_size=width, num_attention_heads=4)
    path = write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer(), kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32,
                                                  quantization_config=GgufConfig(dequantize=True))
    want = theirs.state_dict()
    for name, tensor in GGUFFile(path).tensors():
        assert tensor.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(
            kind if tensor.ndim == 2 else "F32", torch.float32)
        torch.testing.assert_close(tensor.float(), want[name].float(), atol=0, rtol=1e-6)
    torch.testing.assert_close(logits(read(path)), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, relative_error", [
    ("F16", 0.001), ("BF16", 0.01), ("Q8_0", 0.01), ("Q5_1", 0.06), ("Q5_0", 0.07), ("Q4_1", 0.12), ("Q4_0", 0.13),
    ("MXFP4", 0.2), ("TQ1_0", 0.9), ("TQ2_0", 0.9)])
def test_a_quantized_file_is_close_to_the_weights_it_was_made_from(kind, relative_error, tmp_path):
    model = tiny_model("qwen2", hidden_size=256, intermediate_size=256)
    read_back = dict(GGUFFile(write_gguf(tmp_path / "model.gguf", model, kind=kind)).tensors())
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.state_dict()[name]
    error = ((read_back[name].float() - weight).norm() / weight.norm()).item()
    assert 0 < error < relative_error


def test_six_bit_blocks_by_the_formula(tmp_path):
    """Q6_K worked out by hand in float64: value = d * scale[16 values] * (six bits - 32)."""
    data = encode(np.ones((2, 512), np.float32), "Q6_K")
    got = gguf.dequantize(data, gguf.GGMLQuantizationType.Q6_K)
    for number, block in enumerate(data.reshape(-1, 210)):
        low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
        d = block[208:].view(np.float16).astype(np.float64)[0]
        for i in range(256):
            half, within = divmod(i, 128)
            quarter, lane = divmod(within, 32)
            nibble = low[half * 64 + (quarter % 2) * 32 + lane] >> (4 * (quarter // 2)) & 15
            code = int(nibble) | (int(high[half * 32 + lane]) >> (2 * quarter) & 3) << 4
            assert got.reshape(-1)[number * 256 + i] == pytest.approx(d * int(scales[i // 16]) * (code - 32), rel=1e-6)


def parts_of(tmp_path, name="model", **config):
    """A real split file of seven tensors a part; its parts in order."""
    write_gguf(tmp_path / f"{name}.gguf", tiny_model("smollm2", **config), tiny_tokenizer(), split=7)
    return sorted(tmp_path.glob(f"{name}-*.gguf"))


def test_a_file_in_parts_is_opened_by_any_of_them(tmp_path):
    parts = parts_of(tmp_path)
    assert [part.name for part in parts] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    want = dict(GGUFFile(write_gguf(tmp_path / "whole.gguf", tiny_model("smollm2"), tiny_tokenizer())).tensors())
    for part in parts:
        file = GGUFFile(part)
        got = dict(file.tensors())
        assert file.parts == parts and got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 384        # which only the first part has


def test_parts_that_are_missing_or_of_another_model_are_named(tmp_path):
    first, second, third = parts_of(tmp_path)
    (tmp_path / "other").mkdir()
    longer = parts_of(tmp_path / "other", num_hidden_layers=1, tie_word_embeddings=False)
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.gguf is missing: the model is in 3 parts"):
        GGUFFile(third)
    second.write_bytes(third.read_bytes())
    with pytest.raises(UserError, match=r"00002-of-00003.gguf is no part of .* numbers are \[2, 3, 20\], not \[1, 3, 20\]"):
        GGUFFile(first)
    second.write_bytes(longer[1].read_bytes())
    with pytest.raises(UserError, match=r"00002-of-00003.gguf is no part of .* numbers are \[1, 2, 12\], not \[1, 3, 20\]"):
        GGUFFile(first)
    second.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="00002-of-00003.gguf is not a whole GGUF file"):
        GGUFFile(first)
    second.write_bytes(whole)
    GGUFFile(first)
    second.rename(tmp_path / "part.gguf")
    with pytest.raises(UserError, match="part.gguf is one of 3 parts, .* has no such name"):
        GGUFFile(tmp_path / "part.gguf")


def test_parts_that_repeat_or_lack_tensors_are_refused(tmp_path):
    parts = parts_of(tmp_path)
    data = [part.read_bytes() for part in parts]
    last = next(name for name in read_header(parts[2])[1] if name.startswith("blk.1."))
    assert last.replace("blk.1.", "blk.0.") in read_header(parts[0])[1] | read_header(parts[1])[1]
    parts[2].write_bytes(data[2].replace(last.encode(), last.replace("blk.1.", "blk.0.").encode()))
    with pytest.raises(UserError, match="00003-of-00003.gguf is no part of .*it repeats tensors of another part"):
        GGUFFile(parts[0])
    count = b"split.tensors.count" + bytes((5, 0, 0, 0))                 # its type, int32
    for part, content in zip(parts, data):
        part.write_bytes(content.replace(count + bytes((20,)), count + bytes((21,))))
    with pytest.raises(UserError, match="and its other parts hold 20 tensors of the model's 21"):
        GGUFFile(parts[0])


def test_the_bits_a_weight_comes_in_are_counted(tmp_path):
    """By hand: Q4_0 is 18 bytes for 32 weights, Q8_0 34."""
    matrix = ("Q8_0", np.zeros((384, 64), np.float32))
    bits, shares = GGUFFile(write_gguf(tmp_path / "model.gguf", tiny_model("smollm2"), kind="Q4_0",
                                       tensors={"token_embd.weight": matrix})).precision()
    linear, table, norms = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128), 384 * 64, 5 * 64
    assert bits == pytest.approx((linear * 4.5 + table * 8.5 + norms * 32) / (linear + table + norms))
    assert list(shares) == ["Q4_0", "Q8_0", "F32"] and shares["Q8_0"] == table / (linear + table + norms)


def test_config_holds_what_the_file_says(tmp_path):
    model = model_of("llama")
    config = GGUFFile(write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer())).config
    assert (config.family, config.vocab_size, config.head_dim, config.tied_embeddings) == ("llama", 384, 64, False)
    assert config.norm_eps == model.config.rms_norm_eps        # exactly: a float32 read as the decimal it came from
    assert config.rope_theta == 500000.0 and config.rope_scaling == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
    assert tensor_shapes(config) == {name: tuple(t.shape) for name, t in GGUFFile(tmp_path / "model.gguf").tensors()}


def test_an_output_matrix_equal_to_the_embedding_counts_as_tied(tmp_path):
    model = tiny_model("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    assert read(write_gguf(tmp_path / "equal.gguf", model)).config.tied_embeddings
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    decoder = read(write_gguf(tmp_path / "different.gguf", model))
    assert not decoder.config.tied_embeddings
    torch.testing.assert_close(logits(decoder), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("smollm2"), tiny_tokenizer())
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(UserError, match="model.gguf is not a whole GGUF file"):
        GGUFFile(path)


def test_corrupt_headers_end_in_a_sentence_or_in_a_model(tmp_path):
    """Any one byte of the header may be wrong: no other exception, no endless reading of a count gone mad."""
    tokenizer = tiny_tokenizer()
    path = write_gguf(tmp_path / "model.gguf", tiny_model("smollm2"), tokenizer,
                      extra={"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1],
                             "tokenizer.ggml.merges": ["a b"]})
    data = path.read_bytes()
    header = data.index(b"blk.1.")
    random, refused = np.random.default_rng(0), 0
    for offset in random.choice(header, 200, replace=False):
        broken = bytearray(data)
        broken[offset] ^= int(random.integers(1, 256))
        path.write_bytes(broken)
        try:
            GGUFFile(path).config.to_hf()
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("change, sentence", [
    ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported.*llama, qwen2, qwen3, gpt2"),
    ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
    ({"llama.embedding_length": 0}, "llama.embedding_length is 0"),
    ({"llama.attention.head_count": [4, 2]}, r"head_count is \[2, 4\]: only one number for all layers"),
    ({"llama.attention.head_count": [4, 4, 4]}, r"head_count is \[4, 4, 4\], which should be a number for each layer"),
    ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon is 'x'"),
    ({"llama.rope.scaling.type": "spiral"}, "RoPE scaling 'spiral' is not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor is missing"),
    ({"llama.rope.dimension_count": 8}, "8 of a head's 16 dimensions rotate"),
    ({"llama.attention.head_count_kv": 3}, "model.gguf: layer 0 has 4 heads, which its 3 key/value heads do not divide"),
    ({"split.count": 3}, r"is one of 3 parts, .* has no such name"),
    ({"split.count": "x"}, r"is one of x parts, .* has no such name"),
])
def test_what_is_not_supported_is_named(change, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("smollm2"), extra=change)
    with pytest.raises(UserError, match=sentence):
        GGUFFile(path)


@pytest.mark.parametrize("tensors, sentence", [
    ({"blk.1.attn_v.weight": ("I8", np.zeros((32, 64), np.int8))},
     "tensor blk.1.attn_v.weight is stored as I8, which is not read; .* Q6_K"),
    ({"blk.1.ffn_norm.weight": None}, "lacks model.layers.1.post_attention_layernorm.weight and 0 more"),
    ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
    ({"blk.1.attn_norm.weight": None}, "lacks model.layers.1.input_layernorm.weight"),
    ({"blk.0.ffn_up_exps.weight": ("F32", np.zeros((2, 4, 64), np.float32))},
     "tensor blk.0.ffn_up_exps.weight belongs to no supported model of architecture 'llama'"),
    ({"blk.2.attn_q.weight": ("F32", np.zeros((64, 64), np.float32))},
     "tensor blk.2.attn_q.weight belongs to no supported model"),
    ({"blk.0.attn_q.bias": ("F32", np.zeros(64, np.float32))}, "lacks model.layers.0.self_attn.k_proj.bias"),
    ({"blk.0.ffn_down.weight": ("F32", np.zeros((64, 32), np.float32))},
     r"model.layers.0.mlp.down_proj.weight .* has shape \[64, 32\], but should be \[64, 128\]"),
])
def test_tensors_that_do_not_fit_are_named(tensors, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("smollm2"), tensors=tensors)
    with pytest.raises(UserError, match=sentence):
        GGUFFile(path)


def test_rope_factors_that_are_not_llama_3s_are_refused(tmp_path):
    model = model_of("llama")
    model.config.rope_parameters["original_max_position_embeddings"] = 4096
    with pytest.raises(UserError, match="RoPE factors are not Llama 3's"):
        GGUFFile(write_gguf(tmp_path / "model.gguf", model))


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="is not a whole GGUF file: GGUF magic invalid"):
        GGUFFile(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="missing.gguf cannot be read: No such file"):
        GGUFFile(tmp_path / "missing.gguf")
