"""Counts of what the server did, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from moe_llava.checkpoints.offload import Counts

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # bounds of the histogram


class Metrics:
    """Used by the event loop alone. `experts`: of a model whose experts are not all in memory, what the engine's thread counts."""

    def __init__(self, experts: Counts | None = None) -> None:
        self._experts = experts
        self.requests: Counter[str] = Counter()  # by outcome: a status of HTTP, "cancelled", or "failed" in the midst of a stream
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._first_tokens = [0] * (len(SECONDS) + 1)
        self._first_token_seconds = 0.0

    def first_token(self, seconds: float) -> None:
        """Notes how long a client waited for the first token."""
        self._first_tokens[bisect_left(SECONDS, seconds)] += 1
        self._first_token_seconds += seconds

    def text(self, running: int, waiting: int) -> str:
        lines = _head("requests_total", "counter", "chat completions by outcome, and whatever else was refused")
        lines += [f'moe_llava_requests_total{{outcome="{outcome}"}} {count}' for outcome, count in sorted(self.requests.items())]
        values = [
            ("requests_running", "gauge", "answers that are being written", running),
            ("requests_waiting", "gauge", "requests that wait for a place", waiting),
            ("prompt_tokens_total", "counter", "tokens read", self.prompt_tokens),
            ("completion_tokens_total", "counter", "tokens written", self.completion_tokens),
        ]
        if self._experts is not None:
            values += [
                ("expert_hits_total", "counter", "experts that a layer needed and that were in memory", self._experts.hits),
                ("expert_misses_total", "counter", "experts that a layer needed and waited for", self._experts.misses),
                ("experts_foreseen_total", "counter", "of those in memory, fetched ahead", self._experts.foreseen),
                ("experts_fetched_ahead_total", "counter", "experts fetched ahead, needed then or not", self._experts.ahead),
                ("expert_bytes_total", "counter", "bytes of experts that were fetched", self._experts.bytes_read),
            ]
        for name, kind, meaning, value in values:
            lines += [*_head(name, kind, meaning), f"moe_llava_{name} {value}"]
        name = "time_to_first_token_seconds"
        lines += _head(name, "histogram", "from a request's arrival to its first token")
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._first_tokens, strict=True):
            total += count
            lines.append(f'moe_llava_{name}_bucket{{le="{bound}"}} {total}')
        lines += [f"moe_llava_{name}_sum {self._first_token_seconds}", f"moe_llava_{name}_count {total}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP moe_llava_{name} {meaning}", f"# TYPE moe_llava_{name} {kind}"]
