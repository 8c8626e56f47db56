"""`make test`'s last word: the few tests that failed beside others are run once more, by themselves.

The suite has thousands of tests, and some of them measure: a server's patience, memory over time, what two threads do to each other.
On a machine that stops for a second one of them fails now and then, and says nothing about the code. So at most FEW failures get a
second run, one process, nothing beside it. One that fails again fails the run; one that passes is named, since a fault that only
sometimes shows is a fault too, of the test or of the code.

    python -m tests.again FAILED [FAILED ...]       the exit codes of the runs before
"""

import json
import subprocess
import sys
from pathlib import Path

FEW = 5
LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")               # pytest's own file: node ids of what failed and has not passed since


def main(codes: list[str]) -> int:
    """codes: what each run of pytest ended with: 0 passed, 1 some tests failed, others: it did not come to its end."""
    if not set(codes) - {"0"}:
        return 0
    if not set(codes) <= {"0", "1"}:
        return 1
    failed = sorted(json.loads(LAST_FAILED.read_text()))
    if not 0 < len(failed) <= FEW or any("::" not in one for one in failed):              # a file that cannot be read is no matter of time
        print(f"failed: {len(failed)}; a second run is for {FEW} tests at most, and for no file that could not be collected")
        return 1
    print(f"\nRunning {len(failed)} of the tests once more, by themselves:", *failed, sep="\n  ", flush=True)
    code = subprocess.call([sys.executable, "-m", "pytest", "-n", "0", *failed])
    print(f"UNSTEADY, failed beside others and passed alone: {', '.join(failed)}" if code == 0 else "failed again")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
