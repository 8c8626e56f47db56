"""Every stage on a device of its own gives what it gives on the CPU: on the GPU where there is one, else on tests/far.py's, which
refuses what a GPU would refuse. A stage that forgets to move a tensor fails here."""

import os

import pytest
import torch

from compress.layerwise import Walk, second_moment
from families import KINDS
from models import device as devices
from models.checkpoint import load_decoder, open_checkpoint
from runtime.errors import DeviceError, UserError

IDS = torch.randint(0, 384, (6, 40), generator=torch.Generator().manual_seed(0))


def close(one: torch.Tensor, other: torch.Tensor, within: float = 1e-4) -> bool:
    return (one.cpu() - other.cpu()).norm() <= within * other.norm()


@pytest.mark.parametrize("family", KINDS)
def test_a_decoder_loaded_to_a_device(family, tiny_checkpoint, device):
    path = tiny_checkpoint(family)
    wanted = load_decoder(path)(IDS)
    found = load_decoder(path, device=device)(IDS.to(device))
    assert found.device == device and close(found, wanted)


@pytest.mark.parametrize("family", KINDS)
def test_layers_that_come_for_their_turn(family, tiny_checkpoint, device, monkeypatch):
    """With memory for all but the layers: they give the same, and the same gradients."""
    path = tiny_checkpoint(family)
    gradients = []

    def run(decoder, ids):
        decoder.requires_grad_(False)
        table = decoder.model.embed_tokens.weight.requires_grad_(True)
        logits = decoder(ids)
        logits.square().mean().backward()
        gradients.append(table.grad.cpu())
        return logits.detach()
    wanted = run(load_decoder(path), IDS)
    monkeypatch.setattr("models.network.streamed.free_bytes", lambda device: 1000)
    decoder = load_decoder(path, device=device)
    assert all(tensor.is_meta for layer in decoder.model.layers for tensor in layer.parameters())
    assert close(run(decoder, IDS.to(device)), wanted) and close(*gradients[::-1], within=1e-3)
    assert all(tensor.is_meta for layer in decoder.model.layers for tensor in layer.parameters())


@pytest.mark.parametrize("family, home", [*((family, "device") for family in KINDS), *(
    (family, home) for family in ("smollm2", "lfm2_moe", "gemma4") for home in ("memory", "file"))])
def test_a_walk_layer_by_layer(family, home, tiny_checkpoint, device):
    checkpoint = open_checkpoint(tiny_checkpoint(family))
    walks = Walk(checkpoint, IDS, rows=4), Walk(checkpoint.on(device), IDS, home=home, rows=4)
    found = [], []
    for walk, moments in zip(walks, found):
        for _, layer in walk.layers("test"):
            inputs = walk.inputs(layer, second_moment)
            walk.step(layer, lambda names, parts: moments.append(second_moment(parts)))
            moments.extend(inputs.values())
    assert len(found[0]) == len(found[1]) and all(map(close, *found))
    assert all(moment.device == device for moment in found[1])
    assert close(walks[1].x.home, walks[0].x.home)
    assert walks[1].x.home.device == (device if home == "device" else torch.device("cpu"))


def test_where_activations_are_kept(monkeypatch):
    from compress import activations
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(activations, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(activations, "available_memory", lambda: 4000)      # of which half is for what PyTorch rounds up
    assert [activations.home_for(*needed, gpu) for needed in ((800,), (801,), (1600,), (1601,))] == ["device", "memory", "memory", "file"]
    assert activations.home_for(700, gpu, beside=200) == "memory"
    assert [activations.home_for(needed, torch.device("cpu")) for needed in (800, 801)] == ["device", "file"]


def test_a_disk_too_small_for_activations(monkeypatch, tmp_path):
    from compress.activations import room
    with pytest.raises(UserError, match="no room for .* of activations.*TMPDIR"):
        room((1 << 40, 1 << 20), "file", torch.device("cpu"))


def test_a_file_of_activations_has_its_room_from_the_beginning(monkeypatch):
    """A mapping of a file with holes ends the process where the disk is full at last."""
    from compress.activations import room
    took, mapped = [], torch.from_file

    def looked_at(name, **how):
        took.append(os.stat(name).st_blocks * 512)
        return mapped(name, **how)
    monkeypatch.setattr(torch, "from_file", looked_at)
    assert room((1000, 1000), "file", torch.device("cpu")).shape == (1000, 1000) and took[0] >= 4_000_000


@pytest.mark.parametrize("asked", ("gpu", "cuda:", "cuda:x", "CUDA", "cuda:1000", ""))
def test_what_is_no_device(asked):
    with pytest.raises(UserError, match="--device is .*, which should be auto, cpu, cuda or cuda:N"):
        devices.DeviceOptions(device=asked)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find_device("auto") == devices.find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="--device cuda: the installed PyTorch .* is built without CUDA"):
        devices.find_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"--device cuda:0: PyTorch .* finds no GPU here .*leave --device out"):
        devices.find_device("cuda:0")

    def old_driver():
        import warnings
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update")
        return False
    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    with pytest.raises(UserError, match="driver is too old: it serves CUDA 11.4, and PyTorch .* needs 13.0"):
        devices.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.find_device("cuda:1") == torch.device("cuda", 1) and devices.find_device("auto") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="--device cuda:2: this machine has 2 GPUs, from cuda:0 on"):
        devices.find_device("cuda:2")


def test_a_device_that_fails_is_told_in_a_sentence():
    with pytest.raises(UserError, match="cpu has too little memory: 20.00 GiB asked for with .* GB free: .*smaller batch"):
        with devices.computing_on("cpu"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    with pytest.raises(DeviceError, match="cpu failed .*unspecified launch failure.*run the same command again"):
        with devices.computing_on("cpu"):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")
    for error in (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
                  RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")):
        with pytest.raises(UserError, match="cpu has too little memory: more asked for"):
            with devices.computing_on("cpu"):
                raise error
        assert devices.smaller(2, lambda rows, error=error: rows if rows == 1 else _raise(error)) == (1, 1)
    with pytest.raises(RuntimeError, match="^another$"):
        with devices.computing_on("cpu"):
            devices.smaller(2, lambda rows: _raise(RuntimeError("another")))


def _raise(error):
    raise error


def test_the_device_is_the_current_one_meanwhile(monkeypatch):
    from contextlib import contextmanager
    current = []

    @contextmanager
    def made_current(device):
        current.append(device.index)
        yield
        current.append(None)
    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(devices, "find_device", lambda asked: torch.device("cuda", 1))
    with devices.computing_on("cuda:1") as device:
        assert current == [1] and device.index == 1
    assert current == [1, None]


def test_the_next_smaller_batch_is_tried():
    tried = []

    def work(rows):
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError
        return "done"
    assert devices.smaller(16, work) == ("done", 2) and tried == [16, 8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        devices.smaller(2, lambda rows: work(9))
