"""Judging on a device of its own gives what it gives on the CPU (see tests/test_devices.py), and waits for it no more than it must."""

import json

import numpy as np
import pytest
import torch
from anatomies import NATIVE as MODELS, journey      # without PyTorch's fused cells, which the device that pretends does not have

import export.onnx
from compress.teacher import build_cache
from families import KINDS
from models import acceptance, evaluate, what_got_worse
from models.checkpoint import CPU, SPARE, load_decoder
from models.judging import fidelity, on_device
from models.judging.language_model import open_model, spare_for
from models.network.decoder import Decoder
from models.network.torch_backend import TorchBackend
from runtime import decode
from runtime.compare import Top, compare, log_rest, log_softmax
from runtime.errors import UserError
from runtime.sampling import Sampler, SamplingOptions

TEXT = "A small engine reads a sentence and answers in another. 然后 🙂\n" * 10


@pytest.fixture
def fake():
    """tests/far.py and its device, for what only it can count."""
    if torch.cuda.is_available():
        pytest.skip("the fake device is for machines without a GPU")
    far = pytest.importorskip("far")
    with far.present() as device:
        yield far, device


def same_journey(load, device) -> bool:
    wanted, found = (journey(TorchBackend(load(place))) for place in (CPU, device))
    return np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("family", KINDS)
def test_every_way_through_a_cache(family, tiny_checkpoint, device):
    assert same_journey(lambda place: load_decoder(tiny_checkpoint(family), device=place), device)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer(name, device):
    torch.manual_seed(0)
    decoder = Decoder(MODELS[name])
    assert same_journey(decoder.to, device)


@pytest.mark.parametrize("family", KINDS)
def test_a_step_waits_for_the_device_once(family, tiny_checkpoint, fake):
    """For the likeliest tokens, or for the logits. A layer of experts must know how many tokens each of them has."""
    far, device = fake
    backend = TorchBackend(load_decoder(tiny_checkpoint(family), device=device))
    waits = 1 + sum(layer.experts > 0 for layer in backend.decoder.config.layers)
    cache, tokens = backend.new_cache(3, 64), np.array([5, 6, 7])
    decode.prefill(backend, cache, [np.arange(3, 3 + n) for n in (9, 4, 6)])
    before = [cache.snapshot(row) for row in range(3)]
    far.reads.clear(), far.sends.clear()
    logits = decode.step(backend, cache, tokens)
    assert len(far.reads) == waits and not far.sends, far.reads
    for row in range(3):
        cache.restore(row, before[row])
    far.reads.clear(), far.sends.clear()
    likeliest = backend.step_rows(cache, tokens, [Sampler(SamplingOptions(), tokens)] * 3)
    assert len(far.reads) == waits and not far.sends, far.reads
    assert [(int(ids[0]), values[0]) for ids, values in likeliest] == [(row.argmax(), row.max()) for row in logits]


@pytest.mark.parametrize("k", (None, 5, 63))
def test_figures_there_are_those_of_runtime_compare(k, device):
    """In float64, over logits of all sizes, some of them the same token's by far."""
    draw = np.random.default_rng(0)
    p = (draw.standard_normal((40, 64)) * np.geomspace(1e-3, 30, 40)[:, None]).astype(np.float32)
    q = (p + draw.standard_normal((40, 64)) * np.geomspace(1e-4, 5, 40)[draw.permutation(40), None]).astype(np.float32)
    there, reference = torch.from_numpy(q).to(device), p
    if k:
        log_p = np.take_along_axis(log_softmax(p), ids := np.argsort(-p, axis=1)[:, :k], 1)
        reference = Top(ids, log_p, log_rest(log_p))
        held = Top(*(torch.from_numpy(part).to(device) for part in (reference.ids, reference.log_p, reference.log_rest)))
    else:
        held = torch.from_numpy(p).to(device)
    wanted, (kl, differs) = compare(reference, q), on_device.compare(held, there)
    assert 0 < wanted.differs.sum() < 40 and (differs.cpu().numpy() == wanted.differs).all()
    np.testing.assert_allclose(kl.cpu().numpy(), wanted.kl, rtol=1e-9, atol=1e-12)


@pytest.fixture
def files(tmp_path):
    """Texts and labelled sets by name."""
    (tmp_path / "one.txt").write_text(TEXT, "utf-8")
    (tmp_path / "two.txt").write_text(TEXT.upper()[:400], "utf-8")
    (tmp_path / "qa.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann has a cat.", "qas": [
        {"question": f"Who {i}?", "answers": [{"text": "Ann"}]} for i in range(12)]}]}]}))
    (tmp_path / "c.tsv").write_text("".join(f"a sentence {i}\t{i % 2}\n" for i in range(12)))
    (tmp_path / "p.json").write_text(json.dumps(
        [{"instruction": f"Say {i}", "input": "", "output": "The engine answers."} for i in range(5)]))
    return tmp_path


