"""What a checkpoint holds and what it needs: `python -m models.info CKPT`.

Memory is the weights as stored plus one sequence's cache in float32, as the CPU graphs keep it, or float16; activations and
the runtime itself come on top. Bits per weight count scales and zero points.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from models.network.config import LayerConfig, ModelConfig
from runtime.cli import arg, run, table
from runtime.errors import UserError

EXAMPLES = """examples:
  python -m models.info build/smollm2-135m
  python -m models.info --families
"""
ROADS = Path(__file__).parent / "families" / "roads.json"      # family -> step -> "yes", or why not: python -m tests.families --write


@dataclass(frozen=True)
class InfoOptions:
    """Show a checkpoint's shape, sizes and memory needs."""
    checkpoint: Path = arg(None, positional=True, help="folder to read")
    families: bool = arg(False, help="show which families work how far, as the tests found it, and stop")

    def __post_init__(self):
        if (self.checkpoint is None) != self.families:
            raise UserError("give a CHECKPOINT to show, or --families")


def main(argv=None) -> int:
    return run(InfoOptions, "info", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from models.checkpoint import Checkpoint, open_checkpoint
from models.network.decoder import tensor_shapes

MIB = 2**20


def parameters(config: ModelConfig) -> int:
    """Weights of the model; a tied output matrix counts once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def kv_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of keys and values that one token of one sequence takes over all layers."""
    return sum(2 * config.cache_heads(layer) * config.head_size(layer) * element_bytes for layer in config.layers)


def storage(checkpoint: Checkpoint) -> list[dict]:
    """One row a storage type: how many matrices and vectors, their weights and bytes, and bits per weight."""
    shapes, formats = tensor_shapes(checkpoint.config), checkpoint.quantization.tensors if checkpoint.quantization else {}
    rows: dict[str, dict] = {}
    for name in checkpoint.names():
        module, suffix = name.rsplit(".", 1)
        if name in shapes:
            kind, whole = checkpoint.dtype(name), math.prod(shapes[name])
        else:
            form = formats[module]
            kind = f"{form.bits}-bit " + (f"group {form.group}" if form.group else "per channel")
            kind += ("" if form.kind == "int" else f" {form.kind}") + ("" if form.scale_bits == 16 else ", 8-bit scales")
            kind += "" if form.symmetric else " asymmetric"
            whole = math.prod(shapes[f"{module}.weight"]) if suffix == "codes" else 0       # scales count as bytes only
        row = rows.setdefault(kind, {"stored as": kind, "tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += whole > 0
        row["weights"] += whole
        row["bytes"] += checkpoint.nbytes(name)
    listed = [*rows.values()]
    if len(rows) > 1:
        listed.append({"stored as": "all"} | {key: sum(row[key] for row in listed) for key in ("tensors", "weights", "bytes")})
    return [row | {"bits per weight": round(8 * row["bytes"] / row["weights"], 3)} for row in listed]


def memory(checkpoint: Checkpoint) -> list[dict]:
    """One row a context length: MiB of the cache of one sequence, and with the weights, for both cache types."""
    config = checkpoint.config
    weights = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    rows = []
    for tokens in sorted({min(length, config.context_length) for length in (1024, 4096, config.context_length)}):
        row = {"context": tokens, "weights MiB": round(weights / MIB, 1)}
        for name, size in (("fp32", 4), ("fp16", 2)):
            cache = tokens * kv_bytes_per_token(config, size)
            row |= {f"{name} cache MiB": round(cache / MIB, 1), f"with {name} cache MiB": round((weights + cache) / MIB, 1)}
        rows.append(row)
    return rows


def state_bytes(config: ModelConfig) -> int:
    """Bytes of the states that recurrent layers keep of one sequence, whatever its length: two copies in float32."""
    return sum(8 * math.prod(shape) for layer in config.layers for shape in config.state_shapes(layer).values())


def families() -> list[dict]:
    """One row a family: what works."""
    return [{"family": family} | {step: "yes" if found == "yes" else "no" for step, found in steps.items()}
            for family, steps in json.loads(ROADS.read_text("utf-8")).items()]


def info(options: InfoOptions) -> None:
    if options.families:
        print(table(families()))
        return
    checkpoint = open_checkpoint(options.checkpoint)
    config, first = checkpoint.config, checkpoint.config.layers[0]
    same = config.gated if config.uniform and config.gated else f"{first.heads} heads, {first.kv_heads} key/value heads, MLP {first.mlp_size}" if config.uniform else "see below"
    print(f"{options.checkpoint}: {config.family}, {len(config.layers)} layers, {parameters(config):,} parameters")
    print(f"hidden {config.hidden_size}, head_dim {config.head_dim}, vocabulary {config.vocab_size}, "
          f"context {config.context_length}; layers: {same}\n")
    print(table(storage(checkpoint)), "\n")
    print(f"KV cache: {kv_bytes_per_token(config, 4):,} bytes a token in fp32, "
          f"{kv_bytes_per_token(config, 2):,} in fp16" + (f"; states {state_bytes(config):,} bytes" if config.recurrent else "") + "\n")
    print(table(memory(checkpoint)))
    if not config.uniform:
        print()
        print(table([_shape(config, number, layer) for number, layer in enumerate(config.layers)]))


def _shape(config: ModelConfig, number: int, layer: LayerConfig) -> dict:
    window = config.window(layer) if layer.mixer == "attention" else None
    row = {"layer": number, "mixer": layer.mixer, "heads": layer.heads, "kv heads": layer.kv_heads, "window": window or "",
           "keys of": "" if layer.cache_source is None else layer.cache_source, "mlp size": layer.mlp_size,
           "experts": f"{layer.experts_per_token} of {layer.experts}" if layer.experts else ""}
    always = {"layer", "heads", "kv heads", "mlp size"}
    used = {"mixer": config.recurrent, "window": any(config.window(one) for one in config.layers),
            "keys of": any(one.cache_source is not None for one in config.layers), "experts": any(one.experts for one in config.layers)}
    return {key: value for key, value in row.items() if key in always or used[key]}
