"""Peers and several bundles in turns: programs that print what llama.cpp's print, and ours beside them."""

import json
import stat
import sys

import pytest

import runtime.bench
from runtime.bench import numbers

PROGRAM = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
if pathlib.Path({log!r}).with_name("broken").exists():
    sys.exit("said first\\nerror: no memory\\n")
if "-npl" in given:
    print("llama noise")
    print(json.dumps({{"speed_tg": 50.0 * int(given["-npl"]), "speed": 400.0}}))
else:
    tokens = int(given["-p"]) + int(given["-n"])
    print(json.dumps([{{"samples_ns": [tokens * (10 ** 7 if int(given["-n"]) else 10 ** 6)], "n_threads": int(given["-t"]), "build_commit": "abc"}}]))
"""
ON_ONE_THREAD = ["--threads", "1", "--repeat", "2", "--prompt-tokens", "20", "--new-tokens", "8"]


@pytest.fixture
def llama(tmp_path):
    """(path of a llama-bench beside a llama-batched-bench, a model, the calls they had)."""
    for name in ("llama-bench", "llama-batched-bench"):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(PROGRAM.format(python=sys.executable, log=str(tmp_path / "calls")))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "m.gguf").touch()
    return file.with_name("llama-bench"), tmp_path / "m.gguf", lambda: [json.loads(line) for line in (tmp_path / "calls").open()]


def test_bundle_and_llama_cpp_in_turns(golden_bundle, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("runtime.decode.BURST_S", 0)       # in which a first stream of so small a model would be finished
    program, model, calls = llama
    files = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    assert runtime.bench.main([str(golden_bundle), "--against", f"llama.cpp@{program}={model}", "--context", "240", "--streams", "1,3",
                               "--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"]), *ON_ONE_THREAD,
                               "--new-tokens", "200"]) == 0
    out, found = capsys.readouterr().out, json.loads(files["json"].read_text())
    theirs, ours = found["systems"]["llama.cpp m.gguf"], found["systems"][golden_bundle.name]
    assert theirs["figures"] | {"peak_rss_mb": 0} == {
        "prefill_tokens_per_s": 1000, "decode_tokens_per_s": 100, "ttft_ms": 20, "at_240_tokens_per_s": 100, "streams_1_tokens_per_s": 50,
        "streams_1_whole_tokens_per_s": 400, "streams_3_tokens_per_s": 150, "streams_3_whole_tokens_per_s": 400, "peak_rss_mb": 0}
    assert set(theirs["figures"]) - {"peak_rss_mb"} < set(ours["figures"]) and all(len(values) == 2 for name, values in ours["samples"].items()
                                                                                 if name not in ("load_ms", "peak_rss_mb"))
    pairs = [a / b for a, b in zip(ours["samples"]["streams_3_tokens_per_s"], theirs["samples"]["streams_3_tokens_per_s"])]
    assert found["ratios"][f"{golden_bundle.name} / llama.cpp m.gguf"]["streams_3_tokens_per_s"]["median"] == pytest.approx(sum(pairs) / 2)
    assert "build abc, threads 1" in out and "| streams_3_tokens_per_s |" in files["md"].read_text() and files["png"].read_bytes()[:4] == b"\x89PNG"
    depths = [call[call.index("-d") + 1] for call in calls() if "-d" in call]
    assert len(calls()) == 3 * 5 and depths == ["0", "20", "180"] * 3         # after the prompt, and up to 240 tokens


def test_several_bundles_each_in_its_process(golden_bundle, tiny_bundle, tmp_path, capsys):
    small = tiny_bundle("smollm2", 4)[1]
    assert runtime.bench.main([str(golden_bundle), str(small), "--json", str(tmp_path / "x.json"), *ON_ONE_THREAD]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(found["systems"]) == [str(golden_bundle), str(small)] and f"engine of {small}" in found      # both are called `bundle`
    assert all(one["figures"]["peak_rss_mb"] > 20 and one["figures"]["load_ms"] > 0 for one in found["systems"].values())
    assert runtime.bench.main([str(golden_bundle), str(tmp_path), *ON_ONE_THREAD]) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("given, message", [
    ("llama.cp=m", "(did you mean 'llama.cpp'?)"), ("llama.cpp", "give it as NAME=MODEL"), ("llama.cpp=/none.gguf", "there is no /none.gguf"),
    ("llama.cpp@/none={model}", "write where it is, as llama.cpp@/path/to/llama-bench="),
    ("onnxruntime-genai@{python}={model}", "No module named 'onnxruntime_genai'"), ("llama.cpp@/bin/echo={model}", "not llama-bench's JSON"),
    ("broken", "ended with 1: error: no memory")])
def test_what_is_wrong_with_a_peer_is_one_sentence(llama, tmp_path, capsys, given, message):
    if given == "broken":
        (tmp_path / "broken").touch()
        given = f"llama.cpp@{llama[0]}={{model}}"
    assert runtime.bench.main(["--against", given.format(model=llama[1], python=sys.executable), *ON_ONE_THREAD]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and err.count("\n") == 1


def test_numbers_and_choices(golden_bundle, capsys, monkeypatch):
    assert numbers("1, 4,16,4", "--streams", 1) == [1, 4, 16] and numbers("", "--streams", 1) == []
    for words, message in (([str(golden_bundle), "--context", "7"], "--context is '7': write whole numbers of at least 8"),
                           ([str(golden_bundle), "--streams", "a"], "--streams is 'a'"), ([], "give bundles to measure"),
                           ([str(golden_bundle), "--load", "http://localhost:1"], "or --load with")):
        assert runtime.bench.main(words) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert runtime.bench.main([str(golden_bundle), "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