def figures(main, device, monkeypatch, out, *arguments) -> dict:
    """The JSON of a command that computes on a device."""
    with monkeypatch.context() as patch:
        patch.setattr("models.device.find_device", lambda asked: device)
        assert main([str(argument) for argument in (*arguments, "--json", out)]) == 0
    return json.loads(out.read_text())


def near(found, wanted, path="") -> None:
    """Equal but for the rounding of kernels: numbers nearly, all else to the letter."""
    assert type(found) is type(wanted), path
    if isinstance(found, (dict, list)):
        assert len(found) == len(wanted), path
        for key in found if isinstance(found, dict) else range(len(found)):
            near(found[key], wanted[key], f"{path}.{key}")
    else:
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(found, float) else found == wanted, path


def same_figures(main, device, monkeypatch, files, *arguments) -> dict:
    wanted, found = (figures(main, place, monkeypatch, files / "out.json", *arguments) for place in (CPU, device))
    if "backend" in wanted:
        assert (wanted.pop("backend"), found.pop("backend")) == ("pytorch-cpu", f"pytorch-{device.type}")
    near(found, wanted)
    return found


@pytest.mark.parametrize("family", ("smollm2", "phi3", "gemma2", "qwen3_5", "granite4_tiny"))
def test_perplexity_and_divergence(family, files, tiny_checkpoint, device, monkeypatch):
    found = same_figures(evaluate.main, device, monkeypatch, files, tiny_checkpoint(family), "--data", files / "one.txt", files / "two.txt",
                         "--reference", tiny_checkpoint(family, seed=1), "--window", 48)
    assert found["kl"] > 0.01
    alone = same_figures(evaluate.main, device, monkeypatch, files, tiny_checkpoint(family), "--data", files / "one.txt", "--reference",
                         tiny_checkpoint(family))
    assert abs(alone["kl"]) < 1e-9 and alone["top1_agreement"] == 1


def test_against_a_teachers_cache(files, tiny_checkpoint, device, monkeypatch):
    cache = build_cache(tiny_checkpoint("smollm2", seed=1), torch.randint(3, 384, (6, 32), generator=torch.Generator().manual_seed(0)),
                        files / "cache", 20, "fp32").folder
    found = same_figures(evaluate.main, device, monkeypatch, files, tiny_checkpoint("smollm2"), "--task", "kl", "--reference", cache)
    assert found["kl"] > 0.01


