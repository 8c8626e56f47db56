"""GRU and LSTM language models: against torch's own modules, trained and resumed, through a bundle to text, and what refuses them."""

import json
import math

import numpy as np
import pytest
import torch
from checkpoints import random_decoder
from torch import nn

import compress.prune
import compress.quantize
import compress.run
import export.onnx
import export.ort
import export.trt
import export.verify
import models.evaluate
import models.finetune
import models.train
import runtime.generate
from models.data.corpus import Corpus
from models.judging.language_model import open_model
from models.network.cache import KVCache
from models.network.config import ModelConfig
from models.network.decoder import tensor_shapes
from models.training.presets import gated_config, preset
from models.training.trainer import Trainer
from runtime.errors import UserError

KINDS = ("gru", "lstm")


def config(kind: str, size: str = "70k") -> ModelConfig:
    return gated_config(kind, size, preset("100k", 300, 64, eos=0).config)


@torch.no_grad()
def by_torch(decoder, ids: torch.Tensor) -> torch.Tensor:
    """The same model of torch's own modules."""
    x = nn.functional.embedding(ids, decoder.model.embed_tokens.weight)
    for layer in decoder.model.layers:
        mixer = layer.blocks[0].mixer
        theirs = (nn.GRU if decoder.config.gated == "GRU" else nn.LSTM)(x.shape[-1], x.shape[-1], batch_first=True)
        theirs.load_state_dict({f"{name}_l0": tensor for name, tensor in mixer.state_dict().items()})
        normed = nn.functional.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, decoder.config.norm_eps)
        x = x + theirs(normed)[0]
    x = nn.functional.rms_norm(x, x.shape[-1:], decoder.model.norm.weight, decoder.config.norm_eps)
    return x @ decoder.model.embed_tokens.weight.T


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_torchs_own_at_once_and_in_ragged_steps(kind):
    decoder = random_decoder(config(kind))
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = by_torch(decoder, ids)
    torch.testing.assert_close(decoder(ids), expected, rtol=1e-4, atol=1e-4)
    cache, at, found = KVCache(decoder.config, 3, 32), np.zeros(3, np.int64), torch.zeros_like(expected)
    for counts in ((5, 1, 9), (1, 0, 3), (8, 12, 0), (6, 7, 8)):
        rows = torch.stack([ids[row].roll(-int(at[row])) for row in range(3)])[:, :max(counts)]
        logits = decoder(rows, cache=cache, write_index=torch.from_numpy(at.copy()), counts=torch.tensor(counts))
        for row, count in enumerate(counts):
            found[row, at[row]:at[row] + count] = logits[row, :count]
        at += counts
        cache.lengths[:] = at
    assert at.tolist() == [20, 20, 20]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_size_it_is_named_by(kind):
    count = sum(math.prod(shape) for shape in tensor_shapes(gated_config(kind, "5m", preset("5m", 4096, 64, eos=0).config)).values())
    assert count == pytest.approx(5e6, rel=0.05)


def test_its_config_comes_back_and_another_shape_is_refused():
    hf = config("lstm").to_hf()
    assert ModelConfig.from_hf(hf) == config("lstm") and hf["model_type"] == "edgewright_lstm" and "rope_theta" not in hf
    for change, words in (({"intermediate_size": 64}, "intermediate_size 64 is not supported"), ({"rope_theta": 500.0}, "rope_theta 500.0"),
                          ({"num_hidden_layers": 0}, "number of layers is 0"), ({"layer_types": ["full_attention"]}, "layer_types"),
                          ({"edgewright_layers": [[1, 0, 8]] * 2}, "layer 0 is a LSTM of another shape"), ({"hidden_size": 0}, "hidden_size")):
        with pytest.raises(UserError, match=words):
            ModelConfig.from_hf(hf | change)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import random
    from models.tokenizer import main
    folder, chance = tmp_path_factory.mktemp("files"), random.Random(0)
    words = "the king of rivers and mountains sees a ship that sails to an island of gold where no one lives".split()
    (folder / "text.txt").write_text("\n".join(" ".join(chance.choices(words, k=12)) for _ in range(300)))
    assert main(["train", "--data", str(folder / "text.txt"), "-o", str(folder / "tokenizer"), "--vocab-size", "300"]) == 0
    return folder


def train(files, out, kind, *more) -> int:
    return models.train.main(["--architecture", kind, "--preset", "70k", "--tokenizer", str(files / "tokenizer"), "--data", str(files / "text.txt"),
                              "--cache", str(files / "cache"), "--documents", "line", "--valid-share", "0.1", "--steps", "12", "--precision",
                              "fp32", "--batch", "8", "--context", "16", "--eval-every", "4", "-o", str(out), *more])


WAYS = {"gru": ("--learning-rate", "0.01"), "lstm": ("--learning-rate", "0.5", "--optimizer", "sgd")}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, files, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert train(files, out, request.param, *WAYS[request.param]) == 0
    return request.param, out


