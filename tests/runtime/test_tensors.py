"""Every tensor that a bundle's model has is in its table, and every one in the table is the model's: else it is refused by name."""

import copy

import pytest
from checkpoints import small_config, write_bundle

from export import onnx as export_onnx
from export import ort
from models.network.quantized import TensorFormat
from runtime.backends import open_backend
from runtime.bundle import Bundle, open_bundle
from runtime.errors import UserError
from runtime.native.backend import NativeBackend
from runtime.ort_backend import OrtBackend
from runtime.tensors import check_tensors
from runtime.trt_backend import TrtBackend

GPT2 = dict(norm="layer", positions="learned", activation="gelu_tanh", gated_mlp=False, attention_bias=True, output_bias=True,
            mlp_bias=True)
MODELS = {                                               # configuration, format of each module
    "zero points, biases, an untied head": (small_config(tied_embeddings=False, attention_bias=True, output_bias=True, mlp_bias=True),
                                            lambda module: TensorFormat(4, 32, False)),
    "q and v apart, norms of q and k": (small_config("qwen3", qk_norm=True), lambda module: TensorFormat(
        8 if "v_proj" in module else 4, 0, "up_proj" not in module)),
    "levels and scales of a byte": (small_config(), lambda module: TensorFormat(
        2, 32, kind="levels", scale_bits=8) if "up_proj" in module else TensorFormat(4, 64, kind="levels") if "q_proj" in module else
        TensorFormat(8, 32, "k_proj" in module, scale_bits=8)),
    "bit streams": (small_config(), lambda module: TensorFormat(3, 32, False)),
    "gpt2": (small_config("gpt2", layers=((4, 4, 96),) * 2, **GPT2), lambda module: None)}


