"""``GET /v1/models``: what is served here."""

from typing import Any, Final

from fastapi import APIRouter

from server.api.schemas import ErrorResponse, ModelCard, ModelList
from server.errors import NotFoundError
from server.settings import ApiSettings

_UNAUTHORIZED: Final[dict[int | str, dict[str, Any]]] = {
    401: {"model": ErrorResponse, "description": "No API key, or a wrong one."}
}


def models_router(settings: ApiSettings) -> APIRouter:
    """The routes, for the names in the settings."""
    cards = {
        name: ModelCard(
            id=name,
            created=settings.created,
            root=settings.served_model_names[0],
            max_model_len=settings.max_model_len,
        )
        for name in settings.served_model_names
    }
    router = APIRouter()

    @router.get("/v1/models", summary="List the served models", responses=_UNAUTHORIZED)
    async def list_models() -> ModelList:
        """Every name under which the model is served."""
        return ModelList(data=list(cards.values()))

    @router.get(
        "/v1/models/{model:path}",
        summary="Describe a served model",
        responses={**_UNAUTHORIZED, 404: {"model": ErrorResponse, "description": "No model of that name is served."}},
    )
    async def retrieve_model(model: str) -> ModelCard:
        """One served model by its name, which may contain slashes."""
        if model not in cards:
            raise NotFoundError(f"The model {model!r} does not exist.", param="model", code="model_not_found")
        return cards[model]

    return router
