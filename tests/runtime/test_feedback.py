"""Feedback: what is stored, what is refused, and that models.finetune learns from what is exported."""

import json
import sqlite3
import threading

import pytest
import torch
import transformers

from runtime import feedback
from runtime.errors import UserError
from runtime.feedback import NotStored, Store, as_chat, checked

ASKED = [{"role": "user", "content": "What is the capital of Italy?"}]
RIGHT = "It is Rome, 今天 🙂"
CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def record(**more):
    return {"messages": ASKED, "reply": "It is Paris", "rating": "down", **more}


def export(file, *more):
    out = file.with_suffix(".jsonl")
    assert feedback.main(["export", str(file), "-o", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_the_loop_closes(tmp_path, tiny_checkpoint, capsys):
    """Corrections are stored, exported, trained on; transformers finds the corrected reply likelier then."""
    from models import finetune
    store = Store(tmp_path / "said.db")
    for number in range(40):
        question = {"role": "user", "content": f"{number}. The capital of Italy?"}
        store.add(checked(record(id=f"r{number}", model="tiny", messages=[question], correction=RIGHT, comment="no")))
    store.add(checked(record(rating=1)))
    store.add(checked(record()))
    assert len(export(tmp_path / "said.db")) == 41 and len(export(tmp_path / "said.db", "--corrected-only")) == 40
    assert feedback.main(["stats", str(tmp_path / "said.db")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 good, 40 corrected, 1 bad"
    before, after = tiny_checkpoint("smollm2"), tmp_path / "run"
    assert finetune.main([str(before), "--task", "chat", "--data", str(tmp_path / "said.jsonl"), "-o", str(after), "--method", "full",
                          "--batch", "8", "--steps", "24", "--eval-every", "24", "--learning-rate", "3e-3"]) == 0

    def loss(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(before)
        prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([prompt + tokenizer.encode(RIGHT + "<|im_end|>")])
        labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        with torch.no_grad():
            return transformers.AutoModelForCausalLM.from_pretrained(folder)(ids, labels=labels).loss.item()
    assert loss(after / "best") < 0.8 * loss(before)


def test_what_is_exported():
    thread = [*ASKED, {"role": "assistant", "content": "Rome?"}, {"role": "user", "content": "Sure?"}]
    stored = {**dict.fromkeys(("tools", "correction")), **checked(record(messages=thread, reply={"role": "assistant", "content": "No", "reasoning_content": "hm"}))}
    assert as_chat(stored) == {"messages": [ASKED[0], thread[1] | {"weight": 0}, thread[2], stored["reply"]]}
    corrected = as_chat(stored | {"correction": "Yes", "tools": [{"name": "f"}]})
    assert corrected["messages"][-1] == {"role": "assistant", "content": "Yes"} and corrected["tools"] == [{"name": "f"}]


def test_a_second_rating_takes_the_place_of_the_first(tmp_path):
    store, other = Store(tmp_path / "a.db"), Store(tmp_path / "a.db")         # another process's
    first = store.add(checked(record(id="x", rating="up")))
    assert other.add(checked(record(id="x", rating=-0.5, correction="Rome"))) == first
    assert store.add(checked(record())) != store.add(checked(record()))       # without an id each counts
    kept = list(store.records())
    assert [one["rating"] for one in kept] == [-0.5, -1, -1] and kept[0]["correction"] == "Rome" and kept[0]["messages"] == ASKED


def test_many_threads_and_a_reader(tmp_path):
    store = Store(tmp_path / "a.db")
    threads = [threading.Thread(target=lambda: [store.add(checked(record(rating="up"))) for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        feedback.main(["stats", str(tmp_path / "a.db")])
    for thread in threads:
        thread.join()
    assert len(export(tmp_path / "a.db")) == 80


def test_a_full_disk_harms_nothing_that_is_there(tmp_path):
    """SQLite's own limit says what a full disk does: SQLITE_FULL."""
    store = Store(tmp_path / "a.db", largest=64 << 10)
    kept = 0
    with pytest.raises(NotStored, match="make room"):
        for kept in range(1000):
            store.add(checked(record(rating="up", comment="x" * 999)))
    assert 10 < kept < 100 and len(list(store.records())) == kept == len(export(tmp_path / "a.db"))
    store.close()
    Store(tmp_path / "a.db").add(checked(record()))


@pytest.mark.parametrize("wrong, said", [
    ([], "an object"), (record(rating=None), "rating is missing"), (record(rating=True), "rating is True"), (record(rating=5), "stars"),
    (record(rating=float("nan")), "rating is nan"), (record(rating=[]), "rating is"), (record(messages=[]), "messages is"), (record(messages="hi"), "messages is"),
    (record(messages=[{"content": "hi"}]), "role"), (record(messages=[{"role": "user", "content": 5}]), "content of a message is 5"),
    (record(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "image"), (record(reply=None), "message"),
    (record(reply={"role": "user", "content": "hi"}), "reply.role"), (record(reply={"role": "assistant", "tool_calls": "now"}), "tool_calls"),
    (record(reply={"role": "assistant", "tool_calls": [{"name": "now"}]}), "tool_calls"), (record(correction=5), "correction is 5"), (record(tools={}), "tools is"),
    (record(comment="\ud800"), "half a character"), (record(comment="x" * (1 << 20)), "more than 1048576"), (record(tools=[json.loads("[" * 200 + "]" * 200)]), "100 levels")])
def test_what_nobody_could_learn_from_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        checked(wrong)


def test_calls_of_tools_are_stored():
    kept = checked(record(reply={"role": "assistant", "content": None, "tool_calls": [CALL]}, tools=[{"type": "function"}], more=1, correction=""))
    assert set(kept) == {"messages", "reply", "rating", "tools"}


def test_files_that_are_not_ours(tmp_path, capsys):
    (tmp_path / "text.db").write_text("not a database at all, and long enough to be read as one" * 20)
    with sqlite3.connect(tmp_path / "other.db") as base:
        base.execute("CREATE TABLE t (a)")
    Store(tmp_path / "empty.db").close()
    for words, said in ((["stats", "none.db"], "no such file"), (["export", "text.db", "-o", "o"], "not a database"), (["stats", "other.db"], "another program"),
                        (["export", "empty.db"], "-o is missing"), (["export", "empty.db", "-o", "o"], "nothing to learn from")):
        assert feedback.main([words[0], str(tmp_path / words[1]), *words[2:]]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="another program"):
        Store(tmp_path / "other.db")
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "no" / "folder.db")
