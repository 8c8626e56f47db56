"""Random small checkpoints in any format a tensor may have, their bundles, and logits of a backend on a ragged, cached course.

Everything goes through the code that users run: compress/ rounds, models/ writes the checkpoint, export/ the bundle.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_tokenizer

from compress.quantizing.rtn import round_to_nearest
from export import onnx as export_onnx
from models.formats import lineage
from models.checkpoint import load_decoder, write_checkpoint
from models.network.config import LayerConfig, ModelConfig
from models.network.decoder import Decoder
from models.network.quantized import Quantization, QuantizedTensor, TensorFormat
from runtime.bundle import Bundle, open_bundle

LENGTHS = (23, 9, 17)


def small_config(family: str = "llama", layers=((4, 2, 96), (4, 2, 96)), **fields) -> ModelConfig:
    """Two layers of (heads, kv_heads, mlp); the tokenizer's 384 tokens."""
    base = dict(family=family, vocab_size=384, hidden_size=64, head_dim=16, context_length=128, bos_token_id=1,
                eos_token_ids=(2,), pad_token_id=2)
    return ModelConfig(**{**base, **fields, "layers": tuple(LayerConfig(*layer) for layer in layers)})


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    decoder, generator = Decoder(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return decoder


def quantize(weight: torch.Tensor, form: TensorFormat, generator: torch.Generator) -> QuantizedTensor:
    """Rounded to nearest. Zero points differ from row to row, and half of the symmetric groups have negative scales."""
    if not form.symmetric:
        weight = weight + 0.5 * weight.std() * torch.randn(len(weight), 1, generator=generator)
    found = round_to_nearest(weight, form)
    if not form.symmetric or form.kind == "e4m3":
        return found
    mirrored = torch.rand(found.scales.shape, generator=generator) < 0.5          # no code is 0, so every one has a mirror image
    codes = found.codes.unflatten(1, (found.scales.shape[1], -1))
    mirror = 2 ** form.bits - (form.kind == "levels")                             # whose code 0 has one
    codes = torch.where(mirrored[:, :, None], mirror - codes.int(), codes.int()).to(torch.uint8).flatten(1)
    return replace(found, codes=codes, scales=torch.where(mirrored, -found.scales, found.scales))


def write_random(folder: Path, config: ModelConfig, formats=lambda module: None, seed: int = 0, activations: dict | None = None) -> Path:
    """A checkpoint of `config` with random weights; formats(module) -> TensorFormat, or None to leave it dense."""
    decoder, generator = random_decoder(config, seed), torch.Generator().manual_seed(seed)
    chosen, tensors = {}, []
    for name, tensor in decoder.state_dict().items():
        module = name.removesuffix(".weight")
        how = formats(module) if tensor.ndim == 2 and name.endswith("weight") and "positions" not in name else None
        if how is None:
            tensors.append((name, tensor))
        else:
            chosen[module] = how
            tensors += quantize(tensor, how, generator).tensors(module).items()
    hf = config.to_hf() | ({"quantization_config": Quantization(chosen, activations or {}).to_dict()} if chosen else {})
    write_checkpoint(folder, hf, tensors, None, lineage.stage("test", {}, {}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def everywhere(bits: int, group: int, symmetric: bool = True, table: TensorFormat | None = TensorFormat(8, 0)):
    """formats() for `write_random`: one format for all linears, `table` for the embedding."""
    return lambda module: table if module == "model.embed_tokens" else TensorFormat(bits, group, symmetric)


def write_bundle(folder: Path, config: ModelConfig, formats=everywhere(4, 32), *options: str, seed: int = 0) -> tuple[Bundle, Decoder]:
    """A random model as folder/checkpoint, exported with these options as folder/bundle; and PyTorch's decoder of its codes."""
    checkpoint = write_random(folder / "checkpoint", config, formats, seed)
    assert export_onnx.main([str(checkpoint), "-o", str(folder / "bundle"), *options]) == 0
    return open_bundle(folder / "bundle"), load_decoder(checkpoint)


def course(backend, vocabulary: int) -> np.ndarray:
    """Logits [n, vocab] of a ragged batch of three prompts, twelve batched steps, and a chunk of five on one row."""
    rng = np.random.default_rng(0)
    cache, longest = backend.new_cache(len(LENGTHS), 64), max(LENGTHS)
    ids = np.zeros((len(LENGTHS), longest), np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(3, vocabulary, length)
    lengths = np.array(LENGTHS)
    wanted = np.stack([np.zeros_like(lengths), lengths // 2, lengths - 1], axis=1)
    positions = np.tile(np.arange(longest), (len(LENGTHS), 1))
    logits = [backend.forward(ids, positions, np.zeros_like(lengths), wanted, cache).copy()]
    for _ in range(12):
        token = rng.integers(3, vocabulary, (len(LENGTHS), 1))
        logits.append(backend.forward(token, lengths[:, None], lengths, np.zeros((len(LENGTHS), 1), np.int64), cache).copy())
        lengths = lengths + 1
    chunk = rng.integers(3, vocabulary, (1, 5))
    steps = np.arange(5)[None]
    logits.append(backend.forward(chunk, lengths[1] + steps, lengths[1:2], steps, cache.view(1, 2)).copy())
    return np.concatenate([part.reshape(-1, vocabulary) for part in logits])
