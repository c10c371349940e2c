"""What every way of generating text has in common: how to sample, how to answer."""

from typing import Annotated

from pydantic import BaseModel, Field

from server.api.schemas.base import Body, Ignored, ModelName, Unsupported
from server.api.schemas.fields import (
    INT64_MAX,
    INT64_MIN,
    MAX_BAD_WORDS,
    MAX_COUNT,
    MAX_PROMPT_LOGPROBS,
    MAX_STATE_TTL,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    AllowedTokenIds,
    BadWords,
    CheckpointAt,
    LogitBias,
    RequestId,
    SaveState,
    Stop,
    StopTokenIds,
)
from server.api.schemas.structured import StructureFields


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = Field(
        None,
        description="End the stream with a chunk that has empty `choices` and the `usage` of the whole request.",
        examples=[True],
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Add to every chunk the token counts of its choice so far. Default false.", examples=[True]
    )
    include_obfuscation: Annotated[object, Unsupported(False)] = None


class GenerationFields(StructureFields):
    """The fields that completions and chat completions share."""

    model: ModelName = None
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="No stop string, stop token or end of sequence ends a choice before so many tokens. Default 0.",
        examples=[4],
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Divides the logits; 0 (or below 0.00001) always takes the most likely token. Default: what the "
        "model's generation_config.json says, else 1.",
        examples=[0.8],
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Sample from the smallest set of most likely tokens whose probabilities add up to this. Default: "
        "the model's, else 1.",
        examples=[0.95],
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="Sample from so many most likely tokens; 0 or -1: all. Default: the model's, else all.",
        examples=[40],
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Leave out tokens less likely than this share of the most likely one's probability. Default: the "
        "model's, else 0.",
        examples=[0.05],
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="Subtracted from the logits of tokens generated already.",
        examples=[0.5],
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="Subtracted from a token's logit for every time it was generated already.",
        examples=[0.5],
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=100,
        allow_inf_nan=False,
        description="Above 1 makes tokens of the prompt and of the text so far less likely: positive logits are "
        "divided by it, negative ones multiplied. Default: the model's, else 1.",
        examples=[1.1],
    )
    logit_bias: LogitBias = Field(
        None,
        description="Added to the logits of tokens, by token id; values between -100 and 100.",
        examples=[{"42": -100}],
    )
    allowed_token_ids: AllowedTokenIds = Field(
        None,
        description="No token but these is generated; a text ends by itself only if an end-of-sequence token is among "
        "them.",
        examples=[[65, 66, 67]],
    )
    bad_words: BadWords = Field(
        None,
        description=f"Up to {MAX_BAD_WORDS} texts that are not generated, with or without a space before them, in the "
        "tokens that the tokenizer makes of them. The same text in other tokens may still come.",
        examples=[["Ahab", "white whale"]],
    )
    seed: int | None = Field(
        None,
        ge=INT64_MIN,
        le=INT64_MAX,
        description="The same seed gives the same choices, whatever else is running.",
        examples=[7],
    )
    stop: Stop = Field(
        None,
        description=f"Up to {MAX_STOP_STRINGS} strings that end a choice; the text returned ends before the string, "
        "unless `include_stop_str_in_output` is set.",
        examples=[["\n\n"]],
    )
    stop_token_ids: StopTokenIds = Field(
        None,
        description=f"Up to {MAX_STOP_TOKEN_IDS} token ids that end a choice; their text is not returned.",
        examples=[[2]],
    )
    include_stop_str_in_output: bool | None = Field(
        None,
        description="End the text with the stop string, or the stop token's text, that ended it. Default false.",
        examples=[True],
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens such as `</s>` out of the text. Default true.", examples=[False]
    )
    ignore_eos: bool | None = Field(
        None, description="Go on after an end-of-sequence token. Default false.", examples=[True]
    )
    n: int | None = Field(None, ge=1, description="Choices per prompt. Default 1.", examples=[2])
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        description="Add `prompt_logprobs` to the answer: of every token of the prompt the log-probability and rank, "
        "and so many most likely alternatives, up to the server's `--max-logprobs`. Not in a stream. Together with "
        f"those of an echoed prompt, at most {MAX_PROMPT_LOGPROBS:,} log-probabilities per answer.",
        examples=[1],
    )
    stream: bool | None = Field(
        None, description="Answer with server-sent events, ended by `data: [DONE]`.", examples=[True]
    )
    stream_options: StreamOptions | None = Field(None, description="Only together with `stream`.")
    return_token_ids: bool | None = Field(
        None, description="Add `prompt_token_ids` and `token_ids` to the answer. Default false.", examples=[True]
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Write tokens in log-probabilities as `token_id:7`. Default false.", examples=[True]
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer's special tokens (such as beginning of sequence) are added to a text. "
        "Default: true for completions; false for chats, whose template writes them.",
        examples=[True],
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=MAX_COUNT,
        description="Keep only so many tokens of the prompt's end; -1: as many as `--max-model-len` leaves beside the "
        "answer. Default: all of them.",
        examples=[1000],
    )
    request_id: RequestId = Field(
        None,
        description="Becomes a part of the answer's id, unless the header `X-Request-Id` says otherwise: up to 128 "
        "letters, digits and characters of `._~:/+=@-`. Default: a random one.",
        examples=["my-request-1"],
    )

    checkpoint_at: CheckpointAt = Field(
        None,
        description="Up to 64 positions in the prompt, in tokens from its beginning, at which its state is parked for "
        "later prompts that begin alike, beside those where it is parked anyway. Changes nothing in the answer.",
        examples=[[4]],
    )
    state: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Id or name of a saved state: the prompt, or the messages, are what comes after it, and may be "
        "empty.",
        examples=["my-book"],
    )
    save_state: SaveState = Field(
        None,
        description="true, or a name: save the state at the end of every choice, for later requests to go on from; the "
        "answer's `state` tells its id. A name is taken over from the state that had it, which is deleted. "
        "Default false.",
        examples=["my-book"],
    )
    state_ttl: int | None = Field(
        None,
        ge=1,
        le=MAX_STATE_TTL,
        description="Seconds for which the state is saved, together with `save_state`. Default 86400.",
        examples=[3600],
    )
    priority: int | None = Field(
        None,
        ge=INT64_MIN,
        le=INT64_MAX,
        description="Requests of lower values get slots, and have their prompts read, before those of higher ones, "
        "among requests with the same API key's name. Where no slot is free, one that runs with a higher value waits "
        "meanwhile, and goes on later. Default 0.",
        examples=[-1],
    )

    user: Ignored = None
    metadata: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    cache_salt: Annotated[object, Unsupported()] = None
    detokenize: Annotated[object, Unsupported(True)] = None
    early_stopping: Annotated[object, Unsupported(False)] = None
    kv_transfer_params: Annotated[object, Unsupported()] = None
    length_penalty: Annotated[object, Unsupported(1.0)] = None
    logits_processors: Annotated[object, Unsupported([])] = None
    spaces_between_special_tokens: Annotated[object, Unsupported(True, False)] = None
    typical_p: Annotated[object, Unsupported(1.0)] = None
    use_beam_search: Annotated[object, Unsupported(False)] = None


