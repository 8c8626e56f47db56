"""What trains, on a device: as on the CPU, without a wait in a step, with batches prepared ahead, and what a device's failures leave.

On the GPU where there is one, else on tests/far.py's, which counts what the host waits for; PyTorch counts for a GPU.
"""

import json
import os
import signal
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import far
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SENTENCES

from compress.distill import main as distill
from compress.distilling.chunked_loss import chunks, tokens_at_once
from compress.distilling.distiller import Distiller, Losses, labelled_tokens
from compress.distilling.divergence import kl
from compress.distilling.taught import OnPolicy
from compress.quantize import main as quantize
from compress.recover import main as recover
from models.data.corpus import IGNORE
from models.finetune import main as finetune
from models.network.config import LayerConfig, ModelConfig
from models.network.decoder import Decoder
from models.train import main as train
from models.training import memory, placement
from models.training.feed import Feed, cut
from models.training.options import TrainerOptions
from models.training.trainer import Trainer
from runtime.errors import CheckFailed, DeviceError, UserError

VOCAB, CONTEXT, CPU = 50, 12, torch.device("cpu")
NEAR = 2e-3 if torch.cuda.is_available() else 1e-4
LOST = torch.AcceleratorError("CUDA error: unspecified launch failure")


@pytest.fixture(autouse=True)
def found(device, monkeypatch):
    """--device auto finds the device."""
    monkeypatch.setattr(placement, "find_device", lambda asked: CPU if asked == "cpu" else device)


def tiny_decoder(seed=0):
    torch.manual_seed(seed)
    return Decoder(ModelConfig(family="llama", vocab_size=VOCAB, hidden_size=32, layers=(LayerConfig(2, 1, 48),) * 2,
                               head_dim=16, context_length=32))


class Ragged:
    """Rows of random tokens and lengths, labels without loss among them."""

    def __init__(self, count, seed):
        chance = np.random.default_rng(seed)
        self.ids, self.lengths = chance.integers(0, VOCAB, (count, CONTEXT + 1)), chance.integers(4, CONTEXT + 1, count)
        self.ignored = chance.random((count, CONTEXT)) < 0.4
        self.made, self.threads = [], set()

    def __len__(self):
        return len(self.ids)

    def rows(self, indices):
        self.made.append(indices.tolist())
        self.threads.add(threading.current_thread())
        width = self.lengths[indices].max()
        labels = np.where(self.ignored[indices] | (np.arange(CONTEXT) >= self.lengths[indices, None]), IGNORE, self.ids[indices, 1:])
        return self.ids[indices, :width], labels[:, :width]


