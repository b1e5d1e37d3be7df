"""An HTTP server's answer as text, and one error that has the server's own words where it does not come."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

HERE = ("127.0.0.1", "localhost", "::1")
"""Hosts that no proxy is asked for."""
SAID = 500
"""Bytes of what a server says to an error."""


class NoAnswer(Exception):
    """No answer, or an error's.

    Attributes:
        status: an error's; None: there was no connection, it timed out, or it broke off.
        retry_after: the header of an error.
    """

    def __init__(self, problem: str, status: int | None = None, retry_after: str | None = None) -> None:
        super().__init__(problem)
        self.status, self.retry_after = status, retry_after


def ask(url: str, body: Any = None, seconds: float = 600.0, headers: Mapping[str, str] | None = None) -> str:
    """The answer to a GET, or to a POST of `body` as JSON, within `seconds`.

    Raises:
        NoAnswer: there is none.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    is_here = urllib.parse.urlsplit(url).hostname in HERE
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))
    try:
        with opener.open(request, timeout=seconds) as response:
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        with error:
            said = _said(error)
            raise NoAnswer(f"status {error.code}: {said}", error.code, error.headers.get("Retry-After")) from None
    except (OSError, HTTPException, UnicodeDecodeError) as error:
        raise NoAnswer(f"{type(error).__name__}: {error}") from None


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(SAID).decode(errors="replace")
    except (OSError, HTTPException):
        return "nothing more"
