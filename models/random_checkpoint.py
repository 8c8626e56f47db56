"""Write a checkpoint with random weights: `python -m models.random_checkpoint qwen3.5-0.8b -o FOLDER`.

Speed and memory do not depend on what a model knows, so a published shape can be measured where its weights cannot be had. Linears and
tables are drawn with a spread of inputs^-0.5, gains about 1, so that numbers keep their size from layer to layer. The tokenizer knows
the 256 bytes and three special tokens; the tables have as many rows as published. Stored as bfloat16 (float32 where the family stores
a product with a constant: Gemma), one tensor in memory at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import arg, did_you_mean, run
from runtime.errors import UserError
from runtime.files import read_json

SHAPES = {      # the sizes of config.json as published
    "qwen3.5-0.8b": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 1024,
        "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
        "full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}, "tie_word_embeddings": True},
    "gemma3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
        "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "lfm2-1.2b": {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 12288,
        "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
        "rope_theta": 1e6, "max_position_embeddings": 128000, "tie_word_embeddings": True,
        "layer_types": ["full_attention" if number in (2, 5, 8, 10, 12, 14) else "conv" for number in range(16)]}}
EXAMPLES = """examples:
  %(prog)s lfm2-1.2b -o build/lfm2 --layers 4
  %(prog)s my-model/config.json -o build/random
"""


@dataclass(frozen=True)
class Options:
    """Write a checkpoint of a published shape with random weights, to measure its speed and memory."""
    shape: str = arg(positional=True, help=f"{', '.join(SHAPES)}, or a config.json to take the shape from")
    out: Path = arg(short="-o", help="folder to write")
    layers: int | None = arg(None, help="write only the first of its layers", least=1)
    seed: int = arg(0, help="of the random numbers")


def main(argv=None) -> int:
    return run(Options, "write_random", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from models.checkpoint import write_checkpoint
from models.families import FAMILIES, text_config
from models.formats import lineage
from models.network.config import ModelConfig
from models.network.decoder import tensor_shapes
from models.tokenizer import learned, write_files

CENTERS = {"bias": 0.0, "router_bias": 0.0, "A_log": 0.0, "dt_bias": -3.0}         # of vectors; gains are about 1


def write_random(options: Options) -> None:
    """Raises UserError for a shape that is not known, or a configuration that cannot be used."""
    if options.shape not in SHAPES and not Path(options.shape).is_file():
        raise UserError(f"{options.shape!r} is no shape that is known{did_you_mean(options.shape, SHAPES)} and no file: choose from "
                        f"{', '.join(SHAPES)}, or give a config.json")
    hf = dict(SHAPES.get(options.shape) or text_config(read_json(Path(options.shape), strict=False)))
    hf = {key: value for key, value in hf.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    if options.layers:
        hf["num_hidden_layers"] = options.layers
        if "layer_types" in hf:
            hf["layer_types"] = hf["layer_types"][:options.layers]
    hf |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = ModelConfig.from_hf(hf)
    write_checkpoint(options.out, hf, random_tensors(config, hf, options.seed), None, lineage.stage("random", options, {}, {}),
                     lambda folder: write_files(folder, learned([])))
    count = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    print(f"{options.out}: {config.family} of {len(config.layers)} layers, {count / 1e6:.1f}m parameters")


def random_tensors(config: ModelConfig, hf: dict, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of the Decoder; hf: the contents of config.json."""
    naming, generator = FAMILIES[config.family].naming, torch.Generator().manual_seed(seed)
    factors = naming.factors(hf, config) if naming.factors else {}
    for name, shape in tensor_shapes(config).items():
        last = name.rpartition(".")[2]
        values = torch.randn(shape, generator=generator)
        values = values * shape[-1]**-0.5 if len(shape) > 1 else values * 0.1 + CENTERS.get(last, 1.0)
        factor = factors.get(name.removeprefix("model.").removesuffix(".weight"), 1.0)      # so that theirs is of that size
        yield name, (values * factor).bfloat16()
