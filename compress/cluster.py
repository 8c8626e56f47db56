"""Share a stage's work out over the machines or processes of a Ray cluster.

    with cluster(options.ray, options.device) as joined:               # "HOST:PORT", "local", or None: joined is None
        for result in joined.share(work, pieces):                      # in the order of the pieces
            ...

work(piece, device) runs on a worker, whose device is a GPU of its own where the cluster has GPUs and the stage may use them, else
the CPU. A piece whose worker dies is done again by another one, RETRIES times; results come in order, so a stage that keeps each
goes on from the last one kept. Ray is the engine, loaded only where it is asked for; it reports nothing to anyone and starts no
dashboard.

Every machine of the cluster has this code in the same folder or installed, and sees the checkpoint under the same path. A
cluster that is joined has a node on this machine (`ray start --address=HOST:PORT`), because Ray's processes share memory with it.
"""

import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from models.device import computing_on
from runtime.cli import Checked, arg
from runtime.errors import DeviceError, UserError
from runtime.machine import available_cpus

RETRIES = 3                # of a piece whose worker died
AHEAD = 2                  # pieces under way or waiting for each worker: the next one is there when it is done
PATIENCE = 5.0             # seconds to wait for an address to answer


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Checked):
    ray: str | None = arg(None, help="share the work out over a Ray cluster: its HOST:PORT, or local to start one on this machine",
                          metavar="ADDRESS")

    def __post_init__(self):
        super().__post_init__()
        if self.ray is not None and self.ray != "local" and not re.fullmatch(r"[^:/\s]+:\d{1,5}", self.ray):
            raise UserError(f"--ray is {self.ray!r}, which should be HOST:PORT of a cluster, or local")


class Cluster:
    """A cluster that has been joined. workers: how many pieces are done at once; device: on what, cuda or cpu."""

    def __init__(self, ray, device: str):
        found = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(found.get("GPU", 0))
        if not gpus and device.startswith("cuda"):
            raise UserError(f"--device {device}: the Ray cluster has no GPUs; leave --device out to compute on its CPUs")
        self.workers, self._ray = gpus or max(1, int(found.get("CPU", 1))), ray
        # By default Ray ends a worker after each task that has a GPU, and with it the model that it holds.
        self._task = ray.remote(max_retries=RETRIES, num_gpus=int(gpus > 0), num_cpus=int(not gpus), max_calls=0)(_work)
        self.device = "cuda" if gpus else "cpu"

    def share(self, work: Callable, pieces: Iterable) -> Iterator:
        """work(piece, device) of every piece, in order, a few for each worker under way. Raises what `work` raises, and DeviceError for a
        piece whose workers all died."""
        pieces, waiting = iter(pieces), deque()
        try:
            while True:
                for piece in islice(pieces, AHEAD * self.workers - len(waiting)):
                    waiting.append(self._task.remote(work, piece, self.device))
                if not waiting:
                    return
                yield self._result(waiting.popleft())
        finally:
            for task in waiting:
                self._ray.cancel(task, force=True)

    def _result(self, task):
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.RaySystemError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError,
                errors.RuntimeEnvSetupError) as error:
            raise DeviceError(f"the Ray cluster lost the workers of one piece {RETRIES + 1} times ({_first_line(error)}): what was finished "
                              "is kept, run the same command again") from None


def _work(work: Callable, piece, device: str):
    """On a worker: a piece of the work, on the device that Ray lets it see."""
    import torch
    with computing_on(device) as there:
        try:
            return work(piece, there)
        except torch.AcceleratorError:
            os._exit(1)        # this process cannot use its GPU again: Ray begins another, and the piece anew


@contextmanager
def cluster(address: str | None, device: str = "auto") -> Iterator[Cluster | None]:
    """Join, or start, and leave. Raises UserError where nothing answers, and ModuleNotFoundError without Ray."""
    if address is None:
        yield None
        return
    if address != "local":
        _answers(address)
    # Read when Ray is loaded: it reports to nobody, and leaves it to a task without GPUs which it sees.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "local":
            ray.init(address="local", num_cpus=available_cpus(), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--ray {address}: Ray did not start ({_first_line(error)}); of a cluster this machine must be a node: "
                        "ray start --address=HOST:PORT") from None
    try:
        yield Cluster(ray, device)
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray {address}: nothing answers there ({error}); start a cluster with ray start --head, or give --ray local") from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@lru_cache(maxsize=1)
def held(make: Callable, path: Path, *how):
    """make(path, *how), which a worker holds until it is asked for another. Raises UserError where it does not see the path."""
    if not path.is_dir():
        raise UserError(f"{path} is not there on {socket.gethostname()}, a worker of the Ray cluster: each of its machines must see the "
                        "checkpoint under the same path")
    return make(path, *how)
