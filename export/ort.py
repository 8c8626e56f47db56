"""Add ONNX Runtime's own graphs to a bundle: `python -m export.ort BUNDLE`.

`fast.onnx` (`fast_graph.py`) is what ONNX Runtime's CPU runs; it reads the same weights.bin, to the byte, and has the interface of
the portable graph. `cuda.onnx` (`cuda_graph.py`), beside it where the bundle was exported with --dtype fp16, is one step on an NVIDIA
GPU without the host; a model that it does not express goes without, and the command says why.

Models with heads that GroupQueryAttention does not take are refused, and run the portable graph.
"""

from dataclasses import dataclass
from pathlib import Path

from models.formats import lineage
from runtime.bundle import open_bundle
from runtime.capabilities import BACKENDS, FUSED_HEADS
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.tensors import check_tensors
from runtime.files import sole_writer

EXAMPLES = """example:
  python -m export.ort build/smollm2-135m-int4
"""


@dataclass(frozen=True)
class Options:
    """Add ONNX Runtime's fused graphs to a bundle, over the same weights file."""
    bundle: Path = arg(positional=True, help="folder of the bundle")


def main(argv=None) -> int:
    return run(Options, "add_graphs", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from export import bundle as bundles
from export.cuda_graph import CudaGraph, lacks
from export.fast_graph import FastGraph
from export.onnx import DTYPES, graph_entry, summary


@sole_writer("bundle")
def add_graphs(options: Options) -> None:
    """Run the stage. Raises UserError for a bundle that cannot be opened, has no portable graph, or whose heads do not fit."""
    opened = open_bundle(options.bundle)
    plan = check_tensors(opened)
    portable = opened.graph("portable")
    if portable is None:
        raise UserError(f"{options.bundle} has no portable graph to lower: its weights have formats that ONNX lacks")
    if portable["dtype"] not in (able := BACKENDS["onnx"].dtypes):
        raise UserError(f"{options.bundle} computes in {portable['dtype']}, which ONNX Runtime's CPU does not; export with --dtype "
                        + " or ".join(able))
    graph = FastGraph(opened.manifest, DTYPES[portable["dtype"]])
    for layer in filter(graph.fuses, graph.config.layers):
        size, step = graph.config.head_size(layer), FUSED_HEADS["rope" if graph.rotates(layer) else "learned"]
        if size % step:
            raise UserError(f"{options.bundle}: no fast graph, because ONNX Runtime's GroupQueryAttention takes a head_dim that {step} "
                            f"divides, and this model's is {size}; the bundle runs its portable graph instead, as it is")
    if plan["kv_cache"] and any(layer.cache_source is not None for layer in graph.config.layers):
        raise UserError(f"{options.bundle}: no fast graph, because layers that read another's keys and values cannot read them in int8; "
                        "the bundle runs its portable graph instead, as it is")
    stage = lineage.stage("export.ort", options, {"portable": opened.manifest["files"][portable["file"]]["sha256"]})
    manifest = opened.manifest
    for name in ("fast.onnx", "cuda.onnx"):
        manifest = bundles.without_file(manifest, name)
    manifest["lineage"] = [*manifest["lineage"], stage]
    graphs, lack = {"fast": graph}, lacks(manifest)
    if portable["dtype"] == "fp16" and not lack:
        graphs["cuda"] = CudaGraph(manifest, DTYPES["fp16"])
    for role, graph in graphs.items():
        graph.build()
        data = graph.serialize(opened.name)
        entry = graph_entry(role, f"{role}.onnx", len(data), portable["dtype"], opened.max_context, portable["source_checkpoint"], graph.opset)
        manifest["graphs"] = [*manifest["graphs"], entry]
        bundles.add_file(options.bundle, manifest, f"{role}.onnx", data)
    print(summary(options.bundle, manifest))
    if portable["dtype"] == "fp16" and lack:
        print(f"no cuda.onnx, because it does not express {lack}; on an NVIDIA GPU this bundle runs its other graphs")
