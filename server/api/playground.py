"""The playground at ``/``: a static page that speaks the public API and asks no other host for anything."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import Response

_FOLDER: Final = Path(__file__).parent / "static"
_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
    "/states.js": ("states.js", "text/javascript"),
}
PLAYGROUND_PATHS: Final = frozenset(_FILES)
_HEADERS: Final = {
    # The page shows what models write: whatever that is, it runs no script and asks nobody.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def playground_router() -> APIRouter:
    """The page and its parts, read once."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in _FILES.items():
        router.add_api_route(path, _answer((_FOLDER / name).read_bytes(), kind), methods=["GET", "HEAD"])
    return router


def _answer(content: bytes, kind: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer
