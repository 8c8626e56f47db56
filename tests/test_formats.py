"""The suite of formats (format_suite.py), and what `compress.quantize` gives through the command line, on every backend.

`pytest -s tests/test_formats.py` prints the table of combinations.
"""

import re
from itertools import product

import format_suite
import numpy as np
import pytest
import torch
from checkpoints import small_config, write_random
from format_suite import FLOAT8, GRAPH, NATIVE, ROLES, SMALL, Tally, cases, mean_kl, report, try_case

from compress import quantize
from compress.quantizing.mixed import check_target
from export import onnx as export_onnx
from export import ort
from models.checkpoint import load_decoder, open_checkpoint
from models.network.quantized import TensorFormat
from runtime import Engine
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.native import library

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small cost more to share out than to multiply."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tally():
    tally = Tally.empty()
    yield tally
    print(f"\n{report(tally)}")


TITLES = list(dict.fromkeys(one.title for one in cases()))


@pytest.mark.parametrize("title", TITLES)
def test_every_format_runs_as_pytorch_has_it_or_is_refused(title, tally, tmp_path):
    for number, one in enumerate(one for one in cases() if one.title == title):
        try_case(one, tmp_path / str(number), tally)
    assert not tally.wrong, "\n".join(tally.wrong)


def test_every_combination_was_tried(tally):
    """Each role in each format was compared by each way on each backend that has no reason to refuse it."""
    if not all(title in tally.titles for title in TITLES):
        pytest.skip("the tests before did not all run")
    tried = {key[:4] for key in tally.tried}
    forms = [*GRAPH, *NATIVE, *FLOAT8, *SMALL]
    for key in product(ROLES, forms, format_suite.BACKENDS, format_suite.WAYS):
        assert key in tried, key
    ran = {key[:4] for key in tally.tried if key[-1] == "run"}
    for role, form, backend, way in product(ROLES, forms, format_suite.BACKENDS, format_suite.WAYS):
        assert ((role, form, backend, way) in ran) == (format_suite.refusal(backend, {form}) is None), (role, form, backend)


def test_a_wrong_answer_and_an_unexpected_refusal_are_found(tmp_path, monkeypatch):
    """The suite's own test: a core that opens one code wrongly, a backend that refuses, one that runs what it should refuse."""
    one = next(cases())
    backends = {name: format_suite.BACKENDS[name] for name in ("native exact", "portable exact")}
    tally, opened = Tally.empty(), format_suite.open_bundle

    def damaged(folder):
        bundle = opened(folder)
        place = next(t for t in bundle.manifest["weights"]["tensors"] if t["name"] == "layers.0.down.codes")["offset"]
        with open(bundle.path("weights.bin"), "r+b") as file:
            file.seek(place)
            code = file.read(1)[0]
            file.seek(place)
            file.write(bytes([code ^ 8]))
        return bundle

    monkeypatch.setattr(format_suite, "open_bundle", damaged)
    try_case(one, tmp_path / "damaged", tally, backends)
    assert len(tally.wrong) == 2 * len(format_suite.WAYS) and all("logits differ by" in line for line in tally.wrong)
    monkeypatch.setattr(format_suite, "open_bundle", opened)
    tally = Tally.empty()
    backends["portable exact"] = (lambda bundle: format_suite.OrtBackend(bundle, role="none"), True)
    try_case(one, tmp_path / "refused", tally, backends)
    assert len(tally.wrong) == 1 and "portable exact" in tally.wrong[0] and "refused with" in tally.wrong[0]
    monkeypatch.setattr(format_suite, "refusal", lambda backend, formats: "no" if backend.startswith("native") else None)
    tally = Tally.empty()
    try_case(one, tmp_path / "runs", tally, {"native exact": format_suite.BACKENDS["native exact"]})
    assert len(tally.wrong) == 1 and "has to refuse" in tally.wrong[0]


@pytest.mark.parametrize("other, words", [(TensorFormat(8, 0, True, "e4m3"), "8-bit floats"), (TensorFormat(4, 16), "groups that 32")])
def test_a_mixture_that_no_backend_runs_is_refused_at_export(other, words, tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", small_config(), lambda module: other if "down" in module else TensorFormat(3, 32))
    assert export_onnx.main([str(checkpoint), "-o", str(tmp_path / "b")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The capital of France is Paris, and the capital of Italy is Rome. 今天天气很好。\n" * 60, encoding="utf-8")
    return file


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("backend, options", [
    *(("native", ["--embedding-bits", bits]) for bits in "023456"), ("onnx", ["--embedding-bits", "4"]),
    ("onnx", ["--embedding-bits", "8", "--no-symmetric", "--group", "0"]), ("native", ["--bits", "3", "--no-symmetric"]),
    ("native", ["--bits", "2", "--kind", "levels", "--scale-bits", "8", "--embedding-bits", "4"]),
    ("native", ["--target-size", "SMALLEST"]), ("onnx", ["--target-size", "SMALLEST"])], ids=lambda value: "".join(value))
def test_what_quantize_gives_runs_on_every_backend_that_can(tied, backend, options, tiny_checkpoint, text, tmp_path):
    """Logits of a prompt and of a reply through the engine's backends, within what int8 activations cost."""
    source = tiny_checkpoint("smollm2", tie_word_embeddings=tied)
    if "SMALLEST" in options:                           # the fewest bits everywhere, the table too
        data = ["--data", str(text), "--windows", "4", "--length", "32", "--sensitivity-windows", "4"]
        with pytest.raises(UserError, match="the smallest possible") as raised:
            check_target(open_checkpoint(source), 1, backend)
        options = ["--target-size", re.search(r"([\d.]+) MB, of which", str(raised.value))[1] + "MB", *data]
    assert quantize.main([str(source), "-o", str(tmp_path / "q"), "--backend", backend, *options]) == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    assert export_onnx.main([str(checkpoint.path), "-o", str(tmp_path / "b")]) == 0
    graph = all((form.bits in (4, 8), form.kind, form.scale_bits) == (True, "int", 16) for form in checkpoint.quantization.tensors.values())
    assert ort.main([str(tmp_path / "b")]) == (0 if graph else 2) and (graph or backend == "native")
    if "--target-size" in options:
        table = checkpoint.quantization.tensors["model.embed_tokens"]
        assert table.bits in ((2, 3) if backend == "native" else (4,))
    decoder, prompt = load_decoder(checkpoint.path), np.random.default_rng(0).integers(3, 384, 20)
    for provider in ("native", "cpu"):
        if provider == "cpu" and not graph:
            with pytest.raises(UserError, match="which ONNX Runtime does not run"):
                Engine(tmp_path / "b", provider=provider)
            continue
        with Engine(tmp_path / "b", provider=provider) as engine:
            reply = engine.generate(prompt.tolist(), max_new_tokens=8)[0].tokens
        bundle = open_bundle(tmp_path / "b")
        opened = format_suite.BACKENDS["native" if provider == "native" else "fast"][0](bundle)
        whole = np.array([[*prompt, *reply]])
        steps = np.arange(whole.shape[1])[None]
        logits = opened.forward(whole, steps, np.zeros(1, np.int64), steps, opened.new_cache(1, 32))[0].copy()
        expected = format_suite.oracle(decoder, whole)[0]
        assert mean_kl(expected, logits) < 4e-3
        assert logits[len(prompt) - 1:-1].argmax(axis=1).tolist() == reply
