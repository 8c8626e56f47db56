"""Acceptance of a draft's tokens against speculative decoding played out token by token."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.acceptance import accepted, main, measure, overlap
from models.checkpoint import load_decoder
from models.judging.language_model import open_model


@pytest.mark.parametrize("proposals,reply,rounds", [
    ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [4]),                     # the target's 5 ends the round, and too few are left
    ([1, 2, 9, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [2, 4]),
    ([9, 9, 9, 9, 9], [1, 2, 3, 4, 5], [0, 0]), ([1, 2], [1, 2], [])])
def test_rounds_by_hand(proposals, reply, rounds):
    assert accepted(np.array(proposals), np.array(reply), 4) == rounds


def test_overlap_is_the_share_accepted_when_played():
    draw = np.random.default_rng(0)
    p, q = draw.dirichlet(np.ones(6), 2)
    tokens = draw.choice(6, 200_000, p=q)
    share = (draw.random(200_000) < p[tokens] / q[tokens]).mean()
    found = overlap(np.log(p)[None], np.log(q)[None])
    assert found[0] == pytest.approx(share, abs=4 * (0.25 / 200_000) ** 0.5)


def test_greedy_rounds_are_those_of_real_speculative_decoding(tiny_checkpoint, tmp_path):
    """Both models run step by step, the draft from its own proposals, without caches and without the reply in hand."""
    folder, near = tiny_checkpoint("smollm2"), tmp_path / "near"
    near.mkdir()
    for file in folder.iterdir():
        (near / file.name).write_bytes(file.read_bytes())
    draw = torch.Generator().manual_seed(0)
    tensors = {name: t + 0.15 * t.abs().mean() * torch.randn(t.shape, generator=draw)
               for name, t in load_file(near / "model.safetensors").items()}
    save_file(tensors, near / "model.safetensors", {"format": "pt"})
    target, draft = load_decoder(folder), load_decoder(near)

    def choose(model, ids):
        with torch.no_grad():
            return int(model(torch.tensor([ids]))[0, -1].argmax())
    prompts, played = [np.arange(5, 12), np.arange(40, 60, 3), np.arange(300, 310)], []
    eos = open_model(folder).eos
    for prompt in prompts:
        ids, end, stopped = prompt.tolist(), len(prompt) + 24, False
        while len(ids) + 4 <= end and not stopped:
            proposed = list(ids)
            for _ in range(4):
                proposed.append(choose(draft, proposed))
            count = 0
            while count < 4 and proposed[len(ids)] == choose(target, ids):
                ids.append(proposed[len(ids)])
                count += 1
            played.append(count)
            ids.append(choose(target, ids))
            stopped = any(token in eos for token in ids)
        assert not stopped                                        # else the rounds near the end would be cut differently
    found = measure(open_model(folder), open_model(near), prompts, 4, 24, 0)
    assert found["rounds"] == len(played) and found["accepted"] == pytest.approx(np.mean(played))
    assert 0 < found["accepted"] < 4
    assert found["accepted_at"] == pytest.approx([np.mean(np.array(played) > n) for n in range(4)])


def test_a_model_accepts_itself_and_the_command_says_so(tiny_checkpoint, tmp_path, capsys):
    folder, data, figures = tiny_checkpoint("smollm2"), tmp_path / "chat.json", tmp_path / "figures.json"
    data.write_text(json.dumps([{"instruction": f"Say {n}.", "output": "Yes."} for n in range(6)]))
    arguments = [str(folder), str(folder), "--data", str(data), "--skip", "2", "--limit", "3", "--tokens", "12"]
    assert main([*arguments, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["prompts"] == 3 and found["accepted"] == 4.0 and found["sampled_rate"] == pytest.approx(1.0, abs=1e-5)
    assert "token 4 accepted, greedy" in capsys.readouterr().out
    assert main([*arguments[:-1], "300"]) == 2 and "leaves room" in capsys.readouterr().err
    assert main([*arguments[:-1], "0"]) == 2 and "--tokens is 0" in capsys.readouterr().err
    assert main([str(folder), str(tiny_checkpoint("qwen2")), *arguments[2:]]) == 2
