"""``POST /v1/chat/completions``."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.auth import tenant_of
from server.api.body import check_content_type
from server.api.chat_validation import ChatValidator
from server.api.client import EngineClient
from server.api.conversation import Conversations
from server.api.deltas import TokenNames
from server.api.forms import ChatForm
from server.api.generation import GenerationAnswer
from server.api.routing import generated, json_body, parse_body
from server.api.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from server.api.sessions import SESSION_HEADER
from server.api.structured import Grammars
from server.component_settings import ApiSettings
from server.tokenizer import Tokenizer
from server.types import StateAction


def chat_router(
    settings: ApiSettings,
    client: EngineClient,
    tokenizer: Tokenizer | None,
    grammars: Grammars,
    conversations: Conversations,
) -> APIRouter:
    """The route, bound to one engine.

    Args:
        settings: served names, limits.
        client: the way to the engine.
        tokenizer: None: every request is refused.
        grammars: made with the same tokenizer.
        conversations: makes the prompts.
    """
    token_names = TokenNames.of(tokenizer)
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        response_model=ChatCompletion,
        responses=generated(
            "The answer.", "server-sent events whose data are `ChatCompletionChunk`s", ChatCompletionChunk
        ),
        openapi_extra=json_body(ChatCompletionRequest) | SESSION_HEADER,
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer the last message of a conversation, or continue it, with one or several choices."""
        check_content_type(request)
        info = client.require_ready()
        body = await parse_body(request, settings.max_body_bytes)
        continued = None
        if isinstance(reference := body.fields.get("state"), str) and reference:
            # How new messages are written depends on what they come behind.
            (continued,) = await client.command(StateAction.DESCRIBE, tenant_of(request.scope), state=reference)
        names = settings.served_model_names
        job = await body.work(ChatValidator(names, info, tokenizer, grammars, conversations, continued).job)
        return GenerationAnswer(job, ChatForm(token_names.written_for(job), job.role), client)

    return router
