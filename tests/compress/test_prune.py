"""Pruning: what contributes nothing goes without a trace, least squares against lstsq, and the refusals."""

import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from compress.pruning import depth, sparse, vocabulary, width

from compress import prune
from compress.quantizing.gptq import DAMPING
from compress.pruning.sparse import cheapest_ratios
from models.checkpoint import load_decoder, open_checkpoint, write_checkpoint
from runtime.errors import UserError

TEXT = "The small engine reads a sentence and answers in another. " * 40


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def run(source, out, *args) -> int:
    return prune.main([str(source), "-o", str(out), *map(str, args), "--windows", "4", "--length", "32"])


def changed(source, out, change):
    """A copy of a checkpoint whose state dictionary `change` has edited."""
    state = load_decoder(source).state_dict()
    state.pop("lm_head.weight", None) if open_checkpoint(source).config.tied_embeddings else None
    change(state)
    write_checkpoint(out, open_checkpoint(source).hf_config, iter(state.items()), source, {"stage": "test"})
    return out


def logits(folder, vocab=None):
    decoder = load_decoder(folder)
    ids = torch.arange(20)[None] % decoder.config.vocab_size
    with torch.no_grad():
        return decoder(ids)


@pytest.mark.parametrize("order", ("influence", "kl", "greedy", "beam"))
@pytest.mark.parametrize("idle", (0, 1))
def test_a_layer_that_does_nothing_goes_first(order, idle, tiny_checkpoint, tmp_path, data):
    def silence(state):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"model.layers.{idle}.{part}.weight"] = torch.zeros_like(state[f"model.layers.{idle}.{part}.weight"])
    source = changed(tiny_checkpoint("smollm2"), tmp_path / "a", silence)
    assert run(source, tmp_path / "b", "--data", data, "--what", "depth", "--layers", 1, "--order", order) == 0
    assert len(open_checkpoint(tmp_path / "b").config.layers) == 1
    torch.testing.assert_close(logits(tmp_path / "b"), logits(source))
    lineage = json.loads((tmp_path / "b" / "lineage.json").read_text())["stages"][-1]
    assert lineage["metrics"] == {"dropped_layers": [idle]}


