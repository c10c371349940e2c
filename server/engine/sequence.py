"""One choice of one request on its way through the engine."""

from array import array
from dataclasses import dataclass, field

from server.engine.detokenizer import StopMatcher
from server.types import FinishReason, SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt, what has been generated after it, and where its state stands.

    The transcript is ``prompt + outputs``. ``num_launched`` counts the transcript's tokens that
    launched steps absorb into the state; the newest sampled token is in the transcript before it
    is absorbed. With a step in flight, ``num_sampled`` runs ahead of ``len(outputs)``.
    """

    client: bytes
    request_id: int
    choice: int
    prompt: "array[int]"
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int | None
    """Most tokens to sample, the model length limit considered."""
    matcher: StopMatcher | None
    arrived: float
    priority: int = 0
    """Lower values are served first."""

    slot: int | None = None
    num_launched: int = 0
    num_folded: int = 0
    """Of these, the tokens that the state itself has absorbed; the others wait in its ring."""
    num_sampled: int = 0
    """Samplings launched."""
    in_flight: int = 0
    """Launched steps not yet retired that refer to this sequence's slot."""
    outputs: list[int] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.RUNNING
    admitted: float = 0.0
    first_token: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the terminal event has been produced."""
        return self.finish_reason is not FinishReason.RUNNING

    @property
    def prompt_remaining(self) -> int:
        """Prompt tokens not yet given to a launched step."""
        return max(0, len(self.prompt) - self.num_launched)
