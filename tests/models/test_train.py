"""`python -m models.train` as its user runs it: killed and resumed, in two processes, with input of no use."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from models.checkpoint import load_decoder
from models.data.corpus import DataOptions, build_corpus
from models.tokenizer import main as tokenizer_main
from models.train import main

WORDS = "the king of rivers and mountains sees a ship that sails to an island of gold where no one lives".split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with train.txt, valid.txt and a tokenizer."""
    import random
    folder, chance = tmp_path_factory.mktemp("files"), random.Random(0)
    for name, count in (("train", 400), ("valid", 40)):
        text = "\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
    assert tokenizer_main(["train", "--data", str(folder / "train.txt"), "-o", str(folder / "tokenizer"),
                           "--vocab-size", "300"]) == 0
    return folder


def arguments(files, out, *more, steps=12):
    return ["--preset", "80k", "--tokenizer", str(files / "tokenizer"), "--data", str(files / "train.txt"), "--valid",
            str(files / "valid.txt"), "--cache", str(files / "cache"), "--documents", "line", "--steps", str(steps),
            "--precision", "fp32", "--batch", "8", "--context", "16", "--eval-every", "4", "--eval-rows", "16", "-o", str(out), *more]


def losses(out, kind="train", key="loss"):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if row["kind"] == kind}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The uninterrupted run, in a process of its own like those it is compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run([sys.executable, "-m", "models.train", *arguments(files, out, steps=40)], env=ENVIRONMENT, check=True)
    return out


def test_it_learns_and_its_checkpoints_open(finished, files):
    curve = losses(finished)
    assert list(curve) == list(range(1, 41))
    assert curve[40] < curve[1] - 0.5
    valid = losses(finished, "valid", "valid_loss")
    assert list(valid) == [0, *range(4, 41, 4)]
    ids = torch.randint(0, 290, (2, 16), generator=torch.Generator().manual_seed(0))
    for name in ("best", "last"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / name)
        torch.testing.assert_close(load_decoder(finished / name)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert list((finished / "logs").glob("events.out.tfevents.*"))


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(finished, files):
    """Measured again by transformers' own loss, over the same rows."""
    from models.data.corpus import Blocks
    options = DataOptions(data=(str(files / "valid.txt"),), documents="line", cache=files / "cache")
    blocks = Blocks(build_corpus(options, options.data, files / "tokenizer/tokenizer.json", 0), 16)
    input_ids, labels = map(torch.from_numpy, blocks.rows(range(16)))
    logits = transformers.AutoModelForCausalLM.from_pretrained(finished / "best")(input_ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(min(list(losses(finished, "valid", "valid_loss").values())[1:]), rel=1e-4)


def test_lineage_names_options_inputs_and_metrics(finished):
    stages = json.loads((finished / "last/lineage.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["tokenizer", "train"]
    assert stages[1]["options"]["steps"] == 40 and stages[1]["seed"] == 0
    assert set(stages[1]["inputs"]) == {"data", "valid", "tokenizer"}
    assert stages[1]["metrics"]["valid_loss"] == losses(finished, "valid", "valid_loss")[40]


def test_killed_and_resumed_it_has_the_losses_of_the_uninterrupted_run(finished, files, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "models.train", *arguments(files, out, steps=40)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "last/training_state").is_dir():
        time.sleep(0.01)
    while process.poll() is None and (out / "metrics.jsonl").read_text().count("\"train\"") < 6:     # a step past the save at 4
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    died = max(losses(out))
    assert 4 < died < 40
    subprocess.run([*command, "--resume"], env=ENVIRONMENT, check=True)
    assert losses(out) == losses(finished)                                   # to the bit
    assert losses(out, "valid", "valid_loss") == losses(finished, "valid", "valid_loss")
    for name in ("last", "best"):
        assert (out / name / "model.safetensors").read_bytes() == (finished / name / "model.safetensors").read_bytes()
    assert not list(out.glob("*.new")) and not list(out.glob("*.old")) and not list(out.glob(".*"))


def test_stopped_by_sigterm_it_goes_on_to_the_same_end(finished, files, tmp_path):
    """First killed before it saved anything and started again; then SIGTERM between two saves, which saves."""
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "models.train", *arguments(files, out, steps=40)]

    def until(there, number):
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not there():
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate()[1]
        return process.returncode, said
    assert until((out / "logs").exists, signal.SIGKILL)[0] == -signal.SIGKILL and not (out / "last").exists()
    code, said = until(lambda: (out / "last").exists() and max(losses(out)) >= 5, signal.SIGTERM)
    assert code == 143 and (kept := max(losses(out))) < 40 and f"last keeps step {kept}: --resume continues" in said
    subprocess.run([*command, "--resume"], env=ENVIRONMENT, check=True)
    assert losses(out) == losses(finished)
    assert losses(out, "valid", "valid_loss") == losses(finished, "valid", "valid_loss")
    assert (out / "last/model.safetensors").read_bytes() == (finished / "last/model.safetensors").read_bytes()


def test_two_processes_have_the_loss_curve_of_one(finished, files, tmp_path):
    out = tmp_path / "two"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
                    "models.train", *arguments(files, out, steps=40)], env=ENVIRONMENT, check=True, timeout=300)
    one, two = losses(finished), losses(out)
    assert list(one) == list(two)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    assert list(losses(out, "valid", "valid_loss").values()) == pytest.approx(
        list(losses(finished, "valid", "valid_loss").values()), rel=1e-4)


def start_sharded(*arguments) -> list[subprocess.Popen]:
    """The two processes of a run under FSDP, started as `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = ENVIRONMENT | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer"}
    return [subprocess.Popen([sys.executable, str(Path(__file__).parents[1] / "fsdp_on_cpu.py"), *arguments],
                             env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def test_sharded_over_two_processes_killed_and_resumed_it_has_the_loss_curve_of_one(finished, tmp_path, files):
    """FSDP: the sharded weights and moments are gathered when saved and shared out again when resumed."""
    out = tmp_path / "sharded"
    first = start_sharded(*arguments(files, out, steps=40))
    while first[0].poll() is None and not (out / "last/training_state").is_dir():
        time.sleep(0.01)
    for process in first:
        process.kill()
        process.wait()
    assert max(losses(out)) < 40
    assert [process.wait(300) for process in start_sharded(*arguments(files, out, "--resume", steps=40))] == [0, 0]
    for kind, key in (("train", "loss"), ("train", "gradient_norm"), ("valid", "valid_loss")):
        one, sharded = losses(finished, kind, key), losses(out, kind, key)
        assert list(one) == list(sharded)
        assert list(sharded.values()) == pytest.approx(list(one.values()), rel=1e-4)
    ids = torch.randint(0, 290, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_decoder(out / "last")(ids), load_decoder(finished / "last")(ids), rtol=1e-3, atol=1e-3)


def test_resume_with_other_options_or_data_names_them_and_refuses(finished, files, tmp_path, capsys):
    import shutil
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    before = (out / "metrics.jsonl").read_bytes()
    assert main(arguments(files, out, "--resume", "--learning-rate", "0.5", steps=40)) == 2
    assert "learning_rate was 0.0016" in (message := capsys.readouterr().err) and "is 0.5" in message
    (tmp_path / "train.txt").write_text((files / "train.txt").read_text() + "\nmore")
    changed = arguments(files, out, "--resume", steps=40)
    changed[changed.index(str(files / "train.txt"))] = str(tmp_path / "train.txt")
    assert main(changed) == 2
    assert "the contents of data changed" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_overwritten_and_none_is_resumed_from_nothing(finished, files, tmp_path, capsys):
    assert main(arguments(files, finished, steps=40)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(arguments(files, tmp_path / "none", "--resume")) == 2
    assert "no run to resume" in capsys.readouterr().err


def test_a_full_disk_ends_in_a_sentence_and_leaves_no_half_checkpoint(files, tmp_path):
    """The kernel refuses files over 100 kB, as a full disk would refuse them."""
    result = subprocess.run([sys.executable, "-m", "models.train", *arguments(files, tmp_path / "full")], env=ENVIRONMENT,
                            capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr and "Traceback" not in result.stderr
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["logs", "metrics.jsonl"]


def test_a_disk_that_is_full_at_the_first_line_of_the_log_is_one_sentence(files, tmp_path):
    """TensorBoard's first write is of 88 bytes, from its own thread."""
    code = ("import resource, sys; from models import train; from models.training.trainer import Trainer; fit = Trainer.fit\n"
            "def full(self): resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); return fit(self)\n"
            "Trainer.fit = full; sys.exit(train.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, *arguments(files, tmp_path / "run")], env=ENVIRONMENT, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error", "Traceback", "Exception"))]
    assert done.returncode == 2 and len(said) == 1 and "logs could not be written" in said[0], done.stderr[-2000:]