@pytest.mark.parametrize("family", ("smollm2", "gpt2", "qwen3", "gemma2", "qwen3_5", "granite4_h", "lfm2"))
def test_neurons_that_say_nothing_go_without_a_trace(family, tiny_checkpoint, tmp_path, data):
    source = tiny_checkpoint(family)
    size = open_checkpoint(source).config.layers[0].mlp_size
    dead = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:size // 2]

    def silence(state):
        for name in [name for name in state if name.endswith("mlp.down_proj.weight")]:
            state[name] = state[name].clone()
            state[name][:, dead] = 0
    source = changed(source, tmp_path / "a", silence)
    assert run(source, tmp_path / "b", "--data", data, "--what", "mlp", "--neurons", size // 2, "--step", 16) == 0
    assert {layer.mlp_size for layer in open_checkpoint(tmp_path / "b").config.layers} == {size // 2}
    torch.testing.assert_close(logits(tmp_path / "b"), logits(source), atol=2e-3, rtol=2e-2)   # bfloat16 moments, damping


@pytest.mark.parametrize("family", ("smollm2", "qwen3", "qwen2", "gemma3", "qwen3_5", "granite4_tiny", "lfm2_moe"))
def test_a_head_group_that_says_nothing_goes_without_a_trace(family, tiny_checkpoint, tmp_path, data):
    source = tiny_checkpoint(family)
    before = open_checkpoint(source).config
    layer = before.layers[1]
    assert layer.kv_heads > 1

    def silence(state):
        for group, name in enumerate(name for name in state if name.endswith("o_proj.weight")):
            state[name] = state[name].clone()
            state[name].view(len(state[name]), layer.kv_heads, -1)[:, group % layer.kv_heads] = 0
    source = changed(source, tmp_path / "a", silence)
    assert run(source, tmp_path / "b", "--data", data, "--what", "heads", "--groups", layer.kv_heads - 1) == 0
    for old, new in zip(before.layers, open_checkpoint(tmp_path / "b").config.layers, strict=True):
        attention = old.mixer == "attention"
        assert (new.kv_heads, new.heads) == ((old.kv_heads - 1, old.heads // old.kv_heads * (old.kv_heads - 1)) if attention else
                                             (old.kv_heads, old.heads))
    torch.testing.assert_close(logits(tmp_path / "b"), logits(source), atol=2e-3, rtol=2e-2)


def test_taking_over_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    weight, keep = torch.randn(5, 12, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 4, 7, 11])
    got = width.take_over(weight, x.T @ x / len(x), keep, damping=0)
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    torch.testing.assert_close(got, expected)


def test_neurons_are_shared_out_by_importance():
    importance = width.Importance([torch.tensor([9., 9, 8, 8, 1, 1, 0, 0]), torch.tensor([7., 7, .1, .1, .1, .1, .1, .1])], [])
    assert width.choose_neurons(importance, 8, 2) == [6, 2]
    assert sum(width.choose_neurons(importance, 12, 2)) == 12


@pytest.mark.parametrize("family", ("smollm2", "qwen2", "mistral", "phi3", "qwen3_5", "granite4_tiny", "qwen3_moe"))
def test_directions_that_carry_nothing_go_without_a_trace(family, tiny_checkpoint, tmp_path, data):
    """Whatever writes the stream stays in a random half of it (here with an even final gain, see hidden.py)."""
    size = 64
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0))).Q[:, :size // 2]

    def flatten(state):
        for name, tensor in state.items():
            if name == "model.embed_tokens.weight":
                state[name] = tensor @ basis @ basis.T
            elif name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
                state[name] = basis @ basis.T @ tensor
            elif name == "model.norm.weight":
                state[name] = torch.full_like(tensor, 0.7)
    source = changed(tiny_checkpoint(family), tmp_path / "a", flatten)
    assert run(source, tmp_path / "b", "--data", data, "--what", "hidden", "--hidden", size // 2) == 0
    assert open_checkpoint(tmp_path / "b").config.hidden_size == size // 2
    expected = logits(source)
    assert (logits(tmp_path / "b") - expected).abs().max() < 0.02 * expected.abs().max()          # bfloat16 moments
    assert run(source, tmp_path / "c", "--data", data, "--what", "hidden", "--hidden", size // 4) == 0
    assert (logits(tmp_path / "c") - expected).abs().max() > 0.1 * expected.abs().max()           # these did say something


@pytest.mark.parametrize("family", ("gemma4", "qwen3_5", "granite4_tiny", "lfm2_moe"))
def test_layers_of_any_kind_go_but_those_that_others_read(family, tiny_checkpoint, tmp_path, data):
    """What is left is the model without them."""
    source = tiny_checkpoint(family)
    layers = open_checkpoint(source).config.layers
    assert run(source, tmp_path / "b", "--data", data, "--what", "depth", "--layers", len(layers) // 2 + 1, "--order", "influence") == 0
    gone = json.loads((tmp_path / "b" / "lineage.json").read_text())["stages"][-1]["metrics"]["dropped_layers"]
    assert not {layer.cache_source for layer in layers} & set(gone)
    decoder = load_decoder(source)
    decoder.model.layers = torch.nn.ModuleList(layer for layer in decoder.model.layers if layer.number not in gone)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "b"), decoder(torch.arange(20)[None]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family, what, words", (
    ("qwen3_moe", ("mlp", "--keep", 0.8), "--what mlp: layer 1 has a mixture of experts, whose neurons are not pruned"),
    ("olmo2", ("heads", "--groups", 1), "--what heads: family olmo2 has norms over all heads of q and k"),
    ("gemma4", ("heads", "--groups", 1), "--what heads: family gemma4_text has keys and values that several layers read"),
    ("gemma4", ("depth", "--layers", 1), "--layers is 1, which should be from 2 to 5"),
    ("gemma2", ("hidden", "--hidden", 32), "family gemma2 has a norm after what a block adds"),
    ("lfm2", ("hidden", "--hidden", 32), "family lfm2 has short convolutions, as wide as the stream")))
def test_what_has_no_meaning_is_refused_by_name(family, what, words, tiny_checkpoint, tmp_path, data, capsys):
    assert run(tiny_checkpoint(family), tmp_path / "b", "--data", data, "--what", *what) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_tied_table_behind_an_uneven_gain_is_not_rotated(tiny_checkpoint, tmp_path, data, capsys):
    source = changed(tiny_checkpoint("smollm2"), tmp_path / "a", lambda state: state["model.norm.weight"][3:].fill_(2.0))
    assert run(source, tmp_path / "b", "--data", data, "--what", "hidden", "--hidden", 32) == 2
    assert "which no rotation keeps: prune depth or mlp" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_beam_finds_what_greedy_misses(monkeypatch):
    """Layer 0 looks cheapest alone, but 1 and 2 together cost least; the beam is exact on three layers."""
    costs = {(0,): 1.0, (1,): 1.5, (2,): 1.6, (0, 1): 5.0, (0, 2): 4.0, (1, 2): 2.0}
    every = [torch.nn.Identity() for _ in range(3)]
    decoder = torch.nn.Module()
    decoder.model = torch.nn.Module()
    decoder.model.layers = torch.nn.ModuleList(every)
    decoder.forward = lambda ids: torch.zeros(1, 1, 2)
    monkeypatch.setattr(depth, "_divergence", lambda d, ids, whole, left: costs[tuple(sorted({0, 1, 2} - set(left)))])
    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert depth.choose_layers(decoder, ids, 2, "greedy") == [0, 2]
    assert sorted(depth.choose_layers(decoder, ids, 2, "beam")) == [1, 2]


def test_sizes_are_met(tiny_checkpoint, tmp_path, data):
    source = changed(tiny_checkpoint("smollm2"), tmp_path / "even", lambda state: state["model.norm.weight"].fill_(1.0))
    before = open_checkpoint(source)
    stored = sum(before.nbytes(name) for name in before.names())
    for what in ("depth", "mlp", "hidden"):
        assert run(source, tmp_path / what, "--data", data, "--what", what, "--step", 16, "--target-size", f"{int(0.75 * stored)}B") == 0
        after = open_checkpoint(tmp_path / what)
        assert 0.4 * stored < sum(after.nbytes(name) for name in after.names()) <= 0.75 * stored


@pytest.mark.parametrize("score", ("magnitude", "wanda", "sparsegpt"))
@pytest.mark.parametrize("pattern", ("0.5", "2:4"))
@pytest.mark.parametrize("family", ("smollm2", "granite4_tiny"))
def test_zeros_are_where_they_should_be(score, pattern, family, tiny_checkpoint, tmp_path, data):
    source = tiny_checkpoint(family)
    assert run(source, tmp_path / "b", "--data", data, "--what", "sparse", "--sparsity", pattern, "--score", score) == 0
    for name, tensor in load_decoder(tmp_path / "b").state_dict().items():
        if "proj" in name and ".conv" not in name:
            gone = tensor == 0
            counts = gone.unflatten(1, (-1, 4)).sum(-1) if pattern == "2:4" else gone.float().mean(1)
            assert (counts == (2 if pattern == "2:4" else 0.5)).all(), name


def test_the_cheapest_ratios_are_those_of_a_search():
    """Convex costs of three linears of one size: no other choice with as many zeros costs less."""
    columns, generator = 20, torch.Generator().manual_seed(0)
    curves = {name: torch.rand(columns, generator=generator).cumsum(0).cumsum(0) * weight
              for name, weight in (("a", 1.0), ("b", 3.0), ("c", 0.2))}
    found = cheapest_ratios(curves, dict.fromkeys(curves, 100), 0.5)
    cost = lambda zeros: sum(float(curve[n - 1]) if n else 0.0 for curve, n in zip(curves.values(), zeros))     # noqa: E731
    best = min((zeros for zeros in itertools.product(range(columns), repeat=3) if sum(zeros) == 1.5 * columns), key=cost)
    assert tuple(round(ratio * columns) for ratio in found.values()) == best and len(set(best)) == 3


@pytest.mark.parametrize("score", ("magnitude", "wanda", "sparsegpt"))
def test_ratios_by_sensitivity_spare_what_matters(score, tiny_checkpoint, tmp_path, data):
    def quiet(state):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"model.layers.0.{part}.weight"] *= 0.01
    source = changed(tiny_checkpoint("smollm2"), tmp_path / "a", quiet)
    shares, errors = {}, {}
    for ratios in ("even", "sensitivity"):
        out = tmp_path / ratios
        assert run(source, out, "--data", data, "--what", "sparse", "--sparsity", 0.5, "--score", score, "--ratios", ratios) == 0
        weights = [(name, tensor) for name, tensor in load_decoder(out).state_dict().items() if "proj" in name]
        assert sum((w == 0).sum() for _, w in weights) / sum(w.numel() for _, w in weights) == pytest.approx(0.5, abs=0.02)
        shares[ratios] = float(torch.cat([w.flatten() for name, w in weights if "layers.0" in name]).eq(0).float().mean())
        errors[ratios] = float((logits(out) - logits(source)).square().mean())
    assert shares["sensitivity"] > 0.7 and errors["sensitivity"] < 0.5 * errors["even"]


def test_sparsegpt_loses_less_than_magnitude_and_wanda_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 256, generator=generator) @ (torch.eye(256) + 0.1 * torch.randn(256, 256, generator=generator))
    weight, moment = torch.randn(16, 256, generator=generator), x.T @ x / len(x)

    def loss(other):
        return (((weight - other) @ moment) * (weight - other)).sum().item()
    for pattern in ("2:4", 0.5):
        plain = weight.masked_fill(sparse.zeros(weight.abs(), pattern), 0)
        assert loss(sparse.sparsegpt(weight, moment, pattern)) < 0.8 * loss(plain), pattern

    # 2:4 by the paper's equations in float64: the inverse of what is left of H, anew for every column.
    narrow, h = weight[:, :32].double().clone(), moment[:32, :32]
    h = (h + DAMPING * h.diagonal().mean() * torch.eye(32)).double()
    for column in range(32):
        inverses = [torch.linalg.inv(h[j:, j:]) for j in range(column, min(column - column % 4 + 4, 32))]
        if column % 4 == 0:
            cost = narrow[:, column:column + 4].square() / torch.stack([inverse[0, 0] for inverse in inverses])
            gone = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, cost.argsort(1)[:, :2], True)
        error = torch.where(gone[:, column % 4], narrow[:, column], 0.0) / inverses[0][0, 0]
        narrow[:, column:] -= error[:, None] * inverses[0][0]
    torch.testing.assert_close(sparse.sparsegpt(weight[:, :32], moment[:32, :32], "2:4"), narrow.float(), atol=2e-4, rtol=1e-3)

    # Where the zeros all come first, passing errors on is least squares over the columns behind them.
    first, moment = weight[:, :128].clone(), moment[:128, :128]
    first[:, :64] *= 1e-3
    expected = width.take_over(first, moment, torch.arange(64, 128), damping=0)
    got = sparse.sparsegpt(first, moment, 0.5)
    assert (got[:, :64] == 0).all()
    torch.testing.assert_close(got[:, 64:], expected, atol=2e-4, rtol=1e-3)

    score = weight.abs() * x.square().sum(0).sqrt()
    gone = sparse.zeros(score, 0.25)
    for row, mask in zip(score, gone):
        assert set(row.argsort()[:64].tolist()) == set(mask.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("family", ("smollm2", "gemma4"))
def test_a_trimmed_vocabulary_encodes_everything_and_says_the_same(family, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(family)
    (tmp_path / "c.txt").write_text("the small engine " * 30)
    assert run(source, tmp_path / "b", "--data", tmp_path / "c.txt", "--what", "vocabulary") == 0
    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (source, tmp_path / "b"))
    assert after.get_vocab_size() < before.get_vocab_size()
    for text in ("the small engine", "Ein Satz, 然后 🙂 <|im_start|>user\n\tx = 1"):
        assert after.decode(after.encode(text).ids, skip_special_tokens=False) == before.decode(before.encode(text).ids, skip_special_tokens=False)
    assert after.encode("the small engine").tokens == before.encode("the small engine").tokens
    old, new = before.encode("the small engine").ids, after.encode("the small engine").ids
    kept = [before.token_to_id(after.id_to_token(i)) for i in range(after.get_vocab_size())]
    with torch.no_grad():
        a, b = load_decoder(source)(torch.tensor([old])), load_decoder(tmp_path / "b")(torch.tensor([new]))
    torch.testing.assert_close(a[..., kept], b)
    old_config, config = open_checkpoint(source).config, open_checkpoint(tmp_path / "b").config
    assert [kept[i] for i in config.eos_token_ids] == list(old_config.eos_token_ids)
    assert not list(tmp_path.glob(".b*"))


TEXTS = ["the small engine", "", " ", "  x\t\n\n", "Ein Satz, 然后 🙂🏳️‍🌈 e\u0301 user\n\tx = 1", "\x00\x7f\u200d", "aaaaaaa == ====", "<0x41>"]


def in_bytes(pieces: list[str]) -> dict:
    """tokenizer.json of a BPE on characters as SentencePiece's vocabularies become: every merge that leads to a piece."""
    from models.formats.gguf_tokenizer import build_tokenizer
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types, scores = [2, 3, 3] + [6] * 256 + [1] * len(pieces), [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    keys = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1, "eos_token_id": 2}
    return json.loads(build_tokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, None).to_str())


