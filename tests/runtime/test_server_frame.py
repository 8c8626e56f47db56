"""The server's frame over a real socket: status routes, tokens, slots, errors."""

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from runtime.bundle import open_bundle


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


def test_tokenizer_info_is_what_lm_eval_reads(server, served_bundle):
    from lm_eval.utils import RemoteTokenizer
    oracle = Tokenizer.from_file(str(served_bundle / "tokenizer.json"))
    remote = RemoteTokenizer(f"{server.url}/v1/completions")
    assert (remote.bos_token, remote.eos_token, remote.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (remote.bos_token_id, remote.eos_token_id) == (1, 2)
    text = remote.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert remote.encode(text) == oracle.encode(text).ids and remote.decode(remote.encode(text)) == text


def ask(server, prompt="The capital of France is Paris, and the capital of Italy is Rome. " * 3, **more) -> dict:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(reply: dict) -> int:
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_slots_are_saved_restored_and_erased(serve, served_bundle, tmp_path):
    server = serve(slots_dir=tmp_path)

    def act(action, number=0, **body):
        return httpx.post(f"{server.url}/slots/{number}?action={action}", json=body)

    first = ask(server)
    assert cached(first) == 0 and cached(ask(server)) > 0
    saved = act("save", filename="chat.bin").json()
    assert saved["tokens"] >= cached(ask(server)) and (tmp_path / "chat.bin").is_file()
    assert act("erase").status_code == 200 and cached(ask(server)) == 0
    act("erase")
    assert act("restore", filename="chat.bin").json()["tokens"] == saved["tokens"]
    again = ask(server)
    assert cached(again) > 0 and again["choices"] == first["choices"]
    (listed,) = httpx.get(f"{server.url}/slots").json()
    assert listed["model"] == "tiny" and listed["loaded"] and listed["cached_tokens"] > 0 and listed["prefix_bytes"] > 0
    for name in ("../chat.bin", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", "a\0b", "x" * 101, "é"):
        answer = act("save", filename=name)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "filename", name
    assert act("save").json()["error"]["param"] == "filename" and act("save", 1, filename="a").status_code == 404
    (tmp_path / "bad.bin").write_bytes(b"no prefixes")
    for name in ("bad.bin", "missing.bin"):
        answer = act("restore", filename=name)
        assert answer.status_code == 400 and str(tmp_path) not in answer.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.bin", "chat.bin"]


def test_the_servers_folders_are_nothing_to_tell(serve, served_bundle, tmp_path):
    shutil.copytree(served_bundle, tmp_path / "plain")
    manifest = json.loads((tmp_path / "plain/manifest.json").read_text())
    (tmp_path / "plain/manifest.json").write_text(json.dumps(manifest | {"chat_template": None}))
    answer = httpx.post(f"{serve(tmp_path / 'plain').url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 400 and "no chat template" in answer.text and str(tmp_path) not in answer.text


def test_slots_without_a_folder_to_save_in(server):
    answer = httpx.post(f"{server.url}/slots/0?action=save", json={"filename": "a"})
    assert answer.status_code == 400 and "--slots-dir" in answer.text


def samples(server) -> dict:
    """Every figure of /metrics by name and labels, read by Prometheus' own parser."""
    text = httpx.get(f"{server.url}/metrics").text
    return {(one.name, *sorted(one.labels.items())): one.value for family in text_string_to_metric_families(text) for one in family.samples}


def test_metrics(serve):
    server, model = serve(), (("model", "tiny"),)
    labels = (("model", "tiny"), ("route", "/v1/completions"))
    before = samples(server)
    replies = [ask(server), ask(server)]
    httpx.get(f"{server.url}/nothing")
    after = samples(server)

    def grown(name, *labels):
        return after[name, *labels] - before.get((name, *labels), 0)

    assert grown("edgewright_prompt_tokens_total", *model) == sum(reply["usage"]["prompt_tokens"] for reply in replies)
    assert grown("edgewright_cached_tokens_total", *model) == sum(map(cached, replies)) > 0
    assert grown("edgewright_new_tokens_total", *model) == 16 and grown("edgewright_finished_total", *model) == 2
    for name in ("time_to_first_token", "time_per_output_token", "reply"):
        assert grown(f"edgewright_{name}_seconds_count", *labels) == 2
    assert 0 < after["edgewright_time_to_first_token_seconds_sum", *labels] < after["edgewright_reply_seconds_sum", *labels] < 10
    assert grown("edgewright_replies_total", ("finish", "length"), *labels) == 2
    assert grown("edgewright_http_requests_total", ("method", "POST"), ("status", "200")) == 2
    assert grown("edgewright_http_requests_total", ("method", "GET"), ("status", "404")) == 1
    assert after["edgewright_queued", *model] == 0 and after["edgewright_model_loaded", *model] == 1
    assert all(name.startswith(("edgewright_", "process_")) for name, *_ in after)


def test_the_least_recently_used_is_unloaded(serve, served_bundle, tmp_path):
    for name in "abc":
        shutil.copytree(served_bundle, tmp_path / name)
    weights_mb = open_bundle(served_bundle).weights_bytes / (1 << 20)
    server = serve(*(tmp_path / name for name in "abc"), max_memory_mb=4 * weights_mb, prefix_mb=0)

    def loaded() -> str:
        return "".join(slot["model"] for slot in httpx.get(f"{server.url}/slots").json() if slot["loaded"])

    assert loaded() == "a"
    want = ask(server, "Hi", model="a")["choices"]
    for model, then in [("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")]:
        assert ask(server, "Hi", model=model)["choices"] == want and loaded() == then
    assert ask(server, "Hi")["model"] == "a" and loaded() == "ab"

    async def hold(*names):
        async with contextlib.AsyncExitStack() as stack:
            for name in names:
                await stack.enter_async_context(server.service.engine(name))
            await asyncio.sleep(1)

    holding = threading.Thread(target=server.call, args=(hold, "a", "b"))
    holding.start()
    start = time.monotonic()
    assert ask(server, "Hi", model="c")["choices"] == want and time.monotonic() - start > 0.5      # until one is free
    holding.join()
    assert len(loaded()) == 2


def test_small_pieces_are_sent_at_once():
    """On a connection to a socket of ours asyncio sets TCP_NODELAY; without, a stream's pieces wait for delayed acknowledgements."""
    from runtime.server.connection import bind

    async def accepted() -> int:
        found, (one, *_) = asyncio.get_running_loop().create_future(), bind("127.0.0.1", 0)

        def connected(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
        async with await asyncio.start_server(connected, sock=one):
            _, writer = await asyncio.open_connection(*one.getsockname())
            writer.close()
            return await asyncio.wait_for(found, 10)
    assert asyncio.run(accepted())
