"""`make gpu-check` itself, on the CPU: every check is reached and says its figures, one that raises, hangs or dies is told and takes
nothing with it, and what should be found wrong is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gpu_check import __main__ as command
from gpu_check.apart import Check, outcome_of, run_apart, work
from gpu_check.decode import rung
from gpu_check.machine import below, lower_bounds
from gpu_check.place import Place, Row
from gpu_check.prepare import prepare

ROOT = Path(__file__).parents[1]
APART = ("devices", "gpu tests")                # what runs pytest: those tests are part of this run anyway
CHECKS = [check.name for check in command.CHECKS if check.name not in APART]

BAD = '''
import os, subprocess, sys, time
from gpu_check.place import Row
from runtime.errors import CheckFailed, Unavailable, UserError

def fine(place, *words):
    yield Row("words", " ".join(words))

def refused(place):
    yield Row("before", 1.0)
    raise UserError("the file is no file")

def absent(place):
    raise Unavailable("no such device")
    yield

def unpacked(place):
    import surely_not_installed
    yield

def broken(place):
    yield Row("before", 2.0, "s")
    return {}["key"]

def hung(place):
    print("waiting for a device")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Row("child", float(child.pid))
    time.sleep(600)

def dead(place):
    yield Row("before", 3.0)
    os.kill(os.getpid(), 11)

def gone(place):
    print("leaving")
    yield Row("before", 4.0)
    os._exit(3)

def wrong(place):
    yield Row("proof", 0.5, "nats", ok=False)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "bad_checks.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "work").mkdir()
    return Place(tmp_path / "work", "cpu")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_that_goes_wrong_takes_nothing_with_it(place):
    names = ("fine a b", "refused", "absent", "unpacked", "broken", "hung", "dead", "gone", "wrong", "fine")
    found, file = [], place.work / "found.json"
    command.run_checks([Check(name.replace(" ", "-"), f"bad_checks:{name}", 6 if name == "hung" else 60) for name in names], place, found, file)
    assert [outcome.ended for outcome in found] == ["done", "failed", "not here", "not here", "failed", "hung", "crashed", "crashed", "done", "done"]
    said = {outcome.check: outcome.said for outcome in found}
    assert said["refused"] == "the file is no file" and said["absent"] == "no such device" and "surely_not_installed" in said["unpacked"]
    assert "KeyError: 'key'" in said["broken"] and "it last said: child" in said["hung"] and "SIGSEGV" in said["dead"] and "exit code 3" in said["gone"]
    assert [outcome.bad for outcome in found] == [False, True, False, False, True, True, True, True, True, False]
    assert all(outcome.rows for outcome in found if outcome.check not in ("absent", "unpacked"))        # kept, however it ended
    assert found[0].rows[0].value == "a b"
    assert json.loads(file.read_text())["checks"][6]["rows"][0]["value"] == 3.0
    hung = found[5]
    assert 5 < hung.seconds < 30
    deadline = time.monotonic() + 5
    while alive(int(hung.rows[0].value)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(hung.rows[0].value)), "what a killed check had started lives on"


def test_a_check_that_is_stopped_keeps_its_rows(place):
    timer, found = threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)), []
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        command.run_checks([Check("hung", "bad_checks:hung", 60), Check("fine", "bad_checks:fine", 60)], place, found, place.work / "found.json")
    assert [outcome.ended for outcome in found] == ["stopped"] and found[0].rows
    assert json.loads((place.work / "found.json").read_text())["checks"][0]["ended"] == "stopped"


def test_the_minutes_are_for_all_of_them(place, monkeypatch):
    monkeypatch.setattr(command, "MINUTES", 4 / 60)
    found = []
    command.run_checks([Check("first", "bad_checks:hung", 60), Check("second", "bad_checks:fine", 60)], place, found, None)
    assert [outcome.ended for outcome in found] == ["hung", "not reached"] and found[0].seconds < 10


def test_every_check_in_little_on_the_cpu(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    """In this process, which has loaded PyTorch; the other tests have checks in their own."""
    def here(check, place, seconds):
        results = place.work / f"{check.name}.jsonl"
        work(check.where, str(results), json.dumps(place.to_json()))
        return outcome_of(check.name, 0, 1.0, results, place.work / "no.log")

    monkeypatch.setattr(command, "run_apart", here)
    file = tmp_path / "found.json"
    code = command.main(["--device", "cpu", "--model", str(tiny_checkpoint("smollm2")), "--json", str(file), "--only", *CHECKS])
    printed, found = capsys.readouterr().out, {one["check"]: one for one in json.loads(file.read_text())["checks"]}
    assert code == 0, printed
    assert list(found) == CHECKS
    assert {name for name, one in found.items() if one["ended"] != "done"} <= {"tensorrt"}, printed
    figures = {(name, row["what"]): row["value"] for name, one in found.items() for row in one["rows"]}
    for name in ("train", "lora", "distill", "teacher", "evaluate"):
        assert figures[name, "speed"] > 0
    for name in ("cuda fp16", "fast fp16", "portable fp16", "portable fp32"):
        assert 0 <= figures[name, "KL to the exact CPU run"] < 0.1 and figures[name, "decode"] > 0 and figures[name, "host memory"] > 10
    assert figures["rounding", "tensors equal to the CPU's"] == "35 of 35"
    assert 0 < figures["gptq", "KL to the original"] < 10
    assert "engine fp16" in printed and "TensorRT engines run on an NVIDIA GPU alone" in printed
    assert not list(Path(tmp_path).glob("gpu-check-*"))


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("prepared"), "cpu", str(tiny_checkpoint("smollm2")))
    assert [row.what for row in prepare(place)] == ["model", "fp32 bundle", "fp16 bundle", "prepared in"]
    return place


def test_logits_that_are_wrong_are_found(prepared):
    """The reference shifted by one token: no runner says that."""
    rows = {row.what: row for row in rung(prepared, "fp32", "portable")}
    assert rows["KL to the exact CPU run"].ok is True
    reference = dict(np.load(prepared.work / "reference.npz"))
    np.savez(prepared.work / "reference.npz", ids=reference["ids"], logits=np.roll(reference["logits"], 1, axis=0))
    rows = {row.what: row for row in rung(prepared, "fp32", "portable")}
    np.savez(prepared.work / "reference.npz", **reference)
    assert rows["KL to the exact CPU run"].ok is False


def test_codes_that_differ_are_found(prepared):
    from safetensors.torch import load_file, save_file
    assert run_apart(Check("rounding", "gpu_check.stages:rounding", 60), prepared, 60).rows[-1].ok is True
    shutil.rmtree(prepared.work / "rounded")
    file = prepared.work / "int4" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.codes"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    last = run_apart(Check("rounding", "gpu_check.stages:rounding", 60), prepared, 60).rows[-1]
    assert last.ok is False and name in last.value


def test_tests_that_fail_are_a_failure(tmp_path):
    from gpu_check.outside import _pytest
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_a(): assert 1 == 2\ndef test_b(): pytest.skip('no such GPU')\n"
                                         "def test_c(): pytest.skip('no such GPU')\ndef test_d(): pass\n")
    rows = list(_pytest("it", str(tmp_path / "test_it.py")))
    assert rows[0] == Row("2 skipped", "no such GPU") and "test_a" in rows[1].value and rows[-1].ok is False
    assert "1 failed, 1 passed, 2 skipped" in rows[-1].value


def copy_of_the_tracked_files(folder: Path) -> Path:
    """Without .venv, without the built native core."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    for name in filter(None, listed.stdout.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_it_runs_from_a_copy_with_nothing_installed_and_stops_with_what_it_has(tmp_path, tiny_checkpoint):
    """From another folder, with an environment of PYTHONPATH alone; a SIGTERM in the middle leaves a whole JSON file."""
    folder, file = copy_of_the_tracked_files(tmp_path / "copy"), tmp_path / "found.json"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-m", "tests.gpu_check", "--device", "cpu", "--model", str(tiny_checkpoint("smollm2")),
                                "--json", str(file)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("fast fp16"):
            process.send_signal(signal.SIGTERM)
            break
    printed = "".join(printed) + process.stdout.read()
    assert process.wait(60) == 130, printed
    ended = {one["check"]: one["ended"] for one in json.loads(file.read_text())["checks"]}
    assert ended["environment"] == ended["prepare"] == ended["fast fp16"] == "done" and len(ended) < len(command.CHECKS)
    assert "fast fp16" in printed.partition("GPU check on cpu")[2]
    assert not list(tmp_path.glob("gpu-check-*"))


