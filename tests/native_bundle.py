"""Bundles for tests of the native core: random models written as the README's "Formats" say, any format per tensor.

The writer shares nothing with export/, so that each checks the other; PyTorch's Decoder with the dequantized weights
is the oracle.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from models.config import LayerConfig, ModelConfig
from models.decoder import Decoder, inverse_frequencies
from models.quantized import QuantizedTensor, pack
from runtime.bundle import Bundle

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def config(**fields) -> ModelConfig:
    """A small Llama; `layers` may be a list of (heads, kv_heads, mlp)."""
    layers = fields.pop("layers", [(4, 2, 96), (4, 2, 96)])
    base = dict(family="llama", vocab_size=200, hidden_size=64, head_dim=16, context_length=320)
    return ModelConfig(**{**base, **fields, "layers": tuple(LayerConfig(*layer) for layer in layers)})


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    decoder, generator = Decoder(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return decoder


def quantize(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> QuantizedTensor:
    rows, columns = weight.shape
    blocks = weight.reshape(rows, 1 if group == 0 else columns // group, -1)
    if symmetric:
        scales = (blocks.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = ((high - low) / (2 ** bits - 1)).half()
        zeros = (-low / scales.float()).round().clamp(0, 2 ** bits - 1)
    codes = (blocks / scales.float()[:, :, None] + zeros.float()[:, :, None]).round().clamp(0, 2 ** bits - 1)
    return QuantizedTensor(codes.to(torch.uint8).reshape(rows, columns), scales, None if symmetric else zeros.to(torch.uint8),
                           bits, group, symmetric)


class Writer:
    def __init__(self):
        self.tensors, self.data = [], bytearray()

    def add(self, name: str, dtype: str, array: np.ndarray, shape: tuple[int, ...]):
        self.data += bytes(-len(self.data) % 64)
        raw = np.ascontiguousarray(array).tobytes()
        self.tensors.append({"name": name, "dtype": dtype, "shape": list(shape), "offset": len(self.data), "bytes": len(raw)})
        self.data += raw

    def floats(self, name: str, tensor: torch.Tensor, dtype: str = "float32"):
        tensor = tensor.detach().to(FLOATS[dtype])
        self.add(name, dtype, tensor.contiguous().view(torch.uint8).numpy(), tuple(tensor.shape))

    def linear(self, name: str, weight: torch.Tensor, how, bias: torch.Tensor | None) -> torch.Tensor:
        """weight [N, K] in the format `how`: a float dtype or (bits, group, symmetric). Returns what it stands for."""
        if bias is not None:
            self.floats(f"{name}.bias", bias)
        if isinstance(how, str):
            self.floats(f"{name}.weight", weight.t(), how)
            return weight.to(FLOATS[how]).float()
        q = quantize(weight, *how)
        if q.bits in (4, 8):
            offset, kind = (2 ** (q.bits - 1), "int") if q.symmetric else (0, "uint")
            codes = (q.codes.t().contiguous().numpy().astype(np.int16) - offset).astype(np.uint8)
            self.add(f"{name}.codes", f"{kind}{q.bits}", nibbles(codes) if q.bits == 4 else codes, codes.shape)
            scales = q.scales.t() if q.group else q.scales[:, 0]
            self.floats(f"{name}.scales", scales, "float16")
            if q.zeros is not None:
                zeros = (q.zeros.t() if q.group else q.zeros[:, 0]).contiguous().numpy()
                self.add(f"{name}.zeros", f"uint{q.bits}", nibbles(zeros) if q.bits == 4 else zeros, zeros.shape)
        else:
            self.add(f"{name}.codes", f"uint{q.bits}", pack(q.codes, q.bits).numpy(), tuple(q.codes.shape))
            self.floats(f"{name}.scales", q.scales, "float16")
            if q.zeros is not None:
                self.add(f"{name}.zeros", "uint8", q.zeros.numpy(), tuple(q.zeros.shape))
        return q.dequantize()


def nibbles(codes: np.ndarray) -> np.ndarray:
    flat = codes.ravel() & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


def write_bundle(folder: Path, decoder: Decoder, formats=None, *, embed=(8, 0, True), norms: str = "float32") -> Bundle:
    """Write `decoder` as a bundle; its weights become what the bundle's stand for.

    formats(name) -> format of the linear `layers.{l}.{q|k|v|o|gate|up|down}` or `head`; q, k, v (and gate, up) that
    agree are fused as the exporter fuses them. Default: int4, groups of 32.
    """
    formats = formats or (lambda name: (4, 32, True))
    config, out = decoder.config, Writer()
    state = dict(decoder.named_modules())

    def put(name: str, modules: list[str], how):
        weight = torch.cat([state[m].weight for m in modules]).detach()
        biases = [state[m].bias for m in modules]
        value = out.linear(name, weight, how, None if biases[0] is None else torch.cat(biases))
        for module, part in zip(modules, value.split([state[m].weight.shape[0] for m in modules])):
            state[module].weight.data = part.clone()

    def norm(name: str, module: str):
        out.floats(f"{name}.weight", state[module].weight, norms)
        state[module].weight.data = state[module].weight.data.to(FLOATS[norms]).float()
        if getattr(state[module], "bias", None) is not None:
            out.floats(f"{name}.bias", state[module].bias)

    table = state["model.embed_tokens"].weight
    if isinstance(embed, str):
        out.floats("embed.weight", table, embed)
        table.data = table.data.to(FLOATS[embed]).float()
    else:
        q = quantize(table.detach(), *embed)
        codes = q.signed().numpy() if q.bits == 8 and q.symmetric else pack(q.codes, q.bits).numpy()
        out.add("embed.codes", "int8" if q.bits == 8 and q.symmetric else f"uint{q.bits}", codes, tuple(table.shape))
        out.floats("embed.scales", q.scales if q.group else q.scales[:, 0], "float16")
        if q.zeros is not None:
            zeros = q.zeros if q.group else q.zeros[:, 0]
            out.add("embed.zeros", "uint8", zeros.numpy(), tuple(zeros.shape))
        table.data = q.dequantize()
    if not config.tied_embeddings:
        put("head", ["lm_head"], formats("head"))
    if config.positions == "learned":
        out.floats("position_embed.weight", state["model.embed_positions"].weight)
    else:
        angles = torch.arange(config.context_length)[:, None].double() * inverse_frequencies(config).double()
        out.floats("rope.cos", angles.cos()), out.floats("rope.sin", angles.sin())
    for l in range(len(config.layers)):
        base, attention, mlp = f"layers.{l}", f"model.layers.{l}.self_attn", f"model.layers.{l}.mlp"
        groups = [("qkv", attention, ["q", "k", "v"]), ("o", attention, ["o"]),
                  ("gate_up", mlp, ["gate", "up"] if config.gated_mlp else ["up"]), ("down", mlp, ["down"])]
        for fused, owner, parts in groups:
            hows = [formats(f"{base}.{part}") for part in parts]
            if len(parts) > 1 and len(set(hows)) == 1:
                put(f"{base}.{fused}", [f"{owner}.{part}_proj" for part in parts], hows[0])
            else:
                for part, how in zip(parts, hows):
                    put(f"{base}.{part}", [f"{owner}.{part}_proj"], how)
        norm(f"{base}.attn_norm", f"model.layers.{l}.input_layernorm")
        norm(f"{base}.mlp_norm", f"model.layers.{l}.post_attention_layernorm")
        if config.qk_norm:
            norm(f"{base}.q_norm", f"{attention}.q_norm"), norm(f"{base}.k_norm", f"{attention}.k_norm")
    norm("final_norm", "model.norm")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(out.data)
    manifest = {"name": "test", "model": {"config": config.to_dict(), "max_context": config.context_length},
                "weights": {"file": "weights.bin", "bytes": len(out.data), "tensors": out.tensors}, "graphs": [],
                "files": {"weights.bin": {"bytes": len(out.data), "sha256": hashlib.sha256(out.data).hexdigest()}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle(folder, manifest)
