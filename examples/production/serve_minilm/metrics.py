"""What `/metrics` tells, in Prometheus' text format; counted across the processes of the server.

`PROMETHEUS_MULTIPROC_DIR` must name an empty directory before this module is imported: `server.py` sees to it.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

REQUESTS = Counter("embed_requests_total", "Requests answered, by route and HTTP status.", ["route", "status"])
LATENCY = Histogram(
    "embed_request_seconds", "Time from the first byte to the answer, waiting included.", ["route"], buckets=SECONDS
)
PENDING = Gauge("embed_pending", "Requests admitted and not yet answered.", ["route"], multiprocess_mode="livesum")
BATCHES = Counter("embed_batches_total", "Calls of the model, by the padded shape.", ["route", "shape"])
ROWS = Counter("embed_rows_total", "Texts in those batches; the rest of the rows is padding.", ["route"])
MODEL_SECONDS = Histogram("embed_model_seconds", "Time of one batch in the model.", ["route"], buckets=SECONDS)
PLAN_CALLS = Counter(
    "embed_plan_calls_total",
    "Calls of the model that the plan covers (inside) and those that ran the unmodified model (outside).",
    ["route", "where"],
)


def exposition() -> bytes:
    """Return the metrics of all processes as text."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)
