"""Figures for Prometheus.

Responsible for: what is counted and how it is called. Not responsible for: when (gate.py, routes.py).
No prompt, answer or key is ever part of a figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.types import Scope

from dovetail.serving.served_model import ServedModel

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Meters:
    """The figures of one application."""

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
        """One request is over. Its route is the pattern, so that there are few."""
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
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines:
    """Reads the load of the engines when somebody asks."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """One gauge a figure, one value a model."""
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
