"""The server's process: it listens, and at a signal finishes what it has begun."""

import logging
import os
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

if TYPE_CHECKING:  # so that a socket can be had, and replicas be forked, without torch
    from draftwing.serving.scheduler import Scheduler

logger = logging.getLogger(__name__)
LAST_SECONDS = 5
"""For clients to read what they were sent, once nothing runs any more."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, at which nobody is served yet; port 0 is any that is free.

    Raises:
        ValueError: the address is not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"host: cannot listen at {host}, port {port}: {error.strerror or error}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _DrainingServer(uvicorn.Server):
    """At SIGTERM or SIGINT refuses new requests, finishes running ones and ends; at a second one ends at once.

    One that has others beside it leaves new connections to them: it takes none while it drains, and ends once its
    engine has failed.
    """

    def __init__(self, config: uvicorn.Config, scheduler: "Scheduler", drain_seconds: float, has_others: bool) -> None:
        super().__init__(config)
        self._scheduler, self._drain_seconds, self._has_others = scheduler, drain_seconds, has_others
        self._is_draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_draining:
            os._exit(128 + sig)
        self._is_draining = True
        logger.info("draining for at most %g s; a second signal ends at once", self._drain_seconds)
        threading.Thread(target=self._drain, daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        if self._has_others and not self._scheduler.is_alive:
            self.should_exit = True
        if self._has_others and self._is_draining:
            for accepting in self.servers:
                accepting.close()
        return await super().on_tick(counter)

    def _drain(self) -> None:
        try:
            self._scheduler.drain(self._drain_seconds)
        finally:
            self.should_exit = True


def serve(
    app: ASGIApp, scheduler: "Scheduler", listener: socket.socket, drain_seconds: float, has_others: bool = False
) -> int:
    """Serve until a signal comes, or the engine has failed and others serve beside this one; the exit status."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=LAST_SECONDS
    )
    try:
        _DrainingServer(config, scheduler, drain_seconds, has_others).run(sockets=[listener])
        return 0 if scheduler.is_alive else 1
    finally:
        scheduler.stop()
