"""The wheel, in an environment of its own, beside an app that has packages called `models` and `runtime`."""

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from runtime import Engine, __version__

ROOT = Path(__file__).parents[2]
NEEDED = ("numpy", "tokenizers", "jinja2", "markupsafe")
OF_SERVE = ("fastapi", "starlette", "pydantic", "pydantic_core", "typing_extensions", "typing-inspection", "annotated-types",
            "annotated-doc", "opentelemetry-api", "uvicorn", "httptools", "h11", "click", "anyio", "idna", "prometheus_client")
OF_ONNXRUNTIME = ("onnxruntime", "flatbuffers", "packaging", "protobuf")
APP = """
import importlib, json, pkgutil, sys
import models, runtime, runtime.errors
import edgewright
from edgewright import Engine, UserError

bundle, provider = sys.argv[1:]
try:
    with Engine(bundle, provider=provider or None, threads=1) as engine:
        tokens = engine.chat([{"role": "user", "content": "Hi"}], max_new_tokens=4).tokens
        said = engine.explain()
except UserError as error:
    tokens, said = None, str(error)
for module in pkgutil.walk_packages(edgewright.__path__, "edgewright."):
    if not module.name.endswith(("__main__", "_core")) and ".server." not in module.name:
        importlib.import_module(module.name)
print(json.dumps({"tokens": tokens, "said": said, "whose": [models.WHOSE, runtime.WHOSE, runtime.errors.WHOSE],
                  "files": [getattr(module, "__file__", None) or "" for module in sys.modules.values()]}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return runpy.run_path(str(ROOT / "make_wheel.py"))["make_wheel"](tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def packages(wheel, tmp_path_factory):
    """site-packages of an environment that has the wheel and what it needs, linked from where the tests run."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    link(site, NEEDED)
    done = subprocess.run([sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "-q", "--no-deps", wheel],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


def link(site: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for top in {file.parts[0] for file in importlib.metadata.files(name)} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A folder with the app's own packages, called as two of the repository's are."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("models/__init__.py", "runtime/__init__.py", "runtime/errors.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("WHOSE = \"the app's\"\n")
    (folder / "app.py").write_text(APP)
    return folder


@pytest.fixture
def python(packages, app):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words, **more):
        return subprocess.run([packages.parents[2] / "bin/python", *words], capture_output=True, text=True, cwd=app,
                              env=environment | more)
    return run


def test_the_wheel_holds_the_runtime_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        facts = archive.read(f"edgewright-{__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"edgewright", f"edgewright-{__version__}.dist-info"}
    inside = {name.removeprefix("edgewright/") for name in names if name.startswith("edgewright/")}
    files = [*(ROOT / "runtime").rglob("*.py"), *(ROOT / "runtime/server/page").glob("*.*")]
    assert inside == {"py.typed", "native/_core.so", *(str(file.relative_to(ROOT / "runtime")) for file in files)}
    assert not [file for file in (ROOT / "runtime").rglob("*.py") if re.search(r"^\s*(from|import) runtime\b", file.read_text("utf-8"), re.M)]
    assert any(name.endswith("licenses/LICENSE") for name in names) and "-py3-none-" in wheel.name
    required = [line.split(": ")[1] for line in facts.splitlines() if line.startswith("Requires-Dist")]
    assert [line.split(">")[0] for line in required if ";" not in line] == ["numpy", "tokenizers", "jinja2"]
    assert {line.split("extra == ")[1] for line in required if ";" in line} == {'"cpu"', '"gpu"', '"rtx"', '"serve"'}


def test_an_app_with_packages_of_the_same_names(python, packages, golden_bundle):
    """First without ONNX Runtime, which is asked for in one sentence; then with it."""
    want = Engine(golden_bundle, threads=1).chat([{"role": "user", "content": "Hi"}], max_new_tokens=4).tokens

    def told(provider, **more):
        done = python("app.py", golden_bundle, provider, **more)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        told = json.loads(done.stdout)
        assert told["whose"] == ["the app's"] * 3
        assert not [file for file in told["files"] if file.startswith(tuple(f"{ROOT}/{name}/" for name in (
            "models", "compress", "export", "runtime")))]
        return told["tokens"], told["said"]

    assert told("native")[0] == want
    for provider, more in (("cpu", {}), ("", {"EDGEWRIGHT_NATIVE": "/none"})):
        tokens, said = told(provider, **more)
        assert tokens is None and "pip install 'edgewright[cpu]'" in said and "\n" not in said
    link(packages, OF_ONNXRUNTIME)
    tokens, said = told("cpu")
    assert tokens == want and said.startswith("onnxruntime-cpu runs fast.onnx")


def test_its_commands(python, packages, golden_bundle):
    link(packages, OF_ONNXRUNTIME)
    listed, helped = python("-m", "edgewright"), python("-m", "edgewright.bench", "--help")
    assert "python -m edgewright.native.profile" in listed.stdout and "runtime" not in listed.stdout
    assert helped.stdout.startswith("usage: python -m edgewright.bench [BUNDLE]") and "python -m runtime" not in helped.stdout
    said = python("-m", "edgewright.generate", golden_bundle, "-p", "Hi", "--max-new-tokens", "4", "--threads", "1", "--temperature", "0")
    assert said.returncode == 0, said.stderr
    assert said.stdout == Engine(golden_bundle, threads=1).generate("Hi", max_new_tokens=4)[0].text + "\n"
    checked = python("-m", "edgewright.verify", golden_bundle, "--threads", "1")
    assert checked.returncode == 0 and "native" in checked.stdout, checked.stderr


def test_it_serves(packages, golden_bundle, python):
    """First without FastAPI, which is asked for in one sentence; then with it, until SIGTERM."""
    said = python("-m", "edgewright.serve", golden_bundle, "--port", "0")
    assert said.returncode == 2 and "pip install 'edgewright[serve]'" in said.stderr and "Traceback" not in said.stderr
    link(packages, OF_SERVE)
    words = [packages.parents[2] / "bin/python", "-m", "edgewright.serve", golden_bundle, "--port", "0", "--threads", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url, _, served = process.stdout.readline().partition(" serves ")
        assert url, process.stderr.read()
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == golden_bundle.name == served.strip()
        process.terminate()
        assert process.wait(30) == 0, process.stderr.read()
