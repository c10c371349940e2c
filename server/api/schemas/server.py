"""Models, health, version, errors."""

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """One served model name."""

    id: str = Field(description="The name.", examples=["classics-11m"])
    object: str = Field("model", description="Always `model`.", examples=["model"])
    created: int = Field(description="Unix time at which the server started, in seconds.", examples=[1795572236])
    owned_by: str = Field("gale", description="Always `gale`.", examples=["gale"])
    root: str = Field(description="The first served name, whichever name was asked for.", examples=["classics-11m"])
    max_model_len: int | None = Field(
        description="Most tokens of prompt and answer together; null: no limit.", examples=[4096]
    )
    revision: str | None = Field(
        description="Branch, tag or commit of the hub's repository, if one was named.", examples=["main"]
    )
    fingerprint: str | None = Field(
        None,
        description="Names checkpoint, version and data types, as `system_fingerprint` in answers. Null, like what "
        "follows, until the engine has loaded the model.",
        examples=["fp_77eac3d710a6"],
    )
    num_parameters: int | None = Field(None, description="Numbers of the checkpoint.", examples=[10_725_888])
    vocab_size: int | None = Field(None, description="Token ids lie below it.", examples=[8192])
    dtype: str | None = Field(None, description="Type of the weights.", examples=["bfloat16"])
    state_dtype: str | None = Field(None, description="Type of the recurrent states.", examples=["float32"])
    state_bytes: int | None = Field(
        None, description="Memory of one request's state, whatever its length.", examples=[655_360]
    )
    max_num_seqs: int | None = Field(None, description="Choices that can run at once.", examples=[256])
    device: str | None = Field(None, description="Where it runs.", examples=["NVIDIA H200"])


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: str = Field("list", description="Always `list`.", examples=["list"])
    data: list[ModelCard] = Field(description="One entry per name.")


class Health(BaseModel):
    """The answer to `GET /health` of a server that can generate."""

    status: str = Field(description="Always `ready`.", examples=["ready"])


class SleepState(BaseModel):
    """The answer to `POST /sleep`, `POST /wake_up` and `GET /is_sleeping`."""

    is_sleeping: bool = Field(description="Whether the engine has been sent to sleep, and has ended.", examples=[False])


class Version(BaseModel):
    """The answer to `GET /version`."""

    version: str = Field(description="The version's number.", examples=["0.1.0"])


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(
        description="One sentence that names the cause.", examples=["Invalid 'top_p': must be at most 1."]
    )
    type: str = Field(description="The kind of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The request's field at fault.", examples=["max_tokens"])
    code: str | None = Field(description="The case, for programs.", examples=["model_not_found"])


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or above."""

    error: ErrorDetail = Field(description="What went wrong.")
