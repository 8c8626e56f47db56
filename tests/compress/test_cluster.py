"""Two local workers of Ray against one process: the same results, with a worker killed in the middle of its piece; addresses that are none."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress import cluster as clusters
from compress import quantize
from compress.quantizing.sensitivity import measure_sensitivity
from compress.teacher import build_cache, main
from models.checkpoint import open_checkpoint
from models.network.quantized import TensorFormat
from runtime.errors import DeviceError, UserError

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(0, 384, (40, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def two_workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "available_cpus", lambda: 2)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)            # where workers find this file
        with clusters.cluster("local", "cpu") as joined:
            yield joined


def dies_once(mark: Path, piece: int, device: torch.device) -> tuple[int, int, str]:
    """The first worker that has piece 3 kills itself, in the middle of it, as a machine that is switched off does."""
    if piece == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return piece * piece, os.getpid(), device.type


def dies_always(piece: int, device: torch.device) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(piece: int, device: torch.device) -> None:
    raise UserError("--length is 0, which should be more")


def loses_its_device(mark: Path, piece: int, device: torch.device) -> int:
    if not mark.exists():
        mark.touch()
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    return os.getpid()


def test_a_killed_worker_costs_a_piece_done_again(two_workers, tmp_path):
    assert two_workers.workers == 2
    found = list(two_workers.share(partial(dies_once, tmp_path / "mark"), range(8)))
    assert [square for square, _, _ in found] == [n * n for n in range(8)] and (tmp_path / "mark").exists()
    assert len({pid for _, pid, _ in found}) >= 2 and {kind for _, _, kind in found} == {"cpu"}


def test_a_worker_that_lost_its_device_is_replaced(two_workers, tmp_path):
    assert list(two_workers.share(partial(loses_its_device, tmp_path / "mark"), [0]))[0] != os.getpid()


def test_failures_are_told(two_workers):
    with pytest.raises(DeviceError, match="lost the workers of one piece 4 times .*run the same command again"):
        list(two_workers.share(dies_always, [0]))
    with pytest.raises(UserError, match="^--length is 0, which should be more$"):
        list(two_workers.share(refuses, [0]))
    with pytest.raises(UserError, match="no/checkpoint is not there on .*, a worker of the Ray cluster"):
        clusters.held(open_checkpoint, Path("/no/checkpoint"))


def test_a_cache_made_by_two_workers(two_workers, tiny_checkpoint, tmp_path, monkeypatch):
    """Equal to the byte; and after a stop it goes on."""
    path = tiny_checkpoint("smollm2")
    wanted = build_cache(path, IDS, tmp_path / "one", 16, "fp32")
    share, asked = clusters.Cluster.share, []

    def stopping(self, work, pieces):
        for found in share(self, work, pieces):
            if len(asked) == 1:
                asked.append("stop")
                raise KeyboardInterrupt
            asked.append(len(found["ids"]))
            yield found
    monkeypatch.setattr(clusters.Cluster, "share", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_cache(path, IDS, tmp_path / "two", 16, "fp32", shared=two_workers)
    found = build_cache(path, IDS, tmp_path / "two", 16, "fp32", shared=two_workers)
    assert asked == [16, "stop", 16, 8] and found.state == wanted.state
    for name in ("ids", "indices", "log_probabilities", "others"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("family", ("smollm2", "gemma4"))
def test_sensitivity_by_two_workers(family, two_workers, tiny_checkpoint, tmp_path):
    """A layer's damages are the same up to G, whose windows are added in the same order; and what is kept is not made again."""
    checkpoint, formats = open_checkpoint(tiny_checkpoint(family)), [TensorFormat(4, 32), TensorFormat(8, 0), TensorFormat(3, 128)]
    wanted = measure_sensitivity(checkpoint, IDS[:10], formats)
    found = measure_sensitivity(checkpoint, IDS[:10], formats, work=tmp_path / "work", cluster=two_workers)
    assert found.damage.keys() == wanted.damage.keys()
    for module, row in wanted.damage.items():
        assert found.damage[module] == pytest.approx(row, rel=1e-5)
    assert {file.stem for file in (tmp_path / "work").iterdir()} == {"gradients-0", "gradients-4", "gradients-8"} | {
        f"layer-{number}" for number in range(len(checkpoint.config.layers))}
    before = time.monotonic()
    assert measure_sensitivity(checkpoint, IDS[:10], formats, work=tmp_path / "work").damage == found.damage
    assert time.monotonic() - before < 10


def test_a_cluster_joined_by_its_address(two_workers, tiny_checkpoint, tmp_path):
    """By a process of its own, as a user's: its cache is the one made here."""
    import ray
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 40)
    line = [str(tiny_checkpoint("smollm2")), "--data", str(tmp_path / "text.txt"), "--windows", "20", "--length", "16", "--precision", "fp32", "-o"]
    assert main([*line, str(tmp_path / "one")]) == 0
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-m", "compress.teacher", *line, str(tmp_path / "two"), "--ray", address, "--device", "cpu"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (next((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one.name == two.name
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_quantizing_with_two_workers(two_workers, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """The same codes, and nothing left beside them."""
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 100)
    line = [str(tiny_checkpoint("smollm2")), "--data", str(tmp_path / "text.txt"), "--windows", "6", "--length", "32", "--target-bpw", "6", "-o"]
    assert quantize.main([*line, str(tmp_path / "one")]) == 0
    monkeypatch.setattr(quantize, "cluster", lambda *asked: nullcontext(two_workers))
    assert quantize.main([*line, str(tmp_path / "two"), "--ray", "local"]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "text.txt", "two"]
    assert quantize.main([line[0], "-o", str(tmp_path / "three"), "--ray", "local"]) == 2
    assert "--ray shares out the measuring of sensitivity, which --method rtn does without" in capsys.readouterr().err


@pytest.mark.parametrize("address, said", (
    ("127.0.0.1:1", "nothing answers there"), ("no-such-host.invalid:6379", "nothing answers there"),
    ("127.0.0.1", "which should be HOST:PORT"), ("ray://127.0.0.1:10001", "which should be HOST:PORT"), ("127.0.0.1:99999", "nothing answers")))
def test_addresses_that_are_none(address, said, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 40)
    begun = time.monotonic()
    assert main([str(tiny_checkpoint("smollm2")), "--data", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out"), "--ray", address]) == 2
    error = capsys.readouterr().err
    assert f"error: --ray {address}" in error.replace("is '", "").replace("'", "") and said in error and time.monotonic() - begun < 20
