"""Metrics of one server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_llava.checkpoints.offload import Counts
from moe_llava.serving.engine.interface import CompletionEngine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # buckets of the histogram

# Otherwise each counter has a second series, the time of its creation.
disable_created_metrics()


class Metrics:
    """Count requests and tokens. Each server has a registry of its own, so two servers in one process do not add up."""

    def __init__(self, engine: CompletionEngine, experts: Counts | None = None) -> None:
        """Register the metrics. `experts`: counts of the expert cache, None if all experts are in memory."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "moe_llava_requests_total",
            "Chat completions and traces by outcome, and refused requests by status",
            ["outcome"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter("moe_llava_prompt_tokens_total", "Prefill tokens", registry=self._registry)
        self.reused_tokens = Counter(
            "moe_llava_cached_prompt_tokens_total", "Prompt tokens taken from the prefix cache", registry=self._registry
        )
        self.completion_tokens = Counter("moe_llava_completion_tokens_total", "Decoded tokens", registry=self._registry)
        self.time_to_first_token = Histogram(
            "moe_llava_time_to_first_token_seconds",
            "Time from the arrival of a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        running = Gauge("moe_llava_requests_running", "Requests in prefill or decode", registry=self._registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("moe_llava_requests_waiting", "Requests that wait for a slot", registry=self._registry)
        waiting.set_function(lambda: engine.waiting)
        if experts is not None:
            self._registry.register(ExpertCollector(experts))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class ExpertCollector(Collector):
    """Export the counts of the expert cache, which the engine's thread updates."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield the current counts."""
        counts = self._counts
        for name, meaning, value in (
            ("expert_hits_total", "Needed experts that were in memory", counts.hits),
            ("expert_misses_total", "Needed experts that were not in memory", counts.misses),
            ("experts_foreseen_total", "Hits that had been prefetched", counts.foreseen),
            ("experts_fetched_ahead_total", "Prefetched experts, needed or not", counts.ahead),
            ("expert_bytes_total", "Bytes of fetched experts", counts.bytes_read),
        ):
            yield CounterMetricFamily(f"moe_llava_{name}", meaning, value)
