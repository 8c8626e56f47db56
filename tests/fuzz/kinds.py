"""The kinds of things that are damaged, and how to know whether what came out is right.

A kind has originals, a `damage` and a `trial` (trials.py), and a `judge`: "ran" where the result is the original's,
"changed" where the damage may change it and an oracle that is not ours agrees (transformers, the `gguf` package, ONNX
Runtime against the native core), else "wrong: why".
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from models.families.family import INERT_KEYS
from tests.fuzz import trials
from tests.fuzz.trials import CHAT, IDS, TEXTS

def same(ours, theirs, tolerance: float = 1e-3) -> bool:
    """Logits agree, relative to their spread; where one has values that are not finite, so has the other."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    finite = np.isfinite(ours)
    if ours.shape != theirs.shape or not (finite == np.isfinite(theirs)).all():
        return ours.shape == theirs.shape and not (finite.all() or np.isfinite(theirs).all())
    spread = max(1e-6, np.abs(theirs[finite]).max(initial=0))
    return bool(np.abs(ours[finite] - theirs[finite]).max(initial=0) <= tolerance * spread)


# ---- judges: (original folder, damaged folder, touched, the original's result, the result) -> verdict

FUNCTION = ("model", "weights", "graphs", "engines", "tokenizer", "chat_template", "files")      # of a manifest


def judge_bundle(original, folder, touched, before, after, provider=None) -> str:
    if after == before:
        return "ran"
    names = {name for name, _ in touched}
    tokens, rest = after["tokens"] == before["tokens"], {k: v for k, v in after.items() if k != "tokens"} == {k: v for k, v in before.items() if k != "tokens"}
    manifest = [path for name, path in touched if name == "manifest.json"]
    if any(not path or path[0] in FUNCTION for path in manifest):
        return "changed"
    if names <= {"tokenizer.json", "chat_template.jinja", "golden.json", "manifest.json"} and not tokens:
        return f"wrong: other tokens, though only {', '.join(sorted(names))} was touched"
    if names <= {"weights.bin", "golden.json", "manifest.json", "portable.onnx", "fast.onnx"} and not rest and tokens:
        return "changed"
    if names == {"weights.bin"}:
        return _backends_agree(folder)
    if names <= {"golden.json", "manifest.json"}:
        return f"wrong: another result, though only {touched} was touched"
    return "changed"


def _backends_agree(folder: Path) -> str:
    """The native core against ONNX Runtime over the same damaged weights, both without rounding of their own."""
    from runtime.bundle import open_bundle
    from runtime.native.backend import NativeBackend
    from runtime.ort_backend import OrtBackend
    bundle = open_bundle(folder)
    if not bundle.graph("portable"):
        return "changed"
    ids, logits = np.array(IDS[:1]), []
    for backend in (NativeBackend(bundle, threads=1, exact=True), OrtBackend(bundle, threads=1, role="portable", exact=True)):
        cache = backend.new_cache(1, 64)
        logits.append(backend.forward(ids, np.arange(ids.shape[1])[None], np.zeros(1, np.int64), np.array([[ids.shape[1] - 1]]), cache).copy())
    if not all(np.isfinite(l).all() and np.abs(l).max() < 1e6 for l in logits):
        return "changed"
    return "changed" if same(*logits, tolerance=0.02) else f"wrong: native and ONNX Runtime differ by {np.abs(logits[0] - logits[1]).max():.3g}"


def judge_golden(original, folder, touched, before, after) -> str:
    if after == before:
        return "ran"
    return "wrong: fewer comparisons, and all kept" if after["compared"] < before["compared"] else "changed"


def judge_checkpoint(original, folder, touched, before, after) -> str:
    """transformers on the same folder; a quantized one is first written out by what its format says in words."""
    names = {name for name, _ in touched}
    if same(after["logits"], before["logits"], 1e-5):
        if after["chat"] == before["chat"] or names & {"chat_template.jinja", "tokenizer_config.json"}:
            return "ran" if after["chat"] == before["chat"] else "changed"
        return "wrong: another prompt"
    try:
        _as_typed(original, folder)
        theirs = _transformers(folder)
    except Exception as error:                       # it refuses in many ways
        return f"wrong: transformers refuses it ({type(error).__name__}: {error}".split("\n")[0][:300] + ")"
    if theirs is None or not all(np.isfinite(logits).all() for logits in (after["logits"], theirs)):
        return "changed"                             # weights so large that the order of a sum decides where it overflows
    return "changed" if same(after["logits"], theirs) else "wrong: transformers gives other logits"


def _as_typed(original: Path, folder: Path) -> None:
    """Write whole numbers as floats where the original has floats: transformers asks for the type, we for the number.
    And the original's values of keys that nobody computes with, whose types it checks as well."""
    def typed(ours, theirs):
        if isinstance(ours, dict) and isinstance(theirs, dict):
            return {key: typed(value, theirs.get(key)) for key, value in ours.items()}
        return float(ours) if type(ours) is int and isinstance(theirs, float) else ours

    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (folder, original))
    kept = {key: value for key, value in theirs.items() if key in ours and INERT_KEYS.search(key) and key != "use_sliding_window"}
    (folder / "config.json").write_text(json.dumps(typed(ours, theirs) | kept))


