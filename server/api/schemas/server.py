"""Models, health, version, errors."""

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """One served model name."""

    id: str
    object: str = "model"
    created: int = Field(description="Unix time at which the server started, in seconds.")
    owned_by: str = "gale"
    root: str = Field(description="The first served name, whichever name was asked for.")
    max_model_len: int | None = Field(description="Most tokens of prompt and answer together; null: no limit.")


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: str = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer to `GET /health` of a server that can generate."""

    status: str = Field(examples=["ready"])


class Version(BaseModel):
    """The answer to `GET /version`."""

    version: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The request's field at fault.", examples=["max_tokens"])
    code: str | None = Field(examples=["model_not_found"])


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or above."""

    error: ErrorDetail
