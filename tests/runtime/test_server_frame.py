"""The server's frame over a real socket: status routes, tokens, slots, errors."""

import httpx
import pytest
from tokenizers import Tokenizer


def test_health_and_models(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["created"] > 0
    assert httpx.get(f"{server.url}/v1/models/tiny").json() == model


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_while_loading(serve, path):
    server = serve(load=False)
    answer = httpx.get(server.url + path)
    if path == "/health":
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "unavailable_error" and answer.headers["retry-after"] == "1"
    else:
        assert answer.status_code == 200                  # what there will be
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": "Hi"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"


def test_tokens_are_the_tokenizers(server, served_bundle):
    text, oracle = "The capital of France <|im_end|> é🙂", Tokenizer.from_file(str(served_bundle / "tokenizer.json"))
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["tokens"] == oracle.encode(text, add_special_tokens=False).ids and answer["count"] == len(answer["tokens"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == oracle.decode(answer["tokens"], False)
