"""The routes, and what each may answer, as OpenAPI tells it."""

import re
import time
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from draftwing.serving.answers import ChatCompletion, Completion
from draftwing.serving.conversations import ChatRequest, TokenizeRequest
from draftwing.serving.errors import ApiError, as_api_error, documented
from draftwing.serving.front import Front
from draftwing.serving.intake import Intake
from draftwing.serving.peers import Peers
from draftwing.serving.response_schema import ResponseRequest
from draftwing.serving.responses import ResponseBody
from draftwing.serving.scheduler import Scheduler
from draftwing.serving.schema import CompletionRequest, DetokenizeRequest, FieldError
from draftwing.serving.server import Server
from draftwing.serving.streams import Identity

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: run the script that is in it and no other, and talk to this server."""


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(TypedDict):
    object: str
    data: list[Model]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class Status(TypedDict):
    status: str


class Version(TypedDict):
    version: str


class _App(FastAPI):
    """Documents what is answered; the framework's own 422 never is."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        for route in schema["paths"].values():
            for operation in route.values():
                operation["responses"].pop("422", None)
        return schema


def create_app(
    scheduler: Scheduler, intake: Intake, identity: Identity, keys: Sequence[str] = (), peers: Peers | None = None
) -> FastAPI:
    """The application for a scheduler; with keys, requests need one of them; with peers, it tells their figures too."""
    app = _App(title="draftwing", version=version("draftwing"), docs_url=None, redoc_url=None)
    server = Server(scheduler, intake, identity)
    for routes in (_answers(server), _tokens(server), _about(server), _figures(server, peers)):
        app.include_router(routes)
    app.add_middleware(Front, keys=keys)
    for kind in (ApiError, FieldError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


def _hash_of(page: str, tag: str) -> str:
    """What a policy calls the page's script, or its style."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


def _stream_or(model: Any) -> dict[int | str, dict[str, Any]]:
    """A route that answers with a body or, if asked to, with events."""
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    ok = {200: {"model": model, "description": "the answer; with stream: chunks as events", "content": events}}
    return ok | documented(400, 401, 404, 413, 429, 500, 503)


def _answers(server: Server) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=_stream_or(Completion), response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        return await server.answer(body, request)

    @router.post("/v1/chat/completions", responses=_stream_or(ChatCompletion), response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await server.answer(body, request)

    @router.post("/v1/responses", responses=_stream_or(ResponseBody), response_model=None)
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation, in OpenAI's newer form."""
        return await server.answer(body, request)

    return router


def _tokens(server: Server) -> APIRouter:
    router = APIRouter(responses=documented(400, 401, 404, 413))
    tokenizer, length = server.intake.tokenizer, server.scheduler.max_model_len

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """The token ids of a prompt or of a conversation."""
        server.check_model(body.model)
        ids = await server.read(server.intake.tokenize, body)
        texts = await server.read(lambda: list(map(server.texts.text, ids))) if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": texts}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids, special ones included."""
        server.check_model(body.model)
        return {"prompt": await server.read(server.intake.detokenize, body.tokens)}

    @router.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and the chat template."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        known = {name: getattr(tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(tokenizer).__name__, "model_max_length": length} | known

    return router


def _about(server: Server) -> APIRouter:
    router, started = APIRouter(), int(time.time())
    identity, scheduler = server.identity, server.scheduler
    page = files("draftwing.serving").joinpath("page/index.html").read_text(encoding="utf-8")
    policy = POLICY.format(script=_hash_of(page, "script"), style=_hash_of(page, "style"))

    def the_model() -> Model:
        return {
            "id": identity.name,
            "object": "model",
            "created": started,
            "owned_by": "draftwing",
            "root": identity.root,
            "parent": None,
            "max_model_len": scheduler.max_model_len,
        }

    @router.get("/v1/models", responses=documented(401))
    async def models() -> Models:
        """The model that is served."""
        return {"object": "list", "data": [the_model()]}

    @router.get("/v1/models/{name:path}", responses=documented(401, 404))
    async def model(name: str) -> Model:
        """The model that is served, by its name."""
        server.check_model(name)
        return the_model()

    @router.get("/health", responses=documented(503))
    async def health() -> Status:
        """Whether the engine works."""
        if not scheduler.is_alive:
            raise ApiError(503, "the engine has failed")
        return {"status": "ok"}

    @router.get("/ready", responses=documented(503))
    async def ready() -> Status:
        """Whether requests are taken."""
        if not scheduler.is_alive or scheduler.is_draining:
            raise ApiError(503, "no requests are taken")
        return {"status": "ok"}

    @router.get("/version")
    async def the_version() -> Version:
        """The server's version."""
        return {"version": version("draftwing")}

    @router.get("/", response_class=HTMLResponse)
    async def playground() -> Response:
        """The page to try it out."""
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return router


def _figures(server: Server, peers: Peers | None) -> APIRouter:
    router, own = APIRouter(), server.metrics.page
    if peers is not None:
        peers.tell(own)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=Response, responses=PLAIN)
    def metrics() -> Response:  # beside the event loop: others are asked, and waited for
        """Figures for Prometheus."""
        page = own() if peers is None else peers.page(own())
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return router


PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
