"""The command lines: what they print, their exit codes, and that a mistake costs one sentence and no traceback."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from make_bundle import write_manifest

import runtime.bench
import runtime.chat
import runtime.generate
import runtime.verify
from runtime import Engine
from runtime.bench import figures
from runtime.engine import Timings


@pytest.fixture
def bundle(golden_bundle, tmp_path):
    """A copy to do with as one likes."""
    shutil.copytree(golden_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def failed(capsys, *words):
    """stderr is one sentence with these words in it; stdout is empty."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    return True


# runtime.generate

ON_THE_CPU = ["--provider", "cpu", "--threads", "1"]


def test_generate_prints_the_reply(golden_bundle, capsys):
    assert runtime.generate.main([str(golden_bundle), "-p", "Once upon", "--max-new-tokens", "12", *ON_THE_CPU]) == 0
    out, err = capsys.readouterr()
    engine = Engine(golden_bundle, provider="cpu", threads=1)
    reply, = engine.generate("Once upon", max_new_tokens=12)
    assert out == reply.text + "\n" and err.count("\n") == 1
    assert f"{reply.timings.prompt_tokens} prompt tokens, {len(reply.tokens)} new" in err
    assert runtime.generate.main([str(golden_bundle), "-p", "Hi", "--chat", "--temperature", "0.8", "--top-p", "0.9", "--seed",
                                  "3", "--max-new-tokens", "12", *ON_THE_CPU]) == 0
    want = engine.chat([{"role": "user", "content": "Hi"}], temperature=0.8, top_p=0.9, seed=3, max_new_tokens=12)
    assert capsys.readouterr().out == want.text + "\n"


TOOLED = "{% for t in tools or [] %}{{ t.name }},{% endfor %}{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.reasoning_content }}{% endfor %}{{ mood | default('') }}"


def test_tools_and_template_arguments_of_the_command_lines(bundle, tmp_path, monkeypatch, capsys, prompts):
    """--template takes JSON, or else text; what is wrong with it, with the file or for the template is one sentence."""
    (bundle / "chat_template.jinja").write_text(TOOLED)
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]
    write_manifest(bundle, manifest)
    (tmp_path / "tools.json").write_text('[{"name": "now"}, {"name": "then"}]')
    given = ["--tools", str(tmp_path / "tools.json"), "--template", "mood=gay=1"]
    engine = Engine(bundle, provider="cpu", threads=1)
    for words, more in ((given[:2], {}), (given, {"mood": "gay=1"}), (["--template", "mood=[1, 2]"], {"mood": [1, 2]}), (["--template", "mood="], {"mood": ""})):
        tools = {"tools": [{"name": "now"}, {"name": "then"}]} if "--tools" in words else {}
        want = engine.chat([{"role": "user", "content": "Hi"}], max_new_tokens=8, template=more, **tools)
        assert runtime.generate.main([str(bundle), "-p", "Hi", "--chat", "--max-new-tokens", "8", *ON_THE_CPU, *words]) == 0
        assert capsys.readouterr().out == want.text + "\n"
        assert talk(monkeypatch, bundle, "Hi", options=words) == 0
        out, err = capsys.readouterr()
        assert out.startswith(want.text) and f"[{want.timings.prompt_tokens} prompt tokens" in err
    for words, message in ((["--template", "mood"], "--template mood: give it as NAME=VALUE"), (["--template", "mod=1"], "reads no 'mod'"),
                           (["--tools", str(tmp_path / "none.json")], "none.json cannot be read"), (["--template", "tools=3"], "must be a list of dicts")):
        assert runtime.generate.main([str(bundle), "-p", "Hi", "--chat", *ON_THE_CPU, *words]) == 2
        assert failed(capsys, message)
    assert runtime.generate.main([str(bundle), "-p", "Hi", *ON_THE_CPU, *given]) == 2
    assert failed(capsys, "give --chat too")


def test_chat_keeps_the_thought_apart(bundle, monkeypatch, capsys, prompts):
    reply = Engine(bundle, provider="cpu", threads=1).chat([{"role": "user", "content": "Hi"}], max_new_tokens=8)
    monkeypatch.setattr("runtime.engine.Draft.reply", property(lambda self: dataclasses.replace(reply, thought="hm", answer="yes")))
    assert talk(monkeypatch, bundle, "Hi", "And you?") == 0
    assert prompts[2][1] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_generate_ends_at_stop_strings(golden_bundle, capsys):
    text = Engine(golden_bundle, provider="cpu", threads=1).generate("Once upon", max_new_tokens=12)[0].text
    assert runtime.generate.main([str(golden_bundle), "-p", "Once upon", "--max-new-tokens", "12", "--stop", text[3:5], "@@",
                                  *ON_THE_CPU]) == 0
    assert capsys.readouterr().out == text[:text.index(text[3:5])] + "\n"


