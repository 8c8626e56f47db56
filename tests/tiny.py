"""Random two-layer checkpoints with a small real tokenizer, for tests that need a model's shape and not its mind.

Weights are drawn wide enough that the logits differ clearly between tokens; biases and norm gains are random too, so
that a forgotten one shows. The tokenizer is a byte-level BPE trained on the sentences below: any text round-trips.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 384
SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Once upon a time there was a small machine that could read and write.",
    "What is the answer to the question? The answer is that there is no answer.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "今天天气很好，我们去公园散步。你好，世界！",
    "I'm sure they've said it's fine: 12,345 + 678 = 13,023. 🙂🚀",
]
CHAT_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Where a text is cut before its bytes are merged, by llama.cpp's name: the patterns of the models' published tokenizers, copied
# and not made from ours (models/formats/gguf_tokenizer.py), which they are held against.
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "smaug-bpe", "dbrx"),
                    _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST),
    **dict.fromkeys(("qwen2", "megrez"), _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST),
    "qwen35": _SHORT + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _REST,
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
              r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
              r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST,
    **dict.fromkeys(("gpt-4o", "llama4"),
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
                    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST)}

SIZES = dict(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2)
GPT2_NAMES = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
              "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
FAMILIES = {   # name: (Hugging Face's model_type, what sets it apart)
    "llama": ("llama", dict(tie_word_embeddings=False, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})),
    "smollm2": ("llama", dict(tie_word_embeddings=True, rope_parameters={
        "rope_type": "default", "rope_theta": 100000.0})),
    "mistral": ("mistral", dict(tie_word_embeddings=False, sliding_window=16, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True, head_dim=32)),
    "gpt2": ("gpt2", {}),
}
MORE_FAMILIES = {   # of which every room has a test or two, and not all
    "smollm3": ("smollm3", dict(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], layer_types=["full_attention"] * 4)),
    "phi3": ("phi3", dict(tie_word_embeddings=True, max_position_embeddings=256, original_max_position_embeddings=64,
                          rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                                           "original_max_position_embeddings": 64, "short_factor": [1.0 + i / 10 for i in range(6)],
                                           "long_factor": [2.0 + i for i in range(6)]})),
    "qwen3_yarn": ("qwen3", dict(head_dim=32, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                               "original_max_position_embeddings": 64})),
    "ministral3": ("ministral3", dict(head_dim=32, tie_word_embeddings=True, rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1})),
    "granite": ("granite", dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.05, logits_scaling=8.0,
                                tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "gemma2": ("gemma2", dict(head_dim=32, num_hidden_layers=3, sliding_window=16, query_pre_attn_scalar=24,
                              layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "gemma3": ("gemma3_text", dict(head_dim=32, num_hidden_layers=3, sliding_window=16, query_pre_attn_scalar=24,
                                   layer_types=["sliding_attention", "sliding_attention", "full_attention"], rope_parameters={
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                                       "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}})),
    "olmo2": ("olmo2", dict(attention_bias=False)),
    "olmo3": ("olmo3", dict(num_hidden_layers=3, sliding_window=16, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                            rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}, "full_attention": {
                                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}})),
    "exaone4": ("exaone4", dict(num_hidden_layers=3, head_dim=32, sliding_window=16, tie_word_embeddings=True,
                                layer_types=["sliding_attention", "sliding_attention", "full_attention"])),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=32, tie_word_embeddings=True, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0})),
    "ernie4_5": ("ernie4_5", dict(head_dim=32, use_bias=True, tie_word_embeddings=True)),
    "lfm2": ("lfm2", dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_bias=True, block_multiple_of=32)),
    "qwen3_5": ("qwen3_5_text", dict(
        num_hidden_layers=3, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"], tie_word_embeddings=True)),
    "granite4_h": ("granitemoehybrid", dict(
        num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16,
        mamba_n_groups=2, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=96, position_embedding_type="nope",
        embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.05, logits_scaling=8.0, tie_word_embeddings=True)),
    "granite4_tiny": ("granitemoehybrid", dict(
        num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16,
        mamba_n_groups=1, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=96, intermediate_size=64,
        position_embedding_type="rope", embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.05, logits_scaling=2.0)),
    "gemma4": ("gemma4_text", dict(
        num_hidden_layers=6, head_dim=32, global_head_dim=64, sliding_window=16, hidden_size_per_layer_input=32, num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB_SIZE, use_double_wide_mlp=True, final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"] * 3)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16, mlp_only_layers=[0],
                                    norm_topk_prob=True, num_hidden_layers=3, tie_word_embeddings=True)),
    "olmoe": ("olmoe", dict(num_experts=4, num_experts_per_tok=2, intermediate_size=64)),
    "lfm2_moe": ("lfm2_moe", dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1, num_experts=4,
                                  num_experts_per_tok=2, moe_intermediate_size=64, routed_scaling_factor=1.5)),
}


EVERY_FAMILY = FAMILIES | MORE_FAMILIES
LESS_ONE = ("gemma2", "gemma3_text", "qwen3_5_text")        # whose gains are stored as gain - 1


def tiny_tokenizer(pre: str = "smollm") -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens; <|endoftext|> 0, <|im_start|> 1 (BOS), <|im_end|> 2 (EOS, PAD).

    pre: whose pre-tokenizer it has, by llama.cpp's name for it: smollm, gpt-2, llama-bpe, qwen2, qwen35, tekken, ...
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    first = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")] if pre in SPLITS else {
        "gpt-2": []}.get(pre, [pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    if pre in ("qwen2", "qwen35"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


def tiny_model(family: str, seed: int = 0, **config):
    """A random transformers model of `family` (a key of FAMILIES), fp32; `config` overrides Hugging Face's fields."""
    model_type, own = EVERY_FAMILY[family]
    fields = {**SIZES, **own, **config}
    if model_type == "gpt2":
        fields.pop("num_key_value_heads")
        fields = {GPT2_NAMES.get(key, key): value for key, value in fields.items()}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = weight.ndim == 1 and name.endswith("weight")
            # A tied embedding must be small beside what the layers add, or every token would predict itself;
            # the last norm's gain makes up for it.
            spread = 0.1 if weight.ndim == 1 or id(weight) in embeddings else weight.shape[-1] ** -0.5
            less_one = model_type in LESS_ONE and not name.endswith("linear_attn.norm.weight")
            weight.copy_(spread * torch.randn(weight.shape, generator=generator) + (1.0 if gain and not less_one else 0.0))
            if name in ("model.norm.weight", "transformer.ln_f.weight") and family in FAMILIES:
                weight.mul_(3.0)
    return model


