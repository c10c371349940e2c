"""``POST /tokenize``, ``POST /detokenize``, ``GET /tokenizer_info``: the tokenizer, without a generation."""

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from server.api.body import check_content_type
from server.api.checks import check_vocabulary, parse_as, served_name
from server.api.client import EngineClient
from server.api.conversation import Conversations
from server.api.deltas import TokenNames
from server.api.routing import errors, json_body, read_json
from server.api.schemas.tokenization import (
    AddedTokenInfo,
    Detokenization,
    DetokenizeRequest,
    Tokenization,
    TokenizeChatRequest,
    TokenizeRequest,
    TokenizerInfo,
)
from server.component_settings import ApiSettings
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer
from server.tokenizer.config import TokenizerConfig
from server.types import EngineInfo

Answer = TypeVar("Answer")

_NO_TOKENIZER = InvalidRequestError("This server runs without a tokenizer.")

_ERRORS = errors(400, 401, 404, 413, 415, 500, 503)


def tokenization_router(
    settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None, conversations: Conversations
) -> APIRouter:
    """The routes, bound to one tokenizer.

    Args:
        settings: served names, limits.
        client: knows the model's vocabulary and limits.
        tokenizer: None: both routes answer 400.
        conversations: makes prompts of messages.
    """
    names = TokenNames.of(tokenizer)
    router = APIRouter()

    async def answer(request: Request, work: Callable[[dict[str, Any], EngineInfo, Tokenizer], Answer]) -> Answer:
        check_content_type(request)
        info = client.require_ready()
        if tokenizer is None:
            raise _NO_TOKENIZER
        return await read_json(request, settings.max_body_bytes, lambda body: work(body, info, tokenizer))

    def tokenize_body(body: dict[str, Any], info: EngineInfo, tokenizer: Tokenizer) -> Tokenization:
        fields: TokenizeChatRequest | TokenizeRequest
        if "messages" in body:
            fields = parse_as(TokenizeChatRequest, body)
            tokens = conversations.token_ids(fields, add_special_tokens=bool(fields.add_special_tokens))
        else:
            fields = parse_as(TokenizeRequest, body)
            tokens = tokenizer.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
        served_name(fields.model, settings.served_model_names)
        strings = [names.text(token) for token in tokens] if fields.return_token_strs else None
        return Tokenization(count=len(tokens), max_model_len=info.max_model_len, tokens=tokens, token_strs=strings)

    def detokenize_body(body: dict[str, Any], info: EngineInfo, tokenizer: Tokenizer) -> Detokenization:
        fields = parse_as(DetokenizeRequest, body)
        served_name(fields.model, settings.served_model_names)
        check_vocabulary("tokens", fields.tokens, info.vocab_size)
        return Detokenization(prompt=tokenizer.decode(fields.tokens))

    @router.post(
        "/tokenize",
        summary="Turn a text into token ids",
        response_description="The token ids.",
        responses=_ERRORS,
        openapi_extra=json_body(TokenizeRequest, TokenizeChatRequest),
    )
    async def tokenize(request: Request) -> Tokenization:
        """The token ids that a completion would see for this prompt, or a chat completion for these messages."""
        return await answer(request, tokenize_body)

    @router.post(
        "/detokenize",
        summary="Turn token ids into a text",
        response_description="The text.",
        responses=_ERRORS,
        openapi_extra=json_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Detokenization:
        """The text of a whole sequence of token ids."""
        return await answer(request, detokenize_body)

    @router.get(
        "/tokenizer_info",
        summary="Describe the tokenizer",
        response_description="The tokenizer.",
        responses=errors(400, 401),
    )
    async def tokenizer_info() -> TokenizerInfo:
        """The tokenizer's class, its special tokens and the chat template."""
        if tokenizer is None:
            raise _NO_TOKENIZER
        return _describe(tokenizer, settings, conversations)

    return router


def _describe(tokenizer: Tokenizer, settings: ApiSettings, conversations: Conversations) -> TokenizerInfo:
    folder = settings.tokenizer_folder
    config = TokenizerConfig.from_folder(folder) if folder is not None else None
    named = config.values.get("tokenizer_class") if config is not None else None
    tokens = tokenizer.special_tokens
    return TokenizerInfo(
        tokenizer_class=named if isinstance(named, str) else type(tokenizer).__name__,
        vocab_size=tokenizer.vocab_size,
        max_model_len=settings.max_model_len,
        bos_token=tokens.get("bos_token"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token=tokens.get("eos_token"),
        eos_token_id=tokenizer.eos_token_id,
        unk_token=tokens.get("unk_token"),
        pad_token=tokens.get("pad_token"),
        added_tokens_decoder={
            str(token.token_id): AddedTokenInfo.model_validate(token, from_attributes=True)
            for token in (config.added_tokens if config is not None else ())
        },
        chat_template=conversations.source,
    )