def _transformers(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, logging
    logging.set_verbosity_error()
    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization_config"):
        if config["quantization_config"].get("activations") or config["quantization_config"].get("kv_cache"):
            return None
        folder = _dense(folder, config)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    if any(report[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        raise ValueError(f"keys: {report}")
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS[:1])).logits[0].float().tolist()


def _dense(folder: Path, config: dict) -> Path:
    """Weights as code times scale, less the zero point, group by group: a reader of its own."""
    from safetensors.torch import load_file, save_file
    import torch
    tensors, out = load_file(folder / "model.safetensors"), folder / "dense-for-the-oracle"
    out.mkdir()
    forms = config.pop("quantization_config")["tensors"]
    for module, form in forms.items():
        codes, scales = tensors.pop(f"{module}.codes"), tensors.pop(f"{module}.scales").float()
        bits, zeros = form["bits"], tensors.pop(f"{module}.zeros", None)
        raw = np.unpackbits(codes.numpy(), axis=1, bitorder="little")
        width = raw.shape[1] // bits
        values = (raw[:, :width * bits].reshape(len(raw), width, bits) * (1 << np.arange(bits))).sum(-1)
        group = form["group"] or width
        shift = np.full(scales.shape, 1 << (bits - 1)) if zeros is None else zeros.numpy()
        signed = values - np.repeat(shift, group, axis=1)[:, :width]
        tensors[f"{module}.weight"] = torch.from_numpy(signed * np.repeat(scales.numpy(), group, axis=1)[:, :width]).float()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def judge_gguf(original, folder, touched, before, after) -> str:
    """The `gguf` package's own dequantization of the damaged file: the same numbers in every tensor, in any order of rows."""
    if after == before:
        return "ran"
    import gguf
    from models.formats.gguf_file import GGUFFile
    reader = gguf.GGUFReader(folder / "model.gguf")
    theirs = sorted(round(float(np.nansum(np.abs(gguf.dequantize(t.data, t.tensor_type).astype(np.float64)))), 4) for t in reader.tensors
                    if t.name != "rope_freqs.weight")
    ours = sorted(round(float(np.nansum(np.abs(tensor.double().numpy()))), 4) for _, tensor in GGUFFile(folder / "model.gguf").tensors())
    return "changed" if len(ours) != len(theirs) or np.allclose(ours, theirs, rtol=1e-5) else "wrong: other numbers than the gguf package reads"


def judge_tokenizer(original, folder, touched, before, after) -> str:
    """The `tokenizers` library with truncation and padding off."""
    import tokenizers
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation(), theirs.no_padding()
    if after["ids"] != [theirs.encode(text).ids for text in TEXTS]:
        return "wrong: other ids than the tokenizers library gives"
    return "ran" if after == before else "changed"


def judge_template(original, folder, touched, before, after) -> str:
    if after == before:
        return "ran"
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    source = (folder / "chat_template.jinja").read_text()
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), bos_token="<s>", eos_token="</s>", chat_template=source)
        theirs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        return f"wrong: transformers refuses it ({type(error).__name__}: {error})"
    return "changed" if after["text"] == theirs or "strftime_now" in source else f"wrong: transformers renders {theirs[:80]!r}, we {after['text'][:80]!r}"


def judge_foreign(original, folder, touched, before, after) -> str:
    if after == before:
        return "ran"
    function = any(name != "config.json" or not path or path[0] != "quantization_config" or path[-1] in ("bits", "num_bits", "group_size")
                   for name, path in touched)
    return "changed" if function else f"wrong: other weights, though only {touched} was touched"


def judge_data(original, folder, touched, before, after) -> str:
    return "changed"


@dataclasses.dataclass(frozen=True)
class Kind:
    originals: Callable[[Path], list[Path]]
    damage: Callable
    trial: Callable[[Path], dict]
    judge: Callable[..., str]


KINDS = {
    "native": Kind(trials.native_bundles, trials.damage_bundle, partial(trials.run_bundle, provider="native"), judge_bundle),
    "bundle": Kind(trials.bundles, trials.damage_bundle, trials.run_bundle, judge_bundle),
    "onnx": Kind(trials.bundles, partial(trials.damage_bundle, only=("fast.onnx", "portable.onnx")),
                 partial(trials.run_bundle, provider="cpu"), judge_bundle),
    "golden": Kind(trials.bundles, partial(trials.damage_bundle, only=("golden.json",)), trials.run_golden, judge_golden),
    "checkpoint": Kind(trials.checkpoints, trials.damage_checkpoint, trials.run_checkpoint, judge_checkpoint),
    "gguf": Kind(trials.ggufs, trials.damage_bytes, trials.run_gguf, judge_gguf),
    "foreign": Kind(trials.foreign, trials.damage_checkpoint, trials.run_foreign, judge_foreign),
    "tokenizer": Kind(trials.tokenizers, trials.damage_json, trials.run_tokenizer, judge_tokenizer),
    "template": Kind(trials.templates, trials.damage_template, trials.run_template, judge_template),
    "data": Kind(trials.data_files, trials.damage_data, trials.run_data, judge_data),
}
