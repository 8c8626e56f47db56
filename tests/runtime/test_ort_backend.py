"""ONNX Runtime behind the backend interface, against PyTorch behind the same interface."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from models.checkpoint import load_decoder
from models.network.torch_backend import TorchBackend
from runtime import decode
from runtime.bundle import open_bundle
from runtime.errors import DeviceError, UserError
from runtime.ort_backend import OrtBackend
from runtime.sampling import Sampler, SamplingOptions

FAMILIES = ["smollm2", "llama", "mistral", "qwen2", "qwen3", "gpt2"]
TOLERANCE = 2e-4                  # of a logit, float32


@pytest.fixture
def pair(tiny_bundle):
    """pair(family, bits=None, **OrtBackend options) -> the backend and PyTorch's."""
    def make(family="smollm2", bits=None, **options):
        checkpoint, bundle = tiny_bundle(family, bits)
        return OrtBackend(open_bundle(bundle), **options), TorchBackend(load_decoder(checkpoint))
    return make


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 380, n) for n in lengths]


def close(got, want):
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.abs(got - want).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["portable", "fast"])
def test_every_way_through_the_cache(pair, family, role):
    """Ragged prefill, steps, fork, truncation, a chunk on one row's view, growth: each must give PyTorch's logits."""
    backends = pair(family, role=role)
    caches = [backend.new_cache(3, 64) for backend in backends]

    def both(act):
        close(*(act(backend, cache).copy() for backend, cache in zip(backends, caches)))

    first, more, last = prompts_of(23, 9, 17), prompts_of(1, 1, 1, seed=1), prompts_of(12, seed=2)
    both(lambda backend, cache: decode.prefill(backend, cache, first))
    for tokens in more:
        both(lambda backend, cache: decode.step(backend, cache, np.repeat(tokens, 3)))
    for cache in caches:
        cache.fork(0, 2)
        cache.truncate(0, 11)
        cache.truncate(0, 99)
    assert [cache.lengths.tolist() for cache in caches] == [[11, 12, 26]] * 2
    both(lambda backend, cache: decode.step(backend, cache, np.array([5, 6, 7])))
    both(lambda backend, cache: decode.prefill(backend, cache.view(1, 2), last))
    for cache in caches:
        cache.grow(128)
    both(lambda backend, cache: decode.step(backend, cache.view(1, 3), np.array([8, 9])))
    assert [cache.lengths.tolist() for cache in caches] == [[12, 26, 28]] * 2


@pytest.mark.parametrize("role", ["portable", "fast"])
def test_several_positions_of_logits(pair, role):
    backends = pair(role=role)
    ids = np.stack(prompts_of(10, 10))
    positions, start = np.tile(np.arange(10), (2, 1)), np.zeros(2, np.int64)
    wanted = np.array([[0, 9, 4], [3, 3, 1]])
    close(*(backend.forward(ids, positions, start, wanted, backend.new_cache(2, 16)) for backend in backends))


@pytest.mark.parametrize("role", ["portable", "fast"])
def test_decoding_gives_pytorchs_tokens(pair, role):
    prompts, texts = prompts_of(3, 40, 11), []
    for backend in pair(role=role):
        sequences = [decode.Sequence(p, Sampler(SamplingOptions(), p), n) for p, n in zip(prompts, (60, 20, 90))]
        cache = backend.new_cache(3, 64)                    # grows, and rows leave it
        for _ in decode.run(backend, cache, sequences):
            pass
        texts.append([s.tokens for s in sequences])
    assert texts[0] == texts[1] and [len(t) for t in texts[0]] == [60, 20, 90]


@pytest.mark.parametrize("bits", [4, 8])
def test_exact_computes_from_the_codes(pair, bits):
    prompt = prompts_of(30)
    ort, torch = pair(bits=bits, exact=True)
    fused, _ = pair(bits=bits, role="portable")
    logits = [decode.prefill(b, b.new_cache(1, 64), prompt)[0].copy() for b in (ort, torch, fused)]
    assert ort.graph == "portable.onnx"
    assert np.abs(logits[0] - logits[1]).max() < TOLERANCE
    assert np.abs(logits[2] - logits[1]).max() > 2 * TOLERANCE      # int8 activations, where exact is not asked for


def test_the_fast_graph_is_preferred_and_a_role_insisted_on(tiny_bundle):
    bundle = open_bundle(tiny_bundle()[1])
    assert OrtBackend(bundle).graph == "fast.onnx" and OrtBackend(bundle).max_chunk_rows == 1
    assert OrtBackend(bundle, role="portable").graph == "portable.onnx"
    assert OrtBackend(bundle, role="portable").max_chunk_rows is None
    bundle.manifest["graphs"] = [bundle.graph("portable")]
    assert OrtBackend(bundle).graph == "portable.onnx"
    with pytest.raises(UserError, match="no fast graph for ONNX Runtime.*export.ort"):
        OrtBackend(bundle, role="fast")
    bundle.manifest["graphs"] = []
    with pytest.raises(UserError, match="no fast or portable graph for ONNX Runtime.*export.onnx"):
        OrtBackend(bundle)


