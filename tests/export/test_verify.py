"""The proof itself: golden outputs against transformers, and what a broken bundle gives."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from checkpoints import everywhere, small_config, write_random
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from export import bundle as bundles
from export import golden as golden_module
from export import onnx as export_onnx
from export import ort, verify
from export.golden import PROMPTS, shorten
from runtime import verify as runtime_verify
from runtime.bundle import open_bundle
from runtime.text import Tokenizer


def export(checkpoint, out, *options, fast=True):
    assert export_onnx.main([str(checkpoint), "-o", str(out), *options]) == 0
    if fast:
        assert ort.main([str(out)]) == 0
    return out


def run(checkpoint, bundle) -> int:
    return verify.main([str(checkpoint), str(bundle), "--threads", "1"])


@pytest.fixture(scope="module")
def verified(tiny_checkpoint, tmp_path_factory):
    """A verified bundle of a tiny model, and its checkpoint."""
    bundle = export(tiny_checkpoint("smollm2"), tmp_path_factory.mktemp("verified") / "b")
    assert run(tiny_checkpoint("smollm2"), bundle) == 0
    return tiny_checkpoint("smollm2"), bundle


def test_golden_outputs_are_those_of_transformers(verified):
    """Prompts as its tokenizer reads them; each golden row is its logits after the prompt and the tokens so far."""
    checkpoint, bundle = verified
    golden = json.loads((bundle / "golden.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    assert [prompt["name"] for prompt in golden["prompts"]] == list(PROMPTS) and len(PROMPTS) == 8
    for prompt in golden["prompts"]:
        assert prompt["prompt_ids"] == tokenizer(prompt["text"])["input_ids"]
        with torch.no_grad():
            fed = torch.tensor([prompt["prompt_ids"] + prompt["tokens"][:-1]])
            logits = model(fed).logits[0, len(prompt["prompt_ids"]) - 1:].double().numpy()
        assert len(logits) == len(prompt["tokens"]) == 32
        assert prompt["tokens"] == logits.argmax(1).tolist()
        assert np.abs(np.sort(logits)[:, :-21:-1] - prompt["top_logits"]).max() < 1e-4
        assert np.abs(np.take_along_axis(logits, np.array(prompt["top_ids"]), 1) - prompt["top_logits"]).max() < 1e-4
        log_p = np.array(prompt["top_logits"]) - np.array(prompt["logsumexp"])[:, None]
        assert np.abs(np.take_along_axis(log_softmax(logits, 1), np.array(prompt["top_ids"]), 1) - log_p).max() < 1e-4
        assert np.allclose(prompt["margins"], np.diff(np.sort(logits)[:, -2:])[:, 0], atol=1e-4)


def test_the_runtime_checks_the_golden_outputs(verified, capsys):
    assert runtime_verify.main([str(verified[1]), "--threads", "1", "--exact"]) == 0
    assert "kept" in capsys.readouterr().out
    assert [stage["stage"] for stage in open_bundle(verified[1], verify=True).manifest["lineage"]][-1] == "export.verify"


def test_quantized_and_half_precision_bundles_keep_their_budgets(tiny_checkpoint, tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", small_config(), everywhere(4, 32))
    assert run(checkpoint, export(checkpoint, tmp_path / "b", fast=False)) == 0
    table = capsys.readouterr().out.split("Runners")[0]
    assert table.count("portable exact") == 4 and table.count("portable fused") == 4
    half = export(tiny_checkpoint("qwen3"), tmp_path / "h", "--dtype", "fp16")
    assert run(tiny_checkpoint("qwen3"), half) == 0
    table, ladder = capsys.readouterr().out.split("Runners")
    assert table.count("cuda graph ") == 4 and re.search(r"cuda graph +cuda.onnx +ONNX Runtime, CPU +run: mean KL at most", ladder)
    assert re.search(r"cuda +cuda.onnx +ONNX Runtime, CUDA +built, never run", ladder)
    budgets = json.loads((half / "golden.json").read_text())["budgets"]
    assert budgets == {"portable": {"mean_kl": 1e-3}, "fast": {"mean_kl": 0.01}, "cuda_graph": {"mean_kl": 1e-3}, "native": {"mean_kl": 0.01}}
    assert runtime_verify.main([str(half), "--threads", "1"]) == 0


def test_a_cuda_graph_that_computes_something_else_fails_the_proof(tiny_checkpoint, tmp_path, capsys):
    checkpoint = tiny_checkpoint("smollm2")
    bundle = export(checkpoint, tmp_path / "b", "--dtype", "fp16")
    graph = onnx.load(bundle / "cuda.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f *= 1.5
    manifest = open_bundle(bundle).manifest
    bundles.add_file(bundle, manifest, "cuda.onnx", graph.SerializeToString())
    assert run(checkpoint, bundle) == 1
    assert "cuda graph, one prefill: a mean KL of" in capsys.readouterr().err and not (bundle / "golden.json").exists()


def test_the_report_tells_which_runners_ran_and_which_never_did(tiny_checkpoint, tmp_path, capsys):
    """A bf16 graph runs on no CPU of ONNX Runtime's; the native core runs it."""
    checkpoint = tiny_checkpoint("smollm2")
    for dtype, runners in (("fp32", {"portable exact": "run: mean KL at most", "portable fused": "run: mean KL at most"}),
                         ("bf16", {"portable fused": "not run here: ONNX Runtime's CPU lacks"})):
        bundle = export(checkpoint, tmp_path / dtype, "--dtype", dtype, fast=False)
        opened = open_bundle(bundle)
        entry = {"file": "engines/x.engine", "backend": "rtx", "version": "1", "compute_capabilities": ["86", "89"],
                 "capacity": 64, "profiles": [], "bytes": 1}
        bundles.add_file(bundle, opened.manifest | {"engines": [entry]}, "engines/x.engine", b"x")
        assert run(checkpoint, bundle) == 0
        lines = capsys.readouterr().out.split("Runners\n")[1].splitlines()[2:]
        expected = runners | {"native": "run: mean KL at most", "cuda": "built, never run", "tensorrt": "built, never run"}
        for line, (runner, result) in zip(lines, expected.items()):
            assert line.startswith(runner) and result in line, line
        assert "engines/x.engine" in lines[len(expected) - 1] and "SM 86,89" in lines[len(expected) - 1]
    assert runtime_verify.main([str(bundle), "--threads", "1", "--exact"]) == 0
    out = capsys.readouterr().out
    assert "native: mean KL at most 0.01" in out and "tensorrt: not run here (" in out and out.count("kept\n") == 1
    assert "portable_fused: not run here (ONNX Runtime's CPU lacks" in out and "native kept the budget" in out
    assert ort.main([str(bundle)]) == 2 and "computes in bf16" in capsys.readouterr().err


