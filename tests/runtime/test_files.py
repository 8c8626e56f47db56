"""runtime/files.py: writers that are killed, meet each other or fail; JSON and TOML that is out of bounds."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import files
from runtime.errors import UserError

WRITER = """import sys, time
from pathlib import Path
from types import SimpleNamespace
from runtime import files
with files.%s(Path(sys.argv[1])) as place:
    (place / "a" if place.is_dir() else place).write_text("new")
    print("in", flush=True)
    time.sleep(60)
"""


def writer(kind: str, out: Path) -> subprocess.Popen:
    """Another process, half-way through writing `out`."""
    process = subprocess.Popen([sys.executable, "-c", WRITER % kind, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(out: Path, text: str) -> None:
    with files.new_folder(out) as folder:
        (folder / "a").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    fill(tmp_path / "deep" / "out", "one")
    fill(tmp_path / "deep" / "out", "two")
    assert content(tmp_path) == {"deep/out/a": "two"}


@pytest.mark.parametrize("error, raised", [(OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failure_changes_nothing(error, raised, tmp_path):
    fill(tmp_path / "out", "old")
    for place in (files.new_folder(tmp_path / "out"), files.new_file(tmp_path / "out" / "a")):
        with pytest.raises(raised), place as path:
            (path / "a" if path.is_dir() else path).write_text("half")
            raise error
    assert content(tmp_path) == {"out/a": "old"} and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["new_folder", "new_file"])
def test_a_killed_writer_leaves_the_old_and_nothing_after_the_next(kind, tmp_path):
    out = tmp_path / "out"
    write = fill if kind == "new_folder" else files.write
    write(out, "old")
    before = content(out) if out.is_dir() else out.read_text()
    process = writer(kind, out)
    process.kill()
    process.wait()
    assert (content(out) if out.is_dir() else out.read_text()) == before and len(os.listdir(tmp_path)) == 3
    write(out, "next")
    assert os.listdir(tmp_path) == ["out"] and (out / "a" if out.is_dir() else out).read_text() == "next"


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    process = writer("new_folder", tmp_path / "out")
    try:
        with pytest.raises(UserError, match="being written by another process"):
            fill(tmp_path / "out", "mine")
    finally:
        process.kill()
        process.wait()
    with files.lock(tmp_path / "out"):                          # one thread may hold it several times
        fill(tmp_path / "out", "mine")
        refused = []
        thread = threading.Thread(target=lambda: refused.append(pytest.raises(UserError, fill, tmp_path / "out", "theirs")))
        thread.start()
        thread.join()
        assert refused
    assert content(tmp_path) == {"out/a": "mine"}


def test_writers_of_one_file_take_turns(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=files.write, args=(tmp_path / "out", text)) for text in texts]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert (tmp_path / "out").read_text() in texts and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there, expected", [
    ({"out": "old", ".out.partial": "half"}, "old"), ({".out.partial": "new", ".out.old": "old"}, "old"),
    ({"out": "new", ".out.old": "old"}, "new"), ({".out.partial": "half"}, None)])
def test_a_death_between_two_renames_is_mended(there, expected, tmp_path):
    """Where folders cannot change places in one step; whoever opens or writes next puts things right."""
    for name, text in there.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)
    folder = files.restored(tmp_path / "out")
    assert (content(folder) == {"a": expected}) if expected else not folder.exists()
    fill(folder, "next")
    assert content(tmp_path) == {"out/a": "next"} and os.listdir(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path):
    fill(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to("real")
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "real") == {"a": "new"}
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/out")):
        for attempt in (fill, files.write):
            with pytest.raises(UserError, match="could not be written"):
                attempt(out, "text")


def test_a_folder_beside_which_no_lock_fits_is_added_to(tmp_path, monkeypatch):
    """A bundle that is mounted into a container, say, whose root is not the user's."""
    (tmp_path / "out").mkdir()
    stage = files.sole_writer("folder")(lambda options: os.listdir(tmp_path))
    assert stage(SimpleNamespace(folder=tmp_path / "out")) == [".out.lock", "out"]
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert stage(SimpleNamespace(folder=tmp_path / "out")) == ["out"]


BAD = {"deep": ("[" * 101 + "]" * 101, "nested"), "deeper": ("[" * 200_000, "nested"), "deep objects": ('{"a":[' * 60 + "]}" * 60, "nested"),
       "digits": ("1" * 5000, "5000 digits"), "nan": ("[NaN]", "NaN"), "too large": ('{"a": 1e999}', "1e999"),
       "surrogate": (r'["\ud800"]', "half a character"), "not json": ("{", "line 1"), "empty": ("", "line 1")}


@pytest.mark.parametrize("name", BAD)
def test_json_out_of_bounds(name, tmp_path):
    text, words = BAD[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json cannot be read as JSON .*{words}.*; mend it"):
        files.read_json(tmp_path / "a.json", None, "mend it")


@pytest.mark.parametrize("value", [
    json.loads("[" * 100 + "]" * 100), {"[[[": '"]]]\\', "\\": {'"': ["\\\\"]}, "é": "\U0001f600"}, ["[" * 500, {}], 10 ** 30, 1.5, None])
def test_json_within_bounds_is_as_it_was(value):
    assert files.parse_json(json.dumps(value)) == value and files.parse_json(json.dumps(value, ensure_ascii=False)) == value


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "list").write_text("[]")
    for name, words in (("fifo", "not a file"), ("none", "No such file"), ("bytes", "not UTF-8 at byte 7"), ("list", "holds list"),
                        (".", "not a file"), ("n\0l", "null byte")):
        with pytest.raises(UserError, match=words):
            files.read_json(tmp_path / name)
    with pytest.raises(UserError, match="2 bytes, where 1 is the limit"):
        files.read_json(tmp_path / "list", list, largest=1)


@pytest.mark.parametrize("text", ["a = " + "[" * 3000 + "]" * 3000, ".".join("a" * 3000) + " = 1", "a = nan", "a = " + "1" * 5000, "a ="])
def test_toml_out_of_bounds(text, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match="a.toml cannot be read as TOML"):
        files.read_toml(tmp_path / "a.toml")


def test_work_goes_whole_and_leftovers_with_the_next_writer(tmp_path, monkeypatch):
    """What a kill leaves of a finished plan's work is no work to go on with; nor does a writer's half stay."""
    out = tmp_path / "model"
    work = files.work_folder(out, ["a plan"])
    (work / "part").mkdir(parents=True)
    files.work_folder(work, ["its own"]).mkdir()

    def killed(folder, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", killed)
        files.clear_work(out)
    assert not work.exists()
    files.clear_work(out)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.lock").touch()
    (tmp_path / ".model.old").mkdir()
    files.tidy(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / ".model.lock").touch()
    with files.lock(out):
        assert files.restored(out) == out and (tmp_path / ".model.lock").exists()          # its own
    (tmp_path / ".model.lock").touch()
    files.restored(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
