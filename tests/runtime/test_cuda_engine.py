"""Engines on CUDA, over a double of the GPU: the interface an app sees, stepping down, and everything that may be missing on a machine."""

import ctypes
import re
import sys

import pytest
import test_interface
from cuda_double import Cuda, OnnxRuntime, cuda_is_there, opened

from runtime import Engine, backends, cuda_opening, decode, generate
from runtime.bundle import open_bundle
from runtime.cuda_backend import CudaBackend
from runtime.errors import DeviceError, Unavailable

SEEN = ["test_a_misspelt_option_is_told", "test_a_stream_is_given_up", "test_tokens_have_their_texts_beside_their_log_probabilities"]


@pytest.mark.parametrize("name", SEEN)
def test_the_interface_that_an_app_sees(name, golden_bundle, tiny_bundle, monkeypatch):
    monkeypatch.setitem(test_interface.ON_THE_CPU, "provider", "cuda")
    monkeypatch.setattr(decode, "BURST_S", 0)                     # else one piece may be the whole reply
    with cuda_is_there():
        for bundle in (golden_bundle, tiny_bundle("smollm2", 4, "fp16")[1]):
            getattr(test_interface, name)(bundle)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 20, "seed": 3, "n": 3}, {"logprobs": 2, "repetition_penalty": 1.2}],
                         ids=str)
def test_replies_are_the_cpus(tiny_bundle, options):
    """In float32, where the graph is the CPU's own: batches that end row by row, and caches that grow."""
    replies = []
    with cuda_is_there():
        for provider in ("cpu", "cuda"):
            with Engine(tiny_bundle("qwen2", None, "fp32")[1], provider=provider, threads=1) as engine:
                made = engine.generate(["Once upon", "a", "The sea is"], max_new_tokens=70, **options)
                replies.append([(reply.text, reply.tokens, reply.finish_reason) for reply in made])
    assert replies[0] == replies[1]


def test_explain_names_the_graph_and_the_recording(tiny_bundle):
    with cuda_is_there():
        with Engine(tiny_bundle("smollm2", 4, "fp16")[1], provider="cuda") as engine:
            assert engine.explain() == "onnxruntime-cuda runs cuda.onnx (Double, the step recorded)"
        with Engine(tiny_bundle("qwen2")[1], provider="cuda") as engine:
            assert engine.explain().startswith("onnxruntime-cuda runs portable.onnx (Double, the step not recorded: only cuda.onnx can be")


@pytest.fixture
def on(tiny_bundle, monkeypatch):
    """on(provider=None) -> (an engine on the double or what comes below, the double)."""
    monkeypatch.delitem(backends._OPEN, "tensorrt")
    monkeypatch.setattr(backends, "PROVIDERS", ("cuda", "native", "cpu"))
    monkeypatch.setattr("runtime.engine.PROVIDERS", ("cuda", "native", "cpu"))
    monkeypatch.setattr(decode, "BURST_S", 0)

    def make(provider=None):
        made = []

        def open_cuda(bundle, threads):
            made.append(opened(bundle, threads=threads))
            return made[0][0]
        monkeypatch.setitem(backends._OPEN, "cuda", open_cuda)
        return Engine(tiny_bundle("smollm2", 4, "fp16")[1], provider=provider, threads=1), made[0][1]
    return make


def test_a_device_lost_in_the_middle_of_a_reply_hands_it_to_the_next(on):
    engine, module = on()
    stream = engine.stream("Once upon", max_new_tokens=40, ignore_model_stop=True)
    text = next(stream)
    module.cuda.lost = True
    text += "".join(stream)
    assert engine.backend.name == "native" and len(stream.reply.tokens) == 40 and text == stream.reply.text
    assert any(line.startswith("no cuda: the GPU failed: cudaErrorDevicesUnavailable") for line in engine.explain().splitlines())


def test_a_device_lost_under_a_provider_insisted_on_is_told(on):
    engine, module = on("cuda")
    stream = engine.stream("Once upon", max_new_tokens=200)
    next(stream)
    module.fail = "CUDA failure 719: unspecified launch failure"
    with pytest.raises(DeviceError, match="ONNX Runtime failed on cuda: CUDA failure 719"):
        list(stream)


def test_no_memory_for_a_cache_steps_down_with_its_bytes(on):
    engine, module = on()
    module.cuda.allowed = 1
    reply, = engine.generate(["Once"] * 3, max_new_tokens=3, ignore_model_stop=True)[:1]
    assert len(reply.tokens) == 3 and engine.backend.name == "native"
    assert re.search(r"no cuda: the KV cache of 3 x 256 tokens \(\d+ MB\) does not fit the GPU", engine.explain())


