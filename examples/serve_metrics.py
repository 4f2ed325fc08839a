"""Counts of examples/serve_int8.py in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import json
import threading

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds


class Metrics:
    """Counts in Prometheus' text format."""

    def __init__(self) -> None:
        self.lock, self.requests = threading.Lock(), dict[tuple[str, int], int]()
        self.counts, self.seconds, self.samples = [0] * (len(BUCKETS) + 1), 0.0, 0

    def add_request(self, path: str, status: int) -> None:
        """Count an answer."""
        with self.lock:
            self.requests[path, status] = self.requests.get((path, status), 0) + 1

    def add_inference(self, seconds: float, samples: int) -> None:
        """Count a run of the model."""
        with self.lock:
            self.counts[sum(seconds > bound for bound in BUCKETS)] += 1
            self.seconds, self.samples = self.seconds + seconds, self.samples + samples

    def text(self, variant: str) -> str:
        """Everything so far."""
        with self.lock:
            lines = ["# TYPE model_info gauge", f"model_info{{variant={json.dumps(variant)}}} 1"]
            lines += ["# TYPE http_requests_total counter"]
            for (path, status), count in sorted(self.requests.items()):
                lines.append(f'http_requests_total{{path="{path}",status="{status}"}} {count}')
            lines += ["# TYPE inference_samples_total counter", f"inference_samples_total {self.samples}"]
            lines += ["# TYPE inference_duration_seconds histogram"]
            for i, bound in enumerate((*BUCKETS, "+Inf")):
                total = sum(self.counts[: i + 1])
                lines.append(f'inference_duration_seconds_bucket{{le="{bound}"}} {total}')
            lines += [f"inference_duration_seconds_sum {self.seconds}"]
            return "\n".join([*lines, f"inference_duration_seconds_count {sum(self.counts)}", ""])
