"""The engine process: reads requests from the socket, steps the engine, sends what came out."""

import time
import warnings
from typing import TYPE_CHECKING

from server.child import ChildContext, Heartbeat, Ready, keep_loaded
from server.component_settings import EngineConfig
from server.ipc import EngineChannel
from server.types import (
    Cancel,
    ClientMessage,
    EngineInfo,
    Extend,
    GenerateRequest,
    Hello,
    StateCommand,
    StepOutput,
)

if TYPE_CHECKING:
    from server.engine.engine import Engine

_STATS_SECONDS = 0.25


class EngineLoop:
    """Moves messages between the channel and the engine.

    Args:
        engine: ready to serve.
        channel: bound; API processes may have written to it already.
        heartbeat: where to note when a turn begins, and that it waits for work.
    """

    def __init__(self, engine: "Engine", channel: EngineChannel, heartbeat: Heartbeat) -> None:
        self._engine = engine
        self._channel = channel
        self._stats_due = time.monotonic()
        self._was_busy = False
        self._heartbeat = heartbeat

    def turn(self, timeout: float | None = None) -> set[int]:
        """Read everything that has arrived, step once if there is work, send everything that came out.

        Args:
            timeout: seconds to wait for a message when there is no work; None: for ever.

        Returns:
            Those of the channel's watched file descriptors that are readable.
        """
        if self._engine.has_work():
            watched = self._channel.wait(0)
        else:
            self._heartbeat.value = 0.0
            watched = self._channel.wait(timeout)
        self._heartbeat.value = time.monotonic()
        for client, message in self._channel.receive():
            self._handle(client, message)
        if self._engine.has_work():
            self._engine.step()
        self._send(self._engine.take_outputs())
        self._channel.reset_stalled()
        return watched

    def _handle(self, client: bytes, message: ClientMessage) -> None:
        if isinstance(message, GenerateRequest):
            self._engine.submit(client, message)
        elif isinstance(message, Extend):
            self._engine.extend(client, message)
        elif isinstance(message, Cancel):
            self._engine.cancel(client, message.request_ids)
        elif isinstance(message, StateCommand):
            self._engine.command(client, message)
        elif isinstance(message, Hello):
            self._deliver(client, self._engine.info)
            self._deliver(client, StepOutput(stats=self._engine.stats()))

    def _send(self, outputs: dict[bytes, StepOutput]) -> None:
        if self._stats_are_due(outputs):
            stats = self._engine.stats()
            for client in self._channel.clients:
                outputs.setdefault(client, StepOutput()).stats = stats
        for client, output in outputs.items():
            self._deliver(client, output)

    def _stats_are_due(self, outputs: dict[bytes, StepOutput]) -> bool:
        """After a choice or a command, so that who asks next finds it counted; now and then, and when idle."""
        busy, was_busy = self._engine.has_work(), self._was_busy
        self._was_busy = busy
        now = time.monotonic()
        due = (
            (was_busy and not busy)
            or (busy and now >= self._stats_due)
            or any(any(output.finish_reasons) or output.states_told for output in outputs.values())
        )
        if due:
            self._stats_due = now + _STATS_SECONDS
        return due

    def _deliver(self, client: bytes, message: EngineInfo | StepOutput) -> None:
        if not self._channel.send(client, message):
            self._engine.forget_client(client)


def main(context: ChildContext, config: EngineConfig, heartbeat: Heartbeat) -> None:
    """Load the model, then serve until the launcher says stop or is gone.

    Raises:
        GaleError: the model cannot be served.
    """
    channel = EngineChannel(context.address)
    # torch would say at every start that there is no NumPy, which nothing here uses.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    # Imported late: torch takes a second or two.
    from server.engine.engine import Engine

    engine = Engine(config)
    keep_loaded()
    serve(context, engine, channel, heartbeat)


def serve(context: ChildContext, engine: "Engine", channel: EngineChannel, heartbeat: Heartbeat) -> None:
    """Serve with an engine that is ready until the launcher says stop or is gone."""
    channel.watch(context.control.fileno())
    loop = EngineLoop(engine, channel, heartbeat)
    context.tell(Ready(engine.info))
    # Whatever can be read from the launcher, end-of-file or Stop, means the same.
    while not loop.turn():
        pass
    channel.close()
    engine.close()