def write_tiny(folder: Path, family: str, seed: int = 0, **config) -> Path:
    """Save `tiny_model` and `tiny_tokenizer` as a Hugging Face folder; returns it."""
    tiny_model(family, seed, **config).save_pretrained(folder)
    # transformers splits a Qwen2 model's text by Qwen2's pattern, whatever its tokenizer.json says
    tiny_tokenizer("qwen2" if family == "qwen2" else "smollm").save_pretrained(folder)
    return folder


def write_stranger(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint as `folder`, whose tokenizer gives two tokens each other's id; returns it."""
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_padded(checkpoint: Path, folder: Path, rows: int, seed: int = 0) -> Path:
    """A copy of a tied checkpoint as `folder`, its table padded to `rows` with likely tokens; returns it."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(checkpoint, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    table = tensors["model.embed_tokens.weight"]
    more = torch.randn(rows - len(table), table.shape[1], generator=torch.Generator().manual_seed(seed)) * table.std() * 2
    tensors["model.embed_tokens.weight"] = torch.cat((table, more.to(table.dtype)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return folder


def labelled_rows(*parts):
    """Tensors input_ids, labels, ... [b, s] as a Distiller is given them by its trainer."""
    from compress.distilling.distiller import labelled_tokens
    return [torch.from_numpy(part) for part in labelled_tokens(tuple(part.numpy() for part in parts))]
