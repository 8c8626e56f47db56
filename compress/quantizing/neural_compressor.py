"""Codes from neural-compressor: `--method hqq`, one weight at a time and without data, and `--method autoround`, on text.

HQQ chooses a zero point for each group such that few large errors are preferred to many small ones. Its zero points are
fractions, which no backend here runs; they are rounded, and a weight takes the code nearest to it on the grid that is
left, HQQ's own wherever the zero point was whole. Rounding gives back part of what HQQ won: at 4 bits expect no more than
`--method rtn --no-symmetric`.

AutoRound learns, layer by layer, how much to add to each weight before it is rounded, and how far to clip each group, by
the sign of the gradient of the layer's output error. It works on the model as transformers loads it and writes a GPTQ
checkpoint, whose codes and scales (fp16, some negative) are taken as they are. It does not resume. Which device HQQ computes
on is neural-compressor's own choice; AutoRound is given ours.

Needs the extra [quant]. Sources: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models";
Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (2309.05516).
"""

import contextlib
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from compress.foreign import FolderTensors, read_gptq
from compress.quantizing.grid import Grid, fp16
from models.checkpoint import CPU
from models.network.quantized import QuantizedTensor, TensorFormat
from runtime.errors import UserError, pip_line


def hqq(weight: Tensor, form: TensorFormat) -> QuantizedTensor:
    """Quantize weight [N, K], float32. Raises UserError without neural-compressor, or for a format HQQ has not."""
    quantization = _load("hqq")
    if form.symmetric or form.bits not in (2, 3, 4, 8):
        raise UserError(f"HQQ has 2, 3, 4 and 8 bits with zero points, not {form.bits} bits"
                        f"{' without' if form.symmetric else ''}: give --bits 4 --no-symmetric")
    weight = weight.cpu()                     # the library moves it to where it computes
    rows, columns = weight.shape
    groups = form.groups(columns)
    size = columns // groups
    # HQQ's groups are the columns of the weight reshaped to [size, -1]: give it ours that way.
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.reshape(-1, size).T.reshape(rows, columns).contiguous()
    config = quantization.HQQConfig(bits=form.bits, group_size=size, quant_zero=False, quant_scale=False)
    found = quantization.convert(quantization.prepare(nn.Sequential(linear), config))[0].q_weight
    scales = fp16(found.scale.cpu().float().reshape(rows, groups))
    zeros = found.zero.cpu().float().reshape(rows, groups).round().clamp(0, 2**form.bits - 1)
    grid = Grid(scales, zeros, form)
    return grid.tensor(grid.codes(weight))


def autoround(folder: Path, ids: Tensor, formats: dict[str, TensorFormat], iterations: int,
              device: torch.device = CPU) -> dict[str, QuantizedTensor]:
    """Quantize the linears of a checkpoint's layers, all in one format.

    ids: int64 [windows, tokens]. iterations: steps of learning for each layer. Raises UserError without auto-round, for a
    format it has not, and for a model whose linears transformers stores in another way.
    """
    quantization, form = _load("autoround"), next(iter(formats.values()))
    if len(set(formats.values())) > 1 or not form.symmetric or form.bits not in (2, 4, 8) or form.kind != "int":
        raise UserError(f"AutoRound has 2, 4 and 8 bits without zero points, alike for all linears, not {form}")
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    if linears != set(formats):
        differ = sorted(linears ^ set(formats))
        raise UserError(f"AutoRound quantizes every linear of the layers or none, and {differ[0]} is not in both plan and model: "
                        f"leave out --skip, or choose --method gptq")
    with TemporaryDirectory() as written:
        # nsamples and batch_size decide how windows are drawn; amp would compute in bfloat16
        config = quantization.AutoRoundConfig(
            bits=form.bits, group_size=form.group or -1, use_sym=True, iters=iterations, seqlen=ids.shape[1], nsamples=len(ids),
            batch_size=min(8, len(ids)), amp=False, device_map=str(device), scheme=f"W{form.bits}A16", export_format="auto_gptq",
            output_dir=written)
        prepared = quantization.prepare(model, config)
        for window in ids:
            prepared(window[None])
        tensors = FolderTensors(Path(quantization.convert(prepared).name_or_path))
        return {name: read_gptq(tensors, name, form.bits, form.group, {}) for name in formats}


def _load(method: str):
    try:
        # neural-compressor makes its workspace, which neither method uses, where it is imported: let that be elsewhere
        with contextlib.redirect_stderr(None), TemporaryDirectory() as workspace:
            from neural_compressor.common import set_workspace
            set_workspace(workspace)
            from neural_compressor.torch import quantization
            if method == "autoround":
                import auto_round                                        # noqa: F401
    except ImportError as error:
        raise UserError(f"--method {method} needs neural-compressor and auto-round ({error}): "
                        f"{pip_line('quant')}") from None
    for name in ("neural_compressor", "autoround"):                      # which set their own levels when imported
        logging.getLogger(name).setLevel(logging.ERROR)
    return quantization
