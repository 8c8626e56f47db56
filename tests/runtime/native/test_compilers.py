"""The native core is C that GCC and clang both take without a warning: what the compilers on PATH say of it."""

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "runtime" / "native"


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_core_compiles_without_a_warning(compiler):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not on PATH")
    done = subprocess.run([compiler, "-std=gnu11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
                           *sorted(NATIVE.glob("*.c"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_line_is_longer_than_120_columns():
    sources = [*NATIVE.glob("*.[ch]"), *Path(__file__).parent.glob("*.c")]
    assert [] == [f"{path.name}:{n}" for path in sources for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
