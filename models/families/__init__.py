"""The families of models that are known: one table each, and the reading and writing of a config.json by them."""

from dataclasses import fields

from models.families import experts, gemma, gemma4, gpt2, granite, lfm2, llama, olmo, phi3, qwen3_5, recurrent
from models.families.family import (ACTIVATIONS, ARITHMETIC, INERT_KEYS, Family, alike, kind_of, off, reshaped, rope_keys, ropes, take,
                                    windows)
from models.formats.weight_names import OWN_FORM, Naming
from models.network.config import LayerConfig, ModelConfig
from runtime.errors import UserError
from runtime.token_ids import pad_id, token_ids

FAMILIES: dict[str, Family] = (llama.FAMILIES | gpt2.FAMILIES | phi3.FAMILIES | gemma.FAMILIES | gemma4.FAMILIES | granite.FAMILIES
                               | olmo.FAMILIES | lfm2.FAMILIES | qwen3_5.FAMILIES | experts.FAMILIES | recurrent.FAMILIES)
# A multimodal checkpoint's text part stands under "text_config", and is of this family where it does not say so itself.
WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text", "mistral3": "mistral"}
LATER = {"gemma3n": "its four streams (AltUp) are", "falcon_h1": "its two mixers side by side in one layer are",
         "minicpm3": "its latent attention (MLA) is", "nemotron_h": "its layers of a single block each are",
         "lfm3": "its gate of one number for each head is"}
NGRAM = "edgewright_ngram"                # of models/ngram.py, which is no network
_OUTER = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "dtype", "torch_dtype",
          "edgewright_tensors", "edgewright_layers")


def text_config(hf: dict) -> dict:
    """The part of a config.json that describes the decoder."""
    if hf.get("model_type") not in list(WRAPPERS) or not isinstance(hf.get("text_config"), dict):
        return hf
    inner = {key: value for key, value in hf["text_config"].items() if value is not None}
    outer = {key: hf[key] for key in _OUTER if hf.get(key) is not None}                 # which is what transformers looks at
    found = {"model_type": WRAPPERS[hf["model_type"]]} | inner | outer
    return found | ({"architectures": [FAMILIES[found["model_type"]].architecture]} if found["model_type"] in FAMILIES else {})


def family_of(hf: dict) -> Family:
    """Raises UserError for a family that is not known."""
    name = text_config(hf).get("model_type")
    if (later := str(name).removesuffix("_text")) in LATER:
        raise UserError(f"model_type {name!r} is not supported: {LATER[later]} not computed here")
    if name == NGRAM:
        raise UserError("these are n-grams, not a network: models.evaluate judges them, and export.draft adds them to a bundle")
    if name not in list(FAMILIES):                   # it may be anything, a list too
        raise UserError(f"model_type {name!r:.60} is not supported: supported are {', '.join(FAMILIES)} (SmolLM2 is llama)")
    return FAMILIES[name]


