"""A run of the tests ends, whatever they do, and tells what it has found: hooks that conftest.py brings to every run.

- A test that takes more than fifteen minutes (`faulthandler_timeout` in pyproject.toml) has every thread's stack printed, and its process
  ends. With `-n` another process goes on with the tests that come after it, so that it costs the run these minutes.
- A process that does not end though its tests have (a thread that nobody stops) is ended after a minute, with the same stacks.
- With `-n`, the process that hands out the tests ends after LONGEST_S, whatever the others do.
- What fails is told at once, because whoever ends a run from outside would end its summary too.

pytest-xdist's own way of handing out whole files gives a test that ended its process to the next one, again and again, and then waits
for one that waits for a second test; `Files` does neither. It also hands out early what takes long, so that all end together.
"""

import faulthandler
import os
import sys

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key          # where stderr is captured too

ENDS_WITHIN_S = 60
LONGEST_S = 4000
TOLD = 3000                             # characters of a failure
LONG = ("tests/test_families.py", "tests/export/test_verify.py", "tests/models/test_train.py", "tests/test_formats.py",
        "tests/test_missing_parts.py", "tests/export/test_trt.py", "tests/export/test_encoder.py", "tests/test_training_devices.py",
        "tests/test_devices_sensitivity.py", "tests/models/test_get.py", "tests/test_quiet.py")           # a minute and more


class Failures:
    """Tells each as it comes."""

    def __init__(self, terminal):
        self.terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-TOLD:]}")


def pytest_sessionstart(session) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if terminal := session.config.pluginmanager.get_plugin("terminalreporter"):
        session.config.pluginmanager.register(Failures(terminal))
    if session.config.getoption("numprocesses", None):
        faulthandler.dump_traceback_later(LONGEST_S, exit=True, file=session.config.stash[fault_handler_stderr_fd_key])


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node) -> None:
    """pytest's limit is no longer one as soon as a test has failed: its fixtures, which end after it, have one too."""
    if not node.config.getoption("usepdb"):
        faulthandler.dump_traceback_later(float(node.config.getini("faulthandler_timeout")), exit=True,
                                          file=node.config.stash[fault_handler_stderr_fd_key])


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:           # waits for the others, and is then ended
        return
    faulthandler.dump_traceback_later(ENDS_WITHIN_S, exit=True, file=sys.__stderr__)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        """As the class it comes from, but for what the module's docstring says."""

        def remove_node(self, node):
            waiting = ((unit, test) for unit in self.assigned_work[node].values() for test, done in unit.items() if not done)
            unit, ended = next(waiting, (None, None))
            if unit:
                unit[ended] = True
            super().remove_node(node)
            return ended

        def schedule(self) -> None:
            begun = self.collection is not None
            super().schedule()
            for file in reversed(LONG if not begun else ()):
                if file in self.workqueue:
                    self.workqueue.move_to_end(file, last=False)
            for node in self.nodes:         # a new process's second file, without which it does not begin the last test of its first
                self._reschedule(node)

    return Files(config, log)