def losses(out) -> list:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("valid_loss")) for row in rows]


def test_it_learns_and_dead_and_resumed_it_has_the_same_losses(trained, files, tmp_path, monkeypatch):
    kind, whole = trained
    valid = [row[2] for row in losses(whole) if row[2]]
    assert valid[-1] < valid[0] - 0.2
    step = Trainer.train_step

    def dies(self):
        if self.step == 6:
            raise MemoryError                             # saves nothing, as kill -9
        return step(self)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Trainer, "train_step", dies)
        train(files, tmp_path / "run", kind, *WAYS[kind])
    assert train(files, tmp_path / "run", kind, *WAYS[kind], "--resume") == 0
    assert losses(tmp_path / "run") == losses(whole)      # to the bit
    assert (tmp_path / "run/last/model.safetensors").read_bytes() == (whole / "last/model.safetensors").read_bytes()


def test_word2vecs_table_lets_tokens_of_one_company_begin_near_each_other(tmp_path):
    pytest.importorskip("gensim", reason="gensim is the extra `embed`")
    from models.training.word2vec import begin_with
    rng = np.random.default_rng(0)                                    # of 40 tokens, those of one remainder by 4 stand together
    tokens = np.concatenate([rng.choice(np.arange(group, 40, 4), 12) for group in rng.integers(0, 4, 3000)])
    tables = [torch.nn.init.normal_(torch.empty(44, 16), std=0.02, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    for table in tables[:2]:
        begin_with(table, Corpus(tmp_path, tokens, np.array([0]), 1, 0), seed=1)
    assert torch.equal(*tables[:2]) and torch.equal(tables[0][40:], tables[2][40:])          # unseen tokens keep theirs
    assert tables[0][:40].std().item() == pytest.approx(0.02, rel=0.05)
    unit = nn.functional.normalize(tables[0][:40], dim=1)
    near = torch.arange(40)[:, None] % 4 == torch.arange(40) % 4
    assert (unit @ unit.T)[near].mean() > (unit @ unit.T)[~near].mean() + 0.3


def test_the_road_to_text(trained, files, tmp_path, capsys):
    """Bundle, both graphs, the proof, the same judgement as the checkpoint's, and text; and who refuses it, in a sentence."""
    kind, run = trained
    if kind == "gru":
        pytest.skip("its graphs are those of test_anatomy, its road the LSTM's")
    checkpoint, bundle = str(run / "last"), str(tmp_path / "bundle")
    assert export.onnx.main([checkpoint, "-o", bundle]) == 0 and export.ort.main([bundle]) == 0
    assert export.verify.main([checkpoint, bundle, "--threads", "1"]) == 0
    proof = capsys.readouterr().out
    assert proof.count(": mean KL at most") == 2 and f"mixer '{kind}' is none of the native core's" in proof
    found = []
    for model in (checkpoint, bundle):
        assert models.evaluate.main([model, "--data", str(files / "text.txt"), "--max-windows", "3", "--window", "16", "--json",
                                     str(tmp_path / "x.json"), "--threads", "1"]) == 0
        found.append(json.loads((tmp_path / "x.json").read_text()))
    assert found[0]["bits_per_byte"] == pytest.approx(found[1]["bits_per_byte"], rel=1e-5) and found[1]["backend"] == "onnxruntime-cpu"
    capsys.readouterr()
    assert runtime.generate.main([bundle, "-p", "the king of", "--max-new-tokens", "8", "--threads", "1"]) == 0
    reply, = open_model(checkpoint).generate(["the king of"], 8, progress=False)
    assert len(reply.tokens) == 8 and capsys.readouterr().out.rstrip("\n") == reply.text
    learning = ["--task", "continue", "--data", *[str(files / "text.txt")] * 2, "--valid", str(files / "text.txt"), "-o",
                str(tmp_path / "no"), "--steps", "1", "--batch", "1"]
    for main, argv, words in (
            (runtime.generate.main, [bundle, "-p", "x", "--provider", "native"], "is none of the native core's"),
            (export.trt.main, [bundle, "--sm", "89"], f"has {kind.upper()} layers, for which no engine is built"),
            (compress.quantize.main, [checkpoint, "-o", str(tmp_path / "no"), "--bits", "4"], "is neither quantized nor pruned"),
            (compress.prune.main, [checkpoint, "-o", str(tmp_path / "no"), "--what", "depth", "--layers", "1", "--data", str(files / "text.txt")],
             "is neither quantized nor pruned"),
            (compress.run.main, ["tiny", "--model", checkpoint, "--data", str(files / "text.txt"), "-o", str(tmp_path / "no")],
             "is neither quantized nor pruned"),
            (models.finetune.main, [checkpoint, *learning], f"is a {kind.upper()}, which has no linears beside which adapters could stand")):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, (argv, error)
