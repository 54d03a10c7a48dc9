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
    """The numbers of one server, in a registry of their own.

    Args:
        stats: what the engine is doing.
    """

    def __init__(self, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._requests = Counter(
            "nudging_hf_requests",
            "Requests for answers that have ended, by how they ended",
            ["endpoint", "outcome"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "nudging_hf_tokens",
            "Tokens of answers in the base's vocabulary, by the model that wrote them",
            ["author"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "nudging_hf_prompt_tokens", "Tokens of the base's prompts", registry=self._registry
        )
        self._first_token = Histogram(
            "nudging_hf_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "nudging_hf_request_duration_seconds",
            "From the arrival of a request to the end of its answers, for requests that were answered",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for author in ("base", "nudging"):
            self._tokens.labels(author)

    def text(self) -> bytes:
        """All numbers in the text format of Prometheus."""
        return generate_latest(self._registry)

    def ended(self, endpoint: str, outcome: Outcome) -> None:
        """A request has ended."""
        self._requests.labels(endpoint, outcome).inc()

    def watch(self, endpoint: str) -> RequestWatch:
        """A request has arrived."""
        return RequestWatch(self, endpoint)

    def add_prompt(self, tokens: int) -> None:
        """A prompt has been taken."""
        self._prompt_tokens.inc(tokens)

    def add_tokens(self, base: int, nudging: int) -> None:
        """Both models have written so many tokens."""
        self._tokens.labels("base").inc(base)
        self._tokens.labels("nudging").inc(nudging)

    def observe_first_token(self, endpoint: str, seconds: float) -> None:
        """A request has its first token."""
        self._first_token.labels(endpoint).observe(seconds)

    def observe_duration(self, endpoint: str, seconds: float) -> None:
        """A request has been answered."""
        self._duration.labels(endpoint).observe(seconds)


class RequestWatch:
    """One request, from its arrival to its end, which is counted once."""

    def __init__(self, metrics: Metrics, endpoint: str):
        self._metrics = metrics
        self._endpoint = endpoint
        self._began = time.monotonic()
        self._has_token = self._has_ended = False

    def tokens(self, base: int, nudging: int) -> None:
        """The models have written so many tokens of its answers."""
        if not self._has_token and base + nudging:
            self._has_token = True
            self._metrics.observe_first_token(self._endpoint, time.monotonic() - self._began)
        self._metrics.add_tokens(base, nudging)

    def end(self, outcome: Outcome) -> None:
        """The request has ended; only the first call counts."""
        if self._has_ended:
            return
        self._has_ended = True
        self._metrics.ended(self._endpoint, outcome)
        if outcome == "answered":
            self._metrics.observe_duration(self._endpoint, time.monotonic() - self._began)
