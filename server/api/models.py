"""``GET /v1/models``: what is served here."""

from typing import Annotated, Final

from fastapi import APIRouter, Path

from server.api.client import EngineClient
from server.api.routing import errors
from server.api.schemas.server import ModelCard, ModelList
from server.component_settings import ApiSettings
from server.errors import NotFoundError

_TOLD: Final = frozenset(
    {"fingerprint", "num_parameters", "vocab_size", "dtype", "state_dtype", "state_bytes", "max_num_seqs", "device"}
)
"""What the engine says of itself, in a model's card."""


def models_router(settings: ApiSettings, client: EngineClient) -> APIRouter:
    """The routes, for the names in the settings and what the engine tells of itself."""
    router = APIRouter()

    def card(name: str) -> ModelCard:
        told = {} if client.info is None else {field: getattr(client.info, field) for field in _TOLD}
        return ModelCard(
            id=name,
            created=settings.created,
            root=settings.served_model_names[0],
            max_model_len=settings.max_model_len,
            revision=settings.revision,
            **told,
        )

    @router.get(
        "/v1/models", summary="List the served models", response_description="The names.", responses=errors(401)
    )
    async def list_models() -> ModelList:
        """Every name under which the model is served, and which model that is."""
        return ModelList(data=[card(name) for name in settings.served_model_names])

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
        if model not in settings.served_model_names:
            raise NotFoundError(f"The model {model!r} does not exist.", param="model", code="model_not_found")
        return card(model)

    return router
