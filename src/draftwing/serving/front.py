"""What every request passes first: its size, its key, a line in the log; and the last answer where something fails."""

import hmac
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from draftwing.serving.errors import ApiError, as_api_error
from draftwing.serving.schema import MAX_BODY_BYTES

logger = logging.getLogger(__name__)
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/version")
"""Paths that need no key: the page asks its reader for one."""
QUIET = ("/health", "/ready", "/metrics")
"""Paths that are asked for every few seconds, and not logged unless they fail."""
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Front:
    """Around the application. Keys are compared in constant time and never logged, bodies neither."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            self._admit(scope)
            await self._app(scope, _limited(receive), visit.send)
        except ApiError as error:
            await error.response()(scope, receive, visit.send)
        except Exception as error:
            logger.exception("%s %s has failed", scope["method"], json.dumps(scope["path"]))
            if visit.status is None:
                await as_api_error(error).response()(scope, receive, visit.send)
        finally:
            if scope["path"] not in QUIET or (visit.status or 500) >= 500:
                visit.log()

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._keys and scope["path"] not in OPEN and not self._is_key(headers.get("authorization", "")):
            raise ApiError(401, "expected the header Authorization: Bearer KEY, with a key of this server")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body: expected at most {MAX_BODY_BYTES} bytes")

    def _is_key(self, header: str) -> bool:
        kind, _, given = header.partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]  # all of them, always
        return any(matches) and kind.lower() == "bearer"


class _Visit:
    """One request and its answer, for the log."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._start = time.perf_counter()
        self.status: int | None = None
        scope.setdefault("state", {})["facts"] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await self._send(message)

    def log(self) -> None:
        seconds = round(time.perf_counter() - self._start, 4)
        asked = {"method": self._scope["method"], "path": self._scope["path"], "status": self.status}
        facts: dict[str, Any] = asked | {"seconds": seconds} | self._scope["state"]["facts"]
        shown = (value if isinstance(value, int | float) else json.dumps(value).strip('"') for value in facts.values())
        line = " ".join(f"{name}={value}" for name, value in zip(facts, shown, strict=True))
        logger.info("%s", line, extra={"facts": facts})


def _limited(receive: Receive) -> Receive:
    """Receives a body of limited size, whatever its header said."""
    num_bytes = 0

    async def receive_some() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body: expected at most {MAX_BODY_BYTES} bytes")
        return message

    return receive_some