def test_the_cache_is_updated_in_place_and_nothing_is_copied(tiny_bundle):
    backend = OrtBackend(open_bundle(tiny_bundle()[1]))
    cache = backend.new_cache(2, 64)
    assert cache.nbytes == backend.cache_bytes(2, 64) == sum(b.nbytes for b in cache.storage)
    before = [buffer.ctypes.data for buffer in cache.storage]
    decode.prefill(backend, cache, prompts_of(5, 7))
    for buffer in cache.storage:
        used = np.abs(buffer).sum((1, 3)) > 0               # [rows, slots]
        assert used[:, :7].all() and not used[:, 7:].any()
    first = decode.step(backend, cache, np.array([5, 6]))
    second = decode.step(backend, cache, np.array([7, 8]))
    assert np.shares_memory(first, second)                  # the logits' buffer stays, too
    assert [buffer.ctypes.data for buffer in cache.storage] == before
    view = cache.view(1, 2)
    assert view.nbytes == backend.cache_bytes(1, 64) and np.shares_memory(view.lengths, cache.lengths)


def test_many_shapes_on_one_cache(pair):
    ort, torch = pair()
    caches = [b.new_cache(1, 256) for b in (ort, torch)]
    for n in range(1, 14):
        close(*(decode.prefill(b, c, prompts_of(n, seed=n)).copy() for b, c in zip((ort, torch), caches)))
    assert len(caches[0]._bindings) <= 8


def test_no_memory_for_a_cache_is_a_sentence(tiny_bundle):
    backend = OrtBackend(open_bundle(tiny_bundle()[1]))
    with pytest.raises(UserError, match="no memory for a KV cache"):
        backend.new_cache(1, 1 << 48)


@pytest.fixture
def tampered(tiny_bundle, tmp_path):
    """tampered(change): a copy of a tiny bundle whose fast graph `change` has edited, sizes set right again."""
    def make(change):
        source = tiny_bundle()[1]
        for path in source.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        graph = onnx.load(tmp_path / "fast.onnx", load_external_data=False)
        change(graph)
        onnx.save(graph, tmp_path / "fast.onnx")
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["files"]["fast.onnx"]["bytes"] = (tmp_path / "fast.onnx").stat().st_size
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return open_bundle(tmp_path)
    return make


def external(graph):
    return [t for t in graph.graph.initializer if t.external_data]


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd"])
def test_a_graph_may_not_read_outside_the_bundle(tampered, tmp_path, location):
    def change(graph):
        for tensor in external(graph):
            tensor.external_data[0].value = location
    (tmp_path.parent / "outside.bin").write_bytes(bytes(1 << 20))
    with pytest.raises(UserError, match=f"reads the file '{location}', which the manifest does not list"):
        OrtBackend(tampered(change))


def test_a_graph_that_fails_while_it_runs_is_a_sentence(tampered):
    def change(graph):
        for node in graph.graph.node:
            node.input[:] = ["seven" if name == "input_ids" else name for name in node.input]
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, 7]), "sizes"))
        graph.graph.node.insert(0, onnx.helper.make_node("Reshape", ["input_ids", "sizes"], ["seven"]))
    backend = OrtBackend(tampered(change))
    with pytest.raises(UserError, match="fast.onnx: ONNX Runtime cannot run it: .*; export the bundle again") as caught:
        decode.prefill(backend, backend.new_cache(1, 64), prompts_of(5))
    assert not isinstance(caught.value, DeviceError)


@pytest.mark.parametrize("field, value", [("dim_param", "heads"), ("dim_value", 0)])
def test_a_graph_whose_cache_is_none(tampered, field, value):
    def change(graph):
        cache = next(i for i in graph.graph.input if i.name == "past_key.0")
        setattr(cache.type.tensor_type.shape.dim[1], field, value)
    with pytest.raises(UserError, match="fast.onnx: .* not those of this model"):
        OrtBackend(tampered(change))


def test_a_cache_length_fixed_in_the_graph(tampered):
    def change(graph):
        for value in (*graph.graph.input, *graph.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == "capacity":
                    dim.dim_value = 64
    backend = OrtBackend(tampered(change))
    assert backend.new_cache(2, 64).capacity == 64
    with pytest.raises(UserError, match="cache of 64 slots fixed in it; 128 cannot"):
        backend.new_cache(2, 128)
