"""An API process: uvicorn with the HTTP application, steered by the launcher's pipe instead of signals."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Coroutine, Iterator

import uvicorn

from server.api.app import create_app
from server.api.chat_template import load_chat_template
from server.api.client import EngineClient
from server.api.engine_status import EngineStatus
from server.api.protocol import HttpProtocol
from server.api.sleep import SleepSwitch
from server.child import (
    ApiDied,
    ChildContext,
    Drain,
    EngineAsleep,
    EngineDied,
    EngineStarting,
    FallAsleep,
    Heartbeat,
    Quiet,
    Ready,
    SleepRequest,
    WakeRequest,
    keep_loaded,
)
from server.component_settings import ApiSettings
from server.errors import EngineUnavailableError
from server.listeners import BACKLOG
from server.tokenizer import load_tokenizer

GRACE_SECONDS = 2.0
"""After streams were told to end: how long their last bytes may take to leave."""

_DEAD_SECONDS = 1.0
"""How long 503 is answered after the engine's death before the port closes."""
_BEAT_SECONDS = 0.25
_KEEP_ALIVE_SECONDS = 60
"""Longer than clients' connection pools keep idle connections, so that the client is the one to close."""


class _Server(uvicorn.Server):
    """Leaves the signals alone: the launcher acts on them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiProcess:
    """The parts of one API process and the order in which they end.

    Args:
        context: this child's name and pipe.
        settings: for the application.
        shutdown_timeout: most seconds that a drain may take.
        deaths: of engines and of API processes, before this process was started.
        listeners: bound sockets.
        heartbeat: where to note when the event loop is to come round next.
    """

    def __init__(
        self,
        context: ChildContext,
        settings: ApiSettings,
        shutdown_timeout: float,
        deaths: tuple[int, int],
        listeners: list[socket.socket],
        heartbeat: Heartbeat,
    ) -> None:
        self._context = context
        self._listeners = listeners
        self._heartbeat = heartbeat
        self._client = EngineClient(context.address)
        self._client.engine_deaths, self._client.api_deaths = deaths
        tokenizer = chat_template = None
        if (folder := settings.tokenizer_folder) is not None:
            tokenizer = load_tokenizer(folder)
            chat_template = load_chat_template(settings.chat_template, folder, tokenizer.special_tokens)
        self._server = _Server(
            uvicorn.Config(
                create_app(
                    settings, self._client, tokenizer, chat_template, self._switch() if settings.sleep_mode else None
                ),
                http=HttpProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(shutdown_timeout + GRACE_SECONDS + 1),
            )
        )
        self._ending: asyncio.Task[None] | None = None
        self._falling_asleep: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Serve until the launcher says otherwise or is gone."""
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._context.control.fileno(), self._obey)
        self._beat()
        await self._client.start()
        announce = asyncio.create_task(self._announce())
        try:
            await self._server.serve(sockets=self._listeners)
        finally:
            announce.cancel()
            loop.remove_reader(self._context.control.fileno())
            await self._client.close()

    async def _announce(self) -> None:
        await self._client.wait_for(EngineStatus.READY)
        keep_loaded()
        self._context.tell(Ready())

    def _beat(self) -> None:
        """Show the launcher that the event loop comes round."""
        self._heartbeat.value = time.monotonic() + _BEAT_SECONDS
        asyncio.get_running_loop().call_later(_BEAT_SECONDS, self._beat)

    def _obey(self) -> None:
        """Act on a message of the launcher."""
        try:
            message = self._context.control.recv()
        except (EOFError, OSError):
            message = Drain(0)  # The launcher is gone.
            asyncio.get_running_loop().remove_reader(self._context.control.fileno())
        if isinstance(message, (EngineDied, EngineAsleep)) and self._falling_asleep is not None:
            self._falling_asleep.cancel()  # What it was to end has ended.
        if isinstance(message, EngineDied):
            self._client.engine_died(message.deaths)
            if message.final:
                self._end(self._after_death())
        elif isinstance(message, ApiDied):
            self._client.api_deaths = message.deaths
        elif isinstance(message, EngineStarting):
            self._client.reconnect(message.address)
        elif isinstance(message, FallAsleep):
            if self._falling_asleep is not None:
                self._falling_asleep.cancel()
            self._falling_asleep = asyncio.create_task(self._fall_asleep(message))
        elif isinstance(message, EngineAsleep):
            self._client.engine_asleep(message.failure)
        elif isinstance(message, Drain):
            self._client.drain()
            self._end(self._drain(message.timeout))

    def _switch(self) -> SleepSwitch:
        """What the routes that send the engine to sleep do to the launcher."""
        return SleepSwitch(
            lambda wait: self._context.tell(SleepRequest(wait)),
            lambda: self._context.tell(WakeRequest()),
        )

    async def _fall_asleep(self, message: FallAsleep) -> None:
        await self._client.fall_asleep(message.timeout)
        self._context.tell(Quiet(message.number))

    def _end(self, how: Coroutine[None, None, None]) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.create_task(how)

    async def _drain(self, timeout: float) -> None:
        """Close the port, let running requests finish, then end them with an error."""
        self._server.should_exit = True
        await asyncio.sleep(timeout)
        self._client.fail_all(EngineUnavailableError("the server is shutting down"))
        await self._force()

    async def _after_death(self) -> None:
        """Answer 503 for a moment, then close the port."""
        await asyncio.sleep(_DEAD_SECONDS)
        self._server.should_exit = True
        await self._force()

    async def _force(self) -> None:
        """Drop the connections of clients that do not take their last bytes."""
        await asyncio.sleep(GRACE_SECONDS)
        self._server.force_exit = True
        for connection in tuple(self._server.server_state.connections):
            connection.transport.abort()


def main(
    context: ChildContext,
    settings: ApiSettings,
    shutdown_timeout: float,
    deaths: tuple[int, int],
    listeners: list[socket.socket],
    heartbeat: Heartbeat,
) -> None:
    """Serve until the launcher says otherwise or is gone; the arguments are those of :class:`ApiProcess`.

    Raises:
        GaleError: the tokenizer or the chat template cannot be loaded.
    """
    ApiProcess(context, settings, shutdown_timeout, deaths, listeners, heartbeat).run()
