"""``GET /v1/models``: what is served here."""

from typing import Annotated

from fastapi import APIRouter, Path

from server.api.routing import errors
from server.api.schemas.server import ModelCard, ModelList
from server.errors import NotFoundError
from server.settings import ApiSettings


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

    @router.get(
        "/v1/models", summary="List the served models", response_description="The names.", responses=errors(401)
    )
    async def list_models() -> ModelList:
        """Every name under which the model is served."""
        return ModelList(data=list(cards.values()))

    @router.get(
        "/v1/models/{model:path}",
        summary="Describe a served model",
        response_description="The model.",
        responses=errors(401, 404),
    )
    async def retrieve_model(
        model: Annotated[str, Path(description="One of the served names.", examples=["classics-11m"])],
    ) -> ModelCard:
        """One served model by its name, which may contain slashes."""
        if model not in cards:
            raise NotFoundError(f"The model {model!r} does not exist.", param="model", code="model_not_found")
        return cards[model]

    return router
