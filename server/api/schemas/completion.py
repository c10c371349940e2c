"""`POST /v1/completions`."""

from typing import Annotated

from pydantic import BaseModel, Field

from server.api.schemas.base import Unsupported
from server.api.schemas.fields import MAX_COUNT, Prompt
from server.api.schemas.generation import GenerationFields, Usage


class CompletionRequest(GenerationFields):
    """The body of `POST /v1/completions`. A field that is null counts as not given."""

    prompt: Prompt = Field(
        description="A text, a list of texts, a list of token ids, or a list of such lists. None may be empty. Texts "
        "get the tokenizer's special tokens (such as beginning of sequence), token ids are taken as they are.",
        examples=["The old man looked at the sea and"],
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="Most tokens to generate per choice. Default 16.", examples=[64]
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Report the log-probability of every token, and of so many most likely alternatives at its "
        "position, up to the server's `--max-logprobs`.",
    )
    best_of: int | None = Field(
        None, ge=1, description="Only the value of `n` is accepted: all candidates are returned."
    )
    echo: bool | None = Field(
        None, description="Begin each choice's text with its prompt. Not together with `logprobs` yet."
    )

    prompt_embeds: Annotated[object, Unsupported()] = None
    suffix: Annotated[object, Unsupported("")] = None


class Logprobs(BaseModel):
    """Log-probabilities (natural logarithm) of a choice's tokens; the lists are parallel.

    A token whose bytes are no UTF-8 text of their own is written as `bytes:\\xe2\\x80`.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="The most likely tokens at each position, and the sampled one."
    )
    text_offset: list[int] = Field(description="Where each token begins, in characters of the choice's text.")


class Choice(BaseModel):
    """One generated text, or a piece of it in a stream."""

    index: int = Field(description="`prompt number * n + number of the answer to it`.")
    text: str
    logprobs: Logprobs | None = Field(description="If asked for.")
    finish_reason: str | None = Field(
        description="`stop`: end of sequence, stop string or stop token. `length`: max_tokens or the model's limit. "
        "`abort`: the request's own constraints left no token to go on with. null: a piece of a stream with "
        "more to come.",
        examples=["stop", "length"],
    )
    stop_reason: int | str | None = Field(None, description="The stop string or stop token id that ended the choice.")
    token_ids: list[int] | None = Field(None, description="The generated token ids, if asked for.")
    prompt_token_ids: list[int] | None = Field(None, description="The prompt's token ids, if asked for.")


class Completion(BaseModel):
    """The answer to `POST /v1/completions`, and the form of each chunk of a stream."""

    id: str = Field(examples=["cmpl-5f0c6d6c0f5b4f6f8d6a3f6b1c0d9e8a"])
    object: str = Field("text_completion", examples=["text_completion"])
    created: int = Field(description="Unix time in seconds.")
    model: str
    choices: list[Choice]
    usage: Usage | None = None
