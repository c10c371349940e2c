"""`POST /v1/completions`."""

from typing import Annotated

from pydantic import BaseModel, Field

from server.api.schemas.base import Unsupported
from server.api.schemas.fields import MAX_COUNT, Prompt
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


class CompletionRequest(GenerationFields):
    """The body of `POST /v1/completions`. A field that is null counts as not given."""

    prompt: Prompt = Field(
        description="A text, a list of texts, a list of token ids, or a list of such lists. None may be empty, unless "
        "a `state` is continued. Texts get the tokenizer's special tokens (such as beginning of sequence), save behind "
        "a `state`; token ids are taken as they are.",
        examples=["The old man looked at the sea and"],
    )
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="Most tokens to generate per choice. 0, together with `echo` or `prompt_logprobs`, only reads the "
        "prompt. Default 16.",
        examples=[64],
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Report the log-probability of every token, and of so many most likely alternatives at its "
        "position, up to the server's `--max-logprobs`. With `echo`, of the prompt's tokens too; the first has null.",
        examples=[5],
    )
    best_of: int | None = Field(
        None,
        ge=1,
        description="Generate so many candidates per prompt, and return the `n` with the highest log-probability per "
        "token, the best first. Usage counts all of them. Above `n` not in a stream. Default: `n`.",
        examples=[4],
    )
    echo: bool | None = Field(
        None, description="Begin each choice's text with its prompt. Default false.", examples=[True]
    )

    prompt_embeds: Annotated[object, Unsupported()] = None
    suffix: Annotated[object, Unsupported("", hint="; a text is continued at its end only")] = None


class Logprobs(BaseModel):
    """Log-probabilities (natural logarithm) of a choice's tokens; the lists are parallel.

    A token whose bytes are no UTF-8 text of their own is written as `bytes:\\xe2\\x80`.
    """

    tokens: list[str] = Field(
        description="The tokens' texts, those of an echoed prompt first.", examples=[[" was", " a"]]
    )
    token_logprobs: list[float | None] = Field(
        description="Their log-probabilities; -9999 stands for minus infinity, null for the first token of a prompt, "
        "which nothing predicts.",
        examples=[[-1.9862, -2.6516]],
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The most likely tokens at each position, and the one that stands there.",
        examples=[[{" was": -1.9862}, {" a": -2.6516}]],
    )
    text_offset: list[int] = Field(
        description="Where each token begins, in characters of the choice's text.", examples=[[11, 15]]
    )


class Choice(BaseModel):
    """One generated text, or a piece of it in a stream."""

    index: int = Field(description="`prompt number * n + number of the answer to it`.", examples=[0])
    text: str = Field(description="The generated text, with `echo` behind its prompt.", examples=[" the sea."])
    logprobs: Logprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason
    stop_reason: StopReason = None
    prompt_logprobs: PromptLogprobs = None
    token_ids: TokenIds = None
    prompt_token_ids: list[int] | None = Field(
        None, description="The prompt's token ids, if asked for.", examples=[[1, 366, 712, 435]]
    )


class Completion(BaseModel):
    """The answer to `POST /v1/completions`, and the form of each chunk of a stream."""

    id: str = Field(description="The answer's id.", examples=["cmpl-5f0c6d6c0f5b4f6f8d6a3f6b1c0d9e8a"])
    object: str = Field(description="Always `text_completion`.", examples=["text_completion"])
    created: Created
    model: ServedName
    system_fingerprint: Fingerprint
    choices: list[Choice] = Field(
        description="`n` for each prompt. In a chunk one, and none in that with the final usage."
    )
    usage: Usage | None = Field(None, description="Token counts; in a stream only if asked for.")
    state: SavedStates = None
