"""Build the wheel of the runtime alone, which installs as `edgewright`: `python make_wheel.py [FOLDER]`, by default
dist/.

An app may well have packages called `models` or `runtime`, so what it installs has a name of its own: `from edgewright
import Engine`, `python -m edgewright.generate`. The wheel is made in a temporary folder, from a copy of runtime/ under
that name, and depends on nothing but what runtime needs. It holds the C core for this machine and, where the cross
compiler aarch64-linux-gnu-gcc is, another wheel holds it for ARM; neither needs anything newer than glibc 2.34
(pthread_create).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent
NAME = "edgewright"
EXTRAS = ("cpu", "gpu", "rtx", "serve")
PARTS = ("native", "calls", "speculation", "server", "benching")
CROSS = "aarch64-linux-gnu-gcc"


def wheel_project(text: str) -> str:
    """The wheel's pyproject.toml, from the text of the repository's. (A text or list of JSON is one of TOML.)"""
    project = tomllib.loads(text)
    table = project["project"] | {"name": NAME, "description": "Run a language model on a small machine, from a bundle"}
    extras = table.pop("optional-dependencies")
    tables = {"build-system": project["build-system"],
              "project": {key: value for key, value in table.items() if key != "readme"},
              "project.optional-dependencies": {name: extras[name] for name in EXTRAS},
              # included package data would be the C files
              "tool.setuptools": {"packages": [NAME, *(f"{NAME}.{part}" for part in PARTS)], "include-package-data": False},
              "tool.setuptools.package-data": {NAME: ["py.typed"], f"{NAME}.server": ["page/*"]}}
    lines = [line for name, entries in tables.items()
             for line in (f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in entries.items()))]
    return "\n".join([*lines, "[tool.setuptools.dynamic]", f'version = {{ attr = "{NAME}.__version__" }}', ""])


def make_wheel(out: Path, machine: str | None = None) -> Path:
    """Build the wheel in folder `out`; returns its path. machine: None for this one, or "aarch64", compiled with CROSS."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("setup.py", "LICENSE"):
            shutil.copy2(ROOT / name, folder)
        shutil.copytree(ROOT / "runtime", folder / NAME, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        (folder / "pyproject.toml").write_text(wheel_project((ROOT / "pyproject.toml").read_text("utf-8")), "utf-8")
        environment = dict(os.environ)
        if machine:
            environment |= {"CC": CROSS, "LDSHARED": f"{CROSS} -shared", "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
        elif (built := ROOT / "runtime/native/_core.so").exists():   # compiled again where it is older than its sources
            (folder / "lib" / NAME / "native").mkdir(parents=True)
            shutil.copy2(built, folder / "lib" / NAME / "native")
        tag = f"plat-name = manylinux_2_34_{machine or platform.machine()}" if platform.libc_ver()[0] == "glibc" else ""
        (folder / "setup.cfg").write_text(f"[build]\nbuild-lib = lib\n[bdist_wheel]\n{tag}\n", "utf-8")
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--no-build-isolation", "-w", str(folder), str(folder)], env=environment, check=True)
        wheel, = folder.glob("*.whl")
        if f"{NAME}/native/_core.so" not in zipfile.ZipFile(wheel).namelist():
            raise SystemExit("the C core could not be compiled, so there is no wheel: is there a C compiler?")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if sys.argv[1:] else ROOT / "dist")
    print(make_wheel(folder))
    if shutil.which(CROSS) and platform.machine() != "aarch64":
        print(make_wheel(folder, "aarch64"))
