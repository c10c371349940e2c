"""Every failure becomes OpenAI's error shape, also those that nobody foresaw."""

import logging
from collections.abc import Iterable, Iterator, Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body import ClientGoneError, discard_body
from server.errors import (
    ApiError,
    BodyTooLargeError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
)

logger = logging.getLogger(__name__)


def error_json(error: ApiError) -> bytes:
    """The error as JSON, whatever its texts are made of."""
    detail = {name: _unicode(value) for name, value in error.body()["error"].items()}
    return msgspec.json.encode({"error": detail})


def _unicode(text: str | None) -> str | None:
    """Text fit for UTF-8: messages quote requests, which may hold lone surrogates."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


class ErrorAnswer(Response):
    """An :class:`ApiError` as an HTTP response.

    Args:
        error: to be told.
        headers: further ones.
        body_unread: whether there is more of the request's body than has been read.
    """

    media_type = "application/json"

    def __init__(self, error: ApiError, headers: Mapping[str, str] | None = None, *, body_unread: bool = False) -> None:
        super().__init__(error_json(error), error.status, headers)
        if error.retry_after is not None:
            self.headers["retry-after"] = str(error.retry_after)
        self._body_unread = body_unread or isinstance(error, BodyTooLargeError)
        if self._body_unread:
            self.headers["connection"] = "close"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; after refusing a body, let the client finish sending it for a moment."""
        if not self._body_unread:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await discard_body(receive)
        await send({"type": "http.response.body", "body": b""})


async def answer_api_error(request: Request, error: Exception) -> Response:
    """Exception handler for :class:`ApiError`."""
    assert isinstance(error, ApiError)
    return ErrorAnswer(error)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for the router's own refusals."""
    assert isinstance(error, HTTPException)
    call = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ErrorAnswer(NotFoundError(f"There is no route {call}.", code="unknown_url"))
    if error.status_code == 405:
        allow = ", ".join(sorted(_methods(request)))
        return ErrorAnswer(MethodNotAllowedError(f"The method is not allowed: {call}."), {"allow": allow})
    return ErrorAnswer(InvalidRequestError(str(error.detail)), error.headers)


def _routes(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    for route in routes:
        # FastAPI keeps the routes of a router together.
        if (router := getattr(route, "original_router", None)) is not None:
            yield from _routes(router.routes)
        elif isinstance(route, Route):
            yield route


def _methods(request: Request) -> set[str]:
    """What the path of a request allows: the router knows the methods of a path route by route."""
    matching = [route for route in _routes(request.app.routes) if route.matches(request.scope)[0] is not Match.NONE]
    # A path written out is not the one with a parameter that would match it too.
    path = request.url.path if any(route.path == request.url.path for route in matching) else matching[0].path
    return {method for route in matching if route.path == path for method in route.methods or ()}


class ErrorMiddleware:
    """Answers 500 for exceptions that no handler knows, and logs them; ends quietly if the client is gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def observe(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except ClientGoneError:
            return
        except Exception:
            logger.exception("unexpected error in %s %s", scope["method"], scope["path"])
            if started:
                raise
            await ErrorAnswer(InternalError("The server failed to handle the request."))(scope, receive, send)
