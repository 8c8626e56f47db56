"""onnxruntime-gpu's own CUDA provider on a machine without a GPU: over a CUDA runtime that computes nothing and counts (fake_cuda.c).

    libraries = build(folder, unpacked)                   # unpacked: an onnxruntime-gpu wheel, unzipped
    found = steps([bundle.folder, ...], libraries, unpacked, rows=3)

`steps` opens each bundle's cuda.onnx in a child process with enable_cuda_graph, which ONNX Runtime refuses where a node is not on
CUDA, runs a prompt and four steps, and gives what the provider did in each: launches, copies, synchronizations, recordings, replays,
kernels by name; "recorded X" while it recorded. With how="backend", runtime/cuda_backend.py does it, and tells of more steps after a
fork, a truncation and growth.
"""

import ctypes
import enum
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
CAPACITY, TOKENS = 64, 16


def build(folder: Path, unpacked: Path) -> Path:
    """The libraries that the provider asks for, compiled into `folder`: fake_cuda.c, and for every other function one that gives 0
    (and something to hold on to, where it is called ...Create)."""
    source = (HERE / "fake_cuda.c").read_text()
    needed = re.findall(r"\[(libcu\w+\.so\.\d+)\]", _said("readelf", "-d", unpacked / PROVIDER))
    wanted: dict[str, list[str]] = {name: [] for name in needed}
    for name, library in re.findall(r" U (_*(?:cu|nv)\w+)(?:@(\S+))?$", _said("nm", "-D", unpacked / PROVIDER), re.M):
        wanted[library or "libcuda.so.1"].append(name)
    for library, names in sorted(wanted.items(), key=lambda item: "cudart" not in item[0]):       # which the others call
        stubs = folder / f"{library}.c"
        cudart = library.startswith("libcudart")
        stubs.write_text("int fake_cuda_note(const char *);\n" + "".join(
            f'long {name}(void **first) {{ {"*first = first; " if "Create" in name else ""}return fake_cuda_note("{name}"); }}\n'
            for name in names if not re.search(rf"\b{name}\(", source)))
        (folder / f"{library}.map").write_text(f"{library} {{ global: *; }};\n")
        rest = [HERE / "fake_cuda.c"] if cudart else [f"-L{folder}", "-l:" + next(name for name in wanted if "cudart" in name)]
        subprocess.run(["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", folder / library, stubs, *rest, f"-Wl,-soname,{library}",
                        f"-Wl,--version-script={folder / library}.map"], check=True)
    return folder


