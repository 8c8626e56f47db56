"""What the native backend refuses: options, positions, formats it lacks, files cut short, tables and configurations that were tampered
with, and weights that memory does not hold."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import everywhere, small_config, write_bundle

from models.network.quantized import TensorFormat
from runtime import backends, machine
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.native import backend as module
from runtime.native import library
from runtime.native.backend import NativeBackend
from runtime.tensors import check_tensors

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)


def config(**fields):
    return small_config("llama", **{"context_length": 320, **fields})


@pytest.fixture(autouse=True)
def plenty_of_cpus(monkeypatch):
    monkeypatch.setattr(machine, "available_cpus", lambda: 4)


def test_refusals(tmp_path):
    bundle, _ = write_bundle(tmp_path, config())
    for options, words in [({"threads": 5}, "may use 4 CPUs"), ({"threads": 0}, "may use 4 CPUs"), ({"isa": "avx1024"}, "cannot run"),
                           ({"cache_dtype": "int4"}, "cache_dtype")]:
        with pytest.raises(UserError, match=words):
            NativeBackend(bundle, **options)
    backend = NativeBackend(bundle, threads=1)
    cache = backend.new_cache(1, 16)
    for ids, at, words in [([[999]], 0, "vocabulary"), ([[-1]], 0, "vocabulary"), ([[1]], 32, "outside the cache"), ([[1]], 320, "beyond the context")]:
        with pytest.raises(UserError, match=words):
            backend.forward(np.array(ids), None, np.array([at]), np.zeros((1, 1), np.int64), cache)


@pytest.mark.parametrize("group", [16, 8])
def test_a_group_the_core_lacks_is_refused(tmp_path, group):
    bundle, _ = write_bundle(tmp_path, config(), everywhere(4, group))
    with pytest.raises(UserError, match=f"groups of {group}"):
        NativeBackend(bundle)


def test_what_the_core_lacks_falls_back_with_one_line(tmp_path, monkeypatch, caplog):
    bundle, _ = write_bundle(tmp_path, config(), everywhere(4, 16))
    instead = type("Instead", (), {"name": "onnxruntime-cpu", "graph": "fast.onnx"})()
    monkeypatch.setitem(backends._OPEN, "cpu", lambda bundle, threads: instead)
    with caplog.at_level("INFO"):
        backend, lines = backends.open_backend(bundle, None, 1, below="cuda")
    assert backend is instead and len(lines) == 2 and "groups of 16" in lines[1] and caplog.messages == lines[1:]


def test_a_shortened_file_and_nan_are_refused(tmp_path):
    bundle, _ = write_bundle(tmp_path, config())
    weights = bundle.path("weights.bin")
    data = weights.read_bytes()
    weights.write_bytes(data[:-4096])
    with pytest.raises(UserError, match="beyond the end"):
        NativeBackend(bundle)
    tensors = bundle.manifest["weights"]["tensors"]
    for name in ("layers.1.down.scales", "final_norm.weight", "embed.scales"):
        entry, broken = next(t for t in tensors if t["name"] == name), bytearray(data)
        width = 4 if entry["dtype"] == "float32" else 2
        broken[entry["offset"]:entry["offset"] + width] = b"\xff" * width
        weights.write_bytes(broken)
        with pytest.raises(UserError, match="not a finite number"):
            NativeBackend(bundle)


def some_new(module):
    return TensorFormat(3, 32, kind="levels", scale_bits=8) if "up_proj" in module else everywhere(4, 32)(module)


def test_fuzzed_tables_and_configurations_are_refused_and_never_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "check_tensors", lambda bundle: {"tensors": {}, "activations": {}, "kv_cache": None})
    (bundle, _), random = write_bundle(tmp_path, config(), some_new), np.random.default_rng(0)
    values = [0, -1, 1, 2, 15, 17, 63, 2**20, 2**31 - 1, -2**31]
    opened = 0
    for _ in range(300):
        manifest = json.loads(json.dumps(bundle.manifest))
        if random.random() < 0.5:
            entry = manifest["weights"]["tensors"][random.integers(len(manifest["weights"]["tensors"]))]
            key = random.choice(["dtype", "shape", "offset", "bytes", "name"])
            entry[key] = {"dtype": str(random.choice(list(library.DTYPES))), "offset": int(random.choice(values)) * int(random.integers(1, 99)),
                          "bytes": int(random.choice(values)), "shape": [int(random.choice(values)) for _ in range(random.integers(0, 4))],
                          "name": str(random.choice([t["name"] for t in manifest["weights"]["tensors"]]))}[key]
        else:
            model = manifest["model"]["config"]
            if random.random() < 0.5:
                model["layers"][0][str(random.choice(["heads", "kv_heads", "mlp_size"]))] = int(random.choice(values))
            else:
                model[str(random.choice(["vocab_size", "hidden_size", "head_dim"]))] = int(random.choice(values))
        if manifest != bundle.manifest:
            with pytest.raises(UserError):
                check_tensors(Bundle(bundle.folder, manifest))
        try:                                                 # and the core, by itself, never crashes
            backend = NativeBackend(Bundle(bundle.folder, manifest), threads=1)
            backend.forward(np.zeros((1, 3), np.int64), None, np.zeros(1, np.int64), np.array([[0, 1, 2]]), backend.new_cache(1, 16))
            opened += 1
        except UserError:
            pass
    assert opened < 150


def test_out_of_memory_while_repacking_is_a_sentence(tmp_path):
    bundle, _ = write_bundle(tmp_path, config(vocab_size=200_000, hidden_size=256))
    script = f"""
import json, pathlib, resource, sys, threading
from runtime import backends, decode, machine
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.native.backend import NativeBackend
from runtime.sampling import Sampler, SamplingOptions
folder = pathlib.Path({str(bundle.folder)!r})
threading.stack_size(256 << 10)                   # a thread may have ended and its stack not yet gone
bundle = Bundle(folder, json.loads((folder / 'manifest.json').read_text()))
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (70 << 20), -1))
sizes = []
for _ in range(4):
    try:
        NativeBackend(bundle, threads=1)
        sys.exit('opened')
    except UserError as error:
        assert 'out of memory' in str(error), error
    sizes.append(int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize())
assert sizes[-1] <= sizes[1] + (2 << 20), sizes               # nothing stays behind but an arena of Python's
"""
    # One heap: a thread's own would reserve 64 MB of address space, now and then, of the 70 that the limit leaves.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
