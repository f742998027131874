"""Serve all-MiniLM-L6-v2 with a plan.

python examples/production/serve_minilm/server.py --plan out/serve

POST /embed      {"text": "..."} -> {"embedding": [...]}; 422 malformed, 413 too large, 503 queue full, 504 too late
GET  /health     the server is alive
GET  /ready      the model is loaded and compiled
GET  /metrics    Prometheus
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUTE = "/embed"
UNMODIFIED_ROUTE = "/unmodified/embed"


def plan_shapes(directory: str) -> tuple[tuple[int, int], ...]:
    """Return the `(batch, tokens)` of each case of the workload that a plan was made for."""
    import kernel_pytorch as kp

    signatures = kp.load_plan(directory).workload.signatures
    return tuple(dict.fromkeys((s[0].shape[0], s[0].shape[1]) for s in signatures.values()))


def build(arguments: argparse.Namespace):
    """Return the server, ready to run.

    `PROMETHEUS_MULTIPROC_DIR` must be set; the workers are processes of their own.
    """
    import litserve
    from admission import Admission
    from embedding import Embedding
    from metrics import exposition
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.responses import PlainTextResponse, Response

    shapes = plan_shapes(arguments.plan)
    plans = {ROUTE: arguments.plan} | ({UNMODIFIED_ROUTE: ""} if arguments.compare else {})
    services = [
        Embedding(
            route=route,
            target=arguments.workload,
            plan=plan,
            shapes=shapes,
            trust_artifacts=arguments.trust_artifacts,
            wait_s=arguments.wait_ms / 1e3,
        )
        for route, plan in plans.items()
    ]
    server = litserve.LitServer(
        services,
        accelerator=arguments.accelerator,
        devices=1,
        workers_per_device=1,  # one worker uses all cores of its device; a second would share them
        timeout=arguments.timeout_s,
        healthcheck_path="/ready",
        max_payload_size=arguments.max_bytes,
        middlewares=[(Admission, {"routes": tuple(plans), "max_pending": arguments.max_pending})],
        disable_openapi_url=True,
        restart_workers=True,
    )

    async def health() -> Response:
        return PlainTextResponse("ok")

    async def metrics() -> Response:
        return Response(exposition(), media_type=CONTENT_TYPE_LATEST)

    server.app.add_api_route("/health", health, methods=["GET"])
    server.app.add_api_route("/metrics", metrics, methods=["GET"])
    return server


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Serve all-MiniLM-L6-v2 with a plan.")
    parser.add_argument("--plan", required=True, help="directory that `kpt optimize -o` wrote")
    parser.add_argument("--workload", default=f"{HERE / 'workload.py'}:workload", help="what the plan was made for")
    parser.add_argument("--compare", action="store_true", help=f"serve the unmodified model too, at {UNMODIFIED_ROUTE}")
    parser.add_argument("--host", default="127.0.0.1", choices=["127.0.0.1", "0.0.0.0", "::"])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-pending", type=int, default=64, help="requests waiting or computed, by route")
    parser.add_argument("--max-bytes", type=int, default=65536, help="size of a request")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="how long a batch waits to fill")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="a request that waited longer gets a 504")
    parser.add_argument("--trust-artifacts", action="store_true", help="load compiled code beside the plan")
    return parser.parse_args(argv)


def stop_on_sigterm() -> None:
    """Let SIGTERM, which orchestrators send, do what Ctrl-C does: LitServe shuts down gracefully on Ctrl-C only."""
    parent = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() == parent:
            raise KeyboardInterrupt
        raise SystemExit(0)  # a forked child of LitServe, which inherits this handler

    signal.signal(signal.SIGTERM, stop)


def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse new connections, answer what was admitted, and end."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="serve-minilm-") as shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
        sys.path.insert(0, str(HERE))
        stop_on_sigterm()
        build(arguments).run(
            host=arguments.host,
            port=arguments.port,
            num_api_servers=1,  # the bound of the queue is counted in this one process
            generate_client_file=False,
            log_level="warning",
        )


if __name__ == "__main__":
    main()