def steps(bundles: list[Path], libraries: Path, unpacked: Path, rows: int, how: str = "session") -> list[dict]:
    """What the provider did for each bundle: {"prompt": {...}, "steps": [{...}, ...]}, or {"error": text}. how: "session", "backend"."""
    path = {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{unpacked}{os.pathsep}{HERE.parent}"}
    done = subprocess.run([sys.executable, __file__, how, str(rows), *map(str, bundles)], env=os.environ | path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _said(*command) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def _session(folder: str, rows: int, report) -> dict:
    import numpy as np
    import onnxruntime

    from runtime.bundle import open_bundle
    from runtime.nbits import made
    bundle, options, kept = open_bundle(folder), onnxruntime.SessionOptions(), []

    def value(array, device="cuda"):
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
        return kept[-1]
    weights = dict(made(bundle))
    options.add_external_initializers(list(weights), [value(array, "cpu") for array in weights.values()])
    session = onnxruntime.InferenceSession(str(bundle.path("cuda.onnx")), options,
                                           providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    types = {"tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(int64)": np.int64, "tensor(float)": np.float32}
    inputs = {i.name: i for i in session.get_inputs()}
    caches = {name: value(np.zeros((rows, i.shape[1], CAPACITY, i.shape[3]), types[i.type]))
              for name, i in inputs.items() if name.startswith("past_")}
    found = {}
    for name, tokens, start, graph, times in (("prompt", TOKENS, 0, -1, 1), ("steps", 1, TOKENS, 1, 4)):
        binding, how = session.io_binding(), onnxruntime.RunOptions()
        how.add_run_config_entry("gpu_graph_id", str(graph))
        feed = {"input_ids": np.ones((rows, tokens), np.int64), "position_ids": np.tile(np.arange(start, start + tokens), (rows, 1)),
                "logits_positions": np.zeros((rows, 1), np.int64), "seqlens_k": np.full(rows, start + tokens - 1, np.int32)}
        for key, array in feed.items():
            if key in inputs:
                binding.bind_ortvalue_input(key, value(array))
        longest = np.array(CAPACITY if start else tokens, np.int32)
        binding.bind_ortvalue_input("total_sequence_length", value(longest, "cpu"))
        for key, cache in caches.items():
            binding.bind_ortvalue_input(key, cache)
            binding.bind_ortvalue_output(key.replace("past_", "present_"), cache)
        for out in session.get_outputs():
            if "present_" not in out.name:
                binding.bind_ortvalue_output(out.name, value(np.zeros((rows, 1, *out.shape[2:]), types[out.type])))
        report()
        found[name] = []
        for _ in range(times):
            session.run_with_iobinding(binding, how)
            found[name].append(report())
    return {"prompt": found["prompt"][0], "steps": found["steps"]}


class Runtime:
    """cuda.bindings.runtime, as far as runtime/cuda_device.py calls it, over the library: functions that give (error, result)."""

    cudaError_t = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2,
                                                     "cudaMemcpyDeviceToDevice": 3})
    cudaDeviceAttr = types.SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaStreamNonBlocking = 1

    def __getattr__(self, name: str):
        function, gives = getattr(ctypes.CDLL("libcudart.so.13"), name), "Malloc" in name or "Create" in name or "Attribute" in name

        def call(*arguments):
            found = ctypes.c_size_t(0)
            passed = [ctypes.c_size_t(int(argument)) for argument in arguments]
            error = self.cudaError_t(function(*([ctypes.byref(found)] if gives else []), *passed))
            return (error, found.value) if gives else (error,)
        return call

    def cudaGetDeviceProperties(self, device: int):
        return self.cudaError_t.cudaSuccess, types.SimpleNamespace(name="no GPU")

    def cudaMemGetInfo(self):
        return self.cudaError_t.cudaSuccess, 70 << 30, 80 << 30


def _backend(folder: str, rows: int, report) -> dict:
    import numpy as np
    import onnxruntime

    from runtime import decode
    from runtime.bundle import open_bundle
    from runtime.cuda_backend import CudaBackend
    from runtime.sampling import Sampler, SamplingOptions
    backend = CudaBackend(open_bundle(folder), onnxruntime=onnxruntime, cuda=Runtime())
    cache, found = backend.new_cache(rows, CAPACITY), {"how": backend.how, "opening": report()}

    def step() -> dict[str, int]:
        backend.step_rows(cache, np.full(rows, 5), [Sampler(SamplingOptions(), np.array([3])) for _ in range(rows)])
        return report()
    decode.prefill(backend, cache, [np.arange(3, 12 + row) for row in range(rows)])
    found |= {"prompt": report(), "steps": [step() for _ in range(5)]}
    cache.fork(0, rows - 1)
    cache.truncate(0, 4)
    report()
    found["after"] = [step()]
    cache.grow(2 * cache.capacity)
    report()
    found["after"] += [step() for _ in range(4)]
    return found


def _main(how: str, rows: str, *folders: str) -> None:
    library, text = ctypes.CDLL("libcudart.so.13"), ctypes.create_string_buffer(1 << 20)

    def report() -> dict[str, int]:
        library.fake_cuda_report(text, len(text))
        return {name: int(calls) for name, _, calls in (line.rpartition(" ") for line in text.value.decode().splitlines())}
    results = []
    for folder in folders:
        try:
            results.append({"session": _session, "backend": _backend}[how](folder, int(rows), report))
        except Exception as error:                            # ONNX Runtime's, of a class for each status
            results.append({"error": str(error)})
    print(json.dumps(results), flush=True)
    os._exit(0)                                               # what the library frees at the end is not its own


if __name__ == "__main__":
    _main(*sys.argv[1:])
