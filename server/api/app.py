"""The ASGI application of an API process."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from server import __version__
from server.api.auth import PUBLIC_PATHS, AuthMiddleware
from server.api.client import EngineClient
from server.api.completions import completions_router
from server.api.errors import ErrorMiddleware, answer_api_error, answer_http_error
from server.api.models import models_router
from server.api.operations import operations_router
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from server.api.tokenization import tokenization_router
from server.errors import ApiError
from server.settings import ApiSettings
from server.tokenizer import Tokenizer

_DESCRIPTION = "An OpenAI-style API for Gated Linear Attention models."


def create_app(settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None) -> FastAPI:
    """Build the application.

    Args:
        settings: names, keys and limits.
        client: the way to the engine; the caller starts and closes it.
        tokenizer: None: prompts and answers are token ids.
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
    app.include_router(completions_router(settings, client, tokenizer))
    app.include_router(tokenization_router(settings, client, tokenizer))
    app.include_router(models_router(settings))
    app.include_router(operations_router(client))
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    if settings.api_keys:
        app.add_middleware(AuthMiddleware, key_digests=settings.api_keys)
    app.add_middleware(ErrorMiddleware)  # the last one added is the outermost

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, needs_key=bool(settings.api_keys))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _document(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document, with the request models of the routes that read their bodies by themselves."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema(
        [(schema, "validation") for schema in (CompletionRequest, TokenizeRequest, DetokenizeRequest)],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path not in PUBLIC_PATHS:
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
    return document
