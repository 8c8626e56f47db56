"""Encoders with fewer layers: which go, what is left, and what a student learns of its teacher."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from encoder_fixtures import tiny

from compress import distill, prune
from compress.encoders.distill import EncoderDistiller
from compress.encoders.layers import with_layers
from compress.encoders.text import encoded_texts
from models.encoders.network import alone, load
from runtime.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "bert", "text-classification")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = "the quick brown fox jumps over a lazy dog and runs".split()
    file.write_text("\n".join(" ".join(words[n % 7:n % 7 + 1 + n % 4]) for n in range(120)) + "\n")
    return file


def test_the_layer_that_does_nothing_goes(model, text, tmp_path):
    """The second layer's outputs are made zero: then it only normalizes again what is normalized."""
    network = load(model, "text-classification")
    last = network.bert.encoder.layer[1]
    with torch.no_grad():
        for part in (last.attention.output, last.output):
            part.dense.weight.zero_(), part.dense.bias.zero_()
            part.LayerNorm.weight.fill_(1.0), part.LayerNorm.bias.zero_()
    network.save_pretrained(tmp_path / "idle")
    (tmp_path / "idle" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    assert prune.main([str(tmp_path / "idle"), "-o", str(tmp_path / "out"), "--what", "depth", "--layers", "1", "--data", str(text)]) == 0
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["stages"][-1]["metrics"] == {"dropped_layers": [1]}
    state, kept = network.state_dict(), load(tmp_path / "out", "text-classification").state_dict()
    assert all(torch.equal(kept[name], state[name]) for name in kept) and not any("layer.1." in name for name in kept)


def test_a_student_comes_near_its_teacher(model, text, tmp_path):
    assert distill.main(["--teacher", str(model), "--layers", "1", "--data", str(text), "-o", str(tmp_path / "out"), "--steps", "120", "--batch", "16",
                         "--learning-rate", "3e-3", "--hidden-weight", "1", "--attention-weight", "1", "--context", "16", "--device", "cpu"]) == 0
    losses = [one["valid_loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
              if (one := json.loads(line))["kind"] == "valid"]
    assert losses[-1] < 0.3 * losses[0]
    student = load(tmp_path / "out" / "last", "text-classification")
    assert student.config.num_hidden_layers == 1 and student.config.id2label == load(model, "text-classification").config.id2label


def test_the_loss_is_what_it_says(model):
    """Of a batch with padding, one row of it a pair, against sums written out here."""
    teacher = load(model, "text-classification")
    student = with_layers(teacher, [1])
    ids = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])
    mask, types = (ids > 0).long(), torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True, output_attentions=True)
                        for one in (student, teacher))
        want = 0.0
        for row, count in enumerate(mask.sum(1).tolist()):
            p, q = theirs.logits[row].softmax(0), ours.logits[row].softmax(0)
            want += float((p * (p / q).log()).sum())
            want += 2 * float((ours.hidden_states[1][row, :count] - theirs.hidden_states[2][row, :count]).square().mean())
            apart = ours.attentions[0][row, :, :count, :count] - theirs.attentions[1][row, :, :count, :count]
            want += 3 * float(apart.square().mean(0).sum() / count)
        found = EncoderDistiller(student, teacher, "text-classification", None, 2.0, 3.0)(ids, None, mask, types)
    assert float(found) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind, into, out, key", [
    ("bert", "bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense", "intermediate_size"),
    ("distilbert", "distilbert.transformer.layer.{}.ffn.lin1", "distilbert.transformer.layer.{}.ffn.lin2", "hidden_dim")])
def test_neurons_that_say_nothing_go(tmp_path, text, kind, into, out, key):
    """Half of the neurons of each layer are made mute in another order: without them transformers gives the same."""
    folder = tiny(tmp_path / "model", "text-classification", kind)
    network = load(folder, "text-classification")
    mute = [torch.randperm(64)[:32] for _ in range(2)]
    with torch.no_grad():
        for layer, silent in enumerate(mute):
            network.get_submodule(out.format(layer)).weight[:, silent] = 0
    network.save_pretrained(folder)
    assert prune.main([str(folder), "-o", str(tmp_path / "out"), "--what", "mlp", "--neurons", "32", "--step", "16", "--data", str(text)]) == 0
    pruned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert getattr(pruned.config, key) == 32
    ids = torch.randint(4, 30, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, network(ids).logits)
    for layer, silent in enumerate(mute):
        stays = [number for number in range(64) if number not in silent.tolist()]
        assert torch.equal(pruned.get_submodule(into.format(layer)).weight, network.get_submodule(into.format(layer)).weight[stays])