@pytest.mark.parametrize("family", ("smollm2", "qwen3_5"))
@pytest.mark.parametrize("task, name", (("qa", "qa.json"), ("classify", "c.tsv")))
def test_labelled_tasks(task, name, family, files, tiny_checkpoint, device, monkeypatch):
    """The same answers to every example, not only the same scores."""
    answers = []
    for place in (CPU, device):
        found = figures(evaluate.main, place, monkeypatch, files / "out.json", tiny_checkpoint(family), "--task", task, "--data", files / name,
                        "--shots", 1, "--examples", files / "rows.jsonl")
        answers.append([json.loads(row)["answer"] for row in (files / "rows.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == found["examples"] == 11


def test_what_got_worse(files, tiny_checkpoint, device, monkeypatch):
    found = same_figures(what_got_worse.main, device, monkeypatch, files, tiny_checkpoint("smollm2"), tiny_checkpoint("smollm2", seed=1),
                         "--data", files / "one.txt", "--prompts", files / "p.json", "--labelled", files / "c.tsv", "--new-tokens", 8)
    assert found["domains"][0]["kl"] > 0 and len(found["prompts"]) == 5


def test_acceptance(files, tiny_checkpoint, device, monkeypatch):
    found = same_figures(acceptance.main, device, monkeypatch, files, tiny_checkpoint("smollm2"), tiny_checkpoint("smollm2", seed=1),
                         "--data", files / "p.json", "--tokens", 12)
    assert found["rounds"] > 0


def test_a_window_costs_the_host_one_look(tiny_checkpoint, fake):
    """However long it is, and one for all that go through together."""
    far, device = fake
    model, reference = (TorchBackend(load_decoder(tiny_checkpoint("smollm2", seed=seed), device=device)) for seed in (0, 1))
    windows = [fidelity.Window(np.arange(3, 200), 100, 97)] * 5
    far.reads.clear(), far.sends.clear()
    fidelity.measure(model, windows, reference, progress=False)
    assert len(far.reads) == 1 and not far.sends


def short_of_memory(decoder: Decoder, rows: int) -> list[int]:
    """Has a model fail as a device without memory for more rows does; the rows it was asked for."""
    asked, forward = [], decoder.model.forward

    def limited(ids, *told, **more):
        asked.append(len(ids))
        if len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of ...")
        return forward(ids, *told, **more)
    decoder.model.forward = limited
    return asked


def test_fewer_windows_and_replies_where_memory_is_short(tiny_checkpoint, device):
    folder = tiny_checkpoint("smollm2")
    windows = [fidelity.Window(np.arange(3 + n, 40 + n), 10, 27) for n in range(11)]
    prompts = [np.arange(3, 9 + n) for n in range(11)]
    wanted = fidelity.measure(TorchBackend(load_decoder(folder)), windows, progress=False).metrics()
    replies = [reply.text for reply in open_model(folder).generate(prompts, 12, progress=False)]
    model = open_model(folder, device=device)
    asked = short_of_memory(model.backend.decoder, 3)
    near(fidelity.measure(model.backend, windows, progress=False).metrics(), wanted)
    assert asked == [11, 5, 2, 2, 2, 2, 2, 1]                                    # and 5 is not tried again
    assert [reply.text for reply in model.generate(prompts, 12, progress=False)] == replies


def test_a_device_that_fails_is_told(files, tiny_checkpoint, device, monkeypatch, capsys):
    """Without room for one window, and lost in the middle: one sentence, exit code 2, and nothing half-written."""
    for error, says in ((torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has ..."), "3.50 GiB asked for"),
                        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "run the same command again")):
        monkeypatch.setattr("models.device.find_device", lambda asked: device)

        def failing(self, hidden, error=error):
            raise error
        monkeypatch.setattr(Decoder, "head", failing)
        for main, arguments in ((evaluate.main, (tiny_checkpoint("smollm2"), "--data", files / "one.txt")),
                                (evaluate.main, (tiny_checkpoint("smollm2"), "--task", "qa", "--data", files / "qa.json")),
                                (what_got_worse.main, (*[tiny_checkpoint("smollm2")] * 2, "--labelled", files / "c.tsv")),
                                (acceptance.main, (*[tiny_checkpoint("smollm2")] * 2, "--data", files / "p.json"))):
            assert main([str(argument) for argument in (*arguments, "--json", files / "out.json")]) == 2
            told = capsys.readouterr().err.strip().splitlines()[-1]
            assert says in told and not (files / "out.json").exists()


def test_models_leave_room_for_each_other(tiny_checkpoint, monkeypatch):
    """Of 10 GB free, a model leaves what the next one needs, and not more than half."""
    folder, gpu = tiny_checkpoint("smollm2"), torch.device("cuda", 0)
    weights = sum(4 * tensor.numel() for tensor in load_decoder(folder).state_dict().values())
    monkeypatch.setattr("models.judging.language_model.free_bytes", lambda device: 10 << 30)
    assert spare_for(gpu) == spare_for(CPU, folder) == SPARE and spare_for(gpu, folder) == SPARE + weights
    monkeypatch.setattr("models.judging.language_model.free_bytes", lambda device: weights)
    assert spare_for(gpu, folder) == SPARE + weights // 2


def test_what_device_means_for_a_bundle(tiny_checkpoint, tmp_path, monkeypatch):
    assert export.onnx.main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "bundle")]) == 0
    opened, bundle = [], tmp_path / "bundle"
    monkeypatch.setattr("models.judging.language_model.open_backend",
                        lambda bundle, provider, threads, below, **how: (opened.append((provider, below)), None))
    for asked, how, wanted in (("auto", {}, (None, None)), ("auto", {"exact": True}, ("cpu", None)), ("auto", {"provider": "cuda"}, ("cuda", None)),
                               ("cpu", {}, (None, "cuda")), ("cpu", {"provider": "native"}, ("native", None)), ("cpu", {"exact": True}, ("cpu", None)),
                               ("cuda", {}, ("cuda", None)), ("cuda:0", {"provider": "tensorrt"}, ("tensorrt", None))):
        open_model(bundle, asked=asked, **how)
        assert opened.pop() == wanted
    for asked, how, says in (("cuda", {"exact": True}, "--device cuda and an engine of the CPU .*--exact"),
                             ("cuda", {"provider": "native"}, "--device cuda and an engine of the CPU .--provider native.* leave out one"),
                             ("cpu", {"provider": "cuda"}, "--device cpu and an engine of the GPU .--provider cuda"),
                             ("cuda:1", {}, "CUDA_VISIBLE_DEVICES=1 and --device cuda")):
        with pytest.raises(UserError, match=says):
            open_model(bundle, asked=asked, **how)


def test_tables_of_two_sizes_and_an_int8_cache(tiny_checkpoint, device):
    """Compared over the tokens they share, by a model whose keys and values are rounded as an int8 cache rounds them."""
    windows = [fidelity.Window(np.arange(3 + n, 60 + n), 20, 27) for n in range(4)]
    found = []
    for place in (CPU, device):
        model, reference = (load_decoder(tiny_checkpoint("smollm2", seed=seed), device=place) for seed in (0, 1))
        plain = fidelity.measure(TorchBackend(model), windows, TorchBackend(reference), shared=300, progress=False).metrics()
        model.cache_scales = [(torch.full((1,), 0.2, device=place),) * 2] * 2
        found.append((plain, fidelity.measure(TorchBackend(model), windows, TorchBackend(reference), shared=300, progress=False).metrics()))
    near(found[1][0], found[0][0])
    near(found[1][1], found[0][1])
    assert abs(found[1][0]["kl"] - found[1][1]["kl"]) > 1e-3
