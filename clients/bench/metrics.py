"""From answers to figures, under the names that ``vllm bench serve`` gives them."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from clients.bench.flags import LATENCIES
from clients.bench.protocol import Answer


@dataclass(frozen=True, slots=True)
class Run:
    """All answers of one load on one server.

    Attributes:
        server: host and port.
        model: the name sent.
        rate: requests per second, infinite for all at once; None: a ramp.
        concurrency: most requests at once; None: no limit.
        history: how turns carry what was said before, of :data:`clients.bench.flags.HISTORIES`.
        answers: of all requests, in the order of sending.
        seconds: from the start to the last answer.
    """

    server: str
    model: str
    rate: float | None
    concurrency: int | None
    history: str
    answers: Sequence[Answer]
    seconds: float


def percentile(ordered: Sequence[float], share: float) -> float:
    """By linear interpolation between neighbours; ``share`` in percent; 0 of nothing."""
    if not ordered:
        return 0.0
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def latencies(answers: Iterable[Answer]) -> dict[str, list[float]]:
    """Milliseconds of every latency, ascending, over the answers that succeeded."""
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for answer in answers:
        if answer.ok:
            for name, value in _of_one(answer).items():
                values[name].append(value)
            values["itl"] += [gap * 1e3 for gap in answer.gaps]
    return {name: sorted(found) for name, found in values.items()}


def _of_one(answer: Answer) -> dict[str, float]:
    first = answer.first or answer.ended
    found = {"ttft": (first - answer.sent) * 1e3, "e2el": (answer.ended - answer.sent) * 1e3}
    if answer.output_tokens > 1:
        found["tpot"] = (answer.ended - first) * 1e3 / (answer.output_tokens - 1)
    return found


def good(answer: Answer, limits: dict[str, float]) -> bool:
    """Whether an answer came whole and within every limit, in milliseconds."""
    found = _of_one(answer)
    return answer.ok and all(found.get(name, 0.0) <= limit for name, limit in limits.items())


def figures(run: Run, *, limits: dict[str, float], percentiles: Sequence[float]) -> dict[str, Any]:
    """The run's result: ``vllm bench serve``'s fields, then the raw values per request.

    Args:
        run: what was measured.
        limits: of goodput, milliseconds by name; empty: goodput is null.
        percentiles: of the latencies, in percent.
    """
    succeeded = [answer for answer in run.answers if answer.ok]
    inputs, outputs = sum(a.prompt_tokens for a in succeeded), sum(a.output_tokens for a in succeeded)
    seconds = run.seconds
    result: dict[str, Any] = {
        "backend_server": run.server,
        "model_id": run.model,
        "request_rate": "inf" if run.rate == float("inf") else run.rate,
        "max_concurrency": run.concurrency,
        "history": run.history,
        "num_prompts": len(run.answers),
        "duration": seconds,
        "completed": len(succeeded),
        "failed": len(run.answers) - len(succeeded),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_cached_tokens": sum(a.cached_tokens for a in succeeded),
        "request_throughput": len(succeeded) / seconds,
        "request_goodput": sum(good(a, limits) for a in run.answers) / seconds if limits else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": _most_in_a_second(succeeded),
        "max_concurrent_requests": _most_at_once(succeeded),
    }
    for name, ordered in latencies(run.answers).items():
        result[f"mean_{name}_ms"] = statistics.fmean(ordered) if ordered else 0.0
        result[f"median_{name}_ms"] = percentile(ordered, 50)
        result[f"std_{name}_ms"] = statistics.pstdev(ordered) if ordered else 0.0
        for share in percentiles:
            result[f"p{share:g}_{name}_ms"] = percentile(ordered, share)
    return result | {
        "input_lens": [a.prompt_tokens for a in run.answers],
        "output_lens": [a.output_tokens for a in run.answers],
        "cached_lens": [a.cached_tokens for a in run.answers],
        "turns": [a.turn for a in run.answers],
        "start_times": [a.sent for a in run.answers],
        "ttfts": [(a.first or a.ended) - a.sent for a in run.answers],
        "itls": [a.gaps for a in run.answers],
        "latencies": [a.ended - a.sent for a in run.answers],
        "queue_times": [a.waited for a in run.answers],
        "errors": [a.error for a in run.answers],
    }


def _most_in_a_second(answers: Sequence[Answer]) -> float:
    """Tokens that arrived in the fullest second, counted from the first request; a chunk's are its share of all."""
    start = min((answer.sent for answer in answers), default=0.0)
    tokens: dict[int, float] = {}
    for answer in answers:
        moments = accumulate(answer.gaps, initial=answer.first or answer.ended)
        share = answer.output_tokens / (1 + len(answer.gaps))
        for moment in moments:
            second = int(moment - start)
            tokens[second] = tokens.get(second, 0.0) + share
    return max(tokens.values(), default=0.0)


def _most_at_once(answers: Iterable[Answer]) -> int:
    changes = sorted([(a.sent, 1) for a in answers] + [(a.ended, -1) for a in answers])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
