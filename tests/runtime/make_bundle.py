"""A bundle around files that are no model: enough for everything that does not run the graph."""

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 259                       # 256 bytes, <s>, </s>, <pad>
BOS, EOS, PAD = 256, 257, 258
CHATML = ("{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}[assistant]{% endif %}")


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; then three special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={c: byte for byte, c in _bytes_to_unicode().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


def write_bundle(folder: Path, *, template: str | None = CHATML, max_context: int = 512, generation: dict | None = None,
                 **changes) -> Path:
    """Write the files and a manifest for them; `changes` are top-level manifest fields to replace."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.arange(64, dtype=np.float32)
    (folder / "weights.bin").write_bytes(weights.tobytes())
    (folder / "fast.onnx").write_bytes(b"not a graph")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    manifest = {
        "format": "edgewright-bundle", "version": 1, "name": "fake",
        "model": {"config": {"vocab_size": VOCAB, "hidden_size": 8, "head_dim": 4}, "max_context": max_context,
                  "bos_token_id": BOS, "eos_token_ids": [EOS], "pad_token_id": PAD, "generation": generation or {}},
        "graphs": [{"role": "fast", "file": "fast.onnx", "dtype": "fp32", "opset": 24, "weights": "weights.bin"}],
        "engines": [],
        "weights": {"file": "weights.bin", "bytes": 256, "tensors": [
            {"name": "a", "dtype": "float32", "shape": [4, 8], "offset": 0, "bytes": 128},
            {"name": "b.codes", "dtype": "int4", "shape": [3, 5], "offset": 128, "bytes": 8},
            {"name": "c.codes", "dtype": "uint3", "shape": [2, 5], "offset": 192, "bytes": 4}]},
        "tokenizer": "tokenizer.json", "chat_template": None if template is None else "chat_template.jinja",
        "golden": None, "lineage": [], **changes}
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json with the sizes and hashes of what is in the folder, unless it brings its own."""
    if "files" not in manifest:
        files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
        manifest = manifest | {"files": {path.name: {"bytes": path.stat().st_size,
                                                     "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in files}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
