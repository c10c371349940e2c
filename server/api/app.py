"""The ASGI application of an API process."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from server import __version__
from server.api.accounting import AccountingMiddleware
from server.api.auth import PUBLIC_PATHS, AuthMiddleware
from server.api.chat import chat_router
from server.api.chat_template import ChatTemplate
from server.api.client import EngineClient
from server.api.completions import completions_router
from server.api.conversation import Conversations
from server.api.errors import ErrorMiddleware, answer_api_error, answer_http_error
from server.api.models import models_router
from server.api.operations import operations_router
from server.api.playground import playground_router
from server.api.prefill import prefill_router
from server.api.request_id import RequestIdMiddleware
from server.api.routing import ERRORS
from server.api.schemas.chat import ChatCompletionChunk, ChatCompletionRequest
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.server import ErrorResponse
from server.api.schemas.states import ForkRequest, PrefillProgress, PrefillRequest
from server.api.schemas.tokenization import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from server.api.sleep import SleepSwitch, sleep_router
from server.api.states import states_router
from server.api.structured import Grammars
from server.api.tokenization import tokenization_router
from server.component_settings import ApiSettings
from server.errors import ApiError
from server.metrics import HttpMetrics
from server.tokenizer import Tokenizer

_UNBOUND = (
    CompletionRequest,
    ChatCompletionRequest,
    ChatCompletionChunk,
    TokenizeRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
    ForkRequest,
    PrefillProgress,
    PrefillRequest,
)
"""Models that the framework does not see: bodies are read by the routes themselves, chunks are written by hand."""

_DESCRIPTION = "An OpenAI-style API for Gated Linear Attention models."
_CORS_METHODS = ("GET", "POST", "DELETE")
_CORS_HEADERS = ("Retry-After", "X-Request-Id")
_HEADERS = {
    "X-Request-Id": {
        "description": "The request's name: its own header of this name, if that is sane, else a random one.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds to wait before another try.", "schema": {"type": "integer"}},
}
"""What answers carry beside their bodies; the second only those that a later try may spare."""
_UNAUTHORIZED = {
    "description": ERRORS[401],
    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}}},
}


def create_app(
    settings: ApiSettings,
    client: EngineClient,
    tokenizer: Tokenizer | None,
    chat_template: ChatTemplate | None = None,
    sleep_switch: SleepSwitch | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        settings: names, keys and limits.
        client: the way to the engine; the caller starts and closes it.
        tokenizer: None: prompts and answers are token ids.
        chat_template: None: the model has none.
        sleep_switch: None: nobody may send the engine to sleep.
    """
    app = FastAPI(
        title="Gale",
        version=__version__,
        description=_DESCRIPTION,
        redirect_slashes=False,
        # The interactive pages load scripts from other hosts; /openapi.json is all a client needs.
        docs_url=None,
        redoc_url=None,
    )
    conversations = Conversations(tokenizer, chat_template)
    grammars = Grammars(tokenizer)
    app.include_router(completions_router(settings, client, tokenizer, grammars))
    app.include_router(chat_router(settings, client, tokenizer, grammars, conversations))
    app.include_router(tokenization_router(settings, client, tokenizer, conversations))
    app.include_router(models_router(settings, client))
    app.include_router(prefill_router(settings, client, tokenizer, grammars))
    app.include_router(states_router(settings, client))
    metrics = HttpMetrics()
    app.include_router(operations_router(client, metrics))
    if sleep_switch is not None:
        app.include_router(sleep_router(client, sleep_switch))
    app.include_router(playground_router())
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    public_paths = frozenset[str]() if settings.protect_all_routes else PUBLIC_PATHS
    if settings.api_keys:
        app.add_middleware(AuthMiddleware, keys=settings.api_keys, public_paths=public_paths)
    app.add_middleware(ErrorMiddleware)
    if settings.allowed_origins:
        # Added after the checks of keys, so around them: pages may read errors too, and browsers ask without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=("*",),
            expose_headers=_CORS_HEADERS,
        )
    app.add_middleware(AccountingMiddleware, metrics=metrics, max_log_len=settings.max_log_len, tokenizer=tokenizer)
    app.add_middleware(RequestIdMiddleware)  # the last one added is the outermost

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, public_paths if settings.api_keys else None)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _document(app: FastAPI, public_paths: frozenset[str] | None) -> dict[str, Any]:
    """The OpenAPI document, with the request models of the routes that read their bodies by themselves.

    Args:
        public_paths: what needs no key; None: no path needs one.
    """
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema(
        [(schema, "validation") for schema in _UNBOUND],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    # The framework supposes that it checks parameters; there are none that could be wrong.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if public_paths is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    components["headers"] = _HEADERS
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            if public_paths is not None and path not in public_paths:
                operation["security"] = [{"key": []}]
                responses.setdefault("401", dict(_UNAUTHORIZED))
            for status, response in responses.items():
                names = _HEADERS if status in ("429", "503") else ("X-Request-Id",)
                response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return document
