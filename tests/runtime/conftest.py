"""Bundles of tiny random models, exported for real."""

import pytest
from engine_fixtures import engine, open_engine        # noqa: F401  (fixtures)
from page_fixtures import browser, script, scripting, visit     # noqa: F401  (fixtures)
from server_fixtures import serve, served_bundle, server, thinking        # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory):
    """tiny_bundle(family, bits=None | 4 | 8, dtype="fp32") -> (checkpoint, bundle) with every graph that it can have."""
    from compress import quantize
    from export import onnx, ort
    made = {}

    def make(family: str = "smollm2", bits: int | None = None, dtype: str = "fp32"):
        if (family, bits, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{bits}")
            checkpoint = tiny_checkpoint(family)
            if bits:
                assert quantize.main([str(checkpoint), "-o", str(folder / "ckpt"), "--bits", str(bits), "--group", "32"]) == 0
                checkpoint = folder / "ckpt"
            assert onnx.main([str(checkpoint), "-o", str(folder / "bundle"), "--dtype", dtype]) == 0
            assert ort.main([str(folder / "bundle")]) == 0
            made[family, bits, dtype] = checkpoint, folder / "bundle"
        return made[family, bits, dtype]

    return make


@pytest.fixture(scope="session")
def golden_bundle(tiny_bundle):
    """Folder of a full-precision tiny bundle with golden outputs."""
    from export import verify
    checkpoint, bundle = tiny_bundle("qwen2")
    assert verify.main([str(checkpoint), str(bundle), "--threads", "1"]) == 0
    return bundle
