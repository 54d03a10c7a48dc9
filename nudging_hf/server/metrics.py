"""What a server counts, for Prometheus. It knows requests and numbers, never what was asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine import Stats

Outcome = Literal["answered", "refused", "busy", "cancelled", "unavailable", "failed"]
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class _EngineCollector(Collector):
    """Asks the engine for its numbers when Prometheus asks."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("nudging_hf_answers_running", "Answers that are being written", stats.running)
        yield GaugeMetricFamily("nudging_hf_answers_waiting", "Answers that wait for a place", stats.waiting)
        passes = CounterMetricFamily("nudging_hf_forward_passes", "Forward passes of both models", labels=["model"])
        passes.add_metric(["base"], stats.base_forward_passes)
        passes.add_metric(["nudging"], stats.nudging_forward_passes)
        yield passes


class Metrics:
    """The numbers of one server, in a registry of their own. docs/server.md describes them.

    Args:
        stats: what the engine is doing.
    """

    def __init__(self, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self.requests = Counter(
            "nudging_hf_requests",
            "Requests for answers that have ended, by how they ended",
            ["endpoint", "outcome"],
            registry=self._registry,
        )
        self.tokens = Counter(
            "nudging_hf_tokens",
            "Tokens of answers in the base's vocabulary, by the model that wrote them",
            ["author"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "nudging_hf_prompt_tokens", "Tokens of the base's prompts", registry=self._registry
        )
        self.first_token = Histogram(
            "nudging_hf_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "nudging_hf_request_duration_seconds",
            "From the arrival of a request to the end of its answers, for requests that were answered",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for author in ("base", "nudging"):
            self.tokens.labels(author)

    def text(self) -> bytes:
        """All numbers in the text format of Prometheus."""
        return generate_latest(self._registry)


class RequestWatch:
    """One request, from its arrival to its end, which is counted once.

    Args:
        metrics: where it is counted.
        endpoint: which kind of request it is.
    """

    def __init__(self, metrics: Metrics, endpoint: str):
        self._metrics = metrics
        self._endpoint = endpoint
        self._began = time.monotonic()
        self._has_token = self._has_ended = False

    def tokens(self, base: int, nudging: int) -> None:
        """The models have written so many tokens of its answers."""
        if not self._has_token and base + nudging:
            self._has_token = True
            self._metrics.first_token.labels(self._endpoint).observe(time.monotonic() - self._began)
        self._metrics.tokens.labels("base").inc(base)
        self._metrics.tokens.labels("nudging").inc(nudging)

    def end(self, outcome: Outcome) -> None:
        """The request has ended; only the first call counts."""
        if self._has_ended:
            return
        self._has_ended = True
        self._metrics.requests.labels(self._endpoint, outcome).inc()
        if outcome == "answered":
            self._metrics.duration.labels(self._endpoint).observe(time.monotonic() - self._began)
