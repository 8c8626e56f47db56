"""`python -m compress.distill`: its loss against whole distributions, what it teaches, killed and resumed, refused input."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from compress.distill import every_kth_layer, main
from compress.distilling.distiller import Distiller, Losses
from compress.distilling.divergence import divergence
from compress.distilling.matching import hidden_loss
from compress.distilling.taught import OnPolicy
from compress.teacher import write
from compress.quantize import main as quantize
from models.checkpoint import load_decoder, open_checkpoint
from models.data.corpus import IGNORE, build_corpus
from tiny import SENTENCES, labelled_rows

DRAW = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 384, (3, 20), generator=DRAW)
LABELS = torch.randint(0, 384, (3, 20), generator=DRAW).masked_fill(torch.rand(3, 20, generator=DRAW) < 0.3, IGNORE)


def predictions(decoder, k=383):
    """What a cache of `decoder` would give for IDS: index, log-probabilities, others."""
    with torch.no_grad():
        log_p = torch.log_softmax(decoder(IDS), -1)
    top, index = log_p.topk(k)
    return index, top, log_p.exp().scatter(-1, index, 0).sum(-1).log()


@pytest.fixture(scope="module")
def pair(tiny_checkpoint):
    """(teacher, student) decoders."""
    return load_decoder(tiny_checkpoint("smollm2")).requires_grad_(False), load_decoder(tiny_checkpoint("smollm2", 1))


def test_the_loss_is_the_mixture_of_divergence_and_labels(pair):
    teacher, student = pair
    heat, share, kept = 2.0, 0.3, LABELS != IGNORE
    log_p = torch.log_softmax(teacher(IDS)[kept] / heat, -1)
    logits = student(IDS)[kept]
    kl = F.kl_div(torch.log_softmax(logits / heat, -1), log_p, reduction="sum", log_target=True)
    expected = (1 - share) * heat**2 * kl + share * F.cross_entropy(logits, LABELS[kept], reduction="sum")
    distiller = Distiller(student, teacher, Losses(divergence("forward"), heat, share))
    torch.testing.assert_close(distiller(*labelled_rows(IDS, LABELS)), expected, rtol=1e-5, atol=0)
    weight = student.model.layers[0].mlp.up_proj.weight
    for ours, theirs in zip(torch.autograd.grad(distiller(*labelled_rows(IDS, LABELS)), (weight, student.model.embed_tokens.weight)),
                            torch.autograd.grad(expected, (weight, student.model.embed_tokens.weight))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_cached_and_live_teachers_teach_the_same(pair):
    teacher, student = pair
    losses = Losses(divergence("js", 0.7))
    live = Distiller(student, teacher, losses)(*labelled_rows(IDS, LABELS))
    cached = Distiller(student, None, losses)(*labelled_rows(IDS, LABELS, *predictions(teacher)))
    torch.testing.assert_close(live, cached, rtol=1e-4, atol=0)


def test_hidden_states_and_attention_add_their_part(pair):
    teacher, student = pair
    plain = Distiller(student, teacher, Losses(divergence("forward")))(*labelled_rows(IDS, LABELS))
    matched = Distiller(student, teacher, Losses(divergence("forward"), hidden_weight=2.0))
    with torch.no_grad():
        states = []
        for decoder in (student, teacher):
            hooks = []
            for layer in decoder.model.layers:
                layer.register_forward_hook(lambda _, inputs, output, into=hooks: into.append(output))
            decoder.model(IDS)
            states.append(hooks)
    expected = plain + 2.0 * hidden_loss(*states, matched.maps)[LABELS != IGNORE].sum()
    torch.testing.assert_close(matched(*labelled_rows(IDS, LABELS)), expected, rtol=1e-5, atol=0)
    itself = Distiller(teacher, teacher, Losses(divergence("forward"), hidden_weight=1.0, attention_weight=1.0))
    assert itself(*labelled_rows(IDS, LABELS)).abs() < 1e-3


def test_judging_counts_divergence_labels_and_agreement(pair):
    teacher, student = pair
    found = Distiller(student, None, Losses(divergence("reverse"))).judge(*labelled_rows(IDS, LABELS, *predictions(teacher)))
    kept = LABELS != IGNORE
    p, q = teacher(IDS)[kept], student(IDS)[kept]
    torch.testing.assert_close(found["loss"], F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True),
                               rtol=1e-4, atol=0)
    torch.testing.assert_close(found["nll"], F.cross_entropy(q, LABELS[kept], reduction="sum"))
    assert found["top1"] == (p.argmax(-1) == q.argmax(-1)).sum()


def test_every_kth_layer_keeps_the_first_and_the_last(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("smollm2", num_hidden_layers=6))
    student = every_kth_layer(decoder, 3)
    for new, old in enumerate((0, 2, 5)):                       # 2.5 rounds to even
        torch.testing.assert_close(student.model.layers[new].state_dict(), decoder.model.layers[old].state_dict())
    assert student(IDS).shape == (3, 20, 384)


def test_the_student_writes_what_it_finds_likely(tiny_checkpoint):
    """First tokens against the model's own distribution; later ones through the cache against a run without one."""
    decoder = load_decoder(tiny_checkpoint("smollm2"))
    prompts = IDS[:1, :5].repeat(4000, 1)
    first = write(decoder, prompts, 1, torch.Generator().manual_seed(1))[:, 0]
    with torch.no_grad():
        expected = decoder(prompts[:1])[0, -1].softmax(-1)
    likely = expected > 0.02
    counts = torch.bincount(first, minlength=384) / 4000
    assert likely.sum() >= 3 and (counts - expected)[likely].abs().max() < 4 * (0.25 / 4000) ** 0.5
    with torch.no_grad():
        decoder.model.embed_tokens.weight.mul_(40)              # so sure of itself that a draw is the greedy choice
    written = write(decoder, IDS[:, :5], 6, torch.Generator().manual_seed(2))
    ids = IDS[:, :5]
    for _ in range(6):
        ids = torch.cat((ids, decoder(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(written, ids[:, 5:])


def test_on_policy_rows_keep_the_prompt_and_learn_what_follows(tiny_checkpoint):
    class Blocks:
        def __len__(self):
            return 3

        def rows(self, indices):
            return IDS.numpy()[indices], IDS.roll(-1, 1).numpy()[indices]

    class Running:
        step = 4

        class accelerator:
            autocast = torch.no_grad

    decoder, running = load_decoder(tiny_checkpoint("smollm2")), Running()
    rows = OnPolicy(Blocks(), decoder, 1.0, 8, 0, lambda: running)
    input_ids, labels = rows.rows(range(2))
    assert input_ids.shape == labels.shape == (2, 20)
    assert (input_ids[:, :8] == IDS.numpy()[:2, :8]).all() and (labels[:, :7] == IGNORE).all()
    assert (labels[:, 7:-1] == input_ids[:, 8:]).all() and (labels[:, 7:] >= 0).all()
    again, _ = rows.rows(range(2))
    running.step = 5
    other, _ = rows.rows(range(2))
    assert (again == input_ids).all() and (other != input_ids).any()
    never = OnPolicy(Blocks(), decoder, 0.0, 8, 0, lambda: running).rows(range(2))
    assert (never[0] == IDS.numpy()[:2]).all()


def test_on_policy_the_student_answers_a_tasks_own_prompts(tiny_checkpoint, tmp_path):
    """The rows keep the ids of `Task.prompt`; what follows is the student's, and nothing else is learned."""
    from types import SimpleNamespace

    from compress.distilling.taught import Padded
    from models.data.corpus import DataOptions, task_rows
    from models.tasks.defaults import DEFAULTS
    from runtime.text import Tokenizer
    folder = tiny_checkpoint("smollm2")
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": f"a {'long ' * n}text", "summary": "so it is " * (n + 1)}) + "\n" for n in range(3)))
    tokenizer, options = Tokenizer(folder / "tokenizer.json"), DataOptions(data=(str(tmp_path / "s.jsonl"),), task="summarize")
    padded = Padded(task_rows(options, list(options.data), tokenizer, folder), 120, 2)
    running = SimpleNamespace(step=1, accelerator=SimpleNamespace(autocast=torch.no_grad))
    input_ids, labels = OnPolicy(padded, load_decoder(folder), 1.0, None, 0, lambda: running).rows(range(3))
    given, answers = padded.rows(range(3))
    assert input_ids.shape == (3, 120) and ((labels == IGNORE) == (answers == IGNORE)).all() and (labels != answers).any()
    for n in range(3):
        prompt = DEFAULTS["summarize"].prompt({"text": f"a {'long ' * n}text"}, tokenizer)
        count = (labels[n] != IGNORE).sum()
        assert (input_ids[n, :len(prompt)] == prompt).all() and (labels[n, :len(prompt) - 1] == IGNORE).all() and labels[n, len(prompt) - 1] != IGNORE
        assert (input_ids[n, len(prompt):len(prompt) + count - 1] == labels[n, len(prompt) - 1:len(prompt) + count - 2]).all()
    # The same ids, prompt and answer, are the text that stages calibrate on.
    corpus = build_corpus(replace(options, cache=tmp_path / "cache"), options.data, folder / "tokenizer.json", eos=0)
    assert corpus.tokens.tolist() == [token for ids, _ in padded.encoded for token in [*ids.tolist(), 0]]
    command = arguments(tiny_checkpoint, tmp_path / "s.jsonl", tmp_path / "run", "--task", "summarize", "--on-policy", "0.5", "--steps", "2",
                        "--context", "120", "--batch", "1", "--eval-rows", "1")
    assert main(command) == 0 and (tmp_path / "run/last/config.json").is_file()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(SENTENCES * 60), encoding="utf-8")
    return file


def arguments(tiny_checkpoint, text, out, *more):
    student = () if any(word in more for word in ("--student", "--layers", "--preset")) else (
        "--student", str(tiny_checkpoint("smollm2", 1)))
    return ["--teacher", str(tiny_checkpoint("smollm2")), *student, "--data", str(text), "-o", str(out), "--cache",
            str(text.parent / "cache"), "--teacher-cache", str(text.parent / "teacher"), "--steps", "12", "--context", "32",
            "--batch", "4", "--eval-every", "4", "--eval-rows", "4", "--precision", "fp32", *more]


def curve(out, kind="valid", key="valid_loss"):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("more", [(), ("--live", "--loss", "reverse"), ("--layers", "1", "--hidden-weight", "0.5", "--attention-weight", "1"),
                                  ("--loss", "skew", "--on-policy", "0.5", "--prompt", "8"),
                                  ("--preset", "60k", "--hidden-weight", "1", "--label-share", "0.5")])
def test_the_student_comes_nearer_to_its_teacher(more, tiny_checkpoint, text, tmp_path, capsys):
    assert main(arguments(tiny_checkpoint, text, tmp_path / "run", *more, "--learning-rate", "3e-3")) == 0
    kl = curve(tmp_path / "run")
    assert kl[-1] < 0.95 * kl[0]
    result = open_checkpoint(tmp_path / "run" / "last")
    assert not any("maps" in name for name in result.names())
    lineage = json.loads((tmp_path / "run/last/lineage.json").read_text())["stages"][-1]
    assert lineage["stage"] == "compress.distill" and lineage["metrics"]["valid_loss"] == kl[-1]
    assert "top-1 agreement" in capsys.readouterr().out


def test_killed_and_resumed_it_ends_as_if_uninterrupted(tiny_checkpoint, text, tmp_path):
    """With maps to train and text of its own: their state and the draws come back too."""
    more = ("--preset", "60k", "--hidden-weight", "1", "--on-policy", "0.5", "--prompt", "8", "--steps", "40")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compress.distill"]
    subprocess.run([*command, *arguments(tiny_checkpoint, text, tmp_path / "whole", *more)], env=environment, check=True)
    broken = tmp_path / "broken"
    process = subprocess.Popen([*command, *arguments(tiny_checkpoint, text, broken, *more)], env=environment)
    while not (broken / "last").is_dir() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(arguments(tiny_checkpoint, text, broken, *more, "--resume")) == 0
    whole, resumed = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main(arguments(tiny_checkpoint, text, broken, *more, "--resume", "--loss", "js")) == 2


def test_input_of_no_use_is_refused(tiny_checkpoint, text, tmp_path, capsys):
    def refused(words, *more, data=text):
        assert main(arguments(tiny_checkpoint, data, tmp_path / "out", *more)) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()[-1]) < 400
        assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_checkpoint("smollm2", 1).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    Tokenizer(models.BPE({"a": 0}, [])).save(str(other / "tokenizer.json"))
    refused("vocabularies differ", "--student", str(other))
    assert quantize([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "int4")]) == 0
    refused("is quantized", "--student", str(tmp_path / "int4"))
    refused("leave out --student", "--student", str(tiny_checkpoint("smollm2")), "--preset", "60k")
    refused("--layers is 3", "--layers", "3")
    refused("no labels", "--on-policy", "0.5", "--label-share", "0.5")
    refused("at least 0 and at most 1", "--label-share", "1.5")
    refused("--temperature is 0", "--temperature", "0")
    refused("the teacher's context", "--context", "1000")
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("Too short.")
    refused("holds no records", data=empty)
    refused("too few", data=short)
