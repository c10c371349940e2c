"""``X-Request-Id``: one name for a request in its headers and in its answer."""

import uuid
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.schemas.fields import REQUEST_ID

_HEADER: Final = b"x-request-id"


class RequestIdMiddleware:
    """Every answer carries ``X-Request-Id``: the request's own, if it is sane, else a random one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and name its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER), "")
        is_sane = REQUEST_ID.fullmatch(given) is not None
        state = scope.setdefault("state", {})
        state["request_id"] = given if is_sane else uuid.uuid4().hex
        state["request_id_given"] = is_sane

        async def name(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (_HEADER, state["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, name)


def name_request(scope: Scope, wanted: str | None) -> str:
    """The request's name; ``wanted`` becomes it unless the header gave one."""
    state = scope["state"]
    if wanted is not None and not state["request_id_given"]:
        state["request_id"] = wanted
    name: str = state["request_id"]
    return name
