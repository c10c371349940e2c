"""API keys."""

from hashlib import sha256
from hmac import compare_digest
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ErrorAnswer
from server.errors import AuthenticationError

PUBLIC_PATHS: Final = frozenset({"/health", "/version", "/metrics"})
"""Everything else wants a key, unknown paths included: nothing is open by oversight."""


class AuthMiddleware:
    """Answers 401 to requests that bring no valid ``Authorization: Bearer`` key.

    Args:
        app: what the key opens.
        key_digests: SHA-256 of each accepted key, lower-case hex.
    """

    def __init__(self, app: ASGIApp, key_digests: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [bytes.fromhex(digest) for digest in key_digests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS and not self._opens(scope):
            answer = ErrorAnswer(
                AuthenticationError("Send a valid API key in the header 'Authorization: Bearer KEY'."),
                {"www-authenticate": "Bearer"},
            )
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _opens(self, scope: Scope) -> bool:
        header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = sha256(key.strip()).digest()
        # Every key is compared, in constant time, so that the time taken tells nothing.
        return sum([compare_digest(digest, accepted) for accepted in self._digests]) > 0
