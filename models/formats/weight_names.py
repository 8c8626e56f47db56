"""Published names and forms of weights, and the Decoder's.

The Decoder uses Hugging Face's Llama names. A family whose files differ says so in a `Naming`: other names, linears fused into one
tensor or stored [in, out], experts stacked, gains stored as their distance from 1, constant factors of its arithmetic, another order
of rotation. All of that is undone while reading, tensor by tensor, and done again where a checkpoint is written for the family's own
code. A checkpoint that its family's form cannot hold (quantized, or pruned unevenly) is stored as the Decoder has it, and says so.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.network.config import ModelConfig

OWN_FORM = {"edgewright_tensors": "decoder"}            # in config.json: tensors are stored as the Decoder has them
_OURS = re.compile(r"model\.(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+?)(?P<kind>\.weight|\.bias|)")
_BARE = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\..+")            # a Llama saved without its head: no "model."
_NESTED = re.compile(r"(?:model\.language_model\.|language_model\.model\.)(.+)")      # the text part of a multimodal checkpoint
OTHER_PARTS = re.compile(r"(?:model\.)?(?P<part>visual|vision_tower|vision_model|multi_modal_projector|audio_tower|embed_vision|"
                         r"embed_audio|mtp)\..+")
_BUFFER = re.compile(r".+\.rotary_emb\.inv_freq|(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")   # of old files


@dataclass(frozen=True)
class Naming:
    """What a family's files call the Decoder's modules (outside of the layers, and within one), and how they store them.

    A name of theirs with {e} is one for every expert. stacked: theirs hold all experts along a first axis.
    """

    names: dict[str, str] = field(default_factory=dict)                 # ours -> theirs
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()                 # (theirs, ours): one after the other along the outputs
    layer: str = "model.layers.{n}."
    outside: str = "model."
    transposed: tuple[str, ...] = ()                                    # theirs, stored [in, out]
    stacked: tuple[str, ...] = ()                                       # theirs, [experts, ...]
    less_one: tuple[str, ...] = ()                                      # ours, gains stored as gain - 1
    flat: bool = False                                                  # convolutions are [channels, kernel], not [channels, 1, kernel]
    interleaved: bool = False                                           # dimension 2i of a head rotates with 2i + 1
    # ours -> the factor by which our weights are theirs, from the contents of config.json
    factors: Callable[[dict, ModelConfig], dict[str, float]] | None = None


@dataclass(frozen=True)
class Part:
    """Where a Decoder tensor lies in a published one."""

    whole: tuple[int, ...] | None = None        # shape of the published tensor; None: any
    ours: tuple[int, ...] | None = None
    rows: slice | Tensor | None = None          # of the published tensor's outputs, in our order
    expert: int | None = None
    transposed: bool = False
    factor: float = 1.0
    plus: float = 0.0

    def shape(self, published: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this part of a tensor of shape `published`; where that is wrong, itself."""
        return published if self.whole is None or published != self.whole else self.ours

    def cut(self, published: Tensor) -> Tensor:
        """This part: a view where nothing has to be computed, else float32."""
        part = published if self.expert is None else published[self.expert]
        part = part.T if self.transposed else part
        part = part if self.rows is None else part[self.rows]
        part = part if self.ours is None else part.reshape(self.ours)
        return part if (self.factor, self.plus) == (1.0, 0.0) else part.float() * self.factor + self.plus

    def put(self, tensor: Tensor, published: Tensor) -> None:
        """Undo `cut` in a tensor of the published shape."""
        if (self.factor, self.plus) != (1.0, 0.0):
            tensor = (tensor.float() - self.plus) / self.factor
        target = published if self.expert is None else published[self.expert]
        target = target.T if self.transposed else target
        shape = target.shape if self.rows is None else target[self.rows].shape
        target[slice(None) if self.rows is None else self.rows] = tensor.reshape(shape).to(published.dtype)


def rotary_order(head_dim: int, dims: int, interleaved: bool) -> Tensor:
    """Rows of a published head in the order in which dimension i rotates with i + head_dim / 2: int64 [head_dim].

    Published, the first `dims` rotate, i with i + dims / 2, or 2i with 2i + 1; the others do not.
    """
    pairs = torch.arange(dims).view(-1, 2).T if interleaved else torch.arange(dims).view(2, -1)
    still = torch.arange(dims, head_dim).view(2, -1)
    return torch.cat((pairs, still), 1).flatten()


def places(naming: Naming, config: ModelConfig, hf: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[tuple[str, Part]]]:
    """Published tensor -> the Decoder's tensors that it holds. shapes: of the Decoder's tensors; hf: the contents of config.json."""
    found: dict[str, list[tuple[str, Part]]] = {}
    factors = naming.factors(hf, config) if naming.factors else {}
    homes = {module: (theirs, ours) for theirs, ours in naming.fused for module in ours}
    for name, shape in shapes.items():
        match = _OURS.fullmatch(name)
        if match is None:                                               # lm_head
            found.setdefault(name, []).append((name, Part(None, None, factor=factors.get("lm_head", 1.0))))
            continue
        layer, module, kind = match["layer"], match["module"], match["kind"]
        number = re.search(r"\.experts\.(\d+)\.", module)
        generic = module if number is None else module.replace(number[0], ".experts.{e}.")
        theirs, ours = homes.get(generic, (naming.names.get(generic, generic), (generic,)))
        expert = int(number[1]) if number and theirs in naming.stacked else None
        place = naming.outside if layer is None else naming.layer.format(n=layer)
        rest = theirs.replace("{e}", number[1]) if number else theirs
        part = _part(naming, config, layer, generic, kind, shape, [shapes.get(_sibling(name, module, one, number)) for one in ours],
                     ours.index(generic), theirs, expert)
        if expert is not None:
            experts = config.layers[int(layer)].experts
            part = Part((experts, *part.whole), part.ours, part.rows, expert, part.transposed, part.factor, part.plus)
        factor, plus = factors.get(generic, 1.0), 1.0 if generic in naming.less_one else 0.0
        part = Part(part.whole, part.ours, part.rows, part.expert, part.transposed, factor, plus * factor)
        found.setdefault(f"{place}{rest}{'' if theirs in naming.stacked else kind}", []).append((name, part))
    return found


