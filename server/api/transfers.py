"""States as files: sent to clients from a file that the engine has written, and received into one that it reads.

A state may have a hundred megabytes and more, so it never is in this process's memory as a whole. Files lie in the
private folder of the processes, as long as a transfer takes.
"""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from server.api.body import IDLE_SECONDS, ClientGoneError
from server.errors import (
    BodyTooLargeError,
    QueueFullError,
    RequestTimeoutError,
    StateNotSavedError,
    UnsupportedMediaTypeError,
)

CONTENT_TYPE: Final = "application/octet-stream"
_MOST: Final = 32
_MOST_PER_TENANT: Final = 8
_PIECE_BYTES: Final = 1 << 20
_LEAST_RATE: Final = float(1 << 14)
"""Bytes a second that a client has to send, in all that it has sent so far."""


class StateResponse(FileResponse):
    """A file that is removed once it has been sent, or the client has left."""

    chunk_size = _PIECE_BYTES

    def __init__(self, path: Path, name: str, digest: str, on_end: Callable[[], None]) -> None:
        super().__init__(path, media_type=CONTENT_TYPE, filename=f"{name}.safetensors", headers={"ETag": f'"{digest}"'})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class Transfers:
    """The transfers of one API process.

    Args:
        folder: for the files; made when it is needed.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._running: Counter[str] = Counter()

    def begin(self, tenant: str) -> "Transfer":
        """A place for a file, to be given back by ``end``.

        Raises:
            QueueFullError: too many are under way.
        """
        if self._running.total() >= _MOST or self._running[tenant] >= _MOST_PER_TENANT:
            raise QueueFullError("Too many states are being sent and received at once.")
        folder = self._folder()
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateNotSavedError(f"No file can be made for the state: {error.strerror}.") from None
        self._running[tenant] += 1
        return Transfer(folder / uuid.uuid4().hex, lambda: self._end(tenant))

    def _end(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]


class Transfer:
    """One file's way.

    Attributes:
        path: of the file, which is not there yet.
    """

    def __init__(self, path: Path, on_end: Callable[[], None]) -> None:
        self.path = path
        self._on_end: Callable[[], None] | None = on_end

    def end(self) -> None:
        """Remove the file. Idempotent."""
        if self._on_end is None:
            return
        for path in self.path.parent.glob(f"{self.path.name}*"):
            with contextlib.suppress(OSError):
                path.unlink()
        self._on_end()
        self._on_end = None

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """End it after the body."""
        try:
            yield
        finally:
            self.end()

    async def engine_done(self, work: Awaitable[object]) -> None:
        """Wait for what the engine does with the file; it is not removed before, whatever becomes of who waits.

        Raises:
            ApiError: what the engine says; the transfer has ended then.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda _: self.end())
            raise
        except BaseException:
            self.end()
            raise

    async def receive(self, request: Request, limit: int) -> None:
        """Write the request's body to the file.

        Raises:
            UnsupportedMediaTypeError: it is declared as something else.
            BodyTooLargeError: it has more than ``limit`` bytes.
            ClientGoneError: the client left before the end of the body.
            RequestTimeoutError: nothing comes, or next to nothing; others wait for the place.
            StateNotSavedError: the disk does not take it.
        """
        check_binary(request)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise BodyTooLargeError(f"The body has {declared} bytes; a state of this model has at most {limit}.")
        try:
            with self.path.open("xb") as file:
                size = 0
                pieces, begun = request.stream(), time.monotonic()
                while (piece := await _next(pieces, begun + IDLE_SECONDS + size / _LEAST_RATE)) is not None:
                    size += len(piece)
                    if size > limit:
                        raise BodyTooLargeError(
                            f"The body is too large: a state of this model has at most {limit} bytes."
                        )
                    await asyncio.to_thread(file.write, piece)
        except ClientDisconnect:
            raise ClientGoneError from None
        except OSError as error:
            raise StateNotSavedError(f"The state cannot be received: {error.strerror}.") from None


async def _next(pieces: AsyncGenerator[bytes], until: float) -> bytes | None:
    """The next piece of a body, which may take so long, by ``time.monotonic``; None: there are no more.

    Raises:
        RequestTimeoutError: it takes longer.
    """
    try:
        async with asyncio.timeout(min(IDLE_SECONDS, until - time.monotonic())):
            return await anext(pieces, None)
    except TimeoutError:
        raise RequestTimeoutError("The state comes too slowly, or not at all.") from None


def check_binary(request: Request) -> None:
    """Raise UnsupportedMediaTypeError unless the body is declared as bytes of any kind, as they are."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != CONTENT_TYPE:
        raise UnsupportedMediaTypeError(f"Send the state with 'Content-Type: {CONTENT_TYPE}', not {kind!r}.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(f"Content-Encoding {encoding!r} is not supported: send the body as it is.")
