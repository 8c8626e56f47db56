"""Export a checkpoint as a bundle with the portable ONNX graph: `python -m export.onnx CKPT -o BUNDLE`.

The bundle holds the weights (`export/weights.py`), the graph (`export/portable.py`), tokenizer, chat template and a
manifest that says what the model is and where it came from. Codes of a quantized checkpoint are written value for
value. `python -m export.ort BUNDLE` then adds ONNX Runtime's fused graph, `export.verify` the proof.

--dtype is the type of activations, caches and whatever is not quantized; logits are float32 in any case. bf16 is for
TensorRT and the native core: ONNX Runtime's CPU lacks most of its operators. A checkpoint
with weights of 2, 3, 5 or 6 bits gives a bundle without graphs, because ONNX has no such types: the native core runs it.
"""

from dataclasses import dataclass
from pathlib import Path

from models.formats import lineage
from runtime.bundle import open_bundle
from runtime.capabilities import BACKENDS, lacks
from runtime.cli import Checked, arg, run
from runtime.errors import UserError
from runtime.files import new_folder
from runtime.machine import release_free_memory
from runtime.sampling import check_defaults
from runtime.tensors import DEFAULT_CONTEXT
from runtime.text import Tokenizer

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
EXAMPLES = """examples:
  python -m export.onnx build/smollm2-135m-int4-checkpoint -o build/smollm2-135m-int4
  python -m export.onnx build/smollm2-135m -o build/smollm2-135m-fp16 --dtype fp16 --max-context 2048
  python -m export.onnx all-MiniLM-L6-v2 -o build/minilm --task sentence-similarity      an encoder, for runtime.Encoder
"""


@dataclass(frozen=True)
class Options(Checked):
    """Export a checkpoint as a bundle with one portable ONNX graph."""
    checkpoint: Path = arg(positional=True, help="folder of the checkpoint, quantized or not")
    out: Path = arg(short="-o", help="folder of the bundle; an older bundle there is replaced")
    dtype: str = arg("fp32", choices=tuple(DTYPES), help="type of activations, caches and what is not quantized")
    task: str | None = arg(None, choices=("feature-extraction", "sentence-similarity", "text-classification",
                                         "token-classification", "question-answering"), help="export a model that is no decoder for this task (encoder.py)")
    max_context: int | None = arg(None, help=f"tokens a sequence may have (default: the model's, at most {DEFAULT_CONTEXT})")


