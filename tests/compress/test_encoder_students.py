"""Encoders with fewer layers: which go, what is left, and what a student learns of its teacher."""

import json
from pathlib import Path

import pytest
import torch
from encoder_fixtures import tiny

from compress import distill, prune
from compress.encoders.distill import EncoderDistiller
from compress.encoders.layers import with_layers
from models.encoders.network import load


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
    """Of a batch with padding, against sums written out here."""
    teacher = load(model, "text-classification")
    student = with_layers(teacher, [1])
    ids = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True) for one in (student, teacher))
        want = 0.0
        for row, count in enumerate(mask.sum(1).tolist()):
            p, q = theirs.logits[row].softmax(0), ours.logits[row].softmax(0)
            want += float((p * (p / q).log()).sum())
            want += 2 * float((ours.hidden_states[1][row, :count] - theirs.hidden_states[2][row, :count]).square().mean())
            apart = ours.attentions[0][row, :, :count, :count] - theirs.attentions[1][row, :, :count, :count]
            want += 3 * float(apart.square().mean(0).sum() / count)
        found = EncoderDistiller(student, teacher, "text-classification", None, 2.0, 3.0)(ids, None, mask)
    assert float(found) == pytest.approx(want, rel=1e-4)


def test_refused_in_words(model, text, tmp_path, capsys):
    for command, argv, sentence in (
            (prune, [model, "--what", "heads", "--groups", "1", "--data", text], "only layers can be left out"),
            (prune, [model, "--what", "depth", "--layers", "2", "--data", text], "from 1 to 1"),
            (distill, ["--teacher", model, "--preset", "5m", "--data", text], "--preset makes decoders"),
            (distill, ["--teacher", model, "--layers", "1", "--label-share", "0.5", "--data", text], "are for decoders"),
            (distill, ["--teacher", model, "--layers", "3", "--data", text], "from 1 to 2")):
        assert command.main([*map(str, argv), "-o", str(tmp_path / "o")]) == 2
        assert sentence in capsys.readouterr().err, argv
    assert not (tmp_path / "o").exists()
