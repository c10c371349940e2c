"""Messages between the engine process and the API processes, over ZeroMQ on one host.

The engine binds a ROUTER socket in a private directory; every API process connects a DEALER whose
identity is new for each start of that process. A message is one msgpack document of ``server.types``,
columnar: one per engine step and API process.

Neither side ever waits for the other. What an API process has not read yet is bounded: one that falls
so far behind that its outbox fills up loses its own requests, and learns of it by
:class:`~server.types.ClientReset` as soon as it reads again. Nobody else notices.
"""

import errno
import logging
import os
import uuid
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator

import msgspec
import zmq

from server.types import ClientMessage, ClientReset, EngineMessage

logger = logging.getLogger(__name__)

_OUTBOX_MESSAGES = 16384
"""Engine steps that an API process may fall behind, in the engine's memory: a minute or so, tens of MB ..."""
_INBOX_MESSAGES = 1024
"""... and in its own, filled by a thread of ZeroMQ's while Python is busy."""
_RESET_RETRY_SECONDS = 0.05


class EngineChannel:
    """The engine's end.

    Args:
        address: ``ipc://`` path to bind.
        outbox: messages kept for an API process that does not read.

    Attributes:
        clients: identities of the API processes that were heard and can be reached, oldest first.
    """

    def __init__(self, address: str, *, outbox: int = _OUTBOX_MESSAGES) -> None:
        self.clients: dict[bytes, None] = {}
        self._stalled: set[bytes] = set()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, outbox)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # A full outbox and a vanished peer are errors to act on instead of silent drops.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, fd: int) -> None:
        """Let ``wait`` return when this file descriptor becomes readable, too."""
        self._poller.register(fd, zmq.POLLIN)

    def wait(self, timeout: float | None) -> set[int]:
        """Wait until there is something to read.

        Args:
            timeout: seconds; 0 looks without waiting, None waits for ever.

        Returns:
            Those of the watched file descriptors that are readable.
        """
        if self._stalled and timeout != 0:
            timeout = _RESET_RETRY_SECONDS if timeout is None else min(timeout, _RESET_RETRY_SECONDS)
        ready = self._poller.poll(None if timeout is None else int(timeout * 1000))
        return {source for source, _ in ready if isinstance(source, int)}

    def receive(self) -> Iterator[tuple[bytes, ClientMessage]]:
        """Everything that has arrived, with the sender's identity; never waits.

        What a stalled API process sends is dropped: it is about to be reset.
        """
        while True:
            try:
                client, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                logger.error("dropped a malformed message from an API process: %s", error)
                continue
            self.clients[client] = None
            if client not in self._stalled:
                yield client, message

    def send(self, client: bytes, message: EngineMessage) -> bool:
        """Queue a message for an API process; never waits.

        Returns:
            False if it could not be queued, because the API process reads too slowly or is gone: the
            caller must then cancel all its requests.
        """
        if client in self._stalled:
            return False
        if self._try_send(client, message):
            return True
        if client in self.clients:
            self._stalled.add(client)
            logger.warning("an API process does not read its messages: its requests are cancelled")
        return False

    def reset_stalled(self) -> None:
        """Tell the stalled API processes that read again what happened to them; never waits."""
        for client in tuple(self._stalled):
            message = ClientReset(reason="the API process fell too far behind the engine")
            if self._try_send(client, message) or client not in self.clients:
                self._stalled.discard(client)

    def close(self) -> None:
        """Drop what has not been sent and release the socket."""
        self._socket.close()
        self._context.term()

    def _try_send(self, client: bytes, message: EngineMessage) -> bool:
        frames = (client, self._encoder.encode(message))
        try:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                # ZeroMQ looks only now and then at what the other side has taken; asking makes it look now.
                self._socket.getsockopt(zmq.EVENTS)
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.clients.pop(client, None)
            return False
        return True


class ClientChannel:
    """An API process's end, driven by its event loop.

    The raw socket hangs on the loop by its file descriptor, which is edge-triggered: it signals that
    *something* changed, and sending may swallow the signal of an arrival. Hence every wake-up reads
    until nothing is left, and every send looks whether something can be read.

    Args:
        address: ``ipc://`` path of the engine, bound now or later.
        on_messages: called in the loop with everything that one wake-up brought.
        inbox: messages read ahead of Python.
    """

    def __init__(
        self, address: str, on_messages: Callable[[list[EngineMessage]], None], *, inbox: int = _INBOX_MESSAGES
    ) -> None:
        self._on_messages = on_messages
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._loop: AbstractEventLoop | None = None
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, inbox)
        self._socket.setsockopt(zmq.IDENTITY, f"{os.getpid()}-{uuid.uuid4().hex}".encode())
        # The path appears when the engine is up, so trying again is cheap and soon of use.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(address)

    def start(self, loop: AbstractEventLoop) -> None:
        """Deliver messages in this loop from now on."""
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self._read)
        loop.call_soon(self._read)

    def send(self, message: ClientMessage) -> bool:
        """Queue a message for the engine; never waits.

        Returns:
            False if the engine has not read for so long that no more is queued.
        """
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            if self._loop is not None and self._readable():
                self._loop.call_soon(self._read)
        return True

    def close(self, *, linger: int = 100) -> None:
        """Stop delivering and release the socket.

        Args:
            linger: milliseconds that messages not yet sent may take to leave.
        """
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close(linger=linger)
        self._context.term()

    def _readable(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _read(self) -> None:
        if self._loop is None:
            return  # A call scheduled before close().
        messages: list[EngineMessage] = []
        while True:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append(self._decoder.decode(payload))
        if messages:
            self._on_messages(messages)