def test_a_vocabulary_with_byte_tokens_is_trimmed_and_still_spells_any_text(tiny_checkpoint, tmp_path):
    """The corpus keeps its tokens, one by one, though the first merge that leads to "engine" is not the one taken."""
    pieces = ["ne", "gi", "en", "gine", "engi", "engine", "▁t", "he", "▁the", "▁s", "ma", "ll", "mall", "▁small", "aa", "aaa", "==", "a=",
              "然后", *"▁aeghilmnst=然后"]
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("smollm2"), source)
    (source / "tokenizer.json").write_text(json.dumps(in_bytes(pieces)))
    (tmp_path / "c.txt").write_text("the small engine " * 30)
    assert run(source, tmp_path / "b", "--data", tmp_path / "c.txt", "--what", "vocabulary") == 0
    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (source, tmp_path / "b"))
    assert before.encode("the small engine").tokens == after.encode("the small engine").tokens == ["<s>", "▁the", "▁small", "▁", "engine"]
    gone = before.get_vocab().keys() - after.get_vocab().keys()
    assert gone == {"aa", "aaa", "==", "a=", "=", "然后", "然", "后", "engi"}
    for text in TEXTS:
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids) == text
    assert load_decoder(tmp_path / "b").config.vocab_size == after.get_vocab_size()


