"""Collect the server's metrics for Prometheus.

Responsible for: the metrics and their names. Not responsible for: when they change (gate.py, choices.py).
No metric ever contains a prompt, an answer or a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.types import Scope

from dovetail.serving.served_model import ServedModel

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Meters:
    """The metrics of one application."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(list(models)))
        self._requests = Counter(
            "dovetail_requests", "Requests answered", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "dovetail_request_seconds",
            "From the first byte of a request to the last of its response",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "dovetail_first_token_seconds",
            "From a request to the first token of its answer",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "dovetail_prompt_tokens", "Tokens of prompts", ["model"], registry=self._registry
        )
        self._tokens = Counter(
            "dovetail_generated_tokens", "Tokens drawn", ["model"], registry=self._registry
        )

    def request_done(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a finished request. Its label is the pattern of its route, so that there are few labels."""
        route = getattr(scope.get("route"), "path", "unknown")
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def prompt(self, model: str, num_tokens: int) -> None:
        self._prompt_tokens.labels(model).inc(num_tokens)

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token.labels(model).observe(seconds)

    def drawn(self, model: str, num_tokens: int) -> None:
        self._tokens.labels(model).inc(num_tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines:
    """A collector that reads the load of the engines when the metrics are requested."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Yield one gauge for each figure of the load, with one value for each model."""
        figures = {
            "running_answers": ("Answers being decoded", "num_running"),
            "waiting_answers": ("Answers waiting for a place", "num_waiting"),
            "cache_pages": ("Pages of the KV cache in use, 64 tokens each", "num_pages"),
        }
        for name, (meaning, attribute) in figures.items():
            gauge = GaugeMetricFamily(f"dovetail_{name}", meaning, labels=["model"])
            for model in self._models:
                gauge.add_metric([model.name], getattr(model.thread.load, attribute))
            yield gauge
