"""Every family through `Engine`: greedy replies of a ragged batch are those of transformers, on ONNX Runtime and the native core."""

import numpy as np
import pytest
import torch
from tiny import MORE_FAMILIES
from transformers import AutoModelForCausalLM

import export.onnx
import export.ort
from models.checkpoint import load_decoder
from runtime import Engine, decode
from runtime.bundle import open_bundle
from runtime.native.backend import NativeBackend
from runtime.ort_backend import OrtBackend

PROMPTS = ["The capital of France is", "Once upon a time there was a small machine that could read and write. "]
TOKENS = 12


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_greedy_replies_are_those_of_transformers(family, tiny_checkpoint, tmp_path):
    folder, bundle = tiny_checkpoint(family), tmp_path / "bundle"
    assert export.onnx.main([str(folder), "-o", str(bundle)]) == 0 and export.ort.main([str(bundle)]) == 0
    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    for provider in ("cpu", "native"):
        with Engine(bundle, provider=provider, threads=1) as engine:
            for prompt, reply in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=TOKENS, temperature=0)):
                ids = torch.tensor([engine.tokenizer.encode(prompt)])
                with torch.no_grad():
                    theirs = oracle.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1]:].tolist()
                assert list(reply.tokens) == [token for token in theirs if token != oracle.config.eos_token_id], (provider, prompt)


@pytest.mark.parametrize("family, kind", [("lfm2", "conv"), ("qwen3_5", "linear_attention"), ("granite4_h", "mamba")])
def test_a_model_without_any_attention_runs(family, kind, tiny_checkpoint, tmp_path):
    folder, bundle = tiny_checkpoint(family, layer_types=[kind] * 3), tmp_path / "bundle"
    assert export.onnx.main([str(folder), "-o", str(bundle)]) == 0
    ids = np.arange(3, 43)
    with torch.no_grad():
        theirs = load_decoder(folder)(torch.from_numpy(ids)[None])[0].numpy()
    for backend in (OrtBackend(open_bundle(bundle), exact=True), NativeBackend(open_bundle(bundle), threads=1, exact=True)):
        np.testing.assert_allclose(decode.logits(backend, ids), theirs, atol=2e-4)
