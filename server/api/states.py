"""``/v1/states``: the states that were saved with a request's API key."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse

from server.api.accounting import begin_generation
from server.api.auth import tenant_of
from server.api.body import check_content_type, parse_json, read_body
from server.api.checks import parse_as
from server.api.client import EngineClient
from server.api.routing import errors, json_body, query_parameters, unique_query
from server.api.schemas.states import ForkRequest, State, StateDeleted, StateList, UploadQuery
from server.api.transfers import CONTENT_TYPE, StateResponse, Transfer, Transfers
from server.component_settings import ApiSettings
from server.errors import StateNotAbsorbedError
from server.types import SamplingParams, StateAction, StateInfo

Reference = Annotated[
    str, Path(description="The state's id or its name.", examples=["state-5f0c6d6c0f5b4f6f8d6a3f6b", "my-book"])
]
_MAX_BODY: Final = 4096
_BINARY: Final = {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}
_FILE: Final[dict[str, Any]] = {
    "content": _BINARY,
    "headers": {"ETag": {"description": "SHA-256 of the contents.", "schema": {"type": "string"}}},
}
_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {"required": True, "content": _BINARY},
    "parameters": query_parameters(UploadQuery),
}


def states_router(settings: ApiSettings, client: EngineClient) -> APIRouter:
    """The routes, bound to one engine.

    Args:
        settings: limits.
        client: the way to the engine.
    """
    router = APIRouter()
    limit = min(settings.max_body_bytes, _MAX_BODY)
    transfers = Transfers(lambda: client.transfers)

    @router.get(
        "/v1/states",
        summary="List the saved states",
        response_description="The states.",
        responses=errors(400, 401, 503),
    )
    async def list_states(request: Request) -> StateList:
        """The states that were saved with this API key, the oldest first."""
        told = await client.command(StateAction.LIST, tenant_of(request.scope))
        return StateList(data=[state_of(info) for info in told])

    @router.get(
        "/v1/states/{state}",
        summary="Describe a saved state",
        response_description="The state.",
        responses=errors(400, 401, 404, 503),
    )
    async def retrieve_state(request: Request, state: Reference) -> State:
        """One state that was saved with this API key."""
        (info,) = await client.command(StateAction.DESCRIBE, tenant_of(request.scope), state=state)
        return state_of(info)

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
        return state_of(info)

    @router.get(
        "/v1/states/{state}/content",
        summary="Download a saved state",
        response_description="The state, as a safetensors file.",
        response_class=FileResponse,
        responses={200: _FILE, **errors(400, 401, 404, 503, 507)},
    )
    async def download_state(request: Request, state: Reference) -> StateResponse:
        """A file with all that the state is: another server of the same model can go on from it."""
        transfer = transfers.begin(tenant_of(request.scope))
        found: list[StateInfo] = []
        await transfer.engine_done(_write(request, client, state, transfer, found))
        return StateResponse(transfer.path, found[0].name or found[0].id, found[0].digest, transfer.end)

    @router.post(
        "/v1/states",
        summary="Upload a saved state",
        response_description="The new state.",
        status_code=201,
        responses=errors(400, 401, 403, 408, 413, 415, 503, 507),
        openapi_extra=_UPLOAD,
    )
    async def upload_state(request: Request) -> State:
        """Save a state that was downloaded from a server of the same model. It becomes this API key's."""
        query = parse_as(UploadQuery, unique_query(request))
        info = client.require_ready()
        transcript = settings.max_body_bytes if info.max_model_len is None else 4 * info.max_model_len
        transfer = transfers.begin(tenant_of(request.scope))
        with transfer.ending():
            await transfer.receive(request, info.state_file_bytes + transcript)
            (saved,) = await client.command(
                StateAction.UPLOAD,
                tenant_of(request.scope),
                name=query.name,
                ttl=query.ttl,
                path=transfer.path,
                convert=query.convert,
            )
        return state_of(saved)

    return router


async def _write(
    request: Request, client: EngineClient, state: str, transfer: Transfer, found: list[StateInfo]
) -> None:
    """Have the engine write a state's file, and add what it tells of it."""
    tenant = tenant_of(request.scope)
    try:
        found += await client.command(StateAction.DOWNLOAD, tenant, state=state, path=transfer.path)
    except StateNotAbsorbedError:
        record = begin_generation(request.scope, 0)
        params = SamplingParams(max_tokens=0)
        async with await client.submit(prompts=[[]], n=1, params=params, tenant=tenant, state=state) as mailbox:
            record.prompt_tokens += mailbox.context
            async for events in mailbox:
                record.note(events)
        found += await client.command(StateAction.DOWNLOAD, tenant, state=state, path=transfer.path)


def state_of(info: StateInfo) -> State:
    """What clients are told of a saved state."""
    return State(
        id=info.id,
        name=info.name,
        num_tokens=info.num_tokens,
        bytes=info.nbytes,
        turn=info.turn,
        created=int(info.created),
        expires=int(info.expires),
    )
