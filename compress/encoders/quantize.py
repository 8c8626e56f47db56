"""Quantize an encoder's weights: `python -m compress.quantize ENCODER -o OUT --bits 8 --group 0`.

The linears of its layers get --bits, the table of tokens --embedding-bits with one scale a row; heads, norms, positions and biases stay.
Codes are chosen as for a decoder (--method rtn, or clip and gptq over the inputs that each linear has on --data, all from the network as it
was: its layers are few, and none is corrected for those before it), and stored in the same way under transformers' names. export.onnx writes them
value for value; 8 bits with one scale a row run as integer products on ONNX Runtime's CPU, 4 bits in groups as MatMulNBits.
"""

import hashlib
from fnmatch import fnmatchcase

import torch
from torch import nn

from compress.encoders.moments import second_moments
from compress.encoders.text import encoded_texts
from compress.quantizing.calibrated import clip, gptq_descended
from compress.quantizing.rtn import round_to_nearest
from models.checkpoint import check_output
from models.encoders.network import load, read_quantized, save_quantized, task_of
from models.formats import lineage
from models.network.quantized import Quantization, TensorFormat
from models.progress import progress
from runtime.cli import table
from runtime.errors import UserError
from runtime.files import new_folder

CHOOSE = {"clip": clip, "gptq": gptq_descended}


def quantize_encoder(options) -> None:
    """Run the stage; options: compress.quantize's. Raises UserError for what cannot be used; then nothing is written."""
    folder = options.checkpoint
    if read_quantized(folder) is not None:
        raise UserError(f"{folder} is quantized already, and codes cannot be decided twice: quantize the checkpoint it was made from")
    for wrong, words in (
            (options.method not in ("rtn", *CHOOSE), f"--method {options.method} is for decoders: give rtn, clip or gptq"),
            (options.bits not in (4, 8), f"--bits {options.bits}: no graph of an encoder has such weights: give 4 or 8"),
            (options.embedding_bits not in (0, 8), f"--embedding-bits {options.embedding_bits}: an encoder's table has 8, or 0 to leave it alone"),
            (options.kind != "int" or options.scale_bits != 16, "--kind and --scale-bits 8 are for decoders: an encoder's codes are int with fp16 scales"),
            (options.mixed, "--target-size and --target-bpw are for decoders: an encoder's linears have one format"),
            (options.fold, "--fold is for decoders: leave it out"),
            (options.activations, "--activations is for decoders: an encoder's 8-bit products round their inputs where they run"),
            (options.kv_cache != "float", "--kv-cache: an encoder has none")):
        if wrong:
            raise UserError(f"{folder} is an encoder; {words}")
    check_output(options.out, folder)
    model = load(folder, task_of(folder))
    linears, form = _linears(model, options.skip), TensorFormat(options.bits, options.group, options.symmetric)
    for name, linear in linears.items():
        form.groups(linear.in_features)
    hessians, inputs = {}, {}
    if options.method in CHOOSE:
        texts = encoded_texts(folder, model.config, options, options.data, options.windows, options.length)
        inputs["calibration"] = hashlib.sha256(b"".join(one.ids.tobytes() for one in texts)).hexdigest()
        hessians = second_moments(model, linears, texts)
    codes = {}
    for name, linear in progress(linears.items(), label="quantize", unit="linear"):
        weight = linear.weight.detach().float()
        codes[name] = CHOOSE[options.method](weight, hessians[name], form) if hessians else round_to_nearest(weight, form)
    if options.embedding_bits:
        name, table_of = next((name, part) for name, part in model.named_modules() if part is model.get_input_embeddings())
        codes[name] = round_to_nearest(table_of.weight.detach().float(), TensorFormat(8, 0))
    plan = Quantization({name: one.format for name, one in codes.items()})
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    before = sum(tensor.nbytes for tensor in state.values())
    for name, one in codes.items():
        del state[f"{name}.weight"]
        state |= one.tensors(name)
    with new_folder(options.out) as out:
        save_quantized(out, folder, state.items(), plan, lineage.stage("compress.quantize", options, inputs))
    print(f"{len(linears)} linears at {options.bits} bits, " + (f"groups of {options.group}" if options.group else "one scale a row"))
    print(table([{"": "weights, MB", "before": f"{before / 1e6:.1f}", "after": f"{sum(t.nbytes for t in state.values()) / 1e6:.1f}"}]))


def _linears(model, skip: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears of the layers, those in lists of modules that are numbered, but for those that match --skip."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
             and any(part.isdigit() for part in name.split("."))}
    if wrong := next((pattern for pattern in skip if not any(fnmatchcase(name, pattern) for name in found)), None):
        raise UserError(f"--skip {wrong!r} matches no linear of the layers: they are named like {next(iter(found))}")
    return {name: module for name, module in found.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
