"""An OpenAI-style server as a client sees it: which model it serves, its streams, and its errors in words."""

import json
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any

import aiohttp

_LONGEST_ERROR = 300
_READ_BUFFER = 1 << 20
_CONNECT_SECONDS = 30

FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError)
"""What reading an answer may raise beside :class:`ServerError`."""


class ServerError(Exception):
    """The server does not answer, refuses, or fails; the message has its own words.

    Attributes:
        status: of an answer that says so; None: there was none, or it failed on the way.
        code: of the error in that answer, if it has one.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def open_session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """Connections without limits of their own: how many there are and how long they last is for the caller to say."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        headers=headers,
    )


class Server:
    """One server.

    Args:
        session: carries the headers.
        base_url: with or without ``/v1`` at its end.

    Attributes:
        root: its address, without ``/v1``.
        name: host and port, to tell servers apart.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self.name = self.root.split("://")[-1]

    async def first_model(self) -> str:
        """The first model that it lists.

        Raises:
            ServerError: it does not answer, refuses, or serves no model.
        """
        answer = await self.request("GET", "/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise ServerError(f"{self.root}/v1/models does not list a model; name one with --model") from error

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a route answers; None if it answers with an empty body.

        Raises:
            ServerError: it does not answer, or not with a success in JSON.
        """
        url = self.root + path
        try:
            async with self._session.request(method, url, json=body) as response:
                text = await response.text()
                if response.status >= 400:
                    raise _refusal(url, response.status, text)
                return json.loads(text) if text else None
        except aiohttp.ClientError as error:
            raise self._silence(error) from error
        except ValueError as error:
            raise ServerError(f"{url} does not answer in JSON") from error

    def _silence(self, error: Exception) -> ServerError:
        reason = getattr(error, "strerror", None) or error
        return ServerError(
            f"no server answers at {self.root} ({reason}); start one with 'gale serve', or name another with --base-url"
        )

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer, to its end.

        Raises:
            ServerError: it refuses, fails on the way, or ends without ``[DONE]``.
            OSError, aiohttp.ClientError: the connection fails.
            ValueError: a chunk is not JSON.
        """
        url = self.root + path
        async with self._session.post(url, json=body, read_bufsize=_READ_BUFFER) as response:
            if response.status != 200:
                raise _refusal(url, response.status, await response.text())
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if chunk.get("error"):
                    raise ServerError(message(data.decode()))
                yield chunk
        raise ServerError("the stream ended without [DONE]")


def _refusal(url: str, status: int, body: str) -> ServerError:
    """The error of an answer that is one; where keys are concerned, with where the client takes its own from."""
    error = _error_of(body)
    code = error.get("code")
    words = f"{status}: {message(body)}" if error else f"{url} answers {status}: {message(body)}"
    if status == HTTPStatus.UNAUTHORIZED:
        words += " (The key is taken from the environment variable OPENAI_API_KEY.)"
    return ServerError(words, status, code if isinstance(code, str) else None)


def text_of(chunk: Mapping[str, Any]) -> str:
    """The text in a chunk's first choice, of a completion or of a chat; empty if there is none."""
    if not chunk.get("choices"):
        return ""
    choice = chunk["choices"][0]
    return (choice["delta"].get("content") if "delta" in choice else choice.get("text")) or ""


def message(body: str) -> str:
    """The server's own words, if the body has OpenAI's form of an error."""
    return str(_error_of(body).get("message") or body.strip() or "(no body)")[:_LONGEST_ERROR]


def _error_of(body: str) -> dict[str, Any]:
    """OpenAI's form of an error; empty if the body has another."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}
