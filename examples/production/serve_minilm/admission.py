"""A bounded queue in front of the model: what cannot be answered soon is refused at once, and counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

from metrics import LATENCY, PENDING, REQUESTS
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Admission:
    """ASGI middleware: at most `max_pending` requests of a route are waiting or computed; the next gets a 503.

    A queue without a bound turns overload into latency for everybody, and then into memory. A refusal tells the
    caller (and the load balancer) to go elsewhere while the requests that were admitted stay fast.
    """

    def __init__(self, app: ASGIApp, *, routes: Collection[str], max_pending: int) -> None:
        self.app = app
        self.routes = frozenset(routes)
        self.max_pending = max_pending
        self.pending: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope.get("path", "")
        if scope["type"] != "http" or route not in self.routes:
            await self.app(scope, receive, send)
            return
        if self.pending[route] >= self.max_pending:
            REQUESTS.labels(route, 503).inc()
            refusal = JSONResponse({"detail": "queue full"}, status_code=503, headers={"Retry-After": "1"})
            await refusal(scope, receive, send)
            return

        status = 500

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.pending[route] += 1
        PENDING.labels(route).set(self.pending[route])
        started = time.perf_counter()
        try:
            await self.app(scope, receive, observe)
        finally:
            self.pending[route] -= 1
            PENDING.labels(route).set(self.pending[route])
            LATENCY.labels(route).observe(time.perf_counter() - started)
            REQUESTS.labels(route, status).inc()
