"""Other runtimes as systems to be measured (see ours.py), each run by a program of an installation of its own.

    --against llama.cpp=model.gguf                             llama-bench and llama-batched-bench from PATH
    --against llama.cpp@/opt/llama/bin/llama-bench=model.gguf
    --against onnxruntime-genai@/opt/genai/bin/python=FOLDER   a Python that has it

Told by them and not measured: llama.cpp's benchmarks choose no tokens and turn none into text, so their work is a little less than
a reply's. They load their model for each part of a round, outside the times that they tell.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from ..cli import did_you_mean
from ..engine import Timings
from ..errors import UserError
from .conditions import resident_mb
from .ours import figures

_PATIENCE_S = 1800


def peer(text: str, threads: int):
    """The system that an --against names. Raises UserError."""
    who, sign, model = text.partition("=")
    name, _, program = who.partition("@")
    if name not in PEERS or not sign or not model:
        raise UserError(f"--against {text}: give it as NAME=MODEL or NAME@PROGRAM=MODEL, with a NAME of {', '.join(PEERS)}"
                        f"{did_you_mean(name, PEERS) if name not in PEERS else ''}")
    if not Path(model).exists():
        raise UserError(f"--against {text}: there is no {model}")
    kind, default = PEERS[name]
    found = shutil.which(program or default)
    if not found:
        raise UserError(f"--against {text}: {program or default} is no program that can be run; write where it is, as {name}@/path/to/"
                        f"{Path(default).name}={model}")
    return kind(found, model, threads)


class LlamaCpp:
    """program: its llama-bench, with llama-batched-bench beside it; model: a GGUF file."""

    def __init__(self, program: str, model: str, threads: int):
        self.name, self._program, self._model, self._threads = f"llama.cpp {Path(model).name}", Path(program), model, str(threads)
        self._peak_mb, self._said = 0.0, {}

    def described(self) -> dict[str, str]:
        names = {"build_commit": "build", "cpu_info": "CPU", "backends": "backend", "model_type": "model", "n_threads": "threads"}
        return {"engine": ", ".join([str(self._program), *(f"{name} {self._said[key]}" for key, name in names.items() if key in self._said)])}

    def single(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        prefill_s, decode_s = self._bench(prompt_tokens, 0, 0), self._bench(0, new_tokens, prompt_tokens)
        return {"decode_tokens_per_s": new_tokens / decode_s, "prefill_tokens_per_s": prompt_tokens / prefill_s,
                "ttft_ms": prefill_s * 1e3}

    def context(self, context: int, new_tokens: int) -> dict[str, float]:
        return {f"at_{context}_tokens_per_s": new_tokens / self._bench(0, new_tokens, context - new_tokens)}

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        room = count * (prompt_tokens + new_tokens)
        out = self._run(self._program.with_name("llama-batched-bench"), "-c", room, "-npp", prompt_tokens, "-ntg", new_tokens,
                        "-npl", count, "--output-format", "jsonl")
        found = next((json.loads(line) for line in out.splitlines() if line.startswith("{")), None)
        if not found or "speed_tg" not in found:
            raise UserError(f"{self._program.with_name('llama-batched-bench')}: told no speed_tg for {count} streams")
        return {f"streams_{count}_tokens_per_s": found["speed_tg"], f"streams_{count}_whole_tokens_per_s": found["speed"]}

    def finish(self) -> dict[str, float]:
        return {"peak_rss_mb": self._peak_mb} if self._peak_mb else {}

    def _bench(self, prompt: int, new: int, depth: int) -> float:
        """Seconds of one test, after its warm-up."""
        out = self._run(self._program, "-p", prompt, "-n", new, "-d", depth, "-r", 1, "-o", "json")
        try:
            self._said, = json.loads(out)
            return self._said["samples_ns"][0] / 1e9
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self._program}: what it printed is not llama-bench's JSON of one test") from None

    def _run(self, program: Path, *words) -> str:
        """What a program prints, watched for its memory. Raises UserError."""
        words = [str(program), "-m", self._model, "-t", self._threads, *map(str, words)]
        try:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        except OSError as error:
            raise UserError(f"{program}: cannot be run ({error.strerror})") from None
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(.05):
                self._peak_mb = max(self._peak_mb, resident_mb(process.pid, "VmHWM") or 0)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            out, err = process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{' '.join(words)}: took more than {_PATIENCE_S} s") from None
        finally:
            process.kill()
            ended.set()
            watcher.join()
        if process.returncode:
            raise UserError(f"{' '.join(words)}: ended with {process.returncode}: {_last_line(err)}")
        return out


class Genai:
    """program: a Python that can import onnxruntime_genai; model: its folder. One process answers all (genai.py)."""

    def __init__(self, program: str, model: str, threads: int):
        self.name = f"onnxruntime-genai {Path(model).name}"
        self._process = subprocess.Popen([program, str(Path(__file__).with_name("genai.py")), model, str(threads)], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace",
                                         env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")})
        self._hello = self._answer()

    def described(self) -> dict[str, str]:
        return {"engine": f"onnxruntime-genai {self._hello['version']}"}

    def single(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        return figures(self._generate(prompt_tokens, new_tokens))

    def context(self, context: int, new_tokens: int) -> dict[str, float]:
        return {f"at_{context}_tokens_per_s": self._generate(context - new_tokens, new_tokens).decode_tokens_per_s}

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        return {}

    def finish(self) -> dict[str, float]:
        peak = resident_mb(self._process.pid, "VmHWM")
        self._process.communicate()
        return {"load_ms": self._hello["load_ms"]} | ({"peak_rss_mb": peak} if peak else {})

    def _generate(self, prompt_tokens: int, new_tokens: int) -> Timings:
        self._process.stdin.write(f"{prompt_tokens} {new_tokens}\n")
        self._process.stdin.flush()
        return Timings(prompt_tokens, self._answer()["token_ms"])

    def _answer(self) -> dict:
        """Its next line. Raises UserError where there is none."""
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            self._process.kill()
            raise UserError(f"{self.name}: {_last_line(self._process.communicate()[1]) or 'its process has ended'}") from None


PEERS = {"llama.cpp": (LlamaCpp, "llama-bench"), "onnxruntime-genai": (Genai, sys.executable)}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
