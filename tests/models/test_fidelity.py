"""Perplexity, KL and agreement against a float64 brute force over every window."""

import math

import numpy as np
import pytest
import torch
from runtime.text import Tokenizer

from models.judging import fidelity
from models.judging.texts import plain
from models.checkpoint import load_decoder
from models.network.torch_backend import TorchBackend
from runtime.errors import UserError

TEXT = "The engine reads a sentence, 然后 it answers 🙂 in another.\n" * 12


def brute(decoder, ids, first):
    logits = decoder(torch.tensor(ids)[None])[0].double()
    return torch.log_softmax(logits[first - 1:-1], -1)


@pytest.fixture(scope="module")
def models(tiny_checkpoint):
    folders = [tiny_checkpoint("smollm2", seed=s) for s in (0, 1)]
    return [load_decoder(f).eval() for f in folders], Tokenizer(folders[0] / "tokenizer.json")


def test_every_metric_equals_the_brute_force(models):
    (model, reference), tokenizer = models
    ids = tokenizer.encode(TEXT, special_tokens=False).tolist()
    windows = fidelity.cut_windows(plain(tokenizer, TEXT), window=24, stride=10)
    got = fidelity.measure(TorchBackend(model), windows, TorchBackend(reference), progress=False).metrics()

    nll, kl, agree, right, tokens, scored = 0.0, 0.0, 0, 0, 0, []
    with torch.no_grad():
        for start in range(0, len(ids) - 14, 10):
            part = ids[start:start + 24]
            q, p = brute(model, part, 14), brute(reference, part, 14)
            nll -= sum(q[i, t].item() for i, t in enumerate(part[14:]))
            kl += (p.exp() * (p - q)).sum().item()
            right += (q.argmax(-1) == torch.tensor(part[14:])).sum().item()
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
            tokens += len(part) - 14
            scored += list(range(start + 14, start + len(part)))
    assert scored == list(range(14, len(ids)))                     # every token after the first context, once
    assert got["tokens"] == tokens
    assert got["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert got["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert got["top1_agreement"] == agree / tokens and got["token_accuracy"] == right / tokens
    n_bytes = len(TEXT.encode()) - len(tokenizer.decode(ids[:14]).encode())
    assert got["bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=0.02)
    low, high = got["perplexity_interval"]
    assert low < got["perplexity"] < high


def test_a_model_against_itself(models):
    (model, _), tokenizer = models
    windows = fidelity.cut_windows(plain(tokenizer, TEXT), window=32, stride=16, limit=3)
    got = fidelity.measure(TorchBackend(model), windows, TorchBackend(model), progress=False).metrics()
    assert len(windows) == 3 and abs(got["kl"]) < 1e-6 and got["top1_agreement"] == 1


def test_bad_input(models):
    (model, _), tokenizer = models
    with pytest.raises(UserError, match="stride"):
        fidelity.cut_windows(plain(tokenizer, TEXT), window=16, stride=16)
    with pytest.raises(UserError, match="at least 2"):
        fidelity.cut_windows(plain(tokenizer, "a"), window=16, stride=8)
    with torch.no_grad():
        broken = load_decoder_copy(model)
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        fidelity.measure(TorchBackend(broken), [fidelity.Window(np.arange(8), 4, 4)], progress=False)


def load_decoder_copy(model):
    import copy
    return copy.deepcopy(model)
