"""``/sleep`` and ``/wake_up``: the device for somebody else, for a while. Names and parameters are vLLM's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request

from server.api.checks import invalid
from server.api.client import EngineClient
from server.api.engine_status import EngineStatus
from server.api.routing import errors
from server.api.schemas.server import SleepState
from server.errors import EngineAsleepError

_LEVELS: Final = ("1", "2")
_MODES: Final = ("abort", "wait")
_ENDS: Final = (EngineStatus.DEAD, EngineStatus.DRAINING)
"""Statuses in which neither falling asleep nor waking up will be heard of again."""


@dataclass(frozen=True, slots=True)
class SleepSwitch:
    """What the launcher is asked for.

    Attributes:
        sleep: end the engine; with True, running requests may finish first.
        wake: start another.
    """

    sleep: Callable[[bool], None]
    wake: Callable[[], None]


def sleep_router(client: EngineClient, switch: SleepSwitch) -> APIRouter:
    """The routes, bound to one engine."""
    router = APIRouter()

    @router.post(
        "/sleep",
        summary="Free the device",
        response_description="The engine has ended.",
        responses=errors(400, 401, 503),
    )
    async def sleep(
        request: Request,
        level: Annotated[
            str, Query(description="1 or 2. Both free everything: weights are read again from their files.")
        ] = "1",
        mode: Annotated[
            str,
            Query(description="What becomes of running requests: `abort` ends them, `wait` lets them finish first."),
        ] = "abort",
    ) -> SleepState:
        """End the engine, and with it all that it holds on the device, and answer when that is done."""
        _refuse_unknown(request, "level", "mode")
        if level not in _LEVELS:
            raise invalid("level", "must be 1 or 2")
        if mode not in _MODES:
            raise invalid("mode", "must be 'abort' or 'wait'")
        if client.status not in (EngineStatus.FALLING_ASLEEP, EngineStatus.ASLEEP):
            client.require_ready()
        switch.sleep(mode == "wait")
        if await client.wait_for(EngineStatus.ASLEEP, *_ENDS) is not EngineStatus.ASLEEP:
            client.require_ready()
        return SleepState(is_sleeping=True)

    @router.post(
        "/wake_up",
        summary="Load the model again",
        response_description="Requests are served.",
        responses=errors(400, 401, 503),
    )
    async def wake_up(request: Request) -> SleepState:
        """Start another engine, and answer when it serves. Saved states are there again.

        Where it cannot start, because somebody else has taken the device's memory for instance, the answer says why,
        and the server sleeps on.
        """
        _refuse_unknown(request)
        if client.status is EngineStatus.FALLING_ASLEEP:
            await client.wait_for(EngineStatus.ASLEEP, *_ENDS)
        if client.status is EngineStatus.ASLEEP:
            switch.wake()
            await client.wait_for(*(status for status in EngineStatus if status is not EngineStatus.ASLEEP))
        status = await client.wait_for(EngineStatus.READY, EngineStatus.ASLEEP, *_ENDS)
        if status is EngineStatus.ASLEEP and client.wake_failure is not None:
            raise EngineAsleepError(f"The engine did not start, and sleeps on: {client.wake_failure}")
        client.require_ready()
        return SleepState(is_sleeping=False)

    @router.get(
        "/is_sleeping",
        summary="Whether the engine sleeps",
        response_description="Whether it does.",
        responses=errors(400, 401),
    )
    async def is_sleeping(request: Request) -> SleepState:
        """Whether the engine has been sent to sleep, and has ended."""
        _refuse_unknown(request)
        return SleepState(is_sleeping=client.status is EngineStatus.ASLEEP)

    return router


def _refuse_unknown(request: Request, *known: str) -> None:
    for name in request.query_params:
        if name not in known:
            raise invalid(name, "is not a parameter of this route")
