"""Errors as OpenAI's API has them: one form for all, a status that says whose fault it is, nothing of the machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from draftwing.serving.schema import FieldError

TYPES = {  # others are an invalid_request_error
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
DESCRIPTIONS = {
    400: "a field that is wrong, unknown or not supported; `param` names it",
    401: "no API key, or a wrong one",
    404: "no such model",
    413: "the body is too large",
    429: "too many requests are waiting; Retry-After says when to come again",
    500: "the request has failed",
    503: "the server is shutting down, or its engine has failed",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class ErrorDetails(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """What every answer that is an error has."""

    error: ErrorDetails


@dataclass
class ApiError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def body(self) -> ErrorBody:
        """What the client reads."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(_escaped(self.body()), self.status, self.headers or HEADERS.get(self.status))


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error: of one that is not its own, nothing."""
    match error:
        case ApiError():
            return error
        case FieldError():
            return ApiError(400, str(error), error.field, error.code)
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():  # unknown paths and methods, bodies that are no JSON
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            return ApiError(500, "the request has failed")


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first field of a body that has another form than the schema says."""
    first = error.errors()[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, FieldError):
        return as_api_error(raised)
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not path:
        return ApiError(400, "the body: expected a JSON object, with Content-Type: application/json")
    field, said = path[0], str(first["msg"]).removeprefix("Value error, ")
    place = ".".join(path) if first["type"] in ("missing", "extra_forbidden") else field
    return ApiError(400, f"{place}: {said[:1].lower()}{said[1:]}", field)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its documentation."""
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


def _escaped(body: Any) -> Any:
    """A body without lone surrogates, which are no UTF-8; a client may have sent some as a field's name."""
    if isinstance(body, dict):
        return {name: _escaped(value) for name, value in body.items()}
    return body.encode(errors="backslashreplace").decode() if isinstance(body, str) else body