# A process where onnxruntime cannot be imported, the native core is not there, or neither. What it prints is the exit code.
WITHOUT = """import sys
if {onnxruntime}: sys.modules["onnxruntime"] = None
from {module} import main
sys.exit(main(sys.argv[1:]))"""


def run_without(module: str, *argv, onnxruntime: bool = False, native: bool = False):
    environment = os.environ | ({"EDGEWRIGHT_NATIVE": "/nowhere/_core.so"} if native else {})
    code = WITHOUT.format(onnxruntime=onnxruntime, module=module)
    return subprocess.run([sys.executable, "-c", code, *map(str, argv), "--threads", "1"], env=environment, text=True,
                          capture_output=True)


@pytest.fixture(scope="module")
def graphless(tmp_path_factory):
    """A checkpoint of 3-bit weights and its bundle, which has no graph."""
    folder = tmp_path_factory.mktemp("graphless")
    checkpoint = write_random(folder / "c", small_config(), everywhere(3, 32))
    return checkpoint, export(checkpoint, folder / "b", fast=False)


def with_other_numbers(bundle, out, name: str):
    """A copy of the bundle with one tensor's numbers changed and the hashes made right again."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "manifest.json").read_text())
    tensor = next(t for t in manifest["weights"]["tensors"] if t["name"] == name)
    with open(out / "weights.bin", "r+b") as file:
        file.seek(tensor["offset"])
        content = file.read(tensor["bytes"])
        file.seek(tensor["offset"])
        file.write(content[::-1] if tensor["dtype"].startswith("uint")
                   else (np.frombuffer(content, tensor["dtype"]) * np.float32(1.05)).astype(tensor["dtype"]).tobytes())
    manifest["files"]["weights.bin"] = bundles.file_entry(out / "weights.bin")
    bundles.write_manifest(out, manifest)
    return out


def test_a_bundle_without_graphs_is_proven_through_the_native_core(graphless, tmp_path, capsys):
    checkpoint, bundle = graphless
    assert run(checkpoint, bundle) == 0
    out = capsys.readouterr().out
    assert out.count("native exact  ") == 5 and "native exact, native kept the budget" in out
    budgets = json.loads((bundle / "golden.json").read_text())["budgets"]
    assert budgets == {"native_exact": {"mean_kl": 1e-6}, "native": {"mean_kl": 0.01}}
    assert runtime_verify.main([str(bundle), "--threads", "1", "--exact"]) == 0
    out = capsys.readouterr().out
    assert "native, native_exact kept the budget; an engine here runs native" in out
    for name in ("layers.1.o.codes", "final_norm.weight"):
        wrong = with_other_numbers(bundle, tmp_path / name, name)
        assert run(checkpoint, wrong) == 1 and "native exact, one prefill: a mean KL of" in capsys.readouterr().err
        assert runtime_verify.main([str(wrong), "--threads", "1", "--exact"]) == 1
        assert "native_exact has a mean KL of" in capsys.readouterr().err


def test_where_nothing_runs_nothing_is_proven(graphless, verified, tmp_path):
    checkpoint, bundle = graphless
    assert run(checkpoint, bundle) == 0
    for module, argv in (("runtime.verify", [bundle]), ("export.verify", [checkpoint, bundle])):
        done = run_without(module, *argv, native=True)
        assert done.returncode == 1 and "nothing ran here, so nothing is proven: " in done.stderr, done.stderr
        assert "the native core was not built" in done.stderr and "kept" not in done.stdout
    done = run_without("runtime.verify", verified[1], native=True, onnxruntime=True)
    assert done.returncode == 1 and "onnxruntime cannot be imported" in done.stderr and "the native core" in done.stderr


def test_without_onnxruntime_or_without_the_core_the_other_proves(verified, tmp_path):
    checkpoint, bundle = verified[0], shutil.copytree(verified[1], tmp_path / "b")
    done = run_without("runtime.verify", bundle, onnxruntime=True)
    assert done.returncode == 0 and "fast: not run here (onnxruntime cannot be imported" in done.stdout, done.stderr
    assert "native kept the budget" in done.stdout
    done = run_without("export.verify", checkpoint, bundle, onnxruntime=True)
    assert done.returncode == 0 and "native kept the budget" in done.stdout, done.stderr
    assert runtime_verify.main([str(bundle), "--threads", "1"]) == 0          # whose golden outputs hold ONNX Runtime's budgets too
    done = run_without("runtime.verify", bundle, native=True)
    assert done.returncode == 0 and "native: not run here (" in done.stdout and "fast kept the budget" in done.stdout, done.stderr


def test_a_graph_added_after_the_proof_is_not_taken_for_proven(tiny_checkpoint, tmp_path, capsys):
    bundle = export(tiny_checkpoint("smollm2"), tmp_path / "b", fast=False)
    assert run(tiny_checkpoint("smollm2"), bundle) == 0 and ort.main([str(bundle)]) == 0
    assert runtime_verify.main([str(bundle), "--threads", "1"]) == 2
    assert "budgets.fast is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["layers.1.o.weight", "rope.sin", "final_norm.weight"])
def test_a_bundle_with_other_numbers_fails(name, tiny_checkpoint, tmp_path, capsys):
    """One tensor of the weights changed, hashes made right again: exit 1, the graph is named, nothing is written."""
    bundle = with_other_numbers(export(tiny_checkpoint("smollm2"), tmp_path / "b"), tmp_path / "wrong", name)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert run(tiny_checkpoint("smollm2"), bundle) == 1
    error = capsys.readouterr().err
    assert "portable exact, ragged batch: a mean KL of" in error and "PyTorch" not in error.split("failed:")[1]
    assert json.loads((bundle / "manifest.json").read_text()) == manifest and not (bundle / "golden.json").exists()


def test_bad_input(tiny_checkpoint, tmp_path, capsys):
    bundle = export(tiny_checkpoint("smollm2"), tmp_path / "b")
    assert run(tiny_checkpoint("qwen2"), bundle) == 2
    assert "was not exported from" in capsys.readouterr().err
    short = export(tiny_checkpoint("smollm2"), tmp_path / "s", "--max-context", "12")
    assert run(tiny_checkpoint("smollm2"), short) == 2
    assert "has a context of 12 tokens" in capsys.readouterr().err
    assert run(tmp_path / "nothing", bundle) == 2 and run(tiny_checkpoint("smollm2"), tmp_path / "nothing") == 2


def test_prompts_are_shortened_to_the_context(tiny_checkpoint, tmp_path):
    tokenizer = Tokenizer(tiny_checkpoint("smollm2") / "tokenizer.json")
    for text in PROMPTS.values():
        short = shorten(tokenizer, text, 20)
        assert text.startswith(short) and len(tokenizer.encode(short, control_tokens=True)) <= 20
        assert short == text or len(tokenizer.encode(text[:len(short) + 1], control_tokens=True)) > 20
    bundle = export(tiny_checkpoint("smollm2"), tmp_path / "b", "--max-context", "48")
    assert run(tiny_checkpoint("smollm2"), bundle) == 0
    golden = json.loads((bundle / "golden.json").read_text())
    assert max(len(p["prompt_ids"]) + len(p["tokens"]) for p in golden["prompts"]) == 48 + 1


@pytest.mark.real
def test_the_real_model(smollm2_int4, tmp_path, monkeypatch):
    """SmolLM2 in int4: the portable graph exact to KL 1e-6, the fast one below 0.01, on every way through the cache. Three of the
    eight prompts and a dozen tokens of each, because all of them take minutes; `make demo` takes all."""
    monkeypatch.setattr(golden_module, "PROMPTS", {name: PROMPTS[name] for name in ("question", "chinese", "long")})
    monkeypatch.setattr(golden_module, "NEW_TOKENS", 12)
    assert verify.main([str(smollm2_int4), str(export(smollm2_int4, tmp_path / "b"))]) == 0
    golden = json.loads((tmp_path / "b" / "golden.json").read_text())
    assert next(len(p["prompt_ids"]) for p in golden["prompts"] if p["name"] == "long") == 500
    assert "Paris" in Tokenizer(tmp_path / "b" / "tokenizer.json").decode(golden["prompts"][0]["tokens"])
