"""Runs of tests that hang, in their middle, after a failure and behind the last one: each ends, and tells the rest."""

import os
import subprocess
import sys
from pathlib import Path

import ending

TESTS = Path(__file__).parent
HANGS = """
import threading
import pytest

def test_first(): pass

def test_hangs(): threading.Event().wait()

def test_after(): pass

@pytest.fixture
def stuck():
    yield
    threading.Event().wait()

def test_fails(stuck): assert 1 == 2

def test_last(): pass
"""


def run(folder: Path, *words: str) -> tuple[int, str]:
    hooks = (TESTS / "conftest.py").read_text().split("from ending import ")[1].split("#")[0]
    (folder / "conftest.py").write_text(f"import ending\nending.ENDS_WITHIN_S = 2\nfrom ending import {hooks}\n")
    (folder / "pytest.ini").write_text("[pytest]\nfaulthandler_timeout = 2\nfaulthandler_exit_on_timeout = true\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words], cwd=folder, text=True, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**{name: value for name, value in os.environ.items() if "XDIST" not in name}, "PYTHONPATH": str(TESTS)})
    return done.returncode, done.stdout


def test_a_hang_costs_one_test(tmp_path):
    (tmp_path / "test_a.py").write_text(HANGS)
    (tmp_path / "test_b.py").write_text("def test_other(): pass\n")
    code, said = run(tmp_path, "-n", "1", "--dist", "loadfile")
    assert code == 1 and said.count("Timeout (0:00:02)!") == 2 and "in test_hangs" in said and "in stuck" in said, said
    assert "3 failed, 4 passed" in said and "crashed while running 'test_a.py::test_hangs'" in said and "assert 1 == 2" in said, said


def test_a_hang_in_one_process_ends_it_with_what_failed_before(tmp_path):
    (tmp_path / "test_a.py").write_text("import threading\ndef test_fails(): assert 1 == 2\ndef test_hangs(): threading.Event().wait()\n")
    code, said = run(tmp_path)
    assert code == 1 and "FAILED test_a.py::test_fails" in said and "assert 1 == 2" in said and "in test_hangs" in said, said


def test_a_thread_that_goes_on_does_not_keep_the_process(tmp_path):
    (tmp_path / "test_a.py").write_text("import threading\ndef test_it(): threading.Thread(target=threading.Event().wait).start()\n")
    code, said = run(tmp_path)
    assert code == 1 and "1 passed" in said and "Timeout (0:00:02)!" in said, said


def test_what_takes_long_is_there():
    assert [file for file in ending.LONG if not (TESTS.parent / file).exists()] == []


def test_a_few_failures_get_a_second_run_alone(tmp_path):
    """Through the cache that pytest wrote: what fails sometimes, what fails always, too many, a run that did not come to its end."""
    (tmp_path / "test_a.py").write_text("from pathlib import Path\ndef test_once():\n    if not Path('been').exists():\n"
                                        "        Path('been').touch()\n        assert 1 == 2\n")
    (tmp_path / "test_b.py").write_text("def test_always(): assert 1 == 2\n")
    (tmp_path / "test_many.py").write_text("import pytest\n@pytest.mark.parametrize('n', range(6))\ndef test_it(n): assert 1 == 2\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def again(*words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, text=True, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**{name: value for name, value in os.environ.items() if "XDIST" not in name}, "PYTHONPATH": str(TESTS.parent)})
        return done.returncode, done.stdout

    assert again("-m", "tests.again", "0", "0") == (0, "")
    assert again("-m", "pytest", "--cache-clear", "-n", "1", "test_a.py")[0] == 1
    code, said = again("-m", "tests.again", "1", "0")
    assert code == 0 and "UNSTEADY, failed beside others and passed alone: test_a.py::test_once" in said, said
    assert again("-m", "tests.again", "1", "0")[0] == 1                # none is known to have failed: not a pass
    assert again("-m", "pytest", "--cache-clear", "test_b.py")[0] == 1
    code, said = again("-m", "tests.again", "0", "1")
    assert code == 1 and "failed again" in said, said
    assert again("-m", "tests.again", "0", "2")[0] == 1 and again("-m", "tests.again", "-11", "0")[0] == 1
    assert again("-m", "pytest", "--cache-clear", "test_many.py")[0] == 1
    code, said = again("-m", "tests.again", "1", "0")
    assert code == 1 and "failed: 6;" in said, said
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\ndef test_it(): pass\n")
    assert again("-m", "pytest", "--cache-clear", "-n", "1", "test_broken.py")[0] == 1
    assert again("-m", "tests.again", "1", "0")[0] == 1
