"""Repacked weights in a file beside the bundle: read when they are this bundle's and whole, else made anew, and never trusted."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from runtime import Engine
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.native.backend import NativeBackend

HEADER = 256


@pytest.fixture(scope="module")
def two(tiny_bundle, tmp_path_factory):
    """Two models of one shape in 4 bits, each with its file of tiles: folder, path of the tiles, tokens of a reply."""
    from compress import quantize
    from export import onnx
    folder, made = tmp_path_factory.mktemp("two"), []
    shutil.copytree(tiny_bundle("smollm2", 4)[1], folder / "a")
    from tiny import write_tiny
    write_tiny(folder / "checkpoint", "smollm2", seed=1)
    assert quantize.main([str(folder / "checkpoint"), "-o", str(folder / "q"), "--bits", "4", "--group", "32"]) == 0
    assert onnx.main([str(folder / "q"), "-o", str(folder / "b")]) == 0
    for name in "ab":
        assert reply(folder / name, repack_cache=True) == reply(folder / name)
        tiles, = (folder / name).glob(".weights.bin.*.tiles")
        made.append((folder / name, tiles, reply(folder / name)))
    assert made[0][2] != made[1][2] and made[0][1].stat().st_size == made[1][1].stat().st_size
    return made


def reply(folder, **options) -> list[int]:
    with Engine(folder, provider="native", threads=1, **options) as engine:
        return engine.generate([5, 6, 7], max_new_tokens=24, ignore_model_stop=True)[0].tokens


@pytest.fixture
def copy(two, tmp_path):
    folder = shutil.copytree(two[0][0], tmp_path / "bundle")
    return folder, folder / two[0][1].name


def checksum(arena: bytes) -> str:
    """As tiles.c has it, in Python's integers."""
    lanes, mask = [0] * 8, (1 << 64) - 1
    for i, word in enumerate(np.frombuffer(arena, np.uint64).tolist()):
        mixed = ((lanes[i % 8] ^ word) * 0x9e3779b97f4a7c15) & mask
        lanes[i % 8] = (mixed << 29 | mixed >> 35) & mask
    return "".join(f"{(lane ^ lane >> 32) & 0xffffffff:08x}" for lane in lanes)


def forged(whole: bytes, arena: bytes) -> bytes:
    """A file of this arena whose header is right."""
    old, new = checksum(whole[HEADER:]), checksum(arena)
    assert old.encode() in whole[:HEADER]                      # so the checksum is what the core computes
    return whole[:HEADER].replace(old.encode(), new.encode()) + arena


def test_the_file_is_what_runs_and_is_never_run_when_verifying(two, copy):
    """A forged file shows that it is read; with verify=True it is not."""
    folder, tiles = copy
    whole, tokens = tiles.read_bytes(), two[0][2]
    tiles.write_bytes(forged(whole, two[1][1].read_bytes()[HEADER:]))
    assert reply(folder, repack_cache=True) != tokens
    assert reply(folder, repack_cache=True, verify=True) == tokens == reply(folder)


def test_another_models_file_is_never_run(two, copy):
    folder, tiles = copy
    whole = tiles.read_bytes()
    for other in (two[1][1].read_bytes(), whole[:HEADER] + two[1][1].read_bytes()[HEADER:]):
        tiles.write_bytes(other)
        assert reply(folder, repack_cache=True) == two[0][2]
        assert tiles.read_bytes() == whole                     # made anew


def test_the_file_is_bound_to_the_configuration(copy):
    """Of the same weights.bin (whose table of tensors the configuration decides)."""
    folder, tiles = copy
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["config"]["activation"] = "gelu"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert reply(folder, repack_cache=True) == reply(folder)
    assert len(list(folder.glob(".weights.bin.*.tiles"))) == 2


