"""``POST /tokenize`` and ``POST /detokenize``: the server's own tokenizer, without a generation."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server.api.body import check_content_type, parse_json, read_body
from server.api.client import EngineClient
from server.api.completions import OFFLOAD_BYTES, ready_info
from server.api.rendering import TokenNames
from server.api.schemas import (
    Detokenization,
    DetokenizeRequest,
    ErrorResponse,
    Tokenization,
    TokenizeRequest,
)
from server.api.validation import check_vocabulary, parse_as, served_name
from server.errors import InvalidRequestError
from server.settings import ApiSettings
from server.tokenizer import Tokenizer
from server.types import EngineInfo

Answer = TypeVar("Answer")

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorResponse, "description": "`param` names the field at fault, or the server has no tokenizer."},
    401: {"model": ErrorResponse, "description": "No API key, or a wrong one."},
    404: {"model": ErrorResponse, "description": "No model of that name is served."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The body is declared to be something else than plain JSON."},
    503: {"model": ErrorResponse, "description": "The engine cannot serve now; see Retry-After."},
}


def tokenization_router(settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None) -> APIRouter:
    """The routes, bound to one tokenizer.

    Args:
        settings: served names, limits.
        client: knows the model's vocabulary and limits.
        tokenizer: None: both routes answer 400.
    """
    names = TokenNames(None if tokenizer is None else tokenizer.token_bytes())
    router = APIRouter()

    async def answer(request: Request, work: Callable[[bytes, EngineInfo, Tokenizer], Answer]) -> Answer:
        check_content_type(request)
        info = ready_info(client)
        if tokenizer is None:
            raise InvalidRequestError("This server runs without a tokenizer.")
        body = await read_body(request, settings.max_body_bytes)
        if len(body) < OFFLOAD_BYTES:
            return work(body, info, tokenizer)
        return await asyncio.to_thread(work, body, info, tokenizer)

    def tokenize_body(body: bytes, info: EngineInfo, tokenizer: Tokenizer) -> Tokenization:
        fields = parse_as(TokenizeRequest, parse_json(body))
        served_name(fields.model, settings.served_model_names)
        tokens = tokenizer.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
        strings = [names.text(token) for token in tokens] if fields.return_token_strs else None
        return Tokenization(count=len(tokens), max_model_len=info.max_model_len, tokens=tokens, token_strs=strings)

    def detokenize_body(body: bytes, info: EngineInfo, tokenizer: Tokenizer) -> Detokenization:
        fields = parse_as(DetokenizeRequest, parse_json(body))
        served_name(fields.model, settings.served_model_names)
        check_vocabulary("tokens", fields.tokens, info.vocab_size)
        return Detokenization(prompt=tokenizer.decode(fields.tokens))

    @router.post(
        "/tokenize", summary="Turn a text into token ids", responses=_ERRORS, openapi_extra=_body(TokenizeRequest)
    )
    async def tokenize(request: Request) -> Tokenization:
        """The token ids that a completion would see for this prompt."""
        return await answer(request, tokenize_body)

    @router.post(
        "/detokenize", summary="Turn token ids into a text", responses=_ERRORS, openapi_extra=_body(DetokenizeRequest)
    )
    async def detokenize(request: Request) -> Detokenization:
        """The text of a whole sequence of token ids."""
        return await answer(request, detokenize_body)

    return router


def _body(schema: type[BaseModel]) -> dict[str, Any]:
    """How the OpenAPI document describes a body that the route reads by itself."""
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