def test_a_unigram_vocabulary_or_one_without_bytes_is_not_trimmed():
    missing = in_bytes(["a"])
    del missing["model"]["vocab"]["<0x41>"]
    for tokenizer, kind in ((missing, "BPE"), ({"model": {"type": "Unigram", "vocab": [["<unk>", 0.0]]}}, "Unigram")):
        with pytest.raises(UserError, match=f"BPE with a token for every byte, can be trimmed; this one is {kind}"):
            vocabulary.plan(tokenizer, Counter(), None)


def test_a_vocabulary_of_a_given_size_keeps_the_frequent():
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3, "bb": 4}, "merges": ["a b", "ab a", "b b"]},
                 "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": [{"id": 5, "content": "<s>"}]}
    assert vocabulary.plan(tokenizer, Counter({3: 9, 4: 2}), None) == [0, 1, 2, 3, 4, 5]
    assert vocabulary.plan(tokenizer, Counter({3: 9, 4: 2}), 5) == [0, 1, 2, 3, 5]           # aba needs ab
    assert vocabulary.trimmed_tokenizer(tokenizer, [0, 1, 2, 3, 5])["model"]["merges"] == ["a b", "ab a"]


@pytest.mark.parametrize("args, says", [
    (("--what", "depth"), "say how much to keep"), (("--what", "depth", "--layers", 2), "--layers is 2"),
    (("--what", "depth", "--keep", 0.01), "one layer and the embedding"), (("--what", "mlp", "--keep", 1.5), "--keep is 1.5"),
    (("--what", "mlp", "--neurons", 1), "neurons would stay"), (("--what", "heads"), "--groups is None"),
    (("--what", "heads", "--groups", 9), "--groups is 9"), (("--what", "sparse", "--sparsity", "3:4"), "sparsity is '3:4'"),
    (("--what", "sparse", "--sparsity", "2:4", "--ratios", "sensitivity"), "do not go together"),
    (("--what", "vocabulary", "--tokens", 3), "cannot hold"), (("--what", "hidden", "--hidden", 64), "--hidden is 64"),
    (("--what", "mlp", "--target-size", "1GB"), "is not below"), (("--what", "hidden", "--keep", 0.01), "keep more")])
def test_refusals(args, says, tiny_checkpoint, tmp_path, data, capsys):
    assert run(tiny_checkpoint("smollm2"), tmp_path / "b", "--data", data, *args) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_quantized_checkpoint_is_refused(tiny_checkpoint, tmp_path, data, capsys):
    from compress import quantize
    assert quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "q"), "--bits", "4", "--group", "32"]) == 0
    assert run(tmp_path / "q", tmp_path / "b", "--data", data, "--what", "depth", "--layers", 1) == 2
    assert "is quantized" in capsys.readouterr().err
