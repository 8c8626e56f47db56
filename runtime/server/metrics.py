"""Figures for Prometheus at /metrics, under the prefix edgewright_.

What requests took is observed as they end; what the schedulers count is read when somebody asks. A model that was unloaded
and loaded again counts from zero, which Prometheus takes for what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..pending import Pending
from .logs import say

if TYPE_CHECKING:
    from .service import Service

_SECONDS = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (.001, .0025, .005, .0075, .01, .025, .05, .075, .1, .25, .5, 1)
# Of scheduler.Stats: field, what it is.
_GAUGES = {"queued": "requests that wait", "rows": "requests that are being read or answered", "prefix_bytes": "bytes of kept prefixes",
           "cache_bytes": "bytes of the running requests' cache"}
_COUNTERS = {"steps": "steps of all rows", "step_rows": "rows, summed over the steps: by the steps, the mean batch",
             "prompt_tokens": "tokens of prompts", "cached_tokens": "of these, taken from a kept prefix", "new_tokens": "tokens of replies",
             "guessed_tokens": "guesses that passes have checked", "held_tokens": "of these, the tokens of replies",
             "evictions": "kept blocks of prefixes that were dropped", "finished": "replies that were made whole",
             "cancelled": "replies that were given up", "expired": "requests whose deadline passed", "failed": "requests that failed",
             "refused": "requests that found the queue full"}


class Metrics(Collector):
    def __init__(self, service: Service):
        self._service, self._registry = service, CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)                 # memory, CPU time and open files of this process
        own = {"registry": self._registry, "namespace": "edgewright"}
        self.requests = Counter("http_requests", "answers by status", ["method", "status"], **own)
        self.active = Gauge("http_requests_active", "requests that are being answered", **own)
        self._ttft = Histogram("time_to_first_token_seconds", "from submission, waiting included", ["model", "route"],
                               buckets=_SECONDS, **own)
        self._tpot = Histogram("time_per_output_token_seconds", "mean over a reply, after its first token", ["model", "route"],
                               buckets=_PER_TOKEN, **own)
        self._whole = Histogram("reply_seconds", "from submission to the last token", ["model", "route"], buckets=_SECONDS, **own)
        self._ends = Counter("replies", "replies by how they ended", ["model", "route", "finish"], **own)

    def observe(self, pending: Pending, route: str, model: str = "") -> None:
        """Count a request that has ended, once. model: its name among the service's."""
        reply = pending.reply
        times, count = reply.timings.token_ms, len(reply.timings.token_ms)
        finish = reply.finish_reason or ("error" if pending.error else "cancelled")
        self._ends.labels(model, route, finish).inc()
        if count:
            self._ttft.labels(model, route).observe(times[0] / 1e3)
            self._whole.labels(model, route).observe(times[-1] / 1e3)
        if count > 1:
            self._tpot.labels(model, route).observe((times[-1] - times[0]) / (count - 1) / 1e3)
        say("reply", route=route, model=model, finish=finish, prompt_tokens=pending.prompt_tokens, cached_tokens=pending.cached_tokens,
            new_tokens=len(reply.tokens), ttft_ms=round(times[0], 1) if count else None, ms=round(times[-1], 1) if count else None)

    def collect(self) -> Iterator:
        """The schedulers' counters as they are now."""
        stats = {model.name: model.engine.scheduler.stats() for model in self._service.models.values() if model.engine}
        for fields, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, text in fields.items():
                metric = family(f"edgewright_{name}", text, labels=["model"])
                for model, one in stats.items():
                    metric.add_metric([model], getattr(one, name))
                yield metric
        loaded = GaugeMetricFamily("edgewright_model_loaded", "1: in memory", labels=["model"])
        for model in self._service.models.values():
            loaded.add_metric([model.name], int(model.name in stats))
        yield loaded

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
