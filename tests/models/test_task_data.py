"""Data work for tasks: rare labels more often, copies that keep the label, several tasks in one run."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from models.finetune import main
from models.tasks import Example
from models.tasks.augment import KINDS, augmented
from models.tasks.defaults import DEFAULTS
from models.tasks.mixing import class_weights, parse_mix, share, weighted
from models.tasks.options import set_aside
from runtime.errors import UserError

UNEVEN = [Example({"text": f"text {i} of {label} kind and more"}, (label,)) for label, count in (("0", 60), ("1", 20)) for i in range(count)]


def test_labels_are_learned_as_often_as_their_weights_say():
    task = DEFAULTS["classify"]
    counts = Counter(e.answers[0] for e in weighted(UNEVEN, class_weights(("balanced",), task, UNEVEN), seed=1))
    assert counts == {"0": 60, "1": 60}
    times = Counter(e.answers[0] for seed in range(50) for e in weighted(UNEVEN, class_weights(("1=2.5",), task, UNEVEN), seed))
    assert times["0"] == 50 * 60 and times["1"] / (50 * 20) == pytest.approx(2.5, abs=0.1)
    for given, says in (("2=1", "no label '2'"), ("1=-1", "the weight must be a number above 0"), ("1=x", "the weight must be")):
        with pytest.raises(UserError, match=f"--class-weights {given}: {says}"):
            class_weights((given,), task, UNEVEN)
    with pytest.raises(UserError, match="task qa has no labels to weigh"):
        class_weights(("balanced",), DEFAULTS["qa"], UNEVEN)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_the_label_and_most_words_and_are_drawn_by_seed(kind):
    copies = augmented(kind, UNEVEN, 0)
    assert copies == augmented(kind, UNEVEN, 0) != augmented(kind, UNEVEN, 1) and 20 < len(copies) < len(UNEVEN)
    originals = {(e.fields["text"].split()[1], e.answers[0]): e.fields["text"].split() for e in UNEVEN}
    vocabulary = {label: {word for e in UNEVEN if e.answers == (label,) for word in e.fields["text"].split()} for label in "01"}
    changed = 0
    for copy in copies:
        words, label = copy.fields["text"].split(), copy.answers[0]
        if kind == "dropout":
            assert set(words) <= vocabulary[label] and 0 < len(words) < 7
        elif kind == "templates":
            assert set(words) <= vocabulary[label] and len(words) == 7
        else:
            assert len(words) == 7 and sorted("".join(words)) == sorted("".join(min(originals.values(), key=lambda w: (
                sum(a != b for a, b in zip(w, words)), sorted("".join(w)) != sorted("".join(words))))))
        changed += 7 - len(words) if kind == "dropout" else min(sum(a != b for a, b in zip(w, words)) for w in originals.values())
    assert changed / (7 * len(UNEVEN)) < 0.25


def test_some_are_set_aside_however_few_there_are():
    """By what each is, so that the others change nothing; one on either side at least."""
    options = SimpleNamespace(valid_share=0.1, seed=3, data=("few.jsonl",))
    learned, judged = set_aside(UNEVEN, options)
    assert sorted(map(str, learned + judged)) == sorted(map(str, UNEVEN)) and 1 <= len(judged) <= 20
    assert [e for e in judged if e in UNEVEN[:40]] == [e for e in set_aside(UNEVEN[:40], options)[1] if e in judged]
    for count in range(2, 12):
        assert all(set_aside(UNEVEN[:count], options))
        assert all(set_aside(UNEVEN[:count], SimpleNamespace(valid_share=0.999, seed=3, data=())))
    with pytest.raises(UserError, match="few.jsonl: 5 examples, all the same, leave none"):
        set_aside(UNEVEN[:1] * 5, options)


def test_shares_are_even():
    rows = list(range(10))
    assert len(set(share(rows, 4, 0))) == 4 and share(rows, 4, 0) == share(rows, 4, 0)
    assert sorted(Counter(share(rows, 25, 0)).values()) == [2] * 5 + [3] * 5
    assert parse_mix("qa@0.5=a=b.json", ("qa",)) == ("qa", 0.5, "a=b.json") and parse_mix("qa=x", ("qa",))[1] == 1.0
    for entry in ("qa@0.5", "sing=x", "qa@0=x", "qa@many=x"):
        with pytest.raises(UserError, match=f"--mix {entry}: "):
            parse_mix(entry, ("qa",))


def test_a_run_mixes_tasks_weighs_labels_and_keeps_copies_where_they_help(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("".join(f"{'good fine' if i % 4 == 0 else 'bad poor'} thing number {i}\t{int(i % 4 == 0)}\n" for i in range(40)))
    (tmp_path / "valid.tsv").write_text("".join(f"{'good fine' if i % 2 else 'bad poor'} old {i}\t{i % 2}\n" for i in range(12)))
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": f"Long text {i}.", "summary": "Short."}) + "\n" for i in range(30)))
    command = [str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "out"), "--task", "classify", "--data", str(tmp_path / "train.tsv"), "--valid",
               str(tmp_path / "valid.tsv"), "--steps", "16", "--eval-every", "16", "--batch", "8", "--learning-rate", "0.02", "--class-weights",
               "balanced", "--augment", "auto", "--mix", f"summarize@0.5={tmp_path / 's.jsonl'}"]
    assert main(command) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out/augment.json").read_text())
    losses = found["valid_loss"]
    assert set(losses) == {"none", *KINDS} and (found["kind"] or "none") == min(losses, key=losses.get)
    learned = 30 + 30                                                            # 10 rare ones three times
    if found["kind"] is None:
        assert f"{learned + learned // 2} training and 12 validation examples" in said
    assert "changed copies, held-out loss after 4 steps: none" in said
    assert main([*command, "--resume"]) == 0 and "changed copies" not in capsys.readouterr().out
    (tmp_path / "one.tsv").write_text("good it is\t1\nfine it is\t1\n")
    for change, says in ((["--data", str(tmp_path / "one.tsv")], "every example has the label 1"), (["--mix", "song=x"], "--mix song=x: give TASK@WEIGHT=FILE"),
                         (["--task", "continue", "--class-weights"], "--augment auto: keeps labels and scores")):
        arguments = [*command[:2], str(tmp_path / "no"), *command[3:], *change] if change[0] != "--data" else [
            *command[:2], str(tmp_path / "no"), "--task", "classify", *change]
        if "continue" in change:
            arguments = [*command[:2], str(tmp_path / "no"), "--task", "continue", "--data", str(tmp_path / "s.jsonl"), "--field", "text", "--augment", "auto"]
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
