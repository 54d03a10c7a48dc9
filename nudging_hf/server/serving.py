"""Runs the application with uvicorn. It knows sockets and signals, never requests."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

try:
    import uvicorn
except ImportError as error:
    raise ImportError("The server needs further packages: pip install 'nudging-hf[serve]'.") from error

from .engine import Engine

if TYPE_CHECKING:
    from fastapi import FastAPI

_SECONDS_AFTER_GRACE = 5  # For the last bytes to reach the clients.


class GracefulServer(uvicorn.Server):
    """Ends in order after SIGTERM or Ctrl-C: answers that wait get 503 at once, and running ones have some time.

    Args:
        app: the application.
        engine: its engine.
        host, port: where it listens.
        grace: how many seconds running answers have.
    """

    def __init__(self, app: FastAPI, engine: Engine, host: str, port: int, grace: float):
        limit = int(grace) + _SECONDS_AFTER_GRACE
        super().__init__(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=limit))
        self._engine = engine
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server and its engine."""
        ending = asyncio.ensure_future(self._engine.shutdown(self._grace))
        await super().shutdown(sockets)
        if self.force_exit:
            ending.cancel()
        else:
            await ending