def _sibling(name: str, module: str, other: str, number: re.Match | None) -> str:
    return name.replace(module, other.replace("{e}", number[1]) if number else other)


def _part(naming: Naming, config: ModelConfig, layer: str | None, module: str, kind: str, shape: tuple[int, ...],
          shapes: list[tuple[int, ...]], index: int, theirs: str, expert: int | None) -> Part:
    """The part of `module`, the index-th of those (of `shapes`) that a published tensor holds."""
    transposed = theirs in naming.transposed and kind == ".weight"
    start, total = sum(one[0] for one in shapes[:index]), sum(one[0] for one in shapes)
    whole, rows = (total, *shape[1:]), slice(start, start + shape[0]) if len(shapes) > 1 else None
    if module.endswith("conv") and kind == ".weight" and not naming.flat:                   # published as [channels, 1, kernel]
        whole = (shape[0], 1, shape[1])
    last = module.rpartition(".")[2]
    if layer is not None and last in ("q_proj", "k_proj", "q_norm", "k_norm", "g_proj"):
        rows = _head_rows(naming, config, config.layers[int(layer)], last, shape[0], start, rows, len(shapes))
        if last in ("q_proj", "g_proj") and config.attention_gate:
            whole = (2 * shape[0], *shape[1:])
    return Part(whole[::-1] if transposed else whole, shape, rows, expert, transposed)


def _head_rows(naming: Naming, config: ModelConfig, layer, last: str, count: int, start: int, rows, fused: int):
    """Published rows of the queries, keys, gates or their gains, in our order."""
    size, rope = config.head_size(layer), config.rope(layer)
    heads, gated = count // size, config.attention_gate and last in ("q_proj", "g_proj")
    proportional = bool(rope and rope.scaling and rope.scaling["rope_type"] == "proportional")
    turned = rope is not None and (naming.interleaved or rope.dims(size) < size and not proportional) and last != "g_proj"
    if not gated and not turned:
        return rows
    order = rotary_order(size, rope.dims(size), naming.interleaved) if turned else torch.arange(size)
    stride = 2 * size if gated else size                               # a head's query stands before its gate
    first = start + torch.arange(heads)[:, None] * stride + (size if last == "g_proj" else 0)
    return (first + order).flatten()


def stored_as(naming: Naming, config: ModelConfig, hf: dict, shapes: dict[str, tuple[int, ...]]) -> Callable[[str], list | None]:
    """A function from a stored tensor's name to the Decoder's tensors in it: none for a buffer, None for another part of the model
    (vision, audio, further heads). A name that the family does not know is left as it is, and has no place; but GPT-2's checkpoints of
    the first format are stored as the Decoder has them, and do not say so."""
    known = {} if hf.get("edgewright_tensors") else places(naming, config, hf, shapes)
    first_format = not known or config.family == "gpt2"

    def look(stored: str) -> list[tuple[str, Part]] | None:
        if OTHER_PARTS.fullmatch(stored):
            return None
        if _BUFFER.fullmatch(stored):
            return []
        nested = _NESTED.fullmatch(stored)
        for name in (stored, f"model.{nested[1]}" if nested else "", f"model.{stored}" if _BARE.fullmatch(stored) else "",
                     f"transformer.{stored}" if naming.outside == "transformer." else "", "lm_head.weight" if stored ==
                     "language_model.lm_head.weight" else ""):
            if name in known:
                return known[name]
        match = _OURS.fullmatch(stored)
        if match and match["layer"] and int(match["layer"]) < len(config.layers) and match["module"].rpartition(".")[2] in (
                "k_proj", "v_proj", "k_norm") and config.layers[int(match["layer"])].cache_source is not None:
            return []                                       # keys and values that nobody reads
        name = f"model.{stored}" if _BARE.fullmatch(stored) else stored
        return [(name if first_format or name not in shapes else f"{name} (which {config.family} stores otherwise)", Part())]
    return look


def published(naming: Naming, config: ModelConfig, hf: dict, shapes: dict[str, tuple[int, ...]],
              tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Turn the Decoder's tensors into the family's published ones; parts of one are held until all are there."""
    homes = {ours: (theirs, part) for theirs, held in places(naming, config, hf, shapes).items() for ours, part in held}
    counts: dict[str, int] = {}
    for theirs, _ in homes.values():
        counts[theirs] = counts.get(theirs, 0) + 1
    waiting: dict[str, list] = {}
    for name, tensor in tensors:
        theirs, part = homes.get(name, (name, Part()))
        same = part.rows is part.expert is None and not part.transposed and part.whole == part.ours
        if counts.get(theirs, 1) == 1 and same and (part.factor, part.plus) == (1.0, 0.0):
            yield theirs, tensor
            continue
        held = waiting.setdefault(theirs, [counts[theirs], torch.empty(part.whole or tensor.shape, dtype=tensor.dtype)])
        part.put(tensor, held[1])
        held[0] -= 1
        if held[0] == 0:
            yield theirs, waiting.pop(theirs)[1]
