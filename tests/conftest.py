"""Fixtures shared by every room's tests."""

import fcntl
import hashlib
import shutil
import time
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an fp32 checkpoint folder off the 4-bit grid; made once and kept between runs.

    Kept under a name made of the sources it came from, so that a change of them makes it anew.
    """
    from models import get
    sources = b"".join((REPOSITORY / "models" / f"{name}.py").read_bytes() for name in SMOLLM2_SOURCES)
    folder = CACHE / f"smollm2-offgrid-{hashlib.sha256(sources).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "smollm2.lock", "w") as lock:                       # two test runs may start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            assert get.main(["smollm2-135m-instruct", "-o", str(folder), "--off-grid"]) == 0
            for old in CACHE.glob("smollm2-offgrid-*"):
                if time.time() - old.stat().st_mtime > 3600:              # a run that started earlier may still read it
                    shutil.rmtree(old)
    return folder


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