def test_without_a_gpu(capsys):
    import torch
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert command.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "--device cuda" in said.err


@pytest.mark.parametrize("words, sentence", [
    (("--only", "trains"), "--only 'trains' is no check: there are environment, prepare"),
    (("--model", "/no/such", "--device", "cpu"), "--model /no/such: there is none"),
    (("--json", "/no/such/found.json", "--device", "cpu"), "--json /no/such/found.json: no such folder to write it in"),
    (("--model", "a", "--gguf", "b"), "both name the model")])
def test_what_cannot_be_used(words, sentence, capsys):
    assert command.main(list(words)) == 2
    assert sentence in capsys.readouterr().err


def test_versions_below_what_is_tested():
    bounds = lower_bounds()
    assert {"torch", "transformers", "onnxruntime", "numpy", "accelerate"} <= set(bounds)
    assert below("5.17.0", "5.23") and below("2.11.0+cu130", "2.13") and not below("2.13.0+cpu", "2.13") and not below("5.100", "5.23")


def test_shares_of_targets():
    assert Row("speed", 600.0, "tokens/s", 1200.0).share() == 0.5 and Row("load", 2.0, "s", 1.0).share() == 0.5
    assert Row("fact", "text").share() is None


@pytest.mark.parametrize("there, code", [
    ("a GPU", "torch.cuda.is_available = lambda: True\nimport far\nprint(torch._C._get_privateuse1_backend_name())"),
    ("an older PyTorch", "from torch.utils import backend_registration\ndel backend_registration._DummyPrivateUse1Hook\n"
                         "try: import far\nexcept ImportError as error: print(error)")])
def test_the_fake_device_keeps_out_of_the_way(there, code):
    """PyTorch prefers a registered device to the GPU, and an older PyTorch has no way to register one: tests there go on without it."""
    run = subprocess.run([sys.executable, "-c", "import torch\n" + code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert ("privateuseone" if there == "a GPU" else "cannot have the far device") in run.stdout
