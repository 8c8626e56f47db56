"""POST /v1/feedback over a real server: stored, refused, and the disk full while everything else goes on."""

import sqlite3
import threading

import httpx
import pytest

from runtime.errors import UserError
from runtime.feedback import LARGEST_RECORD, Store

SAID = {"messages": [{"role": "user", "content": "Hi"}], "reply": "Ho 🙂", "rating": "up", "id": "chatcmpl-1", "unknown": 1}


@pytest.fixture
def told(serve, tmp_path):
    return serve(feedback=tmp_path / "said.db")


def post(server, **more):
    return httpx.post(f"{server.url}/v1/feedback", json={**SAID, **more})


def test_stored_and_read_by_another_process_meanwhile(told, tmp_path):
    assert httpx.get(f"{told.url}/v1/feedback").json()["enabled"] is True
    assert post(told).status_code == 200 and post(told, rating="down", correction="Hey").status_code == 200
    with sqlite3.connect(tmp_path / "said.db") as base:
        assert base.execute("SELECT id, rating, correction FROM feedback").fetchall() == [("chatcmpl-1", -1.0, "Hey")]
        assert base.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_none_is_kept_unless_asked_for(server):
    assert httpx.get(f"{server.url}/v1/feedback").json()["enabled"] is False
    answer = post(server)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_feedback" and "--feedback" in answer.json()["error"]["message"]


MISTAKES = [b"", b"{", b"[]", b"null", b"5", b'{"rating": NaN}', b'{"a":' * 5000, b"\xff", b"{}", b'{"rating": ' + b"1" * 5000 + b"}",
            b'{"rating": "up", "messages": [{}], "reply": "x"}',
            b'{"rating": "up", "messages": [{"role": "user", "content": "\\ud800"}], "reply": "x"}',
            b'{"rating": 1, "reply": "' + b"x" * LARGEST_RECORD + b'", "messages": [{"role": "user", "content": "x"}]}']


def test_what_is_none_is_the_clients_mistake(told, tmp_path):
    for body in MISTAKES:
        answer = httpx.post(f"{told.url}/v1/feedback", content=body, headers={"Content-Type": "application/json"})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["message"] and error["type"] == "invalid_request_error", (body[:60], answer.text)
    assert list(Store(tmp_path / "said.db").records()) == []


def test_a_full_disk_harms_nothing_else(told, tmp_path):
    told.service.feedback.close()
    told.service.feedback = Store(tmp_path / "said.db", largest=64 << 10)
    answers = [post(told, id=str(number), comment="x" * 2000) for number in range(60)]
    stored = [answer.status_code for answer in answers].index(507)
    assert stored > 5 and answers[stored].json()["error"]["code"] == "not_stored" and {answer.status_code for answer in answers[stored:]} == {507}
    assert httpx.get(f"{told.url}/health").json() == {"status": "ok"}
    assert httpx.post(f"{told.url}/tokenize", json={"prompt": "Hi"}).status_code == 200
    assert len(list(Store(tmp_path / "said.db").records())) == stored


def test_many_at_once(told, tmp_path):
    codes = []
    threads = [threading.Thread(target=lambda: codes.extend(post(told, id=None).status_code for _ in range(8))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 64 == [200] * len(list(Store(tmp_path / "said.db").records()))


def test_a_file_that_is_none_ends_the_start(serve, tmp_path):
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(UserError, match="not a database"):
        serve(feedback=tmp_path / "text")
