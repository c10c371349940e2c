"""From a request's JSON to a job that the engine cannot refuse, save for a full queue."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.api.schemas import (
    HARMLESS_FIELDS,
    NEUTRAL_STREAM_OPTIONS,
    NEUTRAL_VALUES,
    CompletionRequest,
)
from server.errors import InvalidRequestError, NotFoundError
from server.tokenizer import Tokenizer
from server.types import EngineInfo, SamplingParams

Schema = TypeVar("Schema", bound=BaseModel)

DEFAULT_MAX_TOKENS: Final = 16

_SAMPLING_FIELDS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
"""Fields whose default a checkpoint may set."""


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A valid completion request.

    Attributes:
        model: the served name to answer with.
        prompts: token ids; at least one each.
        echoed: the text that each choice of a prompt begins with; empty strings without ``echo``.
        n: choices per prompt.
        params: how all choices sample.
        stream: whether to answer with server-sent events.
        include_usage: whether the stream ends with the token counts.
        prompt_token_ids: whether choices carry their prompt's ids.
        token_ids: whether choices carry their own ids.
    """

    model: str
    prompts: list[list[int]]
    echoed: list[str]
    n: int
    params: SamplingParams
    stream: bool
    include_usage: bool
    prompt_token_ids: bool
    token_ids: bool

    @property
    def num_choices(self) -> int:
        """Choice ``i * n + j`` is the j-th answer to prompt i."""
        return len(self.prompts) * self.n


class CompletionValidator:
    """Turns request bodies into jobs. Safe to call from several threads.

    Args:
        names: the served model names.
        info: the engine's limits.
        tokenizer: None: only token ids are served.
    """

    def __init__(self, names: tuple[str, ...], info: EngineInfo, tokenizer: Tokenizer | None) -> None:
        self._names = names
        self._info = info
        self._tokenizer = tokenizer

    def job(self, body: dict[str, Any]) -> CompletionJob:
        """Check everything that can be known before the engine sees the request, and tokenize.

        Raises:
            InvalidRequestError: ``param`` names the field at fault.
            NotFoundError: no model of that name is served.
        """
        request = parse_request(body)
        model = served_name(request.model, self._names)
        n = request.n or 1
        num_prompts = len(request.prompt)
        self._check_combinations(request, n)
        self._check_room(num_prompts, n)
        params = self._params(request)
        prompts = self._token_ids(request.prompt)
        self._check_prompts(prompts)
        return CompletionJob(
            model=model,
            prompts=prompts,
            echoed=self._echoed(request.prompt) if request.echo else [""] * num_prompts,
            n=n,
            params=params,
            stream=bool(request.stream),
            include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
            prompt_token_ids=bool(request.return_token_ids),
            # Without a tokenizer the ids are the answer.
            token_ids=bool(request.return_token_ids) or self._tokenizer is None,
        )

    def _check_combinations(self, request: CompletionRequest, n: int) -> None:
        if request.best_of is not None and request.best_of != n:
            raise _invalid("best_of", f"must equal 'n' ({n}): choosing among more candidates is not supported")
        if request.stream_options is not None and not request.stream:
            raise _invalid("stream_options", "is only allowed together with 'stream'")
        if request.echo and request.logprobs is not None:
            raise _invalid("echo", "together with 'logprobs' is not supported yet")
        if self._tokenizer is None and request.echo:
            raise _invalid("echo", "is not possible: this server runs without a tokenizer")

    def _check_room(self, num_prompts: int, n: int) -> None:
        most = self._info.max_num_seqs + self._info.max_num_queued_reqs
        if num_prompts * n > most:
            param = "prompt" if num_prompts > most else "n"
            raise _invalid(param, f"asks for {num_prompts * n} choices; this server can never take more than {most}")

    def _params(self, request: CompletionRequest) -> SamplingParams:
        info = self._info
        sampling: dict[str, Any] = {}
        for name in _SAMPLING_FIELDS:
            value = getattr(request, name)
            if value is None:
                value = info.default_sampling.get(name)
            if value is not None:
                sampling[name] = value
        if not 0 < sampling.get("top_k", 0) < info.vocab_size:
            sampling["top_k"] = 0  # 0, -1 and the whole vocabulary are the same
        max_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise _invalid("min_tokens", f"must not exceed max_tokens ({max_tokens})")
        if request.logprobs is not None and request.logprobs > info.max_logprobs:
            raise _invalid("logprobs", f"must be at most {info.max_logprobs} (--max-logprobs)")
        stop = request.stop or ()
        if stop and self._tokenizer is None:
            raise _invalid("stop", "is not possible: this server runs without a tokenizer; use 'stop_token_ids'")
        stop_token_ids = request.stop_token_ids or ()
        check_vocabulary("stop_token_ids", stop_token_ids, self._info.vocab_size)
        logit_bias = request.logit_bias or {}
        check_vocabulary("logit_bias", logit_bias, self._info.vocab_size)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            logit_bias=logit_bias,
            seed=request.seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(request.ignore_eos),
            logprobs=request.logprobs,
            **sampling,
        )

    def _token_ids(self, prompt: list[str] | list[list[int]]) -> list[list[int]]:
        token_lists: list[list[int]] = []
        for item in prompt:
            if isinstance(item, list):
                token_lists.append(item)
            elif self._tokenizer is None:
                raise _invalid("prompt", "must be token ids: this server runs without a tokenizer")
            else:
                token_lists.append(self._tokenizer.encode(item))
        return token_lists

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        limit = self._info.max_model_len
        for token_ids in prompts:
            if not token_ids:
                raise _invalid("prompt", "holds a text without a single token")
            check_vocabulary("prompt", token_ids, self._info.vocab_size)
            if limit is not None and len(token_ids) >= limit:
                raise InvalidRequestError(
                    f"Invalid 'prompt': has {len(token_ids)} tokens; prompt and answer together may have "
                    f"{limit} (--max-model-len), and the answer needs at least one.",
                    param="prompt",
                    code="context_length_exceeded",
                )

    def _echoed(self, prompt: list[str] | list[list[int]]) -> list[str]:
        assert self._tokenizer is not None
        return [item if isinstance(item, str) else self._tokenizer.decode(item) for item in prompt]


