"""One line a stage where stderr is no terminal; a bar where it is."""

import os
import pty
import subprocess
import sys
import termios

PROGRAM = """
from models.progress import progress
assert list(progress(range(3), label="one", unit="layer")) == [0, 1, 2]
with progress(total=1, label="two", unit="step") as bar:
    bar.set_postfix(loss="1")
    bar.update()
assert list(progress(range(3), label="silent", unit="layer", quiet=True)) == [0, 1, 2]
progress(range(3), label="never begun", unit="layer")
"""


def test_lines_in_a_log():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == "one: 3 layers\ntwo: 1 step\n"


def test_bars_on_a_terminal():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:                                  # Linux's end of a terminal whose other side is closed
        pass
    assert process.wait() == 0 and b"one: 100%" in shown and b"3/3" in shown and b"silent" not in shown
