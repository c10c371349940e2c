"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`."""

from pydantic import BaseModel, Field

from server.api.schemas.base import Body, ModelName
from server.api.schemas.conversation import ConversationFields


class TokenizeRequest(Body):
    """The body of `POST /tokenize`. A field that is null counts as not given."""

    model: ModelName = None
    prompt: str = Field(description="The text; it may be empty.", examples=["The old man looked at the sea and"])
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer's special tokens (such as beginning of sequence) are added, as they are to "
        "the prompt of a completion. Default true.",
        examples=[True],
    )
    return_token_strs: bool | None = Field(
        None, description="Also return the text of every token. Default false.", examples=[True]
    )


class TokenizeChatRequest(ConversationFields):
    """The body of `POST /tokenize` for a conversation. A field that is null counts as not given."""

    model: ModelName = None
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer adds its special tokens to those that the template writes. Default false.",
        examples=[True],
    )
    return_token_strs: bool | None = Field(
        None, description="Also return the text of every token. Default false.", examples=[True]
    )


class Tokenization(BaseModel):
    """The answer to `POST /tokenize`."""

    count: int = Field(description="Number of tokens.", examples=[4])
    max_model_len: int | None = Field(
        description="Most tokens of prompt and answer together; null: no limit.", examples=[4096]
    )
    tokens: list[int] = Field(description="Token ids.", examples=[[1, 366, 712, 435]])
    token_strs: list[str] | None = Field(
        description="What each token adds to the text, as in log-probabilities: bytes that are no whole characters as "
        "`bytes:\\xe2\\x80`; special tokens by name. Null if not asked for.",
        examples=[["", " The", " old", " man"]],
    )


class DetokenizeRequest(Body):
    """The body of `POST /detokenize`. A field that is null counts as not given."""

    model: ModelName = None
    tokens: list[int] = Field(description="Token ids, in the vocabulary.", examples=[[1, 321, 4000]])


class Detokenization(BaseModel):
    """The answer to `POST /detokenize`."""

    prompt: str = Field(
        description="The text, without special tokens; bytes that are not UTF-8 become U+FFFD.",
        examples=["The old man"],
    )


class AddedTokenInfo(BaseModel):
    """A token outside the trained vocabulary."""

    content: str = Field(description="Its text.", examples=["<|im_end|>"])
    special: bool = Field(description="Whether it is no part of texts.", examples=[True])
    lstrip: bool = Field(description="Whether it swallows white space before it.", examples=[False])
    rstrip: bool = Field(description="Whether it swallows white space behind it.", examples=[False])
    single_word: bool = Field(description="Whether it is found only as a word of its own.", examples=[False])
    normalized: bool = Field(description="Whether it is looked for in the normalized text.", examples=[False])


class TokenizerInfo(BaseModel):
    """The answer to `GET /tokenizer_info`."""

    tokenizer_class: str = Field(
        description="The class that `tokenizer_config.json` names; else Gale's own.", examples=["LlamaTokenizer"]
    )
    vocab_size: int = Field(description="Ids lie below; the model's vocabulary may be larger.", examples=[8192])
    max_model_len: int | None = Field(
        description="Most tokens of prompt and answer together; null: no limit.", examples=[4096]
    )
    bos_token: str | None = Field(description="The token that begins a text.", examples=["<s>"])
    bos_token_id: int | None = Field(description="Its id.", examples=[1])
    eos_token: str | None = Field(description="The token that ends a text.", examples=["</s>"])
    eos_token_id: int | None = Field(description="Its id.", examples=[2])
    unk_token: str | None = Field(description="The token of what has none.", examples=["<unk>"])
    pad_token: str | None = Field(description="The token of empty places in training.", examples=["<pad>"])
    added_tokens_decoder: dict[str, AddedTokenInfo] = Field(
        description="The tokens that the configuration files add to the vocabulary, by id."
    )
    chat_template: str | None = Field(
        description="The Jinja template of chat completions, if there is one.",
        examples=["{% for m in messages %}{{ m.content }}{% endfor %}"],
    )