def test_continue_a_checkpoint(tiny_checkpoint, files, tmp_path):
    source = tiny_checkpoint("smollm2")
    out = tmp_path / "more"
    fresh = arguments(files, out, "--checkpoint", str(source), "--learning-rate", "0.01")[4:]
    assert main(fresh) == 0
    curve = losses(out, "valid", "valid_loss")
    assert curve[12] < curve[0]
    assert json.loads((out / "last/config.json").read_text())["vocab_size"] == load_decoder(source).config.vocab_size


@pytest.mark.parametrize("change, message", [
    (["--tokenizer", "nowhere"], "no tokenizer.json"),
    (["--checkpoint", "x"], "either --preset and --tokenizer"),
    (["--preset", "9q"], "--preset 9q"),
    (["--batch", "0"], "--batch is 0"),
    (["--languages", "xx"], "--languages xx"),
    (["--momentum", "0.5"], "--momentum 0.5: is for --optimizer sgd"),
    (["--optimizer", "sgd"], "--optimizer sgd has no usual --learning-rate"),
    (["--optimizer", "sgd", "--betas", "0.9", "0.99"], "--betas 0.9 0.99: are AdamW's"),
    (["--betas", "0.9"], "--betas 0.9: should be two numbers"),
])
def test_options_of_no_use_are_refused(files, tmp_path, capsys, change, message):
    assert main(arguments(files, tmp_path / "out", *change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_context_beyond_the_models_is_refused(tiny_checkpoint, files, tmp_path, capsys):
    source = str(tiny_checkpoint("smollm2"))
    assert main(arguments(files, tmp_path / "out", "--checkpoint", source, "--context", "100000")[4:]) == 2
    assert "--context 100000: the model's context is" in capsys.readouterr().err