def test_the_neurons_that_stay_fill_in(model, text, tmp_path):
    """The pruned network is nearer to the whole one on the text than with the same neurons gone and nothing moved."""
    assert prune.main([str(model), "-o", str(tmp_path / "out"), "--what", "mlp", "--neurons", "32", "--step", "32", "--data", str(text)]) == 0
    whole, pruned = (load(folder, "text-classification") for folder in (model, tmp_path / "out"))
    cut = load(model, "text-classification")
    for layer in range(2):
        was, now = (one.get_submodule(f"bert.encoder.layer.{layer}.intermediate.dense").weight for one in (whole, pruned))
        gone = [number for number in range(64) if not (was[number] == now).all(1).any()]
        cut.get_submodule(f"bert.encoder.layer.{layer}.output.dense").weight.data[:, gone] = 0
    texts = encoded_texts(model, whole.config, prune.Options(checkpoint=model, out=tmp_path, what="mlp", data=(str(text),)), (str(text),), 40, 64)

    @torch.no_grad()
    def last(one):
        return torch.cat([one(**alone(one, row), output_hidden_states=True).hidden_states[-1][0] for row in texts])
    assert (last(pruned) - last(whole)).square().mean() < 0.7 * (last(cut) - last(whole)).square().mean()


def test_a_build_that_is_not_known_is_refused(tmp_path):
    from compress.encoders.neurons import neurons_of
    config = transformers.AutoConfig.for_model("modernbert", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                               intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    with pytest.raises(UserError, match="a modernbert model has no MLPs of two linears, intermediate_size wide"):
        neurons_of(transformers.AutoModelForSequenceClassification.from_config(config))


def test_pairs_are_read_as_pairs(model, tmp_path):
    """As transformers' tokenizer puts two texts together, with types; by an encoder of sentences apart."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence1": "a b", "sentence2": "c", "label": "x"}\n' * 3)
    options = distill.Options(teacher=model, layers=1, out=tmp_path, data=(str(pairs),))
    read = encoded_texts(model, load(model, "text-classification").config, options, (str(pairs),), None, 64)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))("a b", "c", return_token_type_ids=True)
    assert len(read) == 3 and read[0].ids.tolist() == theirs["input_ids"] and read[0].types.tolist() == theirs["token_type_ids"]
    apart = tiny(tmp_path / "sentences", "feature-extraction")
    (apart / "1_Pooling").mkdir()
    found = encoded_texts(apart, load(apart, "sentence-similarity").config, options, (str(pairs),), None, 64)
    assert [one.ids.tolist() for one in found[:2]] == [[2, 4, 5, 3], [2, 6, 3]] and len(found) == 6


def test_refused_in_words(model, text, tmp_path, capsys):
    for command, argv, sentence in (
            (prune, [model, "--what", "heads", "--groups", "1", "--data", text], "of which layers and neurons can be left out"),
            (prune, [model, "--what", "mlp", "--keep", "0.5", "--data", text], "give --layers or --neurons in place"),
            (prune, [model, "--what", "mlp", "--neurons", "64", "--step", "8", "--data", text], "a multiple of --step 8 below the 64"),
            (prune, [model, "--what", "mlp", "--neurons", "12", "--step", "8", "--data", text], "a multiple of --step 8 below the 64"),
            (prune, [model, "--what", "depth", "--layers", "2", "--data", text], "from 1 to 1"),
            (distill, ["--teacher", model, "--preset", "5m", "--data", text], "--preset makes decoders"),
            (distill, ["--teacher", model, "--layers", "1", "--label-share", "0.5", "--data", text], "are for decoders"),
            (distill, ["--teacher", model, "--layers", "3", "--data", text], "from 1 to 2")):
        assert command.main([*map(str, argv), "-o", str(tmp_path / "o")]) == 2
        assert sentence in capsys.readouterr().err, argv
    assert not (tmp_path / "o").exists()
