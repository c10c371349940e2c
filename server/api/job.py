"""A checked request, ready for the engine."""

from dataclasses import dataclass

from server.types import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A valid request for text, whichever route it came by.

    Attributes:
        model: the served name to answer with.
        prompts: token ids; at least one each.
        echoed: the text that each choice of a prompt begins with; empty strings without ``echo``.
        n: choices per prompt.
        candidates: answers to generate per prompt, of which the n best are returned.
        priority: lower values are served first, among requests of one tenant.
        state: id or name of the saved state that the prompts continue; they may then be empty.
        save_state: whether to save the choices' states.
        state_name: of the state to be saved.
        state_ttl: seconds for which it is kept; None: as the engine likes.
        state_turn: the role of the chat message within which the saved transcripts end; None: of none.
        checkpoint_at: positions at which the prompts' states are parked.
        params: how all choices sample.
        stream: whether to answer with server-sent events.
        include_usage: whether the stream ends with the token counts.
        continuous_usage: whether every chunk carries its choice's token counts.
        prompt_token_ids: whether the answer carries the prompts' ids.
        token_ids: whether choices carry their own ids.
        tokens_as_ids: whether log-probabilities name tokens by their ids.
        request_id: what the client calls the request.
        role: who speaks in a chat's answer.
        logprobs: alternatives to report per token; None: choices carry no log-probabilities.
        echoes_logprobs: whether these begin with those of the echoed prompt.
        prompt_logprobs: alternatives to report per token of the prompt, apart from these; None: not wanted.
    """

    model: str
    prompts: list[list[int]]
    echoed: list[str]
    n: int
    candidates: int
    priority: int
    checkpoint_at: tuple[int, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    continuous_usage: bool
    prompt_token_ids: bool
    token_ids: bool
    tokens_as_ids: bool
    request_id: str | None
    role: str
    logprobs: int | None
    echoes_logprobs: bool = False
    prompt_logprobs: int | None = None
    state: str | None = None
    save_state: bool = False
    state_name: str | None = None
    state_ttl: int | None = None
    state_turn: str | None = None

    @property
    def num_choices(self) -> int:
        """Choice ``i * n + j`` is the j-th answer to prompt i."""
        return len(self.prompts) * self.n
