"""``POST /tokenize`` and ``POST /detokenize``: the server's own tokenizer, without a generation."""

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from server.api.body import check_content_type
from server.api.checks import check_vocabulary, parse_as, served_name
from server.api.client import EngineClient
from server.api.deltas import TokenNames
from server.api.routing import errors, json_body, read_json, ready_info
from server.api.schemas.tokenization import Detokenization, DetokenizeRequest, Tokenization, TokenizeRequest
from server.errors import InvalidRequestError
from server.settings import ApiSettings
from server.tokenizer import Tokenizer
from server.types import EngineInfo

Answer = TypeVar("Answer")

_ERRORS = errors(400, 401, 404, 413, 415, 500, 503)


def tokenization_router(settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None) -> APIRouter:
    """The routes, bound to one tokenizer.

    Args:
        settings: served names, limits.
        client: knows the model's vocabulary and limits.
        tokenizer: None: both routes answer 400.
    """
    names = TokenNames(None if tokenizer is None else tokenizer.token_bytes())
    router = APIRouter()

    async def answer(request: Request, work: Callable[[dict[str, Any], EngineInfo, Tokenizer], Answer]) -> Answer:
        check_content_type(request)
        info = ready_info(client)
        if tokenizer is None:
            raise InvalidRequestError("This server runs without a tokenizer.")
        return await read_json(request, settings.max_body_bytes, lambda body: work(body, info, tokenizer))

    def tokenize_body(body: dict[str, Any], info: EngineInfo, tokenizer: Tokenizer) -> Tokenization:
        fields = parse_as(TokenizeRequest, body)
        served_name(fields.model, settings.served_model_names)
        tokens = tokenizer.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
        strings = [names.text(token) for token in tokens] if fields.return_token_strs else None
        return Tokenization(count=len(tokens), max_model_len=info.max_model_len, tokens=tokens, token_strs=strings)

    def detokenize_body(body: dict[str, Any], info: EngineInfo, tokenizer: Tokenizer) -> Detokenization:
        fields = parse_as(DetokenizeRequest, body)
        served_name(fields.model, settings.served_model_names)
        check_vocabulary("tokens", fields.tokens, info.vocab_size)
        return Detokenization(prompt=tokenizer.decode(fields.tokens))

    @router.post(
        "/tokenize", summary="Turn a text into token ids", responses=_ERRORS, openapi_extra=json_body(TokenizeRequest)
    )
    async def tokenize(request: Request) -> Tokenization:
        """The token ids that a completion would see for this prompt."""
        return await answer(request, tokenize_body)

    @router.post(
        "/detokenize",
        summary="Turn token ids into a text",
        responses=_ERRORS,
        openapi_extra=json_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Detokenization:
        """The text of a whole sequence of token ids."""
        return await answer(request, detokenize_body)

    return router