def test_a_scheduler_counts_the_memory_of_the_device(on):
    engine, module = on("cuda")
    assert engine.scheduler._budget == (8 << 30) // 2
    prompts = ["Once upon", "a time", "there was"]
    together = [engine.submit(prompt, max_new_tokens=30, ignore_model_stop=True) for prompt in prompts]
    before = module.replays
    tokens = [pending.result(60).tokens for pending in together]
    assert tokens == [engine.generate(prompt, max_new_tokens=30, ignore_model_stop=True)[0].tokens for prompt in prompts]
    assert module.replays > before
    engine.close()


# What may be missing on a machine. Each is a line and exit code 2, of a command too.

class Driver:
    """libcuda.so.1, of a driver for this CUDA."""

    def __init__(self, version):
        self.version = version

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.version
        return 0


@pytest.fixture
def machine(monkeypatch):
    """machine(...) makes this one with a GPU, onnxruntime-gpu and CUDA's libraries, but for what is named."""
    def make(driver=13020, packages=("onnxruntime-gpu",), providers=("CUDAExecutionProvider", "CPUExecutionProvider"), missing=(),
             gpu=True, folders=("/site", "/site"), **how):
        load = ctypes.CDLL

        def library(name, *args, **more):
            if name != "libcuda.so.1":
                return load(name, *args, **more)
            if not driver:
                raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
            return Driver(driver)

        def preload_dlls(directory):
            for name in missing:                  # as onnxruntime 1.31.1 prints them
                print(f"Failed to load {name}: {name}: cannot open shared object file: No such file or directory")

        cuda = Cuda(fail=() if gpu else {"cudaSetDevice"}, error="cudaErrorNoDevice")
        module = OnnxRuntime(cuda, **how)
        module.get_available_providers, module.preload_dlls, module.cuda_version = lambda: list(providers), preload_dlls, "13.0"
        monkeypatch.setattr(ctypes, "CDLL", library)
        found = dict(zip(packages, (("1.31.1", folder) for folder in folders)))
        monkeypatch.setattr(cuda_opening, "_installed", found.get)
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        return module
    return make


MISSING = [
    ({"driver": None}, "this machine has no NVIDIA driver"),
    ({"driver": 12040}, r"driver is too old: it runs CUDA 12\.4 at most, and onnxruntime-gpu 1\.31\.\d was built for CUDA 13\.0; update"),
    ({"packages": ("onnxruntime", "onnxruntime-gpu")}, "are both installed.*pip uninstall -y onnxruntime onnxruntime-gpu, then pip install"),
    ({"providers": ("CPUExecutionProvider",)}, "has no CUDA provider; install onnxruntime-gpu in place of onnxruntime"),
    ({"missing": ("libcublasLt.so.13", "libcurand.so.10")},
     r"lacks libcublasLt\.so\.13, libcurand\.so\.10 of CUDA 13\.0; pip install 'onnxruntime-gpu\[cuda,cudnn\]==1\.31"),
    ({"gpu": False}, "no NVIDIA GPU or driver that CUDA can use is here.*cudaErrorNoDevice"),
    ({"on_cpu": True}, "no usable CUDA device")]


@pytest.mark.parametrize("lack, words", MISSING, ids=[next(iter(lack)) for lack, _ in MISSING])
def test_what_a_machine_lacks_is_one_line(machine, tiny_bundle, capsys, lack, words):
    machine(**lack)
    with pytest.raises(Unavailable, match=words):
        backends._OPEN["cuda"](open_it(tiny_bundle), 1)
    capsys.readouterr()
    assert generate.main([str(tiny_bundle("smollm2", 4, "fp16")[1]), "-p", "Once", "--provider", "cuda"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "Traceback" not in told.err
    assert re.search(words, told.err)


def test_one_that_hides_another_of_another_folder_is_no_mistake(machine):
    """onnxruntime-gpu unpacked beside, before the machine's own onnxruntime in PYTHONPATH."""
    module = machine(packages=("onnxruntime", "onnxruntime-gpu"), folders=("/usr/lib/python3/dist-packages", "/unpacked"))
    assert cuda_opening.usable_onnxruntime() is module


def test_where_a_package_is_installed_is_known():
    import numpy
    version, folder = cuda_opening._installed("numpy")
    assert version == numpy.__version__ and folder == numpy.__file__.removesuffix("/numpy/__init__.py")
    assert cuda_opening._installed("no-such-package-at-all") is None


def open_it(tiny_bundle):
    return open_bundle(tiny_bundle("smollm2", 4, "fp16")[1])


def test_a_machine_that_lacks_nothing(machine, tiny_bundle, capsys):
    machine()
    assert generate.main([str(tiny_bundle("smollm2", 4, "fp16")[1]), "-p", "Once", "--provider", "cuda", "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr()
    assert "4 new" in told.err
    machine(driver=13000)                         # one CUDA runs on another of its major version
    assert isinstance(backends._OPEN["cuda"](open_it(tiny_bundle), 1), CudaBackend)
