"""Two models of one tokenizer whose tables are padded to other sizes: judged and taught over the tokens both have.

Against float64 over those tokens, and by a model against itself with more rows: nothing may be between the two.
"""

import json

import numpy as np
import pytest
import torch
from tiny import SENTENCES, VOCAB_SIZE, labelled_rows, write_padded, write_stranger

from compress import distill, quantize, recover, teacher
from compress.distilling.distiller import Distiller, Losses
from compress.distilling.divergence import divergence
from models import acceptance, evaluate, what_got_worse
from models.checkpoint import load_decoder
from models.data.corpus import IGNORE
from models.judging.fidelity import cut_windows
from models.judging.texts import plain
from runtime.text import Tokenizer

TEXT = "\n".join(SENTENCES) * 3


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """{rows: folder} of one model with 384 (the tokenizer's), 392 and 400 rows, and "other": another one with 400."""
    plain, place = tiny_checkpoint("smollm2"), tmp_path_factory.mktemp("padded")
    (place / "text.txt").write_text(TEXT)
    return {384: plain, 392: write_padded(plain, place / "392", 392, 1), 400: write_padded(plain, place / "400", 400, 2),
            "other": write_padded(tiny_checkpoint("smollm2", 1), place / "other", 400, 3), "text": place / "text.txt"}


def figures(main, *arguments, out):
    assert main([*map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("model, reference", [(392, 400)])
def test_a_model_is_itself_however_padded(model, reference, folders, tmp_path):
    found = figures(evaluate.main, folders[model], "--task", "kl", "--reference", folders[reference], "--data", folders["text"],
                    "--window", 64, out=tmp_path / "e.json")
    assert abs(found["kl"]) < 1e-6 and found["top1_agreement"] == 1
    worse = figures(what_got_worse.main, folders[reference], folders[model], "--data", folders["text"], "--windows", 3,
                    out=tmp_path / "w.json")
    assert abs(worse["domains"][0]["kl"]) < 1e-6 and worse["domains"][0]["top1_agreement"] == 1
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(3)))
    agreed = figures(acceptance.main, folders[model], folders[reference], "--data", tmp_path / "chats.jsonl", "--tokens", 8,
                     out=tmp_path / "a.json")
    assert agreed["accepted"] == 4 and agreed["sampled_rate"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("model", [384, 392])
def test_divergence_is_over_the_tokens_both_have(model, folders, tmp_path):
    found = figures(evaluate.main, folders[model], "--reference", folders["other"], "--data", folders["text"], "--window", 64,
                    out=tmp_path / "e.json")
    decoders, kl, agree, nll = [load_decoder(folders[name]) for name in (model, "other")], [], [], []
    with torch.no_grad():
        for window in cut_windows(plain(Tokenizer(folders[384] / "tokenizer.json"), TEXT), 64, 32):
            both = [decoder(torch.from_numpy(window.ids)[None])[0, window.first - 1:-1].double() for decoder in decoders]
            nll += (-both[0].log_softmax(-1).gather(1, torch.from_numpy(window.ids[window.first:])[:, None])[:, 0]).tolist()
            log_q, log_p = (logits[:, :VOCAB_SIZE].log_softmax(-1) for logits in both)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            agree += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-4) and found["top1_agreement"] == pytest.approx(np.mean(agree))
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)        # its own, over its own table


def test_a_cache_is_made_over_the_tokenizers_tokens(folders, tmp_path):
    assert teacher.main([str(folders["other"]), "--data", str(folders["text"]), "--length", "64", "--top", "383", "--precision",
                         "fp32", "--cache", str(tmp_path / "c"), "-o", str(tmp_path / "t")]) == 0
    (cache,) = (tmp_path / "t").iterdir()
    cached = figures(evaluate.main, folders[400], "--task", "kl", "--reference", cache, out=tmp_path / "e.json")
    live = figures(evaluate.main, folders[384], "--task", "kl", "--reference", folders["other"], "--data", folders["text"],
                   "--window", 64, out=tmp_path / "l.json")
    assert cached["kl"] == pytest.approx(live["kl"], rel=0.05)