@pytest.fixture(scope="module", params=MODELS)
def bundle(request, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle"), *MODELS[request.param])[0]


def changed(bundle: Bundle, change) -> Bundle:
    manifest = copy.deepcopy(bundle.manifest)
    change(manifest)
    return Bundle(bundle.folder, manifest)


def refused(bundle: Bundle, change, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        check_tensors(changed(bundle, change))


def test_each_missing_tensor_is_named(bundle):
    check_tensors(bundle)
    for number, tensor in enumerate(bundle.manifest["weights"]["tensors"]):
        refused(bundle, lambda m: m["weights"]["tensors"].pop(number), tensor["name"])
        refused(bundle, lambda m: m["weights"]["tensors"][number].update(name="other"), tensor["name"])


def test_a_manifest_from_before_formats_were_told(bundle):
    def older(manifest):
        del manifest["weights"]["formats"], manifest["model"]["kv_cache"]

    if any({"kind", "scale_bits"} & set(form) for form in bundle.manifest["weights"]["formats"].values()):       # which those had not
        refused(bundle, older, "export the bundle again")
        return
    check_tensors(changed(bundle, older))
    for number, tensor in enumerate(bundle.manifest["weights"]["tensors"]):
        if not tensor["name"].endswith(".zeros"):
            refused(bundle, lambda m: (older(m), m["weights"]["tensors"].pop(number)), "weights")


def test_each_tensor_is_held_to_its_type_shape_and_place(bundle):
    tensors = bundle.manifest["weights"]["tensors"]
    for number, tensor in enumerate(tensors):
        name, shape = tensor["name"], tensor["shape"]
        refused(bundle, lambda m: m["weights"]["tensors"][number].update(offset=tensor["offset"] + 64), name)
        refused(bundle, lambda m: m["weights"]["tensors"][number].update(dtype="int4" if tensor["dtype"] == "uint4" else "uint4"), name)
        refused(bundle, lambda m: m["weights"]["tensors"][number].update(shape=[*shape, 1]), name)
        if len(set(shape)) > 1:
            refused(bundle, lambda m: m["weights"]["tensors"][number].update(shape=shape[::-1]), name)
    for first, second in ((0, 1), (3, 5)):
        def swap(m):
            m["weights"]["tensors"][first], m["weights"]["tensors"][second] = tensors[second], tensors[first]
        refused(bundle, swap, tensors[first]["name"])


def test_what_the_model_has_no_place_for_is_named(bundle):
    def add(m, name):
        m["weights"]["tensors"].append(m["weights"]["tensors"][-1] | {"name": name})
    for name in ("layers.0.o.other", "layers.9.o.weight", "head.bias", "layers.0.attn_norm.bias_", "embed.zeros_"):
        refused(bundle, lambda m: add(m, name), name)
    refused(bundle, lambda m: add(m, "final_norm.weight"), "listed twice")
    refused(bundle, lambda m: m["weights"]["formats"].update({"layers.9.o": {"bits": 4, "group": 32, "symmetric": True}}), "layers.9.o")


def test_the_configuration_and_the_formats_decide(bundle):
    for number, (name, form) in enumerate(bundle.manifest["weights"]["formats"].items()):
        other = form | {"symmetric": not form["symmetric"]}
        refused(bundle, lambda m: m["weights"]["formats"].update({name: other}), "weights.formats cannot be read" if "kind" in form else f"{name}.zeros")
        refused(bundle, lambda m: m["weights"]["formats"].pop(name), name)
        for key, value in (("bits", 7), ("group", 5), ("kind", "odd"), ("symmetric", 1), ("odd", 1), ("bits", "4"), ("group", None)):
            refused(bundle, lambda m: m["weights"]["formats"][name].update({key: value}), "export the bundle again")
    refused(bundle, lambda m: m["weights"].pop("formats"), "weights.formats cannot be read")
    config = bundle.model["config"]
    for key in ("attention_bias", "output_bias", "mlp_bias", "qk_norm", "gated_mlp", "tied_embeddings"):
        refused(bundle, lambda m: m["model"]["config"].update({key: not config[key]}), "export the bundle again")
    for key, value in (("hidden_size", 32), ("vocab_size", 383), ("head_dim", 8), ("layers", config["layers"][:1]), ("norm", None),
                       ("layers", [*config["layers"], config["layers"][0]]), ("layers", [{"heads": 4}]), ("positions", "rope2")):
        if key != "norm" or config["norm"] == "layer":
            if value != "rope2" or config["positions"] != "rope":
                refused(bundle, lambda m: m["model"]["config"].update({key: value}), "export the bundle again")


def test_levels_are_never_joined(bundle):
    def join(m):
        formats = m["weights"]["formats"]
        formats["layers.0.gate_up"] = {"bits": 2, "group": 32, "symmetric": True, "kind": "levels"}
    refused(bundle, join, "layers.0.gate_up: matrices of levels are stored one by one"
            if bundle.model["config"]["gated_mlp"] else "layers.0.gate_up")


def test_every_backend_refuses(tmp_path):
    """And none is stepped down to: a damaged bundle is not a missing backend."""
    bundle, _ = write_bundle(tmp_path, *MODELS["zero points, biases, an untied head"])
    engine = {"file": "weights.bin", "backend": "rtx", "version": "1", "capacity": 64, "compute_capabilities": [], "profiles": []}
    for name in ("layers.0.down.zeros", "layers.1.qkv.bias", "head.codes", "layers.0.mlp_norm.weight"):
        def drop(m):
            m["weights"]["tensors"] = [t for t in m["weights"]["tensors"] if t["name"] != name]
            m["engines"].append(engine)
        broken = changed(bundle, drop)
        for opening in (NativeBackend, OrtBackend, TrtBackend, lambda b: open_backend(b, None, 1)):
            with pytest.raises(UserError, match=f"lack.* {name}"):
                opening(broken)


def test_caches_and_activations_with_stored_scales(tiny_checkpoint, tmp_path):
    from compress import quantize
    (tmp_path / "text.txt").write_text("The capital of France is Paris, and the capital of Italy is Rome. " * 60)
    assert quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "q"), "--method", "clip", "--bits", "8", "--group", "0",
                          "--data", str(tmp_path / "text.txt"), "--windows", "2", "--length", "32", "--kv-cache", "channel",
                          "--backend", "onnx", "--activations", "8", "--activation-scales", "static"]) == 0
    assert export_onnx.main([str(tmp_path / "q"), "-o", str(tmp_path / "b")]) == 0 and ort.main([str(tmp_path / "b")]) == 0
    bundle = open_bundle(tmp_path / "b")
    check_tensors(bundle)
    names = [tensor["name"] for tensor in bundle.manifest["weights"]["tensors"]]
    scales = [name for name in names if name.endswith(("input_scale", "k_scale", "v_scale"))]
    assert len(scales) == 2 * (3 + 2)                    # qkv, o, gate_up of two layers, and their caches
    for name in scales:
        refused(bundle, lambda m: m["weights"]["tensors"].pop(names.index(name)), name)
    refused(bundle, lambda m: m["model"].update(kv_cache=None), "layers.0.k_scale")
    refused(bundle, lambda m: m["model"].update(activations={}), "layers.0.qkv.input_scale")
