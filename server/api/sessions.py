"""``X-Session-Id``: names a conversation, whose newest state then outlasts others in the prefix cache."""

from typing import Any, Final

from starlette.types import Scope

from server.api.schemas.fields import REQUEST_ID
from server.errors import InvalidRequestError

_NAME: Final = "X-Session-Id"
_HEADER: Final = _NAME.lower().encode()

SESSION_HEADER: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": _NAME,
            "in": "header",
            "required": False,
            "description": "Names a conversation, among those of the API key: the state at the end of its newest "
            "answer is given up after all that no session holds. Changes nothing in the answer.",
            "schema": {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"},
            "example": "talk-1",
        }
    ]
}
"""How the OpenAPI document describes the header."""


def session_of(scope: Scope) -> str | None:
    """The session that a request belongs to; None: to none.

    Raises:
        InvalidRequestError: the header holds no name.
    """
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER), None)
    if given is not None and REQUEST_ID.fullmatch(given) is None:
        raise InvalidRequestError(
            f"Invalid header '{_NAME}': must be 1 to 128 letters, digits and characters of ._~:/+=@-.", param=_NAME
        )
    return given
