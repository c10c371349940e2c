"""`/v1/states`."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from server.api.schemas.base import Body, ModelName
from server.api.schemas.fields import MAX_STATE_TTL, STATE_NAME, Prompt, state_name

StateName = Annotated[
    str | None,
    PlainValidator(state_name, json_schema_input_type=Annotated[str, Field(pattern=f"^{STATE_NAME.pattern}$")] | None),
]


class ForkRequest(Body):
    """The body of `POST /v1/states/{state}/fork`. It may be left out."""

    name: StateName = Field(
        None,
        description="The fork's name, taken over from the state that had it, which is deleted. Default: none.",
        examples=["my-copy"],
    )
    ttl: int | None = Field(
        None, ge=1, le=MAX_STATE_TTL, description="Seconds for which the fork is kept. Default 86400.", examples=[3600]
    )


class UploadQuery(Body):
    """The query of `POST /v1/states`."""

    model_config = ConfigDict(strict=False)

    name: StateName = Field(
        None,
        description="The state's name, taken over from the state that had it, which is deleted. Default: none.",
        examples=["my-book"],
    )
    ttl: int | None = Field(
        None, ge=1, le=MAX_STATE_TTL, description="Seconds for which it is kept. Default 86400.", examples=[3600]
    )
    convert: bool = Field(
        False,
        description="Whether numbers may be rounded if this server holds states in a smaller type.",
        examples=[True],
    )


class PrefillRequest(Body):
    """The body of `POST /v1/states/prefill`."""

    model: ModelName = None
    prompt: Prompt = Field(
        description="A text or a list of token ids: one, empty only behind a `state`. A text gets the tokenizer's "
        "special tokens (such as beginning of sequence), save behind a `state`.",
        examples=["The old man looked at the sea and"],
    )
    state: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Id or name of a saved state that the prompt continues.",
        examples=["my-book"],
    )
    name: StateName = Field(
        None,
        description="The new state's name, taken over from the state that had it, which is deleted. Default: none.",
        examples=["my-chapter"],
    )
    ttl: int | None = Field(
        None, ge=1, le=MAX_STATE_TTL, description="Seconds for which it is kept. Default 86400.", examples=[3600]
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether a text gets the tokenizer's special tokens. Default: true, behind a `state` false.",
        examples=[False],
    )

    stream: bool | None = Field(
        None,
        description="Tell of the progress by server-sent events, ended by the new state and `data: [DONE]`.",
        examples=[False],
    )


class PrefillQuery(Body):
    """What stands behind the path of `POST /v1/states/prefill` where the body is a text."""

    model_config = ConfigDict(strict=False)

    model: ModelName = None
    state: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Id or name of a saved state that the text continues.",
        examples=["my-book"],
    )
    name: StateName = Field(
        None,
        description="The new state's name, taken over from the state that had it, which is deleted.",
        examples=["my-chapter"],
    )
    ttl: int | None = Field(
        None, ge=1, le=MAX_STATE_TTL, description="Seconds for which it is kept. Default 86400.", examples=[3600]
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the text gets the tokenizer's special tokens. Default: true, behind a `state` false.",
        examples=[False],
    )
    stream: bool | None = Field(
        None,
        description="Tell of the progress by server-sent events. Also where the body is JSON.",
        examples=[False],
    )


class PrefillProgress(BaseModel):
    """An event of a streamed answer to `POST /v1/states/prefill`."""

    object: str = Field("state.progress", description="Always `state.progress`.", examples=["state.progress"])
    num_tokens: int = Field(
        description="Tokens absorbed so far, those of a `state` that is continued included.", examples=[16384]
    )
    tokens_per_second: float = Field(description="Of the text, since its beginning.", examples=[20000.0])


class State(BaseModel):
    """A saved state."""

    id: str = Field(description="Names it in `state`.", examples=["state-5f0c6d6c0f5b4f6f8d6a3f6b"])
    object: str = Field("state", description="Always `state`.", examples=["state"])
    name: str | None = Field(description="Names it, too; null if it was given no name.", examples=["my-book"])
    num_tokens: int = Field(description="Tokens of its transcript: prompts and answers.", examples=[8])
    bytes: int = Field(
        description="What it takes, which forks share; 0 if it has to be computed again from its tokens.",
        examples=[1179648],
    )
    turn: str | None = Field(
        description="The role of the chat message within which its transcript ends, and behind which further messages "
        "come; null if it was not saved by a chat.",
        examples=["assistant"],
    )
    created: int = Field(description="Unix time in seconds.", examples=[1795570400])
    expires: int = Field(description="Unix time in seconds; from then on it is unknown.", examples=[1795656800])


class StateList(BaseModel):
    """The answer to `GET /v1/states`."""

    object: str = Field("list", description="Always `list`.", examples=["list"])
    data: list[State] = Field(description="The states saved with the request's API key, the oldest first.")


class StateDeleted(BaseModel):
    """The answer to `DELETE /v1/states/{state}`."""

    id: str = Field(description="The id of the state that is no more.", examples=["state-5f0c6d6c0f5b4f6f8d6a3f6b"])
    object: str = Field("state.deleted", description="Always `state.deleted`.", examples=["state.deleted"])
    deleted: bool = Field(True, description="Always true.", examples=[True])