@pytest.mark.parametrize("options, message", [
    (["-p", ""], "the prompt is empty"), (["-p", "a" * 100_000], "context is 256"), (["-p", "a\udcff"], "lone surrogate"),
    (["-p", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"), (["-p", "a", "--max-new-tokens", "-3"], "is -3"),
    (["-p", "a", "--max-new-tokens", "1000"], "context is 256"),
    (["-p", "a", "--temperature", "-1"], "temperature is -1"), (["-p", "a", "--temperature", "nan"], "temperature is nan"),
    (["-p", "a", "--top-p", "2"], "top_p is 2"), (["-p", "a", "--threads", "0"], "threads is 0"),
    (["-p", "a", "--max-memory-mb", "0.001"], "more than max_memory_mb=0.001"), (["-p", "a", "--stop", ""], "stop strings")])
def test_generate_refuses(golden_bundle, capsys, options, message):
    assert runtime.generate.main([str(golden_bundle), *options, *([] if "--threads" in options else ON_THE_CPU)]) == 2
    assert failed(capsys, message)


def test_generate_without_a_bundle(tmp_path, capsys):
    assert runtime.generate.main([str(tmp_path / "none"), "-p", "a"]) == 2
    assert failed(capsys, "no such folder")


def test_generate_with_nothing_to_say_is_a_usage_error(golden_bundle, capsys):
    with pytest.raises(SystemExit) as error:
        runtime.generate.main([str(golden_bundle)])
    assert error.value.code == 2 and failed(capsys, "-p/--prompt")


def test_verify_option_of_every_command(bundle, capsys):
    change_a_byte(bundle / "portable.onnx")                   # not the graph that runs
    assert runtime.generate.main([str(bundle), "-p", "a", "--max-new-tokens", "1", *ON_THE_CPU]) == 0
    capsys.readouterr()
    assert runtime.generate.main([str(bundle), "-p", "a", "--verify", *ON_THE_CPU]) == 1
    assert failed(capsys, "portable.onnx")


# runtime.chat

def talk(monkeypatch, folder, *lines, options=()):
    """Run a chat with these lines typed; an exception among them is raised where it stands. Returns the exit code."""
    typed = iter(lines)

    def read(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line
    monkeypatch.setattr("builtins.input", read)
    return runtime.chat.main([str(folder), "--max-new-tokens", "8", *ON_THE_CPU, *options])


@pytest.fixture
def prompts(monkeypatch):
    """Every list of messages the engine is asked to answer."""
    asked = []
    stream_chat = Engine.stream_chat
    monkeypatch.setattr(Engine, "stream_chat", lambda self, messages, **o: asked.append(list(messages)) or stream_chat(self, messages, **o))
    return asked


def test_chat_remembers_and_forgets(golden_bundle, monkeypatch, capsys, prompts):
    assert talk(monkeypatch, golden_bundle, "Hi", "", "And you?", "/reset", "Hello", "/what", "/exit", "never", options=["--system", "Be brief."]) == 0
    assert [[m["role"] for m in messages] for messages in prompts] == [
        ["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    reply = Engine(golden_bundle, provider="cpu", threads=1).chat(prompts[0], max_new_tokens=8)
    out, err = capsys.readouterr()
    assert out.startswith(reply.text) and prompts[1][2]["content"] == reply.text
    assert "/what: no such command" in err


def test_ctrl_d_ends_a_chat_and_ctrl_c_at_the_prompt_does_not(golden_bundle, monkeypatch, capsys, prompts):
    assert talk(monkeypatch, golden_bundle, KeyboardInterrupt(), "Hi") == 0
    assert len(prompts) == 1 and "Ctrl-D ends" in capsys.readouterr().err


def test_ctrl_c_stops_the_reply_only(golden_bundle, monkeypatch, capsys, prompts):
    from runtime.engine import Stream
    advance = Stream.__next__

    def interrupted(self):
        if len(prompts) == 1 and self.reply.text:
            raise KeyboardInterrupt
        return advance(self)
    monkeypatch.setattr(Stream, "__next__", interrupted)
    assert talk(monkeypatch, golden_bundle, "Hi", "Go on") == 0
    assert [m["role"] for m in prompts[1]] == ["user", "assistant", "user"] and prompts[1][1]["content"]
    assert "[stopped]" in capsys.readouterr().err


def test_a_message_that_cannot_be_answered_leaves_no_trace(golden_bundle, monkeypatch, capsys, prompts):
    assert talk(monkeypatch, golden_bundle, "Hi " * 300, "a\udcff", "Hi") == 0
    assert prompts[2] == [{"role": "user", "content": "Hi"}]
    err = capsys.readouterr().err
    assert "context is 256" in err and "lone surrogate" in err


def test_chat_refuses_bad_options_before_it_loads(tmp_path, monkeypatch, capsys):
    assert talk(monkeypatch, tmp_path / "none", options=["--temperature", "nan"]) == 2
    assert failed(capsys, "temperature is nan")


# runtime.verify

def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_accepts_what_was_exported(golden_bundle, capsys):
    assert runtime.verify.main([str(golden_bundle), "--threads", "1", "--exact"]) == 0
    out = capsys.readouterr().out
    assert "have the sha256 of the manifest" in out and "portable: mean KL at most 1e-06" in out and "fast: mean KL" in out
    assert out.count("kept") >= 2 and "EXCEEDED" not in out


@pytest.mark.parametrize("name", ["weights.bin", "portable.onnx", "fast.onnx", "tokenizer.json", "chat_template.jinja", "golden.json"])
def test_verify_names_a_changed_file(bundle, capsys, name):
    change_a_byte(bundle / name)
    assert runtime.verify.main([str(bundle)]) == 1
    assert failed(capsys, "changed", name)


def test_verify_finds_a_missing_file(bundle, capsys):
    (bundle / "golden.json").unlink()
    assert runtime.verify.main([str(bundle)]) == 2
    assert failed(capsys, "golden.json: missing")


def edit_golden(bundle, change):
    """Change golden.json and the manifest with it, as a broken exporter might."""
    import hashlib
    golden = json.loads((bundle / "golden.json").read_text())
    change(golden)
    (bundle / "golden.json").write_text(json.dumps(golden))
    manifest = json.loads((bundle / "manifest.json").read_text())
    content = (bundle / "golden.json").read_bytes()
    manifest["files"]["golden.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_verify_finds_logits_that_are_not_pytorchs(bundle, capsys):
    def swap(golden):
        prompt = golden["prompts"][0]
        prompt["top_logits"] = [[x * 1.2 for x in row] for row in prompt["top_logits"]]
    edit_golden(bundle, swap)
    assert runtime.verify.main([str(bundle), "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    assert "EXCEEDED" in out and "fast has a mean KL of" in err


def test_verify_finds_another_tokenizer(bundle, capsys):
    edit_golden(bundle, lambda golden: golden["prompts"][1]["prompt_ids"].append(5))
    assert runtime.verify.main([str(bundle)]) == 1
    assert "gives other tokens on this machine" in capsys.readouterr().err


def test_verify_refuses_another_version_of_the_golden_outputs(bundle, capsys):
    edit_golden(bundle, lambda golden: golden.update(version=2))
    assert runtime.verify.main([str(bundle)]) == 2
    assert "version 2" in capsys.readouterr().err


def test_a_bundle_without_golden_outputs_is_said_to_have_none(tiny_bundle, capsys):
    assert runtime.verify.main([str(tiny_bundle("smollm2")[1])]) == 0
    out = capsys.readouterr().out
    assert "no golden outputs in it, so its answers were not checked" in out and "kept" not in out


# runtime.bench

KEYS = {"decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms", "tpot_ms_p50", "peak_rss_mb"}


def test_bench_measures_and_writes_json(golden_bundle, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert runtime.bench.main([str(golden_bundle), "--prompt-tokens", "20", "--new-tokens", "10", "--repeat", "3", "--json", str(path),
                               *ON_THE_CPU]) == 0
    out, result = capsys.readouterr().out, json.loads(path.read_text())
    assert KEYS <= result.keys() and all(result[key] > 0 for key in KEYS)
    assert len(result["samples"]["ttft_ms"]) == 3 and result["ttft_ms"] == np.median(result["samples"]["ttft_ms"])
    assert result["prefill_tokens_per_s"] == pytest.approx(np.median([20e3 / t for t in result["samples"]["ttft_ms"]]))
    for word in ("machine: ", "versions: python", "onnxruntime", "median", "tpot_ms_p99", "load_ms"):
        assert word in out
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_times_of_tokens_say():
    assert figures(Timings(100, [50.0, 52.0, 54.0, 56.0, 66.0])) == {
        "decode_tokens_per_s": 250.0, "prefill_tokens_per_s": 2000.0, "ttft_ms": 50.0, "tpot_ms_p50": 2.0,
        "tpot_ms_p95": pytest.approx(8.8), "tpot_ms_p99": pytest.approx(9.76)}


@pytest.mark.parametrize("options, message", [
    (["--repeat", "0"], "--repeat is 0"), (["--new-tokens", "1"], "--new-tokens is 1, which should be at least 2"),
    (["--prompt-tokens", "0"], "--prompt-tokens is 0"), (["--prompt-tokens", "250"], "context is 256"),
    (["--json", "/no/such/folder/x.json"], "no such folder to write it in")])
def test_bench_refuses(golden_bundle, capsys, options, message):
    assert runtime.bench.main([str(golden_bundle), *options, *ON_THE_CPU]) == 2
    assert failed(capsys, message)


# the processes

def run(*argv, **kwargs):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, **kwargs)


def test_exit_codes_of_the_processes(bundle):
    ok = run("-m", "runtime.generate", str(bundle), "-p", "Hi", "--max-new-tokens", "2", "--threads", "1")
    assert ok.returncode == 0 and ok.stdout
    refused = run("-m", "runtime.generate", str(bundle), "-p", "Hi", "--temperature", "-1")
    assert (refused.returncode, refused.stdout) == (2, "") and refused.stderr.startswith("error: temperature is -1")
    change_a_byte(bundle / "weights.bin")
    changed = run("-m", "runtime.verify", str(bundle))
    assert changed.returncode == 1 and "weights.bin" in changed.stderr and "Traceback" not in changed.stderr


def test_a_reader_that_leaves_ends_a_command_quietly():
    """As in `python -m ... | head -1`, whether or not Python keeps what is printed for later; a socket's broken pipe is no reader."""
    code = ("import sys; from dataclasses import dataclass; from runtime import cli\n"
            "@dataclass(frozen=True)\nclass Options:\n    'A stage.'\n"
            "def stage(options):\n    for i in range(100_000):\n        print(i, flush={})\n"
            "def other(options):\n    raise BrokenPipeError(32, 'of a socket')\n"
            "raise SystemExit(cli.run(Options, {}, []))")
    for flush in (True, False):
        with subprocess.Popen([sys.executable, "-c", code.format(flush, "stage")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "0\n"
            process.stdout.close()
            assert (process.stderr.read(), process.wait(30)) == ("", 141)
    done = run("-c", code.format(True, "other"))
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_importing_the_runtime_is_light():
    """No torch and nothing of training; ONNX Runtime, Jinja and OpenSSL only when they are needed."""
    code = ("import sys, runtime; assert 'numpy' not in sys.modules; from runtime import Engine; import runtime.chat, runtime.bench, "
            "runtime.verify; print(*[m for m in ('torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt', 'jinja2', 'ssl', "
            "'_hashlib', 'models', 'compress', 'export', 'safetensors', 'scipy') if m in sys.modules])")
    done = run("-c", code)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stdout + done.stderr


def test_the_runtime_works_where_nothing_else_is_installed(golden_bundle, tmp_path):
    """A process in which importing torch, or another room of the house, fails."""
    code = ("import sys\nfor name in ('torch', 'transformers', 'onnx', 'models', 'compress', 'export', 'safetensors', 'scipy', 'tqdm'):\n"
            "    sys.modules[name] = None\n"
            "from runtime import Engine\n"
            f"print(Engine({str(golden_bundle)!r}, threads=1).chat([{{'role': 'user', 'content': 'Hi'}}], max_new_tokens=3).tokens)")
    done = run("-c", code)
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr


def test_what_the_disk_refuses_is_one_sentence(capsys):
    """Wherever in a stage it comes from; a mistake of the program's keeps its traceback."""
    import errno
    from dataclasses import dataclass

    from runtime import cli

    @dataclass(frozen=True)
    class Options:
        """A stage."""

    def stage(number):
        def fail(options):
            raise OSError(number, "said by the system", "/work.bin")
        return fail
    mends = {errno.ENOSPC: "make room, or ", errno.EFBIG: "make room, or ", errno.EROFS: "", errno.ENAMETOOLONG: "",
             errno.EACCES: "change its permissions, or "}
    for number, mend in mends.items():
        assert cli.run(Options, stage(number), []) == 2
        assert capsys.readouterr().err == f"error: /work.bin: said by the system; {mend}choose another place\n"
    with pytest.raises(OSError):
        cli.run(Options, stage(errno.EINVAL), [])
