"""What the case studies share: commands as a user types them, the server, the figures, the page.

Every command is printed and run in a process of its own; what it makes is kept, so that a story that was interrupted goes on where it
stopped. Nothing is computed here.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from models.judging.page import Section, document
from runtime.cli import table
from runtime.errors import CheckFailed
from runtime.files import write


BITS = 5.4          # a weight; four bits with a scale for each 32 take 5.25 with the 8 bits of the vocabulary


class Story:
    def __init__(self, title: str, out: Path):
        self.title, self.out, self.sections = title, out, []
        out.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.out / name

    def write(self, name: str, records: list[dict]) -> Path:
        """Records as a JSONL file."""
        write(self.path(name), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return self.path(name)

    def run(self, module: str, *words, makes: Path) -> None:
        """`python -m MODULE WORDS`, unless what it makes is there. Raises CheckFailed where it fails."""
        words = [str(word) for word in words]
        print(f"\n$ python -m {module} {' '.join(words)}", flush=True)
        if makes.exists():
            print(f"{makes} is there already")
        elif code := subprocess.run([sys.executable, "-m", module, *words]).returncode:
            raise CheckFailed(f"{module} ended with exit code {code}; what it said stands above")

    def bundle(self, checkpoint: Path, name: str, task: str, data: Path) -> Path:
        """The checkpoint at BITS a weight, 3 to 8 of them where each does least harm to the task's own prompts and answers, as a bundle."""
        quantized, bundle = self.path(f"{name}-checkpoint"), self.path(name)
        self.run("compress.quantize", checkpoint, "-o", quantized, "--method", "clip", "--target-bpw", BITS, "--task", task, "--data", data,
                 "--windows", 32, "--sensitivity-windows", 6, makes=quantized / "config.json")
        self.run("export.onnx", quantized, "-o", bundle, makes=bundle / "manifest.json")
        return bundle

    def figures(self, name: str, model: Path, *words) -> dict:
        """What models.evaluate says of a model."""
        self.run("models.evaluate", model, *words, "--json", self.path(f"{name}.json"), makes=self.path(f"{name}.json"))
        return json.loads(self.path(f"{name}.json").read_text("utf-8"))

    def tell(self, title: str, meaning: str, rows: list[dict], bars: list[tuple[float, float, float]] | None = None) -> None:
        """A table, for the terminal now and for the page. bars: of each row a value and its interval."""
        print("\n" + table(rows, title=title), flush=True)
        self.sections.append(Section(title, meaning, rows, bars))

    def finish(self) -> None:
        page = self.path("report.html")
        write(page, document(self.title, self.sections))
        print(f"\n{page}: open it in a browser")


def scored(rows: dict[str, dict], metrics: tuple[str, ...], main: str) -> tuple[list[dict], list[tuple[float, float, float]]]:
    """Of each model a row with these metrics, and a bar of the main one with its interval."""
    table_rows = [{"model": name, **{metric: f"{found[metric]:.3f}" if found[metric] <= 1 else f"{found[metric]:.1f}" for metric in metrics}}
                  for name, found in rows.items()]
    return table_rows, [(found[main], *(value or 0.0 for value in found[f"{main}_interval"])) for found in rows.values()]


@contextlib.contextmanager
def server(bundle: Path, *words) -> Iterator[str]:
    """The address of a server of this bundle."""
    command = [sys.executable, "-m", "runtime.serve", str(bundle), "--port", "0", *map(str, words)]
    print(f"\n$ python -m runtime.serve {' '.join(command[3:])}", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            if not said.startswith("http"):
                raise CheckFailed("the server did not start; what it said stands above")
            url = said.split()[0]
            while not loaded(url):
                time.sleep(0.1)
            yield url
        finally:
            os.kill(process.pid, signal.SIGTERM)
            process.stdout.read()


def loaded(url: str) -> bool:
    """Whether the server has its first model. Raises CheckFailed where it is gone."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=60):
            return True
    except urllib.error.HTTPError:            # 503: it is loading
        return False
    except urllib.error.URLError as error:
        raise CheckFailed(f"the server has ended ({error.reason}); what it said stands above") from None


def post(url: str, body: dict) -> dict:
    """The JSON answer to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())
