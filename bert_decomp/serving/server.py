"""uvicorn around the application: connections that say nothing are closed, and a stop lets requests finish."""

from __future__ import annotations

from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..prediction.predictor import Predictor
from .app import make_app

# Seconds in which the head of the first request must have come, and in which open requests may finish at a stop.
HEAD_SECONDS, STOP_SECONDS = 10.0, 30
CONNECTIONS = 4096


class _Protocol(H11Protocol):
    """HTTP that closes a connection on which no request has begun: uvicorn itself waits for the first one forever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def server(predictor: Predictor, name: str, host: str, port: int, **options: Any) -> uvicorn.Server:
    """A server that is not running yet; ``run()`` blocks until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        make_app(predictor, name),
        host=host,
        port=port,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=16 * 2**10,
        **options,
    )
    return uvicorn.Server(config)