def trainer(out, module=None, rows=None, **options):
    options = {"steps": 6, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup": 2, "eval_every": 3, "precision": "fp32"} | options
    return Trainer(module or tiny_decoder(), TrainerOptions(out=out, **options), rows or Ragged(20, 1), Ragged(8, 2),
                   lambda module, folder, metrics: None, {})


def lines(folder, *kinds):
    """Of metrics.jsonl, what is the same every time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows if row["kind"] in (kinds or row["kind"])]


def alike(folder, other):
    """The same numbers, but for the order of sums (in a norm, say), which is a device's own."""
    return all(one.keys() == two.keys() and all(two[name] == pytest.approx(one[name], rel=NEAR) for name in one if name != "kind")
               for one, two in zip(lines(folder), lines(other), strict=True))


@contextmanager
def nothing_waits(device):
    """Raises where the host waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    far.reads.clear(), far.sends.clear()
    try:
        yield
        assert far.reads == far.sends == []
    finally:
        torch.cuda.is_available() and torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4, "checkpointing": True}, {"schedule": "wsd", "clip": 0.01}])
def test_a_run_on_the_device_is_the_cpus(options, tmp_path, device):
    trainer(tmp_path / "cpu", device="cpu", **options).fit()
    run = trainer(tmp_path / "device", **options)
    assert run.accelerator.device == device and all(p.device == device for p in run.module.parameters())
    run.fit()
    assert alike(tmp_path / "cpu", tmp_path / "device") and len(lines(tmp_path / "device", "train")) == 6


def test_a_step_waits_for_nothing(tmp_path, device):
    run = trainer(tmp_path)
    run.train_step()
    with nothing_waits(device):
        updates = [run.train_step() for _ in range(3)]
    assert all(np.isfinite(update.read()).all() for update in updates)
    with pytest.raises((AssertionError, RuntimeError)), nothing_waits(device):          # it can tell
        updates[0].read(), float(run.module.model.norm.weight.detach().sum())


@pytest.mark.parametrize("live, losses", [(True, Losses(kl)), (True, Losses(kl, 2.0, 0.3, 1.0, 1.0)), (False, Losses(kl, 1.0, 0.5))])
def test_a_step_of_distilling_waits_for_nothing(live, losses, tmp_path, device):
    class Told(Ragged):
        def rows(self, indices):
            rows = super().rows(indices)
            drawn = np.random.default_rng(0)
            index = drawn.permuted(np.broadcast_to(np.arange(VOCAB), (*rows[0].shape, VOCAB)), axis=-1)[..., :4].copy()
            log_p = np.log(np.full(index.shape, 0.2, np.float32))
            return rows if live else (*rows, index, log_p, log_p[..., 0])
    found = []
    for place in ("cpu", "auto"):                               # one after the other: where a process computes is one for all in it
        teacher = tiny_decoder(1).requires_grad_(False) if live else None
        options = TrainerOptions(out=tmp_path / place, steps=6, batch=4, micro_batch=4, learning_rate=1e-2, warmup=0, precision="fp32",
                                 device=place)
        run = Trainer(Distiller(tiny_decoder(), teacher, losses), options, Told(20, 1), Told(8, 2), None, {},
                      loss=lambda module, *rows: module(*rows), pack=labelled_tokens)
        if teacher is not None:
            teacher.to(run.accelerator.device)
        first = run.train_step()
        with nothing_waits(device):
            updates = [first, *(run.train_step() for _ in range(2))]
        found.append([update.read() for update in updates])
    assert np.allclose(*found, rtol=NEAR)


def test_more_logits_at_once_on_a_device_and_fewer_kernels(device):
    """A CPU takes 64 tokens at a time; a device as many as it has memory for."""
    assert tokens_at_once(CPU, 49152) == 64 and tokens_at_once(device, 49152) == 1365 and tokens_at_once(device, 2**30) == 64
    assert len(chunks(32768, tokens_at_once(device, 49152))) * 20 < len(chunks(32768, tokens_at_once(CPU, 49152)))


def test_the_next_batch_is_prepared_meanwhile_and_no_run_has_others(tmp_path):
    rows, plain = Ragged(20, 1), Ragged(20, 1)
    options = TrainerOptions(out=tmp_path, steps=4, batch=6, seed=3)
    ahead, due = (Feed(r, lambda rows: rows, options, 1, 0, ahead) for r, ahead in ((rows, True), (plain, False)))
    ahead.batch(0, 2)
    ahead.thread.submit(int).result()                           # the one that was coming has come
    assert len(rows.made) == 6 and len(rows.threads) == 2
    for step, micro in ((0, 2), (1, 2), (2, 3), (3, 3)):        # resumed at 0; smaller pieces at 2
        found, wanted = ahead.batch(step, micro), due.batch(step, micro)
        assert found.labels == wanted.labels == sum(int((labels != IGNORE).sum()) for _, labels in wanted.pieces)
        assert found.tokens == wanted.tokens == sum(ids.size for ids, _ in wanted.pieces)
        assert all(np.array_equal(a, b) for one, two in zip(found.pieces, wanted.pieces, strict=True) for a, b in zip(one, two))
    assert ahead.coming is None                                 # none beyond the last step
    assert plain.threads == {threading.current_thread()}
    assert all(rows.lengths[made].tolist() == sorted(rows.lengths[made]) for made in plain.made)


@pytest.mark.parametrize("begun", [1, 7, 60, 10**6])
def test_a_batch_is_cut_where_it_costs_least(begun):
    """Against every way there is to cut twelve rows."""
    rows = SimpleNamespace(lengths=np.array([3, 40, 5, 5, 41, 8, 7, 90, 5, 9, 60, 62]))
    indices = np.random.default_rng(0).permutation(12)

    def cost(pieces):
        return sum(begun + len(piece) * rows.lengths[piece].max() for piece in pieces)
    found = cut(rows, indices, 5, begun)
    order = np.concatenate(found)
    assert sorted(order) == sorted(indices) and (np.diff(rows.lengths[order]) >= 0).all() and max(map(len, found)) <= 5
    ways = (np.split(order, [n + 1 for n in range(11) if bits >> n & 1]) for bits in range(2**11))
    assert cost(found) == min(cost(way) for way in ways if max(map(len, way)) <= 5) <= cost(cut(rows, indices, 5))
    assert begun < 10**6 or len(found) == 3


def test_rows_that_a_model_writes_are_not_made_ahead(tmp_path):
    blocks = Ragged(20, 1)
    fresh = OnPolicy(blocks, tiny_decoder(), 0.0, 4, 0, lambda: SimpleNamespace(step=0))
    Feed(fresh, lambda rows: rows, TrainerOptions(out=tmp_path, steps=4, batch=4), 1, 0, ahead=True).batch(0, 4)
    assert len(blocks.made) == 1 and blocks.threads == {threading.current_thread()}


class NaNAt(torch.nn.Module):
    """A decoder whose logits are NaN in one training step."""

    def __init__(self, step):
        super().__init__()
        self.inner, self.left = tiny_decoder(), step

    def forward(self, input_ids, logits_positions=None):
        logits = self.inner(input_ids, logits_positions=logits_positions)
        self.left -= self.training
        return logits * (torch.nan if self.left == 0 and self.training else 1.0)


@pytest.mark.parametrize("step, kept", [(2, None), (3, None), (5, 3), (6, 3)])
def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run(step, kept, tmp_path):
    """At 3 and 6, steps after which a checkpoint is due, too: it is read before that is written."""
    run = trainer(tmp_path / "run", NaNAt(step), micro_batch=4)
    weights, after = [], run.train_step

    def step_and_look():
        update = after()
        weights.append([p.detach().clone() for p in run.module.parameters()])
        return update
    run.train_step = step_and_look
    with pytest.raises(CheckFailed, match=rf"loss nan .* at step {step}, in the batch of rows (\d+, ){{3}}\d+; "
                                          + ("nothing was saved" if kept is None else f".*last keeps step {kept}")):
        run.fit()
    assert len(weights) - step in (0, 1)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(weights[step - 2], weights[step - 1]))
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, step))


def out_of_memory_above(run, most):
    """Makes the loss of micro-batches of more than `most` rows fail as PyTorch does."""
    loss, judge, tried = run.loss, run.judge, []

    def limited(work, model, ids, *rest):
        tried.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
        return work(model, ids, *rest)
    run.loss, run.judge = (lambda *args: limited(loss, *args)), (lambda *args: limited(judge, *args))
    return tried


def test_too_little_memory_takes_smaller_pieces_before_anything_is_learned(tmp_path, device):
    trainer(tmp_path / "two", batch=8, micro_batch=2).fit()
    run = trainer(tmp_path / "run", batch=8, micro_batch=8)
    tried = out_of_memory_above(run, 3)
    run.fit()
    assert run.micro == 2 and set(tried[:3]) == {8, 4, 2} and max(tried[3:]) <= 2
    assert alike(tmp_path / "two", tmp_path / "run")
    with pytest.raises(UserError, match=f"{device} has too little memory: 20.00 GiB asked for.*smaller batch"):
        run = trainer(tmp_path / "none")
        out_of_memory_above(run, 0)
        run.fit()


def test_memory_that_ends_later_ends_the_run(tmp_path):
    """Smaller pieces then would change what the run learns from there on."""
    run = trainer(tmp_path / "run")
    after = run.train_step

    def step():
        if run.step == 4:
            out_of_memory_above(run, 0)
        return after()
    run.train_step = step
    with pytest.raises(UserError, match="too little memory"):
        run.fit()
    assert run.micro == 2 and run.saved == 3


def test_a_device_that_is_lost_ends_in_a_sentence_and_the_run_goes_on_elsewhere(tmp_path, device):
    trainer(tmp_path / "whole").fit()
    run = trainer(tmp_path / "run")
    loss = run.loss

    def failing(*rows):
        if run.step == 4:
            raise LOST
        return loss(*rows)
    run.loss = failing
    with pytest.raises(DeviceError, match=f"{device} failed .*unspecified launch failure.*--resume"):
        run.fit()
    assert lines(tmp_path / "run")[-1]["step"] == 3             # of the step under way when it was lost nothing is known
    trainer(tmp_path / "run", resume=True, micro_batch=4, device="cpu").fit()
    whole, resumed = lines(tmp_path / "whole", "train"), lines(tmp_path / "run", "train")
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in whole], rel=NEAR)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stopped_run_tells_of_its_last_step_and_goes_on(number, error, tmp_path):
    """The host knows of a step when the next one is queued; here there is none."""
    trainer(tmp_path / "whole").fit()
    run = trainer(tmp_path / "run")
    after = run.train_step
    run.train_step = lambda: (os.kill(os.getpid(), number) if run.step == 3 else None, after())[1]
    with pytest.raises(error):
        run.fit()
    assert run.saved == 4 and [line["step"] for line in lines(tmp_path / "run", "train")] == [1, 2, 3, 4]
    trainer(tmp_path / "run", resume=True).fit()
    assert alike(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("asked", ["cuda:0", "cuda:1"])
def test_one_gpu_for_many_processes_is_refused(asked, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=f"--device {asked}: of the processes launched together each takes a GPU of its own"):
        placement.process_state(asked)


def test_precision_is_the_chosen_devices(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index else (7, 5))
    turing, ampere = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [placement.mixed_precision("auto", device) for device in (CPU, turing, ampere)] == ["no", "no", "bf16"]
    assert placement.mixed_precision("fp16", turing) == "fp16"
    for asked, device in (("bf16", CPU), ("bf16", turing), ("fp16", CPU)):
        with pytest.raises(UserError, match=f"--precision {asked}"):
            placement.mixed_precision(asked, device)


def test_a_micro_batch_is_what_free_memory_holds(monkeypatch):
    module, gpu = tiny_decoder(), torch.device("cuda", 0)

    def rows(free, batch=64):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return memory.rows_at_once(module, module.config, batch, CONTEXT, CONTEXT, False, gpu, default=3)
    parts = [memory.training_bytes(module, module.config, n, CONTEXT, CONTEXT, False, ragged=True) for n in (0, 1, 20)]
    fixed, one, twenty = (sum(part.values()) - part["process"] for part in parts)
    assert twenty == fixed + 20 * (one - fixed)
    assert rows(1.01 * twenty / memory.SHARE) == 20 and rows(0.99 * twenty / memory.SHARE) == 19
    assert rows(1e12) == 64 and rows(0) == 1 and rows(None) == 3
    assert memory.rows_at_once(module, module.config, 64, CONTEXT, CONTEXT, False, CPU, default=3) == 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 60), encoding="utf-8")
    (folder / "chats.json").write_text(json.dumps([{"instruction": f"say {i} " * (1 + i % 5), "input": "", "output": "so it is said"} for i in range(40)]))
    (folder / "labels.tsv").write_text("\n".join(f"{'good fine' if i % 2 else 'bad poor'} {i}\t{i % 2}" for i in range(40)))
    return folder


COMMANDS = {
    "train": (train, "--checkpoint MODEL --data TEXT --valid TEXT --cache CACHE --context 32"),
    "lora": (finetune, "MODEL --task chat --data CHATS --valid CHATS"),
    "full": (finetune, "MODEL --task classify --data LABELS --valid LABELS --method full --labels 0=bad 1=good"),
    "kept adapter": (finetune, "GPT2 --task chat --data CHATS --valid CHATS --keep-adapter"),
    "live teacher": (distill, "--teacher MODEL --student OTHER --data TEXT --cache CACHE --teacher-cache TAUGHT --context 32 --eval-rows 4 "
                              "--live --hidden-weight 1 --attention-weight 1"),
    "own text": (distill, "--teacher MODEL --student OTHER --data TEXT --cache CACHE --teacher-cache TAUGHT --context 32 --eval-rows 4 "
                          "--on-policy 1 --prompt 8"),
    "recover": (recover, "CODES --teacher MODEL --data TEXT --cache CACHE --teacher-cache TAUGHT --length 32 --eval-rows 4"),
    "recover weights": (recover, "CODES --teacher MODEL --data TEXT --cache CACHE --teacher-cache TAUGHT --length 32 --eval-rows 4 --train weights --block-steps 2"),
    "cached teacher": (distill, "--teacher MODEL --layers 1 --data TEXT --cache CACHE --teacher-cache TAUGHT --context 32 --eval-rows 4"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_the_device_writes_what_it_writes_on_the_cpu(name, files, tiny_checkpoint, tmp_path, device):
    command, line = COMMANDS[name]
    places = {"MODEL": tiny_checkpoint("smollm2"), "OTHER": tiny_checkpoint("smollm2", 1), "GPT2": tiny_checkpoint("gpt2"), "TEXT": files / "text.txt",
              "CHATS": files / "chats.json", "LABELS": files / "labels.tsv", "CACHE": files / "cache", "TAUGHT": files / "taught"}
    if "CODES" in line:
        places["CODES"] = tmp_path / "codes"
        assert quantize([str(places["MODEL"]), "-o", str(places["CODES"]), "--bits", "4", "--group", "32"]) == 0
    for place in ("cpu", "auto"):
        words = [str(places.get(word, word)) for word in line.split()]
        assert command([*words, "--steps", "4", "--batch", "8", "--micro-batch", "4", "--eval-every", "2", "--precision", "fp32", "--device",
                        place, "-o", str(tmp_path / place)]) == 0
    assert alike(tmp_path / "cpu", tmp_path / "auto")
    kept = "adapter_model.safetensors" if name == "kept adapter" else "model.safetensors"
    wanted, found = (load_file(tmp_path / place / "last" / kept) for place in ("cpu", "auto"))
    assert wanted.keys() == found.keys() and all(
        (found[key].float() - tensor.float()).norm() <= NEAR * tensor.float().norm() for key, tensor in wanted.items())
