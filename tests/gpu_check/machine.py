"""What the machine is: the GPU, its driver and free memory, and the versions of what is installed, beside our lower bounds."""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator

from gpu_check.apart import ROOT
from gpu_check.place import Place, Row
from runtime.machine import available_cpus, available_memory, cpu_name

SEEN = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "tokenizers", "gguf", "onnx", "onnxruntime", "onnxruntime-gpu",
        "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "ray", "pytest")
OURS = ("runtime", "runtime.engine", "runtime.cuda_backend", "models.device", "models.checkpoint", "models.training.trainer",
        "models.finetune", "models.evaluate", "compress.quantize", "compress.distill", "compress.teacher", "export.onnx", "export.ort",
        "export.trt", "export.verify")


def environment(place: Place) -> Iterator[Row]:
    yield Row("python", f"{platform.python_version()}, {platform.system()} {platform.release()}")
    yield Row("processor", f"{cpu_name()}, {available_cpus()} CPUs, {(available_memory() or 0) / 1e9:.0f} GB of memory free")
    yield from _gpu(place.device)
    bounds = lower_bounds()
    for name in SEEN:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        low = name in bounds and below(version, bounds[name])
        yield Row(name, f"{version}, below the tested {bounds[name]}" if low else version)
    for name in OURS:
        try:
            importlib.import_module(name)
        except Exception as error:
            yield Row(f"import {name}", f"{type(error).__name__}: {error}", ok=False)
    if shutil.which("cc") is None and importlib.util.find_spec("runtime.native._core") is None:
        yield Row("native core", "not built, and no C compiler")
    yield Row("imports", f"{len(OURS)} modules of ours looked at")


def _gpu(device: str) -> Iterator[Row]:
    fields = ("name", "driver_version", "compute_cap", "memory.total", "memory.free", "clocks.max.sm", "power.limit")
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True)
        for number, line in enumerate(asked.stdout.splitlines()):
            yield Row(f"GPU {number}", ", ".join(f"{field} {value.strip()}" for field, value in zip(fields, line.split(","))))
    if device == "cuda":
        import torch
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        yield Row("PyTorch's GPU", f"{torch.cuda.get_device_name()}, SM{major}{minor}, CUDA {torch.version.cuda}, "
                                   f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    try:
        import onnxruntime
        yield Row("onnxruntime runs on", ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()))
    except ImportError as error:
        yield Row("onnxruntime", f"cannot be imported: {error}")


def lower_bounds() -> dict[str, str]:
    """Package -> the lowest version of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *(line for part in project["optional-dependencies"].values() for line in part)]
    return {found[1]: found[2] for line in lines if (found := re.match(r"([\w-]+)(?:\[\w+\])?[>=]=([\d.]+)", line))}


def below(version: str, bound: str) -> bool:
    first, second = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (version.partition("+")[0], bound))
    return first < second
