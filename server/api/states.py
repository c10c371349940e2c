"""``/v1/states``: the states that were saved with a request's API key."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request

from server.api.accounting import begin_generation
from server.api.auth import tenant_of
from server.api.body import check_content_type, parse_json, read_body
from server.api.checks import invalid, parse_as
from server.api.client import EngineClient
from server.api.generation import while_connected
from server.api.routing import errors, json_body, read_json, ready_info
from server.api.schemas.states import ForkRequest, PrefillRequest, State, StateDeleted, StateList
from server.api.structured import Grammars
from server.api.validation import CompletionValidator, GenerationJob
from server.errors import InternalError
from server.settings import ApiSettings
from server.tokenizer import Tokenizer
from server.types import StateAction, StateInfo

Reference = Annotated[
    str, Path(description="The state's id or its name.", examples=["state-5f0c6d6c0f5b4f6f8d6a3f6b", "my-book"])
]
_MAX_BODY: Final = 4096


def states_router(
    settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None, grammars: Grammars
) -> APIRouter:
    """The routes, bound to one engine.

    Args:
        settings: limits.
        client: the way to the engine.
        tokenizer: None: only token ids are served.
        grammars: made with the same tokenizer.
    """
    router = APIRouter()
    limit = min(settings.max_body_bytes, _MAX_BODY)

    @router.get(
        "/v1/states",
        summary="List the saved states",
        response_description="The states.",
        responses=errors(400, 401, 503),
    )
    async def list_states(request: Request) -> StateList:
        """The states that were saved with this API key, the oldest first."""
        told = await client.command(StateAction.LIST, tenant_of(request.scope))
        return StateList(data=[_state(info) for info in told])

    @router.get(
        "/v1/states/{state}",
        summary="Describe a saved state",
        response_description="The state.",
        responses=errors(400, 401, 404, 503),
    )
    async def retrieve_state(request: Request, state: Reference) -> State:
        """One state that was saved with this API key."""
        (info,) = await client.command(StateAction.DESCRIBE, tenant_of(request.scope), state=state)
        return _state(info)

    @router.delete(
        "/v1/states/{state}",
        summary="Delete a saved state",
        response_description="The state is no more.",
        responses=errors(400, 401, 404, 503, 507),
    )
    async def delete_state(request: Request, state: Reference) -> StateDeleted:
        """Forget a state. Requests that continue it already, and its forks, go on."""
        (info,) = await client.command(StateAction.DELETE, tenant_of(request.scope), state=state)
        return StateDeleted(id=info.id)

    @router.post(
        "/v1/states/{state}/fork",
        summary="Fork a saved state",
        response_description="The new state.",
        status_code=201,
        responses=errors(400, 401, 403, 404, 413, 415, 503, 507),
        openapi_extra=json_body(ForkRequest, required=False),
    )
    async def fork_state(request: Request, state: Reference) -> State:
        """Save the same state once more, under an id of its own: it lives on when the other is deleted or expires."""
        body = await read_body(request, limit)
        if body:
            check_content_type(request)
        fork = parse_as(ForkRequest, parse_json(body) if body else {})
        (info,) = await client.command(
            StateAction.FORK, tenant_of(request.scope), state=state, name=fork.name, ttl=fork.ttl
        )
        return _state(info)

    @router.post(
        "/v1/states/prefill",
        summary="Read a text and save its state",
        response_description="The new state.",
        status_code=201,
        responses=errors(400, 401, 403, 404, 413, 415, 429, 500, 503, 507),
        openapi_extra=json_body(PrefillRequest),
    )
    async def prefill_state(request: Request) -> State:
        """Absorb a text, alone or behind a saved state, and generate nothing."""
        check_content_type(request)
        validator = CompletionValidator(settings.served_model_names, ready_info(client), tokenizer, grammars)
        job = await read_json(
            request, settings.max_body_bytes, lambda body: validator.job(_reading(parse_as(PrefillRequest, body)))
        )
        saved: list[StateInfo] = []
        await while_connected(request.receive, _prefill(request, job, client, saved))
        return _state(saved[0])

    return router


async def _prefill(request: Request, job: GenerationJob, client: EngineClient, saved: list[StateInfo]) -> None:
    """Run a job that reads one prompt, and add the state that it saved."""
    record = begin_generation(request.scope, len(job.prompts[0]))
    mailbox = await client.submit(
        prompts=job.prompts,
        n=1,
        params=job.params,
        tenant=tenant_of(request.scope),
        state=job.state,
        save_state=True,
        state_name=job.state_name,
        state_ttl=job.state_ttl,
    )
    async with mailbox:
        record.prompt_tokens += mailbox.context
        async for events in mailbox:
            record.note(events)
            saved += [event.state for event in events if event.state is not None]
    if not saved:
        raise InternalError("The engine did not save the state.")


def _reading(request: PrefillRequest) -> dict[str, Any]:
    """The completion that reads a prompt and does nothing else."""
    if len(request.prompt) > 1:
        raise invalid("prompt", "must be one text or one list of token ids")
    fields = request.model_dump(exclude={"name", "ttl"}, exclude_none=True)
    return {**fields, "max_tokens": 0, "save_state": request.name or True, "state_ttl": request.ttl}


def _state(info: StateInfo) -> State:
    return State(
        id=info.id,
        name=info.name,
        num_tokens=info.num_tokens,
        bytes=info.nbytes,
        turn=info.turn,
        created=int(info.created),
        expires=int(info.expires),
    )
