"""`python -m runtime.serve` as a process: its signals, its log, its exit codes."""

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
from test_help import ROOT

SECRET = "Nobody may read this sentence"
LONG = {"prompt": SECRET, "max_tokens": 200, "n": 128, "ignore_eos": True, "temperature": 0}


@contextmanager
def process(*words):
    """A server's process and its address."""
    command = [sys.executable, "-m", "runtime.serve", *map(str, words), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as one:
        try:
            line = one.stdout.readline()
            assert line, one.stderr.read()
            url = line.split()[0]
            while httpx.get(f"{url}/health").status_code != 200:
                time.sleep(0.02)
            yield one, url
        finally:
            one.kill()


def test_sigterm_finishes_streams_and_refuses_new_ones(served_bundle):
    with process(served_bundle) as (one, url):
        got = []
        thread = threading.Thread(target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=60)))
        whole = httpx.Client()
        assert whole.get(f"{url}/health").status_code == 200
        thread.start()
        while not re.search(r'edgewright_rows\{model="tiny"\} [1-9]', httpx.get(f"{url}/metrics").text):
            time.sleep(0.01)
        one.terminate()
        while (answer := whole.get(f"{url}/v1/models")).status_code == 200:  # on a connection that was open before
            time.sleep(0.01)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping" and answer.headers["retry-after"]
        assert httpx.get(f"{url}/health").status_code == 503                 # and on a new one
        thread.join(60)
        assert got[0].text.endswith("data: [DONE]\n\n") and got[0].text.count('"finish_reason":"length"') == 128
        assert one.wait(30) == 0
        log = one.stderr.read()
    lines = [json.loads(line) for line in log.splitlines()]                  # nothing else is there
    assert {"loaded", "request", "reply", "stopping", "unloaded"} <= {line["event"] for line in lines}
    assert SECRET not in log and all(line["time"].endswith("Z") and line["level"] for line in lines)
    reply = next(line for line in lines if line["event"] == "reply")
    assert reply["model"] == "tiny" and reply["new_tokens"] == 200 and reply["finish"] == "length"


def test_a_second_signal_ends_at_once(served_bundle):
    with process(served_bundle) as (one, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as stream:
            parts = stream.iter_bytes()
            next(parts)
            one.terminate()
            time.sleep(0.3)
            one.terminate()
            start = time.monotonic()
            text = b"".join(parts).decode()
            assert '"code":"stopping"' in text and text.endswith("data: [DONE]\n\n") and text.count('"finish_reason":"length"') < 128
        assert one.wait(10) == 0 and time.monotonic() - start < 5


def test_what_cannot_be_served(served_bundle, tmp_path):
    """A bundle that is none, two of one name, one that opens and cannot be loaded: one sentence, exit code 2."""
    (tmp_path / "tiny").symlink_to(served_bundle)
    for words, said in [([tmp_path / "none"], "no such folder"), ([served_bundle, tmp_path / "tiny"], "two bundles are called 'tiny'"),
                        ([served_bundle, "--slots-dir", tmp_path / "none"], "no such folder to keep slots in"),
                        ([served_bundle, "--provider", "cuda"], "cuda"), ([served_bundle, "--max-memory-mb", "0.01"], "--max-memory-mb is"),
                        ([served_bundle, "--host", "203.0.113.7"], "cannot listen"), ([served_bundle, "--host", "no.invalid"], "cannot listen")]:
        done = subprocess.run([sys.executable, "-m", "runtime.serve", *map(str, words), "--port", "0"], capture_output=True, text=True,
                              cwd=ROOT, timeout=60)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and said in last and "Traceback" not in done.stderr, done.stderr


def test_no_key_and_no_loopback_is_warned_of(served_bundle):
    with process(served_bundle, "--host", "0.0.0.0") as (one, url):
        one.terminate()
        assert one.wait(30) == 0
        warning = json.loads(one.stderr.readline())
    assert warning["level"] == "warning" and "--api-keys" in warning["event"]