def read_config(hf: dict) -> ModelConfig:
    """Read the contents of a config.json. Raises UserError naming the key and value that cannot be used."""
    family, hf = family_of(hf), dict(text_config(hf))
    name = hf["model_type"]
    hf |= {key: value for key, value in family.missing.items() if hf.get(key) is None}
    for key, value in hf.items():
        if ARITHMETIC.search(key) and key not in family.read and not INERT_KEYS.search(key) and not off(key, value):
            raise UserError(f"{key} {value!r} is not supported for {name}: it changes what the model computes, and "
                            f"would be ignored; remove it only if the model was trained without it")
    for key, only in family.only.items():
        if take(hf, key, type(only), only) != only:
            raise UserError(f"{key} {hf[key]} is not supported: only {only} is")
    for alias, key in family.aliases.items():
        if alias in hf and hf.setdefault(key, hf[alias]) != hf[alias]:
            raise UserError(f"{key} is {hf[key]} and {alias}, which means the same, {hf[alias]}")
    told = {what: take(hf, *entry) for what, entry in family.keys.items()}
    hidden, heads = told["hidden_size"], told["heads"]
    activation = told.get("activation", "silu")
    if heads < 1:
        raise UserError(f"{family.keys['heads'][0]} is {heads}, which should be at least 1")
    if name == "gpt2" and hidden % heads:
        raise UserError(f"n_embd is {hidden}, which its n_head {heads} does not divide")
    if activation not in ACTIVATIONS:
        raise UserError(f"{family.keys['activation'][0]} {activation!r} is not supported: supported are {', '.join(ACTIVATIONS)}")
    silent = heads if "num_key_value_heads" in hf else family.kv_heads or heads
    width = told.pop("mlp_size")
    every = LayerConfig(heads, _given(told.pop("kv_heads", None), silent), _given(width, 4 * hidden))
    shape = told | {"layers": alike(hf, told["layers"], every), "activation": ACTIVATIONS[activation],
                    "head_dim": _given(told["head_dim"], family.head_dim or hidden // heads),
                    "tied_embeddings": take(hf, "tie_word_embeddings", bool, family.tied)} | family.fixed
    del shape["heads"]
    shape |= {key: take(hf, key, bool, False) for key in family.biases}
    if "attention_bias" in family.biases:
        shape["output_bias"] = shape["attention_bias"]
    if shape.get("positions", "rope") == "rope":
        shape |= {"sliding_window": None} if family.hybrid else windows(hf, family, shape["layers"])
        shape |= ropes(hf, family, shape)
    shape |= family.more(hf, shape) if family.more else {}
    shape["layers"] = reshaped(hf, shape["layers"])
    vocab = take(hf, "vocab_size", int)
    return ModelConfig(family=name, vocab_size=vocab, bos_token_id=hf.get("bos_token_id"),
                       pad_token_id=pad_id(hf.get("pad_token_id"), vocab, "pad_token_id"),
                       eos_token_ids=token_ids(hf.get("eos_token_id"), vocab, "eos_token_id"), **shape)


def write_config(config: ModelConfig) -> dict:
    """The contents of a config.json that `transformers` reads (with `edgewright_layers` where it cannot).

    Raises ValueError for a combination that the family's keys do not express, such as gpt2 with RoPE.
    """
    if not config.layers or config.family not in list(FAMILIES):
        raise ValueError(f"{config.family!r} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    hf = _plain(config, family)
    try:
        plain = ModelConfig.from_hf(hf)
    except UserError as error:
        plain, reason = None, error
    else:
        reason = "what its keys can say is another one"
    if plain == config:
        return hf
    hf |= {"edgewright_layers": [[layer.heads, layer.kv_heads, layer.mlp_size] for layer in config.layers], "head_dim": config.head_dim}
    hf |= OWN_FORM if family.naming != Naming() else {}
    if config.family == "gpt2":
        hf["n_head"] = 1                                 # edgewright_layers says the rest
    try:
        if ModelConfig.from_hf(hf) == config:
            return hf
    except UserError as error:
        reason = error
    raise ValueError(f"family {config.family} cannot express this model: {reason}")


def _plain(config: ModelConfig, family: Family) -> dict:
    """The family's own keys."""
    said = {field.name: getattr(config, field.name) for field in fields(config)} | {"layers": len(config.layers),
            "activation": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)}
    said |= {name: max(getattr(layer, name) for layer in config.layers) for name in ("heads", "kv_heads", "mlp_size")}
    if config.family == "gpt2":
        del said["head_dim"]
    if "activation" in family.keys and family.keys["activation"][0] == "hidden_activation" and config.activation == "gelu_tanh":
        said["activation"] = "gelu_pytorch_tanh"
    hf = {"architectures": [family.architecture], "model_type": config.family, "vocab_size": config.vocab_size}
    hf |= {key: said[what] for what, (key, *_) in family.keys.items() if what in said}
    if config.positions == "rope":
        hf |= rope_keys(config, family.nested)
    hf |= {key: getattr(config, key) for key in family.biases}
    if family.window:
        kinds = [kind_of(config, layer) for layer in config.layers]
        asked = {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0} if family.window == "asked" else {}
        width = config.sliding_window or (family.window_size if family.nested else None)      # which transformers wants there anyway
        hf |= asked | {"sliding_window": width} | (
            {"layer_types": kinds} if family.window == "asked" or family.pattern else {})
    eos = config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None
    hf |= {"tie_word_embeddings": config.tied_embeddings, "bos_token_id": config.bos_token_id, "eos_token_id": eos,
           "pad_token_id": config.pad_token_id}
    return hf | (family.back(config) if family.back else {})


def _given(value, default):
    return default if value is None else value