def main(argv=None) -> int:
    return run(Options, "export", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import onnx

from export import bundle as bundles
from export.encoder import export_encoder
from export.graph import OPSET
from export.portable import portable_graph
from export.weights import write_weights
from models.encoders.network import is_encoder
from models.formats.chat import special_ids, special_tokens
from models.checkpoint import Checkpoint, open_checkpoint
from models.network.quantized import Quantization

GRAPH = "portable.onnx"


def export(options: Options) -> None:
    """Write the bundle. Raises UserError for a checkpoint, context or folder that cannot be used."""
    if options.task or is_encoder(options.checkpoint):
        for name, given in (("--dtype", options.dtype != "fp32"), ("--max-context", options.max_context is not None)):
            if given:
                raise UserError(f"{name} is for decoders: the graph of an encoder is fp32, of any length the model has")
        return export_encoder(options.checkpoint, options.out, options.task)
    checkpoint = open_checkpoint(options.checkpoint)
    config = checkpoint.config
    max_context = min(config.short_context, DEFAULT_CONTEXT) if options.max_context is None else options.max_context
    if not 1 <= max_context <= config.context_length:
        raise UserError(f"--max-context {max_context}: the model's context is {config.context_length} tokens, so give 1 "
                        f"to {config.context_length}")
    if not (checkpoint.path / bundles.TOKENIZER).is_file():
        raise UserError(f"{checkpoint.path} has no {bundles.TOKENIZER}, which a bundle needs: save the tokenizer there "
                        f"(in transformers, AutoTokenizer.from_pretrained(...).save_pretrained)")
    plan = (checkpoint.quantization or Quantization({})).to_dict()
    check_formats(checkpoint, plan)
    Tokenizer(checkpoint.path / bundles.TOKENIZER)          # one that cannot be read is refused before the long work
    release_free_memory()
    facts = model_facts(checkpoint, plan, max_context)
    bundles.check_output(options.out)
    source = checkpoint.sha256()
    stage = lineage.stage("export.onnx", options, {"checkpoint": source})
    with new_folder(options.out) as folder:
        weights = bundles.WeightsWriter(folder / bundles.WEIGHTS)
        write_weights(checkpoint, weights, DTYPES[options.dtype], facts)
        manifest = bundles.manifest(options.out.resolve().name, facts, weights, weights.close(),
                                    [*lineage.read(checkpoint.path), stage])
        bundles.copy_companions(checkpoint, folder, manifest)
        graphless = sorted({lack.what for lack in lacks("onnx", plan)})
        if not graphless:
            data = portable_graph(manifest, DTYPES[options.dtype]).serialize(manifest["name"])
            (folder / GRAPH).write_bytes(data)
            onnx.checker.check_model(str(folder / GRAPH), full_check=True)
            manifest["files"][GRAPH] = bundles.file_entry(folder / GRAPH)
            manifest["graphs"].append(graph_entry("portable", GRAPH, len(data), options.dtype, max_context, source))
        bundles.write_manifest(folder, manifest)
        open_bundle(folder)                                 # what the runtime would refuse is not left behind
    print(summary(options.out, manifest))
    if max_context > config.short_context:
        print(f"note: the rotations of this bundle are those for more than {config.short_context} tokens (LongRoPE), for shorter texts too")
    if graphless:
        print(f"no graph: ONNX has no weights of {', '.join(graphless)}; the native core runs this bundle")
    elif unbuilt := sorted({lack.what for lack in lacks("tensorrt", plan)}):
        print(f"note: {' and '.join(unbuilt)} run on ONNX Runtime, not on TensorRT")


def check_formats(checkpoint: Checkpoint, plan: dict) -> None:
    """Raises UserError for a mixture that no backend of a bundle runs."""
    graphs, native = (next(lacks(backend, plan), None) for backend in ("onnx", "native"))
    step = BACKENDS["native"].group_multiple
    groups = any(form["group"] % step and checkpoint.shape(f"{name}.scales")[1] > 1 for name, form in plan["tensors"].items())
    missing = native.what if native else f"groups that {step} does not divide" if groups else None
    if graphs and missing:
        raise UserError(f"{checkpoint.path}: no backend runs it: ONNX has no weights of {graphs.what}, and the native core, which "
                        f"has, has no {missing}; quantize the original again with 4 and 8 bits (--backend onnx), or without these")


def model_facts(checkpoint: Checkpoint, plan: dict, max_context: int) -> dict:
    """The manifest's "model": the configuration, what of `plan` is no weight, and what generation_config.json adds.

    Raises UserError where that file holds what no engine would open.
    """
    config, file = checkpoint.config, checkpoint.path / "generation_config.json"
    generation = bundles.read_json(file)
    check_defaults(generation, str(file), config.vocab_size)
    return {"config": config.to_dict(), "activations": plan["activations"], "kv_cache": plan["kv_cache"], "max_context": max_context,
            **special_ids(config, checkpoint.path), "special_tokens": special_tokens(checkpoint.path), "generation": generation}


def graph_entry(role: str, file: str, size: int, dtype: str, max_context: int, source: str, opset: int = OPSET) -> dict:
    """A graph's entry for the manifest. The profile gives the smallest and largest value of each symbolic dimension."""
    tokens = [1, max_context]
    return {"role": role, "file": file, "bytes": size, "dtype": dtype, "opset": opset, "weights": bundles.WEIGHTS,
            "source_checkpoint": source, "profile": {"b": [1, None], "s": tokens, "k": tokens, "capacity": tokens}}


def summary(folder: Path, manifest: dict) -> str:
    """One line on a bundle."""
    graphs = ", ".join(graph["file"] for graph in manifest["graphs"]) or "no graph"
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    return f"{folder}: {graphs}; {total / 1e6:.1f} MB, of which weights {manifest['weights']['bytes'] / 1e6:.1f} MB"
