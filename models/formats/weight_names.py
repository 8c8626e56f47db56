"""Published names of weights, and the Decoder's.

The Decoder uses Hugging Face's Llama names, which Mistral, Qwen and SmolLM checkpoints have on disk already, perhaps
without the leading "model.". GPT-2's are mapped here: other names, linear weights stored [in, out] (its Conv1D), and q,
k and v fused into one `c_attn`. A GPT-2 whose shape its published form cannot hold (quantized, or pruned unevenly) is
stored under the Decoder's names.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, cat

_NAME = r"%s(?P<module>.+)\.(?P<kind>weight|bias)"
_BARE = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\..+")          # a Llama saved without its head: no "model."
_DECODER_NAME = re.compile(_NAME % r"(?:model\.layers\.(?P<layer>\d+)\.)?")


@dataclass(frozen=True)
class Naming:
    """What a format calls the Decoder's modules: outside of the layers, and within one, where it may hold several fused."""

    prefix: str                                 # a pattern; its group `layer` is the layer's number
    outside: dict[str, tuple[str, ...]]
    layer: dict[str, tuple[str, ...]]

    def decoder_names(self, name: str) -> list[str]:
        """The Decoder's tensors that one of this name holds; none where it is no parameter's name."""
        match = re.fullmatch(_NAME % self.prefix, name)
        if not match:
            return []
        place, table = ("", self.outside) if match["layer"] is None else (f"model.layers.{match['layer']}.", self.layer)
        return [f"{place}{module}.{match['kind']}" for module in table.get(match["module"], ())]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GPT2 = Naming(r"(?:transformer\.)?(?:h\.(?P<layer>\d+)\.)?",
              {"wte": ("model.embed_tokens",), "wpe": ("model.embed_positions",), "ln_f": ("model.norm",)},
              {"ln_1": ("input_layernorm",), "ln_2": ("post_attention_layernorm",), "attn.c_attn": _QKV,
               "attn.c_proj": ("self_attn.o_proj",), "mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",)})
GGUF = Naming(r"(?:blk\.(?P<layer>[^.]+)\.)?",
              {"token_embd": ("model.embed_tokens",), "position_embd": ("model.embed_positions",),
               "output_norm": ("model.norm",), "output": ("lm_head",)},
              {"attn_norm": ("input_layernorm",), "ffn_norm": ("post_attention_layernorm",), "attn_qkv": _QKV,
               "attn_q": _QKV[:1], "attn_k": _QKV[1:2], "attn_v": _QKV[2:], "attn_output": ("self_attn.o_proj",),
               "attn_q_norm": ("self_attn.q_norm",), "attn_k_norm": ("self_attn.k_norm",), "ffn_gate": ("mlp.gate_proj",),
               "ffn_up": ("mlp.up_proj",), "ffn_down": ("mlp.down_proj",)})
_BUFFERS = {"gpt2": re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")}       # causal masks of old files


@dataclass(frozen=True)
class Part:
    """Where a Decoder tensor lies in a published one: part `index` of `count` along the outputs, perhaps transposed."""

    transposed: bool = False
    index: int = 0
    count: int = 1

    def shape(self, published: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this part of a tensor of shape `published`."""
        shape = published[::-1] if self.transposed else published
        return (shape[0] // self.count, *shape[1:]) if shape and shape[0] % self.count == 0 else shape

    def cut(self, published: Tensor) -> Tensor:
        """This part as a view."""
        return (published.T if self.transposed else published).chunk(self.count)[self.index]


def decoder_names(family: str, published: str) -> list[tuple[str, Part]]:
    """The Decoder tensors that a published tensor holds: none for a buffer, its own name where it has no other."""
    if published.endswith(".rotary_emb.inv_freq") or family in _BUFFERS and _BUFFERS[family].fullmatch(published):
        return []
    if family == "gpt2" and (names := GPT2.decoder_names(published)):
        turned = ".c_" in published and published.endswith(".weight")
        return [(name, Part(turned, index, len(names))) for index, name in enumerate(names)]
    return [(f"model.{published}" if _BARE.fullmatch(published) else published, Part())]


def publish_gpt2(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Turn the Decoder's tensors into GPT-2's published ones; q, k and v are held until the three are there."""
    names = {(table is GPT2.layer, module): (theirs, modules) for table in (GPT2.outside, GPT2.layer)
             for theirs, modules in table.items() for module in modules}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        match = _DECODER_NAME.fullmatch(name)
        theirs, modules = names.get(match and (match["layer"] is not None, match["module"]), (None, ()))
        if theirs is None:
            yield name, tensor
            continue
        waiting[name] = tensor
        ours, published = ("model.layers.", "transformer.h.") if match["layer"] else ("", "transformer.")
        number = f"{match['layer']}." if match["layer"] else ""
        parts = [f"{ours}{number}{module}.{match['kind']}" for module in modules]
        if all(part in waiting for part in parts):
            whole = cat([waiting.pop(part) for part in parts]) if len(parts) > 1 else waiting.pop(name)
            turned = match["kind"] == "weight" and ".c_" in theirs
            yield f"{published}{number}{theirs}.{match['kind']}", whole.T if turned else whole
