"""Reading a request's body: its size, its content type, and JSON without JSON's dark corners."""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.types import Receive

from server.errors import BodyTooLargeError, InvalidRequestError, UnsupportedMediaTypeError

IDLE_SECONDS: Final = 120.0
"""How long a client may send nothing of a long body while it is waited for."""
_LINGER_SECONDS: Final = 1.0
_LONGEST_INT: Final = 1000


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody left to answer."""


def check_content_type(request: Request) -> None:
    """Accept JSON, and a body that does not say what it is.

    Raises:
        UnsupportedMediaTypeError: the body is declared as something else, or as compressed.
    """
    kind = media_type(request)
    is_json = kind == "application/json" or (kind and kind.startswith("application/") and kind.endswith("+json"))
    if kind is not None and not is_json:
        raise UnsupportedMediaTypeError(f"Send the body with 'Content-Type: application/json', not {kind!r}.")
    _check_encoding(request)


def check_text_type(request: Request) -> None:
    """Accept a body that has been declared as a text or as bytes, and is UTF-8.

    Raises:
        UnsupportedMediaTypeError: the body is declared to be of another charset, or as compressed.
    """
    charset = re.search(r"charset=\"?([^\s;\"]+)", request.headers.get("content-type", ""), re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaTypeError(f"The charset {charset[1][:40]!r} is not supported: send UTF-8.")
    _check_encoding(request)


def media_type(request: Request) -> str | None:
    """What the body is declared to be, without parameters; None: nothing."""
    content_type = request.headers.get("content-type")
    return None if content_type is None else content_type.partition(";")[0].strip().lower()


def _check_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(f"Content-Encoding {encoding!r} is not supported: send the body as it is.")


async def read_body(request: Request, limit: int) -> bytearray:
    """The whole body, of at most ``limit`` bytes.

    Raises:
        BodyTooLargeError: by Content-Length before anything is read, else as soon as the limit is passed.
        ClientGoneError: the client left before the end of the body.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLargeError(f"The body has {declared} bytes; at most {limit} are accepted.")
    # In one piece, which goes back to the system as a whole: many small ones would leave holes that the process keeps.
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        piece = message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) + len(piece) > limit:
            raise BodyTooLargeError(f"The body is too large: at most {limit} bytes are accepted.")
        body += piece
    return body


async def discard_body(receive: Receive) -> None:
    """Read what still arrives of a refused body, for a short while.

    Closing a connection on which data is unread resets it, and the client may never see the answer.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object; strict where ``json.loads`` is not.

    Raises:
        InvalidRequestError: not UTF-8, not JSON, not an object; NaN or Infinity, a lone surrogate, or a
            field given twice (``param`` names the field); a number or nesting beyond all reason.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8: byte {error.start} is {body[error.start]:#04x}.") from None
    suspicious = False

    def suspect(literal: str) -> float:
        nonlocal suspicious
        suspicious = True
        return math.nan

    def suspect_length(digits: str) -> float:
        return suspect(digits) if len(digits) > _LONGEST_INT else 0.0

    try:
        value = _load(text, suspect)
    except ValueError:
        # An integer longer than Python will convert: once more, to find out whose it is.
        value = _load(text, suspect, suspect_length)
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    if suspicious:
        name = _find_field(value, lambda item: isinstance(item, float) and math.isnan(item))
        raise InvalidRequestError(
            f"'{name}' holds a number that JSON does not have, or an absurdly long one.", param=name
        )
    if "\\ud" in text or "\\uD" in text:
        name = _find_field(value, lambda item: isinstance(item, str) and not _is_unicode(item))
        if name is not None:
            raise InvalidRequestError(f"'{name}' holds a lone surrogate, which is not Unicode text.", param=name)
    return value


def _load(text: str, parse_constant: Callable[[str], float], parse_int: Callable[[str], float] | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=parse_constant, parse_int=parse_int)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not JSON: {error.msg} at line {error.lineno} column {error.colno}."
        ) from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequestError(f"'{name}' is given twice.", param=name)
            seen.add(name)
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_field(body: dict[str, Any], is_bad: Callable[[Any], bool]) -> str | None:
    """The first field of the body that contains a bad key or value at any depth."""
    for name, field in body.items():
        stack: list[Any] = [name, field]
        while stack:
            item = stack.pop()
            if is_bad(item):
                return name
            if isinstance(item, list):
                stack.extend(item)
            elif isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
    return None