class SavedState(BaseModel):
    """A state that was saved."""

    id: str = Field(description="For `state`.", examples=["state-5f0c6d6c0f5b4f6f8d6a3f6b"])
    num_tokens: int = Field(description="Tokens of its transcript: the context and the answer.", examples=[8])
    bytes: int = Field(
        description="What it takes on the server; 0 if it has to be computed again from its tokens.", examples=[1179648]
    )


SavedStates = Annotated[
    SavedState | list[SavedState | None] | None,
    Field(
        description="With `save_state`, what was saved; a list, one for each choice, if there are several. In a "
        "stream, in the chunk that ends the choice."
    ),
]


class PromptTokensDetails(BaseModel):
    """Where the prompts' tokens came from."""

    cached_tokens: int = Field(description="Prompt tokens that had been read for an earlier request.", examples=[0])


class Usage(BaseModel):
    """Token counts of the whole request."""

    prompt_tokens: int = Field(
        description="Tokens of all prompts; each counts once, however many choices it has.", examples=[4]
    )
    completion_tokens: int = Field(
        description="Tokens generated for all choices, candidates of `best_of` included.", examples=[2]
    )
    total_tokens: int = Field(description="Both.", examples=[6])
    prompt_tokens_details: PromptTokensDetails | None = Field(None, description="More about the prompts' tokens.")


FinishReason = Annotated[
    str | None,
    Field(
        description="`stop`: end of sequence, stop string or stop token. `length`: the most tokens asked for, or the "
        "model's limit. `abort`: the request's own constraints left no token to go on with. null: a piece of a stream "
        "with more to come.",
        examples=["stop", "length"],
    ),
]
StopReason = Annotated[
    int | str | None, Field(description="The stop string or stop token id that ended the choice.", examples=["\n\n"])
]
TokenIds = Annotated[
    list[int] | None, Field(description="The generated token ids, if asked for.", examples=[[320, 261]])
]
Created = Annotated[int, Field(description="Unix time in seconds.", examples=[1795572236])]
ServedName = Annotated[str, Field(description="The served name that answers.", examples=["classics-11m"])]
Fingerprint = Annotated[
    str,
    Field(
        description="Names the checkpoint, the version of Gale and the data types: while it stays the same, so do the "
        "answers to requests with a seed.",
        examples=["fp_5f0c6d6c0f5b"],
    ),
]


class PromptToken(BaseModel):
    """What is known of a token at a position of the prompt."""

    logprob: float = Field(description="Natural logarithm of its probability there.", examples=[-1.498])
    rank: int = Field(description="How many tokens were at least as likely, itself included.", examples=[1])
    decoded_token: str | None = Field(description="Its text; null without a tokenizer.", examples=[" man"])


PromptLogprobs = Annotated[
    list[dict[str, PromptToken] | None] | None,
    Field(
        description="If asked for, of each token of the prompt: the token itself, and the most likely ones, by token "
        "id; null for the first, which nothing predicts."
    ),
]
