"""Fixtures shared by every room's tests."""

import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from ending import pytest_exception_interact, pytest_sessionstart, pytest_unconfigure, pytest_xdist_make_scheduler    # noqa: F401  (hooks)

with suppress(ImportError):        # of PyTorch, or of what an older one lacks; first of all, see there
    import far                      # noqa: F401

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / "build" / "test-cache"
SMOLLM2_SOURCES = ("get", "formats/gguf_file", "formats/gguf_tokenizer", "network/offgrid")    # modules whose change may change the checkpoint


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and labelled sets beside the repository; a test that needs them is skipped where they are absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this repository")
    return folder


@pytest.fixture
def device(monkeypatch):
    """A device that is not the CPU: the GPU where there is one, else tests/far.py's, which finds what a GPU would refuse."""
    import torch
    if torch.cuda.is_available():
        # A GPU's TF32 and a CPU's bfloat16 differ by more than any stage should.
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
        yield torch.device("cuda", 0)
        return
    import far
    with far.present() as device:
        yield device


def kept(name: str, sources: Iterable[Path], make: Callable[[Path], int]) -> Path:
    """A folder that `make` writes, once for all processes and runs, under a name made of the sources it came from: a change of them
    makes it anew."""
    sums = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    folder = CACHE / f"{name}-{sums.hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:                       # two test runs may start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            assert make(folder) == 0
            for old in CACHE.glob(f"{name}-*"):
                if time.time() - old.stat().st_mtime > 3600:              # a run that started earlier may still read it
                    shutil.rmtree(old)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an fp32 checkpoint folder off the 4-bit grid."""
    from models import get
    return kept("smollm2-offgrid", (REPOSITORY / "models" / f"{name}.py" for name in SMOLLM2_SOURCES),
                lambda folder: get.main(["smollm2-135m-instruct", "-o", str(folder), "--off-grid"]))


@pytest.fixture(scope="session")
def smollm2_int4(smollm2) -> Path:
    """The same as `compress.quantize` leaves it by default: 4 bits in groups of 32, the table in 8."""
    from compress import quantize
    sources = [smollm2 / "config.json", *sorted(REPOSITORY.glob("compress/**/*.py")), *sorted(REPOSITORY.glob("models/**/*.py"))]
    return kept("smollm2-int4", sources, lambda folder: quantize.main([str(smollm2), "-o", str(folder)]))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """tiny_checkpoint(family, seed=0, **Hugging Face config fields) -> folder of a random two-layer model.

    family: llama (untied, Llama-3 RoPE scaling), smollm2, mistral (window of 16), qwen2, qwen3, gpt2.
    """
    from tiny import write_tiny
    made = {}

    def make(family: str = "smollm2", seed: int = 0, **config) -> Path:
        key = repr((family, seed, sorted(config.items())))
        if key not in made:
            made[key] = write_tiny(tmp_path_factory.mktemp(family), family, seed, **config)
        return made[key]

    return make
