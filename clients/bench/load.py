"""Sending a workload to one server, or to two in turn, and collecting the answers."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clients.bench.metrics import Run
from clients.bench.protocol import Answer, Target
from clients.bench.workload import Conversation, Prompt


@dataclass(frozen=True, slots=True)
class Load:
    """How a workload is sent.

    Attributes:
        conversations: in the order of sending.
        moments: seconds from the start at which each begins.
        rate: requests per second, as the figures name it; None: a ramp.
        concurrency: most requests at once, over all servers; None: no limit.
        chat: whether turns are messages.
    """

    conversations: Sequence[Conversation]
    moments: Sequence[float]
    rate: float | None
    concurrency: int | None
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
            answers = await _converse(target, conversation, noticed, chat=load.chat)
        answers[0].waited = answers[0].sent - asked
        return answers

    tasks: list[list[asyncio.Task[list[Answer]]]] = [[] for _ in targets]
    for number, (conversation, moment) in enumerate(zip(load.conversations, load.moments, strict=True)):
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        order = [(number + offset) % len(targets) for offset in range(len(targets))]
        for index in order:
            tasks[index].append(asyncio.create_task(talk(targets[index], conversation)))
    runs = []
    for target, own in zip(targets, tasks, strict=True):
        answers = [answer for answers in await asyncio.gather(*own) for answer in answers]
        seconds = max((answer.ended for answer in answers), default=start) - start
        runs.append(Run(target.server.name, target.model, load.rate, load.concurrency, answers, seconds))
    return runs


async def _converse(
    target: Target, conversation: Conversation, noticed: Callable[[Answer], None], *, chat: bool
) -> list[Answer]:
    """All turns, each with the whole history before it; a turn that fails ends the conversation."""
    answers: list[Answer] = []
    messages: list[dict[str, str]] = []
    text: Prompt = ""
    for number, turn in enumerate(conversation.turns):
        if chat:
            messages.append({"role": "user", "content": str(turn.prompt)})
            answer = await target.ask(messages, turn.max_tokens)
            messages.append({"role": "assistant", "content": answer.text})
        else:
            text = f"{text} {turn.prompt}" if number else turn.prompt
            answer = await target.ask(text, turn.max_tokens)
            text = f"{text}{answer.text}"
        answers.append(answer)
        noticed(answer)
        if not answer.ok:
            break
    return answers
