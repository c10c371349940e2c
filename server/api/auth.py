"""API keys: which requests they open, and whose requests those are."""

from hashlib import sha256
from hmac import compare_digest
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ErrorAnswer
from server.api.playground import PLAYGROUND_PATHS
from server.errors import AuthenticationError
from server.keys import ApiKey

PUBLIC_PATHS: Final = PLAYGROUND_PATHS | {"/health", "/health/live", "/health/ready", "/version", "/metrics"}
"""Open unless all routes are protected. Everything else wants a key, unknown paths included: nothing is open by
oversight."""

_TENANT: Final = "gale.tenant"


def tenant_of(scope: Scope) -> str:
    """The name of the key that a request came with; empty where no key is needed."""
    tenant: str = scope.get(_TENANT, "")
    return tenant


class AuthMiddleware:
    """Answers 401 to requests that bring no valid ``Authorization: Bearer`` key.

    Args:
        app: what a key opens; :func:`tenant_of` tells it the key's name.
        keys: the accepted keys.
        public_paths: what needs none.
    """

    def __init__(self, app: ASGIApp, keys: tuple[ApiKey, ...], public_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = [(bytes.fromhex(key.digest), key.name) for key in keys]
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in self._public_paths:
            tenant = self._tenant(scope)
            if tenant is None:
                answer = ErrorAnswer(
                    AuthenticationError("Send a valid API key in the header 'Authorization: Bearer KEY'."),
                    {"www-authenticate": "Bearer"},
                )
                await answer(scope, receive, send)
                return
            scope[_TENANT] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = sha256(key.strip()).digest()
        # Every key is compared, in constant time, so that the time taken tells nothing of the wrong ones.
        names = [name for accepted, name in self._keys if compare_digest(digest, accepted)]
        return names[0] if names else None
