"""`POST /tokenize` and `POST /detokenize`."""

from pydantic import BaseModel, Field

from server.api.schemas.base import Body, ModelName


class TokenizeRequest(Body):
    """The body of `POST /tokenize`. A field that is null counts as not given."""

    model: ModelName = None
    prompt: str = Field(description="The text; it may be empty.", examples=["The old man looked at the sea and"])
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer's special tokens (such as beginning of sequence) are added, as they are to "
        "the prompt of a completion. Default true.",
    )
    return_token_strs: bool | None = Field(None, description="Also return the text of every token. Default false.")


class Tokenization(BaseModel):
    """The answer to `POST /tokenize`."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int | None = Field(description="Most tokens of prompt and answer together; null: no limit.")
    tokens: list[int] = Field(description="Token ids.")
    token_strs: list[str] | None = Field(
        description="What each token adds to the text, as in log-probabilities: bytes that are no whole characters as "
        "`bytes:\\xe2\\x80`; nothing for special tokens. Null if not asked for."
    )


class DetokenizeRequest(Body):
    """The body of `POST /detokenize`. A field that is null counts as not given."""

    model: ModelName = None
    tokens: list[int] = Field(description="Token ids, in the vocabulary.", examples=[[1, 321, 4000]])


class Detokenization(BaseModel):
    """The answer to `POST /detokenize`."""

    prompt: str = Field(description="The text, without special tokens; bytes that are not UTF-8 become U+FFFD.")
