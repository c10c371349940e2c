"""``POST /v1/completions``."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.body import check_content_type
from server.api.client import EngineClient
from server.api.completion_validation import CompletionValidator
from server.api.deltas import TokenNames
from server.api.forms import CompletionForm
from server.api.generation import GenerationAnswer
from server.api.routing import generated, json_body, read_json
from server.api.schemas.completion import Completion, CompletionRequest
from server.api.sessions import SESSION_HEADER
from server.api.structured import Grammars
from server.component_settings import ApiSettings
from server.tokenizer import Tokenizer


def completions_router(
    settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None, grammars: Grammars
) -> APIRouter:
    """The route, bound to one engine.

    Args:
        settings: served names, limits.
        client: the way to the engine.
        tokenizer: None: only token ids are served.
        grammars: made with the same tokenizer.
    """
    names = TokenNames.of(tokenizer)
    router = APIRouter()

    @router.post(
        "/v1/completions",
        summary="Complete a text",
        response_model=Completion,
        responses=generated("The completion.", "chunks of the same form as server-sent events", Completion),
        openapi_extra=json_body(CompletionRequest) | SESSION_HEADER,
    )
    async def create_completion(request: Request) -> Response:
        """Continue one or several prompts, each with one or several choices."""
        check_content_type(request)
        validator = CompletionValidator(settings.served_model_names, client.require_ready(), tokenizer, grammars)
        job = await read_json(request, settings.max_body_bytes, validator.job)
        return GenerationAnswer(job, CompletionForm(names.written_for(job)), client)

    return router
