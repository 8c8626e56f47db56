"""Export a checkpoint as a bundle with the portable ONNX graph: `python -m export.onnx CKPT -o BUNDLE`.

The bundle holds the weights (`export/weights.py`), the graph (`export/portable.py`), tokenizer, chat template and a
manifest that says what the model is and where it came from. Codes of a quantized checkpoint are written value for
value. `python -m export.ort BUNDLE` then adds ONNX Runtime's fused graph, `export.verify` the proof.

--dtype is the type of activations, caches and whatever is not quantized; logits are float32 in any case. bf16 is for
TensorRT and the native core: ONNX Runtime's CPU lacks most of its operators. A checkpoint
with weights of 2, 3, 5 or 6 bits gives a bundle without graphs, because ONNX has no such types: the native core runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.formats import lineage
from runtime.bundle import open_bundle
from runtime.cli import Checked, arg, run
from runtime.errors import UserError
from runtime.machine import release_free_memory
from runtime.sampling import check_defaults
from runtime.text import Tokenizer
from runtime.token_ids import pad_id, token_id

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEFAULT_CONTEXT = 8192
EXAMPLES = """examples:
  python -m export.onnx build/smollm2-135m-int4-checkpoint -o build/smollm2-135m-int4
  python -m export.onnx build/smollm2-135m -o build/smollm2-135m-fp16 --dtype fp16 --max-context 2048
  python -m export.onnx all-MiniLM-L6-v2 -o build/minilm --task sentence-similarity      an encoder: build/minilm/model.onnx
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

from export import bundle as bundles
from export.encoder import export_encoder, is_encoder
from export.graph import OPSET, check
from export.portable import portable_graph
from export.weights import GRAPH_BITS, write_weights
from models.formats.chat import special_tokens, stop_ids
from models.formats.checkpoint import Checkpoint, open_checkpoint

GRAPH = "portable.onnx"


def export(options: Options) -> None:
    """Write the bundle. Raises UserError for a checkpoint, context or folder that cannot be used."""
    if options.task or is_encoder(options.checkpoint):
        return export_encoder(options.checkpoint, options.out, options.task)
    checkpoint = open_checkpoint(options.checkpoint)
    config = checkpoint.config
    max_context = min(config.context_length, DEFAULT_CONTEXT) if options.max_context is None else options.max_context
    if not 1 <= max_context <= config.context_length:
        raise UserError(f"--max-context {max_context}: the model's context is {config.context_length} tokens, so give 1 "
                        f"to {config.context_length}")
    if not (checkpoint.path / bundles.TOKENIZER).is_file():
        raise UserError(f"{checkpoint.path} has no {bundles.TOKENIZER}, which a bundle needs: save the tokenizer there "
                        f"(in transformers, AutoTokenizer.from_pretrained(...).save_pretrained)")
    check_formats(checkpoint)
    Tokenizer(checkpoint.path / bundles.TOKENIZER)          # one that cannot be read is refused before the long work
    release_free_memory()
    facts = model_facts(checkpoint, max_context)
    bundles.check_output(options.out)
    source = checkpoint.sha256()
    stage = lineage.stage("export.onnx", options, {"checkpoint": source})
    with bundles.new_bundle(options.out) as folder:
        weights = bundles.WeightsWriter(folder / bundles.WEIGHTS)
        write_weights(checkpoint, weights, DTYPES[options.dtype], max_context)
        manifest = bundles.manifest(options.out.resolve().name, facts, weights, weights.close(),
                                    [*lineage.read(checkpoint.path), stage])
        bundles.copy_companions(checkpoint, folder, manifest)
        widths = sorted({form.bits for form in checkpoint.quantization.tensors.values()} if checkpoint.quantization else ())
        if set(widths) <= set(GRAPH_BITS):
            graph = portable_graph(config, bundles.stored_tensors(manifest), DTYPES[options.dtype],
                                   bundles.int8_rows(manifest["model"]))
            (folder / GRAPH).write_bytes(graph.serialize(manifest["name"]))
            check(folder / GRAPH)
            manifest["files"][GRAPH] = bundles.file_entry(folder / GRAPH)
            size = manifest["files"][GRAPH]["bytes"]
            manifest["graphs"].append(graph_entry("portable", GRAPH, size, options.dtype, max_context, source))
        bundles.write_manifest(folder, manifest)
        open_bundle(folder)                                 # what the runtime would refuse is not left behind
    print(summary(options.out, manifest))
    if not manifest["graphs"]:
        print(f"no graph: ONNX has no weights of {', '.join(str(b) for b in widths if b not in GRAPH_BITS)} bits; the "
              "native core runs this bundle")
    elif any(name.endswith(".zeros") for name in bundles.stored_tensors(manifest)):
        print("note: asymmetric weights run on ONNX Runtime; TensorRT takes only symmetric ones")


def check_formats(checkpoint: Checkpoint) -> None:
    """Raises UserError for a mixture that no backend runs: widths that ONNX lacks beside what the native core lacks."""
    plan = checkpoint.quantization
    odd = [form.bits for form in plan.tensors.values() if form.bits not in GRAPH_BITS] if plan else []
    lacks = {"8-bit floats": lambda module, form: form.kind == "e4m3",
             "groups that 32 does not divide": lambda module, form: form.group % 32 and checkpoint.shape(f"{module}.scales")[1] > 1,
             "stored scales of activations": lambda module, form: plan.activations.get("per") == "tensor"}
    for what, found in lacks.items() if odd else ():
        if any(found(module, form) for module, form in plan.tensors.items()):
            raise UserError(f"{checkpoint.path}: no backend runs it: ONNX has no weights of {odd[0]} bits, and the native core, which "
                            f"has, has no {what}; quantize the original again with 4 and 8 bits (--backend onnx), or without these")


def model_facts(checkpoint: Checkpoint, max_context: int) -> dict:
    """The manifest's "model": the configuration, how activations are rounded, and what generation_config.json adds.

    Raises UserError where that file holds what no engine would open.
    """
    config, file = checkpoint.config, checkpoint.path / "generation_config.json"
    generation = bundles.read_json(file)
    check_defaults(generation, str(file))

    def special(name: str) -> int | None:
        value = (pad_id if name == "pad_token_id" else token_id)(generation.get(name), config.vocab_size, f"{file}: {name}")
        return value if getattr(config, name) is None else getattr(config, name)

    return {"config": config.to_dict(), "activations": checkpoint.quantization.activations if checkpoint.quantization else {},
            "kv_cache": checkpoint.quantization.kv_cache if checkpoint.quantization else None,
            "max_context": max_context, "bos_token_id": special("bos_token_id"),
            "eos_token_ids": list(stop_ids(config, checkpoint.path)), "pad_token_id": special("pad_token_id"),
            "special_tokens": special_tokens(checkpoint.path), "generation": generation}


def graph_entry(role: str, file: str, size: int, dtype: str, max_context: int, source: str) -> dict:
    """A graph's entry for the manifest. The profile gives the smallest and largest value of each symbolic dimension."""
    tokens = [1, max_context]
    return {"role": role, "file": file, "bytes": size, "dtype": dtype, "opset": OPSET, "weights": bundles.WEIGHTS,
            "source_checkpoint": source, "profile": {"b": [1, None], "s": tokens, "k": tokens, "capacity": tokens}}


def summary(folder: Path, manifest: dict) -> str:
    """One line on a bundle."""
    graphs = ", ".join(graph["file"] for graph in manifest["graphs"]) or "no graph"
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    return f"{folder}: {graphs}; {total / 1e6:.1f} MB, of which weights {manifest['weights']['bytes'] / 1e6:.1f} MB"
