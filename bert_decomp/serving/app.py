"""The application: routes, errors in OpenAI's form, limits and metrics around a ``Batcher``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from ..prediction.predictor import Predictor
from .batcher import Batcher, Overloaded, TooLong
from .requests import (
    AnswerRequest,
    ClassifyRequest,
    EmbeddingsRequest,
    RerankRequest,
    classify_answer,
    embeddings_answer,
    found_answer,
    rerank_answer,
)

# Bytes of a request, seconds in which it must have come, and tokens that may wait.
BODY_BYTES, BODY_SECONDS, QUEUE_TOKENS = 4 * 2**20, 20.0, 2**20


def error(status: int, message: str, **headers: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(
        {"error": {"message": message, "type": kind, "code": status}}, status, headers
    )


class Limits:
    """ASGI middleware: a body that is too long or too slow is refused before anything reads it."""

    def __init__(self, app: Any, metrics: Metrics, paths: set[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._body(scope, receive)
            if isinstance(body, JSONResponse):
                await body(scope, receive, watched)
                return
            parts = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def replayed() -> Any:
                part = next(parts, None)
                return part if part is not None else await receive()

            # Every body is JSON, also where curl calls it a form.
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            await self.app({**scope, "headers": headers}, replayed, watched)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def _body(self, scope: Any, receive: Any) -> bytes | JSONResponse:
        """The whole body, or what to say instead."""
        too_long = error(413, f"the body has more than {BODY_BYTES} bytes", connection="close")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > BODY_BYTES:
            return too_long
        body = bytearray()

        async def read() -> bytes | JSONResponse:
            while True:
                message = await receive()
                body.extend(message.get("body", b""))
                if len(body) > BODY_BYTES:
                    return too_long
                if not message.get("more_body"):
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            text = f"the body did not come within {BODY_SECONDS:g} seconds"
            return error(408, text, connection="close")


class Metrics:
    """Prometheus metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "lowrank_bert", "registry": self.registry}
        self.requests = Counter("requests", "requests", ["path", "status"], **common)
        self.seconds = Histogram("request_seconds", "seconds of a request", ["path"], **common)
        self.batch_seconds = Histogram("batch_seconds", "seconds of the model a batch", **common)
        self.texts = Counter("texts", "texts answered", **common)
        self.tokens = Counter("tokens", "tokens answered", **common)
        self.waiting = Gauge("waiting_tokens", "tokens of requests that are not answered", **common)

    def batch(self, texts: int, tokens: int, seconds: float) -> None:
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_seconds.observe(seconds)


def make_app(predictor: Predictor, name: str) -> FastAPI:
    """The application for a model that requests may call ``name``.

    Example:
        >>> import uvicorn
        >>> uvicorn.run(make_app(Predictor("runs/mine/model"), "mine"))  # doctest: +SKIP
    """
    metrics, answers = Metrics(), predictor.answers
    batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(predictor, QUEUE_TOKENS, metrics.batch)
        metrics.waiting.set_function(lambda: batcher.waiting if batcher else 0)
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="lowrank-bert", lifespan=lifespan)

    async def outputs(
        texts: list[str], pairs: list[str] | None, truncate: bool
    ) -> tuple[np.ndarray, int]:
        assert batcher is not None
        return await batcher.outputs(texts, pairs, truncate)

    def refuse(wanted: str) -> None:
        raise HTTPException(
            400, f"{name} gives no {wanted}; what it gives is called {answers.kind}"
        )

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingsRequest) -> Any:
        if answers.kind != "vector":
            refuse("embeddings")
        vectors, tokens = await outputs(request.texts(), None, request.truncate)
        return JSONResponse(embeddings_answer(request, name, vectors, tokens))

    @app.post("/classify")
    async def classify(request: ClassifyRequest) -> Any:
        if answers.kind == "entities":
            assert batcher is not None
            rows, tokens = await batcher.found(request.texts())
            return JSONResponse(found_answer(name, rows, tokens))
        if answers.kind in ("vector", "answer"):
            refuse("classes")
        found, tokens = await outputs(request.texts(), None, request.truncate)
        return JSONResponse(classify_answer(name, answers, found, tokens))

    @app.post("/rerank")
    async def rerank(request: RerankRequest) -> Any:
        documents = request.documents
        if answers.kind == "vector":
            vectors, tokens = await outputs([request.query, *documents], None, request.truncate)
            vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
            scores = vectors[1:] @ vectors[0]
        elif answers.kind == "score":
            queries = [request.query] * len(documents)
            found, tokens = await outputs(queries, documents, request.truncate)
            scores = 1 / (1 + np.exp(-found[:, 0]))
        else:
            refuse("scores of pairs")
        return JSONResponse(rerank_answer(request, name, scores, tokens))

    @app.post("/answer")
    async def answer(request: AnswerRequest) -> Any:
        if answers.kind != "answer":
            refuse("answers to questions")
        contexts = request.contexts()
        assert batcher is not None
        rows, tokens = await batcher.found([request.question] * len(contexts), contexts)
        return JSONResponse(found_answer(name, rows, tokens))

    @app.get("/v1/models")
    async def models() -> Any:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "owned_by": "lowrank-bert"}],
        }

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return error(422, f"{place}: {first['msg']}" if place else first["msg"])

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, problem: HTTPException) -> Response:
        return error(problem.status_code, str(problem.detail))

    @app.exception_handler(TooLong)
    async def too_long(_request: Request, problem: TooLong) -> Response:
        return error(413, str(problem))

    @app.exception_handler(Overloaded)
    async def overloaded(_request: Request, _problem: Overloaded) -> Response:
        return error(503, "too many texts are waiting; try again later", **{"retry-after": "1"})

    paths = {
        "/v1/embeddings",
        "/classify",
        "/rerank",
        "/answer",
        "/v1/models",
        "/health",
        "/metrics",
    }
    app.add_middleware(Limits, metrics=metrics, paths=paths)
    return app
