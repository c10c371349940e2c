"""uvicorn's HTTP/1.1 protocol with bounds on what it keeps of a request beside the body, and on how long a head takes.

uvicorn bounds neither, so a client could hold connections for ever with a byte now and then, or fill
the memory with one endless header, before the body or after it.
"""

import asyncio
import select
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import error_json
from server.errors import InvalidRequestError

MAX_HEAD_BYTES = 64 * 1024
"""Of request line and headers. Also of whatever comes between two pieces of a body, or after the last one."""
HEAD_SECONDS = 30.0
PEER: Final = "gale.peer"
"""Extension of the scope: its ``has_left`` tells whether the client is gone, which nobody notices who does not read."""


def _last_words(status: bytes, message: str, code: str) -> bytes:
    """A whole response, after which the connection is closed: no application has seen the request."""
    body = error_json(InvalidRequestError(message, code=code))
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (status, len(body)) + body


_TOO_LONG = _last_words(
    b"431 Request Header Fields Too Large",
    f"The request line and headers have more than {MAX_HEAD_BYTES} bytes.",
    "headers_too_large",
)
_NOT_HTTP = _last_words(b"400 Bad Request", "The request is not valid HTTP/1.1.", "invalid_http")


class _HeadTooLongError(Exception):
    """Raised through the parser, which stops."""


class HttpProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers are too long or do not come to an end."""

    _head_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _unaccounted = 0
    """Bytes since the last head or piece of a body was whole: the parser may have to keep them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: its first head may take so long."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, for whatever reason."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and count what the parser keeps."""
        self._unaccounted += len(data)
        super().data_received(data)
        if self._unaccounted > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def send_400_response(self, msg: str) -> None:
        """The parser has stopped."""
        if self._unaccounted > MAX_HEAD_BYTES:
            self._refuse()
        else:
            self.transport.write(_NOT_HTTP)
            self.transport.close()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._head_timer is None:
            self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The end of a request's head.

        Raises:
            _HeadTooLongError: it came in one piece that is too long.
        """
        length = len(self.url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        if length > MAX_HEAD_BYTES:
            raise _HeadTooLongError
        self._in_head = False
        self._unaccounted = 0
        self._stop_timer()
        super().on_headers_complete()
        self.scope.setdefault("extensions", {})[PEER] = {"has_left": self._peer_left}

    def _peer_left(self) -> bool:
        """Whether the client has closed its end, also where nothing is read because there is enough to do."""
        connection = self.transport.get_extra_info("socket")
        if self.transport.is_closing() or connection is None:
            return True
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def on_chunk_header(self) -> None:
        """The size of the next piece of a body is known."""
        self._unaccounted = 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body; the application bounds the whole."""
        self._unaccounted = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request; what follows is the next one's head."""
        self._in_head = True
        self._unaccounted = 0
        super().on_message_complete()

    def _refuse(self) -> None:
        if self._in_head:
            self.transport.write(_TOO_LONG)
        # Else an answer may be on its way already.
        self.transport.close()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._time_out)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_out(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._head_timer = None
            self.transport.close()
        else:
            # While a response runs, the next request's head may wait: it is not being read.
            self._start_timer()
