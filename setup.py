"""Builds the native core (native/*.c of the runtime), if there is a C compiler: everything else is in pyproject.toml.

The core is a shared library that Python opens with ctypes, so it is not bound to one version of Python, and a wheel is
tagged py3-none-PLATFORM. Each isa_*.c names its own instruction set; the flags below are for all, and for GCC and clang
(CC=clang) alike.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "edgewright" if Path("edgewright").is_dir() else "runtime"       # the copy of make_wheel.py, or the repository's
NATIVE = Path(PACKAGE, "native")


class AnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlainName(build_ext):
    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))


setup(
    cmdclass={"bdist_wheel": AnyPython, "build_ext": PlainName},
    ext_modules=[Extension(
        f"{PACKAGE}.native._core", sorted(str(path) for path in NATIVE.glob("*.c")),
        depends=["setup.py", *(str(path) for path in NATIVE.glob("*.h"))], optional=True, libraries=["m", "pthread"],
        extra_compile_args=["-std=gnu11", "-O2", "-g0", "-fno-math-errno", "-fvisibility=default"])],
)
