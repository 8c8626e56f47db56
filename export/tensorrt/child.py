"""Run a command in a child process, so that a crash in a library's native code ends in a sentence and exit code 2.

TensorRT's parser and ONNX Runtime trust much of a model: a malformed one can end their process. The child is forked
before either is loaded; Ctrl-C and SIGTERM are passed on to it, and its exit code is the command's. Where the system
cannot fork, the command runs as it is.
"""

import os
import signal
import sys
from collections.abc import Callable


def in_a_child(command: Callable[[], int], name: str) -> int:
    """`command()` in a child; returns its exit code, or 2 after saying that a signal ended it."""
    if not hasattr(os, "fork"):
        return command()
    sys.stdout.flush()
    passed_on = (signal.SIGINT, signal.SIGTERM)
    # Blocked and waited for: a signal that came just before a blocking waitpid() would be heard only when that returns.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*passed_on, signal.SIGCHLD))
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)                         # a terminal's Ctrl-C reaches it once, through the parent
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return command()
    handler = signal.signal(signal.SIGCHLD, lambda *_: None)          # without one a system may drop the signal
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if (received := signal.sigwait((*passed_on, signal.SIGCHLD))) != signal.SIGCHLD:
            os.kill(child, received)
    signal.signal(signal.SIGCHLD, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    code = os.waitstatus_to_exitcode(ended[1])
    if code >= 0 or -code == signal.SIGTERM:
        return code if code >= 0 else 128 - code
    reason = {signal.SIGKILL: "killed, as systems do when memory runs out; close other programs or use a larger machine"}.get(
        -code, f"ended by {signal.Signals(-code).name}: the model crashed TensorRT or ONNX Runtime, so it is malformed or "
        "beyond them; export it again, simplified, and try onnx.checker.check_model on it")
    print(f"error: {name} was {reason}; nothing was written", file=sys.stderr)
    return 2