@pytest.mark.parametrize("kind, student", [("forward", 392), ("skew", 392), ("forward", 384)])
def test_the_loss_is_over_the_shared_tokens_and_empties_the_others(kind, student, folders):
    ids = torch.randint(0, 384, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(12) > 10, IGNORE)
    taught, learns = load_decoder(folders["other"]).requires_grad_(False), load_decoder(folders[student])
    loss = divergence(kind)
    kept = labels != IGNORE
    logits = learns(ids)[kept]
    log_p = taught(ids)[kept][:, :VOCAB_SIZE].log_softmax(-1)
    expected = loss(log_p, logits[:, :VOCAB_SIZE].log_softmax(-1)).sum() - logits.softmax(-1)[:, :VOCAB_SIZE].sum(-1).log().sum()
    if kind == "forward":            # the whole divergence, the teacher's probabilities being 0 beyond
        torch.testing.assert_close(expected, (log_p.exp() * (log_p - logits.log_softmax(-1)[:, :VOCAB_SIZE])).sum(), rtol=1e-5, atol=0)
    top, index = log_p.topk(383)
    told = torch.zeros(2, 12, 383, dtype=torch.int64), torch.zeros(2, 12, 383), torch.zeros(2, 12)
    for whole, part in zip(told, (index, top, log_p.exp().scatter(-1, index, 0).sum(-1).log())):
        whole[kept] = part
    live = Distiller(learns, taught, Losses(loss), VOCAB_SIZE)
    cached = Distiller(learns, None, Losses(loss), VOCAB_SIZE)
    weights = learns.model.layers[0].mlp.up_proj.weight, learns.model.embed_tokens.weight
    wanted = torch.autograd.grad(expected, weights)
    for total in (live(*labelled_rows(ids, labels)), cached(*labelled_rows(ids, labels, *told))):
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)
        for ours, theirs in zip(torch.autograd.grad(total, weights), wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("live, student, model", [([], 400, 392), (["--on-policy", "1", "--prompt", "28"], 400, 384)])
def test_distilling_from_its_padded_self_starts_at_nothing(live, student, model, folders, tmp_path):
    out = tmp_path / "run"
    assert distill.main(["--teacher", str(folders[model]), "--student", str(folders[student]), "--data", str(folders["text"]), "-o",
                         str(out), "--steps", "1", "--batch", "1", "--context", "32", "--eval-every", "1", "--eval-rows", "2", "--top", "383",
                         "--cache", str(tmp_path / "c"), "--teacher-cache", str(tmp_path / "t"), "--precision", "fp32", *live]) == 0
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["valid_loss"]) < 2e-3 and first["valid_top1"] > 0.999
    assert load_decoder(out / "last").config.vocab_size == student


@pytest.mark.parametrize("student, model", [(400, 384)])
def test_recovering_with_a_padded_teacher(student, model, folders, tmp_path, capsys):
    assert quantize.main([str(folders[student]), "-o", str(tmp_path / "q"), "--bits", "4", "--method", "rtn"]) == 0
    common = ["--data", str(folders["text"]), "--steps", "2", "--batch", "1", "--length", "64", "--windows", "2", "--top", "383",
              "--cache", str(tmp_path / "c"), "--teacher-cache", str(tmp_path / "t")]
    capsys.readouterr()
    assert recover.main([str(tmp_path / "q"), "--teacher", str(folders[model]), "-o", str(tmp_path / "r"), *common]) == 0
    stranger = write_stranger(folders[model], tmp_path / "stranger")
    assert recover.main([str(tmp_path / "q"), "--teacher", str(stranger), "-o", str(tmp_path / "s"), *common]) == 2
    assert "vocabularies differ" in capsys.readouterr().err