def test_a_damaged_file_is_made_anew(two, copy):
    folder, tiles = copy
    whole, random = tiles.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:-1], whole + b"\0", b"", whole[:HEADER], b"x" + whole[1:], bytes(len(whole))]
    for at in [HEADER, len(whole) - 1, *random.integers(HEADER, len(whole), 20)]:
        for bit in (0, 7):
            damaged.append(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
    swapped = bytearray(whole)                                 # two lines of 64 bytes change places
    swapped[4096:4160], swapped[8192:8256] = whole[8192:8256], whole[4096:4160]
    for content in [*damaged, bytes(swapped)]:
        tiles.write_bytes(content)
        NativeBackend(open_bundle(folder), threads=1, repack_cache=True).close()
        assert tiles.read_bytes() == whole
    assert reply(folder, repack_cache=True) == two[0][2]


def test_scales_that_are_not_finite_are_refused_on_both_roads(copy):
    folder, tiles = copy
    whole = tiles.read_bytes()
    for value in (0x7c00, 0x7e00, 0xfc00):                     # infinity, NaN, minus infinity
        tiles.write_bytes(forged(whole, value.to_bytes(2, "little") + whole[HEADER + 2:]))
        with pytest.raises(UserError, match="is not a finite number"):
            NativeBackend(open_bundle(folder), threads=1, repack_cache=True)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "broken link", "link to a device"])
@pytest.mark.parametrize("name", ["", ".partial"])
def test_what_is_no_file_is_neither_waited_for_nor_followed_nor_replaced(two, copy, tmp_path, kind, name):
    folder, tiles = copy
    whole, place = tiles.read_bytes(), tiles.with_name(tiles.name + name)
    tiles.unlink()
    (tmp_path / "mine").write_bytes(forged(whole, two[1][1].read_bytes()[HEADER:]))
    before = (tmp_path / "mine").read_bytes()
    {"fifo": lambda: os.mkfifo(place), "folder": place.mkdir, "link": lambda: place.symlink_to(tmp_path / "mine"),
     "broken link": lambda: place.symlink_to(tmp_path / "new"), "link to a device": lambda: place.symlink_to("/dev/zero")}[kind]()
    mode = place.lstat().st_mode
    signal.alarm(20)                                           # which ends a run that blocks
    assert reply(folder, repack_cache=True) == two[0][2]
    signal.alarm(0)
    assert place.lstat().st_mode == mode and (tmp_path / "mine").read_bytes() == before and not (tmp_path / "new").exists()
    assert name == "" or not tiles.exists()


def test_a_file_of_another_name_is_not_written_through_a_hard_link(copy, tmp_path):
    folder, tiles = copy
    tiles.unlink()
    (tmp_path / "mine").write_bytes(b"precious")
    os.link(tmp_path / "mine", f"{tiles}.partial")
    NativeBackend(open_bundle(folder), threads=1, repack_cache=True).close()
    assert (tmp_path / "mine").read_bytes() == b"precious"


OPEN = """import sys
from runtime.bundle import open_bundle
from runtime.native.backend import NativeBackend
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    NativeBackend(open_bundle(sys.argv[1]), threads=1, repack_cache=True).close()
"""


def test_processes_that_write_at_once_leave_one_whole_file(two, copy):
    folder, tiles = copy
    whole = tiles.read_bytes()
    tiles.unlink()
    tiles.with_name(tiles.name + ".partial").write_bytes(b"what a killed writer left")
    running = [subprocess.Popen([sys.executable, "-c", OPEN, str(folder), "1"], stdin=subprocess.PIPE) for _ in range(4)]
    for process in running:
        process.communicate(b"\n")
        assert process.returncode == 0
    assert tiles.read_bytes() == whole and [path.name for path in folder.glob(".*")] == [tiles.name]


def test_a_full_disk_leaves_nothing(two, copy):
    folder, tiles = copy
    tiles.unlink()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder), "1"], input=b"\n", preexec_fn=limit)
    assert done.returncode == 0 and not list(folder.glob(".*"))
