"""`POST /v1/chat/completions`."""

from typing import Annotated

from pydantic import BaseModel, Field

from server.api.schemas.base import Ignored, Unsupported
from server.api.schemas.conversation import ConversationFields, Message
from server.api.schemas.fields import MAX_COUNT
from server.api.schemas.generation import (
    Created,
    Fingerprint,
    FinishReason,
    GenerationFields,
    PromptLogprobs,
    SavedStates,
    ServedName,
    StopReason,
    TokenIds,
    Usage,
)


class ChatCompletionRequest(ConversationFields, GenerationFields):
    """The body of `POST /v1/chat/completions`. A field that is null counts as not given."""

    messages: list[Message] = Field(
        description="The conversation so far, oldest message first. Behind a `state` only what is new of it; empty: "
        "the text of the state goes on.",
        examples=[[{"role": "user", "content": "Tell me about the sea."}]],
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="Most tokens to generate per choice. Default: what `--max-model-len` leaves; without that limit, "
        "4096. 0, with `save_state` or `prompt_logprobs`, only reads the messages.",
        examples=[256],
    )
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="The older name of `max_completion_tokens`; of both only one may be given, or the same value.",
        examples=[256],
    )
    logprobs: bool | None = Field(
        None, description="Report the log-probability of every token. Default false.", examples=[True]
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        description="With `logprobs`: also report so many most likely tokens at each position, up to the server's "
        "`--max-logprobs`. Default 0.",
        examples=[3],
    )
    echo: bool | None = Field(
        None,
        description="With `continue_final_message`: begin each answer with the message it continues. Default false.",
        examples=[False],
    )

    prediction: Ignored = None

    audio: Annotated[object, Unsupported()] = None
    function_call: Annotated[object, Unsupported("none", "auto")] = None
    functions: Annotated[object, Unsupported([])] = None
    include_reasoning: Annotated[object, Unsupported(True)] = None
    modalities: Annotated[object, Unsupported(["text"])] = None
    moderation: Annotated[object, Unsupported()] = None
    parallel_tool_calls: Annotated[object, Unsupported(True, False)] = None
    reasoning_effort: Annotated[object, Unsupported(hint="; a template may take it by 'chat_template_kwargs'")] = None
    tool_choice: Annotated[object, Unsupported("none", "auto")] = None
    verbosity: Annotated[object, Unsupported("medium")] = None
    web_search_options: Annotated[object, Unsupported()] = None


class TokenLogprob(BaseModel):
    """A token and how likely it was."""

    token: str = Field(
        description="The token's text; `bytes:\\xe2\\x80` if it is none of its own, `token_id:7` on request.",
        examples=["sea"],
    )
    logprob: float = Field(
        description="Natural logarithm of its probability; -9999 stands for minus infinity.", examples=[-1.498]
    )
    bytes: list[int] | None = Field(description="The bytes it adds to the text; null if it adds none.", examples=[[10]])


class ChatLogprob(TokenLogprob):
    """A generated token and the most likely ones at its position."""

    top_logprobs: list[TokenLogprob] = Field(description="As many as `top_logprobs` asks for, the likeliest first.")


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatLogprob] = Field(description="One entry per token.")


class AnswerMessage(BaseModel):
    """What the model says."""

    role: str = Field(description="Who speaks: `assistant`, or whose message was continued.", examples=["assistant"])
    content: str = Field(description="The generated text.", examples=["The sea was calm."])


class ChatChoice(BaseModel):
    """One answer."""

    index: int = Field(description="Number of the choice, from 0.", examples=[0])
    message: AnswerMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason
    stop_reason: StopReason = None
    token_ids: TokenIds = None


class ChatCompletion(BaseModel):
    """The answer to `POST /v1/chat/completions`."""

    id: str = Field(description="The answer's id.", examples=["chatcmpl-5f0c6d6c0f5b4f6f8d6a3f6b1c0d9e8a"])
    object: str = Field(description="Always `chat.completion`.", examples=["chat.completion"])
    created: Created
    model: ServedName
    system_fingerprint: Fingerprint
    choices: list[ChatChoice] = Field(description="`n` answers.")
    usage: Usage = Field(description="Token counts.")
    state: SavedStates = None
    prompt_logprobs: PromptLogprobs = None
    prompt_token_ids: list[int] | None = Field(
        None, description="The prompt's token ids, if asked for.", examples=[[1, 366, 712, 435]]
    )


class DeltaMessage(BaseModel):
    """What is new of a message."""

    role: str | None = Field(None, description="In a choice's first chunk.", examples=["assistant"])
    content: str | None = Field(None, description="New text.", examples=[" calm"])


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int = Field(description="Number of the choice, from 0.", examples=[0])
    delta: DeltaMessage = Field(description="What is new.")
    logprobs: ChatLogprobs | None = Field(description="Of the new tokens, if asked for.")
    finish_reason: FinishReason
    stop_reason: StopReason = None
    token_ids: TokenIds = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed answer to `POST /v1/chat/completions`."""

    id: str = Field(description="The answer's id.", examples=["chatcmpl-5f0c6d6c0f5b4f6f8d6a3f6b1c0d9e8a"])
    object: str = Field(description="Always `chat.completion.chunk`.", examples=["chat.completion.chunk"])
    created: Created
    model: ServedName
    system_fingerprint: Fingerprint
    choices: list[ChatChunkChoice] = Field(description="One choice; none in the chunk that carries the final usage.")
    usage: Usage | None = Field(None, description="Token counts, if asked for; in the last chunk those of all choices.")
    state: SavedStates = None
    prompt_token_ids: list[int] | None = Field(
        None,
        description="The prompt's token ids, if asked for; in each choice's first chunk.",
        examples=[[1, 366, 712, 435]],
    )