def parse_request(body: dict[str, Any]) -> CompletionRequest:
    """Check a body against the schema, after taking out what may be ignored.

    Raises:
        InvalidRequestError: ``param`` names the field at fault.
    """
    body = {name: value for name, value in body.items() if name not in HARMLESS_FIELDS}
    _drop_neutral(body, NEUTRAL_VALUES)
    options = body.get("stream_options")
    if isinstance(options, dict):
        body["stream_options"] = options = dict(options)
        _drop_neutral(options, NEUTRAL_STREAM_OPTIONS, "stream_options.")
    return parse_as(CompletionRequest, body)


def parse_as(schema: type[Schema], body: dict[str, Any]) -> Schema:
    """Check a body against a schema.

    Raises:
        InvalidRequestError: ``param`` names the field at fault.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None


def served_name(name: str | None, names: tuple[str, ...]) -> str:
    """The name that a request means; not given: the first.

    Raises:
        NotFoundError: no model of that name is served.
    """
    if name is None:
        return names[0]
    if name not in names:
        served = ", ".join(map(repr, names))
        raise NotFoundError(
            f"The model {name!r} does not exist; this server has {served}.", param="model", code="model_not_found"
        )
    return name


def check_vocabulary(param: str, token_ids: "list[int] | tuple[int, ...] | Mapping[int, float]", size: int) -> None:
    """Raise InvalidRequestError for ``param`` unless all ids are in [0, size)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
        bad = next(token for token in token_ids if not 0 <= token < size)
        raise _invalid(param, f"holds the token id {_brief(bad)}; ids lie in 0..{size - 1}")


def _drop_neutral(fields: dict[str, Any], neutral: Mapping[str, tuple[object, ...]], prefix: str = "") -> None:
    for name in fields.keys() & neutral.keys():
        value = fields.pop(name)
        if value is not None and not any(_same(value, harmless) for harmless in neutral[name]):
            raise InvalidRequestError(f"'{prefix}{name}' is not supported by this server.", param=prefix + name)


def _same(value: object, neutral: object) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _explain(error: ErrorDetails) -> InvalidRequestError:
    param = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return InvalidRequestError(f"'{param}' is required.", param=param)
    if error["type"] == "extra_forbidden":
        return InvalidRequestError(f"Unknown field: '{param}'.", param=param)
    message = error["msg"].replace("Input should be", "must be")
    value = error["input"]
    if isinstance(value, str | int | float | bool):
        message += f", not {_brief(value)}"
    return _invalid(param, message)


def _brief(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _invalid(param: str, complaint: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{param}': {complaint}.", param=param)
