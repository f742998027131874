"""The service: texts in, sentence embeddings out, in batches of the shapes that the plan covers.

No `from __future__ import annotations` here: LitServe reads the annotations to find the request's type.
"""

import sys
import time
from pathlib import Path

import litserve
import torch
from litserve.loops import BatchedLoop
from metrics import BATCHES, MODEL_SECONDS, PLAN_CALLS, ROWS
from pydantic import BaseModel, Field

import kernel_pytorch as kp

sys.path.insert(0, str(Path(__file__).parents[2]))
import minilm

MAX_CHARACTERS = 8192


class Text(BaseModel):
    """A request; what does not fit is refused with a 422 before it reaches the queue."""

    text: str = Field(min_length=1, max_length=MAX_CHARACTERS)


class Resumed:
    """A queue whose next item was taken already."""

    def __init__(self, item, queue) -> None:
        self.item = item
        self.queue = queue

    def get(self, *, timeout: float | None = None):
        item, self.item = self.item, None
        return self.queue.get(timeout=timeout) if item is None else item

    def get_nowait(self):
        item, self.item = self.item, None
        return self.queue.get_nowait() if item is None else item


class SleepingLoop(BatchedLoop):
    """LitServe's own batching, which polls an empty queue a thousand times a second, made to sleep on it.

    Measured on a server of two idle workers: 0.25 cores without this, under 0.06 with it.
    """

    def get_batch_requests(self, lit_api, request_queue, transport):
        return super().get_batch_requests(lit_api, Resumed(request_queue.get(), request_queue), transport)


class Embedding(litserve.LitAPI):
    """Embeds texts with a plan, or with the unmodified model as one would run it without this package.

    Args:
        route: Path of the endpoint.
        target: The workload the plan was made for.
        plan: Directory of the plan; empty for the unmodified model, which takes batches of any size, padded to their
            longest text: that is its best, so the comparison is fair.
        shapes: `(batch, tokens)` that the plan covers.
        trust_artifacts: Whether compiled code beside the plan may be loaded.
        wait_s: How long a batch waits to fill.
    """

    def __init__(
        self,
        *,
        route: str,
        target: str,
        plan: str,
        shapes: tuple[tuple[int, int], ...],
        trust_artifacts: bool,
        wait_s: float,
    ) -> None:
        super().__init__(
            api_path=route, max_batch_size=max(b for b, _ in shapes), batch_timeout=wait_s, loop=SleepingLoop()
        )
        self.target = target
        self.plan = plan
        self.shapes = tuple(sorted(shapes))
        self.trust_artifacts = trust_artifacts
        self.max_tokens = max(t for _, t in shapes)
        self.counted = {"inside": 0, "outside": 0}

    def setup(self, device: str) -> None:
        """Load the model in the worker, apply the plan, and compile every shape before the first request."""
        workload = kp.load_target(self.target)
        self.model = workload.model()
        if self.plan:
            calls = {case: workload.call(case, seed=0) for case in workload.cases}
            self.model = kp.apply(self.plan, self.model, inputs=calls, trust_artifacts=self.trust_artifacts)
        for batch, _ in self.shapes:
            self.predict(["warm-up"] * batch)

    def decode_request(self, request: Text) -> str:
        return request.text

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def inputs(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Return the texts as the model takes them: padded to the smallest shape of the plan that holds them."""
        exact = minilm.tokenize(texts, tokens=None)
        longest = min(exact["input_ids"].shape[1], self.max_tokens)
        if not self.plan:
            return minilm.tokenize(texts, tokens=longest)
        fitting = [(b, t) for b, t in self.shapes if b >= len(texts) and t >= longest]
        batch, tokens = min(fitting, key=lambda shape: shape[0] * shape[1])
        return minilm.tokenize(texts, batch=batch, tokens=tokens)

    @torch.no_grad()
    def predict(self, texts: list[str]) -> list[list[float]]:
        call = self.inputs(texts)
        started = time.perf_counter()
        embedded = minilm.embed(self.model(**call), call["attention_mask"])
        MODEL_SECONDS.labels(self.api_path).observe(time.perf_counter() - started)
        shape = "x".join(map(str, call["input_ids"].shape)) if self.plan else "as they come"
        BATCHES.labels(self.api_path, shape).inc()
        ROWS.labels(self.api_path).inc(len(texts))
        self.count_plan_calls()
        return embedded[: len(texts)].tolist()

    def count_plan_calls(self) -> None:
        """Tell the metrics whether the plan covered the call; a plan that keeps the unmodified model has no counts."""
        if not self.plan or not kp.load_plan(self.plan).candidate.steps:
            return
        counts = kp.call_counts(self.model)
        for where, now in (("inside", counts.inside), ("outside", counts.outside)):
            PLAN_CALLS.labels(self.api_path, where).inc(now - self.counted[where])
            self.counted[where] = now

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]):  # annotated, it would be validated as a response model
        return {"embedding": output}
