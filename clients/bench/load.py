"""Sending a workload to one server, or to two in turn, and collecting the answers."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clients.bench.metrics import Run
from clients.bench.protocol import Answer, Target
from clients.bench.workload import Conversation, Prompt
from clients.server import FAILURES, ServerError

_STATE_SECONDS = 3600
"""After which a state is forgotten that a run, having been killed, has left behind."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a workload is sent.

    Attributes:
        conversations: in the order of sending.
        moments: seconds from the start at which each begins.
        rate: requests per second, as the figures name it; None: a ramp.
        concurrency: most requests at once, over all servers; None: no limit.
        history: how a turn carries what was said before: "resend" all of it, or go on from a "state".
        chat: whether turns are messages.
    """

    conversations: Sequence[Conversation]
    moments: Sequence[float]
    rate: float | None
    concurrency: int | None
    history: str
    chat: bool


async def send(load: Load, targets: Sequence[Target], noticed: Callable[[Answer], None]) -> list[Run]:
    """Send everything to every server; with several, they take turns conversation by conversation.

    So two servers are compared under the same load at the same time: each gets every conversation, and the order in
    which they get it alternates.

    Args:
        load: what, and when. With several servers a conversation's moments are each server's own.
        targets: at least one.
        noticed: called with each answer as it ends.
    """
    places = asyncio.Semaphore(load.concurrency) if load.concurrency else contextlib.nullcontext()
    start = time.perf_counter()

    async def talk(target: Target, conversation: Conversation) -> list[Answer]:
        asked = time.perf_counter()
        async with places:
            answers = await _converse(target, conversation, load, noticed)
        answers[0].waited = answers[0].sent - asked
        return answers

    tasks: list[list[asyncio.Task[list[Answer]]]] = [[] for _ in targets]
    async with asyncio.TaskGroup() as group:
        for number, (conversation, moment) in enumerate(zip(load.conversations, load.moments, strict=True)):
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            order = [(number + offset) % len(targets) for offset in range(len(targets))]
            for index in order:
                tasks[index].append(group.create_task(talk(targets[index], conversation)))
    runs = []
    for target, own in zip(targets, tasks, strict=True):
        answers = [answer for task in own for answer in task.result()]
        seconds = max((answer.ended for answer in answers), default=start) - start
        name, model = target.server.name, target.model
        runs.append(Run(name, model, load.rate, load.concurrency, load.history, answers, seconds))
    return runs


async def _converse(
    target: Target, conversation: Conversation, load: Load, noticed: Callable[[Answer], None]
) -> list[Answer]:
    """All turns; one that fails ends the conversation."""
    if load.history == "resend":
        return await _turns(target, conversation, load, noticed, state=None)
    state = f"bench-{uuid.uuid4().hex}"
    try:
        return await _turns(target, conversation, load, noticed, state=state)
    finally:
        # Also where the run is stopped: what it leaves would take room from the next.
        with contextlib.suppress(ServerError, *FAILURES):
            await target.server.request("DELETE", f"/v1/states/{state}")


async def _turns(
    target: Target, conversation: Conversation, load: Load, noticed: Callable[[Answer], None], *, state: str | None
) -> list[Answer]:
    transcript = _Transcript(load)
    last = len(conversation.turns) - 1
    answers: list[Answer] = []
    for number, turn in enumerate(conversation.turns):
        fields: dict[str, Any] = {}
        if state and number > 0:
            fields["state"] = state
        if state and number < last:
            # A name is the newest state's that is given it: the server keeps one for each conversation.
            fields |= {"save_state": state, "state_ttl": _STATE_SECONDS}
        answer = await target.ask(transcript.ask(turn.prompt), turn.max_tokens, fields)
        answer.turn = number
        if "save_state" in fields and answer.ok and not answer.saved:
            answer.error = "the server saves no state: --history state takes Gale"
        transcript.answer(answer.text)
        answers.append(answer)
        noticed(answer)
        if not answer.ok:
            break
    return answers


class _Transcript:
    """What the requests of a conversation carry: all of it, or behind a state only what is new."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._messages: list[dict[str, str]] = []
        self._text: Prompt = ""
        self._begun = False

    def ask(self, prompt: Prompt) -> Prompt | list[dict[str, str]]:
        """The prompt or the messages of the next request."""
        if self._load.chat:
            self._messages.append({"role": "user", "content": str(prompt)})
            return list(self._messages)
        # Conversations of several turns are text.
        self._text = f"{self._text} {prompt}" if self._begun else prompt
        self._begun = True
        return self._text

    def answer(self, text: str) -> None:
        """Note what came."""
        if self._load.history == "state":
            self._messages, self._text = [], ""
        elif self._load.chat:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._text = f"{self._text}{text}"
