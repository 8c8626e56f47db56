"""Fewer layers of an encoder: which go, and the same network without them.

    python -m compress.prune ENCODER -o OUT --what depth --layers 4 --data FILES

The layers that change least of what goes through them leave: 1 - cos(what enters, what leaves), averaged over the tokens of the text
(Men et al. 2024, block influence). An encoder's heads stay, because its config.json has no place for fewer of them: a head's size is the
hidden size by their number; neurons, channels and the vocabulary stay too. What was lost comes back in part by compress.distill.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from compress.encoders.text import encoded_texts
from models.checkpoint import check_output
from models.encoders.network import load, pooled_by, read_quantized, save, task_of
from models.formats import lineage
from runtime.errors import UserError
from runtime.files import new_folder


def prune_encoder(options) -> None:
    """Run the stage; options: compress.prune's. Raises UserError for what cannot be used; then nothing is written."""
    folder = options.checkpoint
    if options.what != "depth":
        raise UserError(f"{folder} is an encoder, of which only layers can be left out: --what {options.what} is for decoders; give "
                        "--what depth")
    if options.keep is not None or options.target_size is not None:
        raise UserError(f"{folder} is an encoder, whose layers are counted: give --layers in place of --keep or --target-size")
    if read_quantized(folder) is not None:
        raise UserError(f"{folder} is quantized: prune the checkpoint it was made from, then quantize")
    check_output(options.out, folder)
    task = task_of(folder)
    model = load(folder, task)
    total = len(layers_of(model))
    if options.layers is None or not 1 <= options.layers < total:
        raise UserError(f"--layers is {options.layers}, which should be from 1 to {total - 1}: the layers to keep")
    influence = influences(model, encoded_texts(folder, model.config, options.data, options.windows, options.length))
    kept = sorted(sorted(range(total), key=lambda number: -influence[number])[:options.layers])
    gone = [number for number in range(total) if number not in kept]
    print(f"layers left out: {' '.join(map(str, gone))}")
    stage = lineage.stage("compress.prune", options, {}, {"dropped_layers": gone})
    with new_folder(options.out) as out:
        save(out, with_layers(model, kept), folder, stage, pooled_by(folder) if task == "sentence-similarity" else None)


def layers_of(model) -> nn.ModuleList:
    """The list of layers. Raises UserError for a network whose layers share their weights."""
    found = next((part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and name.split(".")[-1] in ("layer", "layers")), None)
    if found is None or len(found) != model.config.num_hidden_layers:
        raise UserError(f"a {model.config.model_type} model has no layers of its own weights that could be left out")
    return found


def with_layers(model, kept: list[int]):
    """A copy of the model with these of its layers, in this order."""
    student = copy.deepcopy(model)
    layers = layers_of(student)
    chosen = [layers[number] for number in kept]
    for name, part in student.named_modules():
        if part is layers:
            parent = student.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.ModuleList(chosen))
            break
    student.config.num_hidden_layers = len(kept)
    return student


@torch.no_grad()
def influences(model, texts) -> list[float]:
    """Of each layer: 1 - cos of what enters and what leaves, the mean over tokens."""
    sums, tokens = [0.0] * len(layers_of(model)), sum(map(len, texts))
    for one in texts:
        states = model(input_ids=torch.from_numpy(one.ids)[None], attention_mask=torch.ones(1, len(one), dtype=torch.long),
                       output_hidden_states=True).hidden_states
        for number, (before, after) in enumerate(zip(states, states[1:])):
            sums[number] += float((1 - F.cosine_similarity(before[0], after[0], dim=-1)).sum())
    return [total / tokens for total in sums]
