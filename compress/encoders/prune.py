"""Prune an encoder: fewer layers (layers.py), or fewer neurons in each of its MLPs (neurons.py).

    python -m compress.prune ENCODER -o OUT --what depth --layers 4 --data FILES
    python -m compress.prune ENCODER -o OUT --what mlp --neurons 768 --data FILES

An encoder's heads stay, because its config.json has no place for fewer of them: a head's size is the hidden size by their number;
channels and the vocabulary stay too. What was lost comes back in part by compress.distill.
"""

from compress.encoders.layers import influences, layers_of, with_layers
from compress.encoders.moments import second_moments
from compress.encoders.neurons import narrowed, neurons_of
from compress.encoders.text import encoded_texts
from models.checkpoint import check_output
from models.encoders.network import load, pooled_by, read_quantized, save, task_of
from models.formats import lineage
from runtime.errors import UserError
from runtime.files import new_folder


def prune_encoder(options) -> None:
    """Run the stage; options: compress.prune's. Raises UserError for what cannot be used; then nothing is written."""
    folder = options.checkpoint
    if options.what not in ("depth", "mlp"):
        raise UserError(f"{folder} is an encoder, of which layers and neurons can be left out: --what {options.what} is for decoders; give "
                        "--what depth or --what mlp")
    if options.keep is not None or options.target_size is not None:
        raise UserError(f"{folder} is an encoder, whose layers and neurons are counted: give --layers or --neurons in place of --keep or "
                        "--target-size")
    if read_quantized(folder) is not None:
        raise UserError(f"{folder} is quantized: prune the checkpoint it was made from, then quantize")
    check_output(options.out, folder)
    task = task_of(folder)
    model = load(folder, task)
    student, metrics = (_fewer_layers if options.what == "depth" else _fewer_neurons)(model, options)
    stage = lineage.stage("compress.prune", options, {}, metrics)
    with new_folder(options.out) as out:
        save(out, student, folder, stage, pooled_by(folder) if task == "sentence-similarity" else None)
    before, after = (sum(part.numel() for part in one.parameters()) for one in (model, student))
    print(f"{options.out}: {after / 1e6:.1f}M of {before / 1e6:.1f}M parameters")


def _fewer_layers(model, options):
    total = len(layers_of(model))
    if options.layers is None or not 1 <= options.layers < total:
        raise UserError(f"--layers is {options.layers}, which should be from 1 to {total - 1}: the layers to keep")
    influence = influences(model, encoded_texts(options.checkpoint, model.config, options, options.data, options.windows, options.length))
    kept = sorted(sorted(range(total), key=lambda number: -influence[number])[:options.layers])
    gone = [number for number in range(total) if number not in kept]
    print(f"layers left out: {' '.join(map(str, gone))}")
    return with_layers(model, kept), {"dropped_layers": gone}


def _fewer_neurons(model, options):
    key, pairs = neurons_of(model)
    width, step = getattr(model.config, key), options.step
    if options.neurons is None or not step <= options.neurons < width or options.neurons % step:
        raise UserError(f"--neurons is {options.neurons}, which should be a multiple of --step {step} below the {width} of each layer")
    texts = encoded_texts(options.checkpoint, model.config, options, options.data, options.windows, options.length)
    return narrowed(model, second_moments(model, [out for _, out in pairs], texts), options.neurons), {key: options.neurons}
