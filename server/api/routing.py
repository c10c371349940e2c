"""What the routes have in common: bodies and answers, and how the OpenAPI document describes them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from server.api.body import parse_json, read_body
from server.api.schemas.server import ErrorResponse
from server.errors import InvalidRequestError

Answer = TypeVar("Answer")

OFFLOAD_BYTES: Final = 16 * 1024
"""Bodies from this size on are parsed and tokenized in a thread, so that streams do not stall meanwhile."""

_SLOW_FIELDS: Final = ("response_format", "structured_outputs")
"""Bodies with these are worked on in a thread: checking what a text must look like can take seconds."""

ERRORS: Final[dict[int, str]] = {
    400: "The request can never succeed as it is; `param` names the field at fault.",
    401: "No API key, or a wrong one.",
    403: "The API key has saved as many states as it may.",
    404: "There is no model, or no saved state, of that name.",
    408: "Nothing of the body has come for too long.",
    413: "The body is too large.",
    415: "The body is declared to be something else than what the route takes.",
    429: "The API key has as many choices waiting and running as it may; see Retry-After.",
    500: "The server failed.",
    503: "The queue is full, or the engine cannot serve; see Retry-After.",
    507: "The store of saved states is full, or a state's file cannot be written.",
}
"""What each status of an error means."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document describes these errors of a route."""
    return {status: {"model": ErrorResponse, "description": ERRORS[status]} for status in statuses}


def json_body(*schemas: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """How the OpenAPI document describes a body, of one of these forms, that the route reads by itself."""
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in schemas]
    schema: dict[str, Any] = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def query_parameters(schema: type[BaseModel]) -> list[dict[str, Any]]:
    """How the OpenAPI document describes a query that the route checks by itself."""
    described = schema.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": field.pop("description"),
            "examples": {"example": {"value": field.pop("examples")[0]}},
            "schema": {key: value for key, value in field.items() if key != "title"},
        }
        for name, field in described.items()
    ]


def unique_query(request: Request) -> dict[str, Any]:
    """The parameters of a request's query.

    Raises:
        InvalidRequestError: one is given twice.
    """
    pairs = request.query_params.multi_items()
    for index, (name, _) in enumerate(pairs):
        if any(name == other for other, _ in pairs[:index]):
            raise InvalidRequestError(f"'{name}' is given twice.", param=name)
    return dict(pairs)


def prefill_body(schema: type[BaseModel], query: type[BaseModel]) -> dict[str, Any]:
    """How the OpenAPI document describes a body that is JSON, or a text with fields of this form behind the path."""
    described = json_body(schema)
    text = {"schema": {"type": "string", "minLength": 1}, "example": "The old man looked at the sea and"}
    for kind in ("text/plain", "application/octet-stream"):
        described["requestBody"]["content"][kind] = text
    described["parameters"] = query_parameters(query)
    return described


def event_stream(*chunks: type[BaseModel]) -> dict[str, Any]:
    """How the OpenAPI document describes an answer as server-sent events, in the form that FastAPI gives its own."""
    models: tuple[type[BaseModel], ...] = (*chunks, ErrorResponse)
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": schemas}}
    data = {
        "description": "A chunk; an error, after which nothing but the end follows; or `[DONE]`, the end.",
        "anyOf": [json, {"const": "[DONE]"}],
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"text/event-stream": {"itemSchema": event}}


def generated(answer: str, chunks: str, chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document describes what a route that generates answers.

    Args:
        answer: what it is.
        chunks: what it is made of in a stream.
        chunk: the form of these.
    """
    description = (
        f"{answer} With `stream`, {chunks}, ended by `data: [DONE]`; an error after the stream's start is one event, "
        '`data: {"error": ...}`.'
    )
    described = {"description": description, "content": event_stream(chunk)}
    return {200: described, **errors(400, 401, 403, 404, 413, 415, 429, 500, 503, 507)}


@dataclass(frozen=True, slots=True)
class JsonBody:
    """A request's JSON body.

    Attributes:
        fields: the object.
        is_slow: whether it takes a while to work on it, as on large ones and on those of some fields.
    """

    fields: dict[str, Any]
    is_slow: bool

    async def work(self, work: Callable[[dict[str, Any]], Answer]) -> Answer:
        """What becomes of the body; slow ones are worked on in a thread."""
        return await asyncio.to_thread(work, self.fields) if self.is_slow else work(self.fields)


async def parse_body(request: Request, limit: int) -> JsonBody:
    """The request's JSON body, which has not been read yet.

    Args:
        request: as it came.
        limit: most bytes of the body.

    Raises:
        ApiError: the body cannot be accepted.
        ClientGoneError: the client left before the end of the body.
    """
    body = await read_body(request, limit)
    if len(body) >= OFFLOAD_BYTES:
        return JsonBody(await asyncio.to_thread(parse_json, body), is_slow=True)
    fields = parse_json(body)
    return JsonBody(fields, is_slow=not fields.keys().isdisjoint(_SLOW_FIELDS))


async def read_json(request: Request, limit: int, work: Callable[[dict[str, Any]], Answer]) -> Answer:
    """What becomes of the request's JSON body; large ones, and slow ones, are worked on in a thread.

    Args:
        request: its body has not been read yet.
        limit: most bytes of the body.
        work: from the parsed body to the result.

    Raises:
        ApiError: the body cannot be accepted, or what ``work`` raises.
        ClientGoneError: the client left before the end of the body.
    """
    return await (await parse_body(request, limit)).work(work)
