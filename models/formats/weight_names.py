"""Published names of weights, and the Decoder's.

The Decoder uses Hugging Face's Llama names, which Mistral, Qwen and SmolLM checkpoints have on disk already, perhaps
without the leading "model.". GPT-2's are mapped here: other names, linear weights stored [in, out] (its Conv1D), and q,
k and v fused into one `c_attn`. A GPT-2 whose shape its published form cannot hold (quantized, or pruned unevenly) is
stored under the Decoder's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, cat

_GPT2_OUTSIDE = {"wte": "model.embed_tokens", "wpe": "model.embed_positions", "ln_f": "model.norm"}
_GPT2_LAYER = {"ln_1": ("input_layernorm",), "ln_2": ("post_attention_layernorm",),
               "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
               "attn.c_proj": ("self_attn.o_proj",), "mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",)}
_GPT2_NAME = re.compile(r"(?:transformer\.)?(?:h\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")
_GPT2_BUFFERS = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")     # causal masks of old files
_BARE = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\..+")          # a Llama saved without its head: no "model."
_DECODER_NAME = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")


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
    if published.endswith(".rotary_emb.inv_freq") or (family == "gpt2" and _GPT2_BUFFERS.fullmatch(published)):
        return []
    match = _GPT2_NAME.fullmatch(published) if family == "gpt2" else None
    if match and match["layer"] is None and match["module"] in _GPT2_OUTSIDE:
        return [(f"{_GPT2_OUTSIDE[match['module']]}.{match['kind']}", Part())]
    if match and match["layer"] is not None and match["module"] in _GPT2_LAYER:
        modules = _GPT2_LAYER[match["module"]]
        turned = match["kind"] == "weight" and ".c_" in match["module"]
        return [(f"model.layers.{match['layer']}.{module}.{match['kind']}", Part(turned, index, len(modules)))
                for index, module in enumerate(modules)]
    return [(f"model.{published}" if _BARE.fullmatch(published) else published, Part())]


def publish_gpt2(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Turn the Decoder's tensors into GPT-2's published ones; q, k and v are held until the three are there."""
    outside = {ours: theirs for theirs, ours in _GPT2_OUTSIDE.items()}
    inside = {ours: (theirs, index, len(modules)) for theirs, modules in _GPT2_LAYER.items()
              for index, ours in enumerate(modules)}
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        match = _DECODER_NAME.fullmatch(name)
        if match and match["layer"] is None and match["module"] in outside:
            yield f"transformer.{outside[match['module']]}.{match['kind']}", tensor
        elif match and match["layer"] is not None and match["module"] in inside:
            theirs, index, count = inside[match["module"]]
            published = f"transformer.h.{match['layer']}.{theirs}.{match['kind']}"
            parts = waiting.setdefault(published, {})
            parts[index] = tensor
            if len(parts) == count:
                del waiting[published]
                whole = cat([parts[i] for i in range(count)]) if count > 1 else tensor
                yield published, whole.T if match["kind"] == "weight" and ".c_" in theirs else whole
        else:
            yield name, tensor
