"""What ``gale bench`` does with its flags (:mod:`clients.bench.flags`)."""

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clients.bench.flags import SAMPLING
from clients.bench.load import Load, send
from clients.bench.metrics import figures
from clients.bench.protocol import Answer, Target
from clients.bench.report import print_results, write_report
from clients.bench.workload import (
    Conversation,
    Lengths,
    Ramp,
    arrivals,
    passages,
    random_conversations,
    shared_prefixes,
)
from clients.server import Server, ServerError, open_session

_RAMP = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
_READY_EVERY = 0.5
"""Seconds between looks at a server that is not ready."""


class UsageError(Exception):
    """Flags that cannot work; the message names them."""


def run(arguments: argparse.Namespace) -> int:
    """Measure and report.

    Returns:
        0; 1 if a server cannot be measured or no request of some run succeeded; 2 for flags that cannot work; 130 if
        it was interrupted, and whatever runs were complete are reported.
    """
    errors = Console(stderr=True)
    results: list[dict[str, Any]] = []
    code = 0
    try:
        _check(arguments)
        asyncio.run(_measure(arguments, errors, results))
    except UsageError as error:
        errors.print(f"gale bench: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except (ServerError, OSError, UnicodeDecodeError) as error:
        errors.print(f"gale bench: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        code = 130
        told = "the runs before this one are reported" if results else "nothing is reported"
        errors.print(f"gale bench: stopped; {told}", highlight=False)
    if results:
        _report(arguments, results)
    return code or int(not all(result["completed"] for result in results))


def _report(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    print_results(Console(), results, arguments.metric_percentiles, arguments.percentile_metrics)
    if arguments.output:
        content = results[0] if len(results) == 1 else results
        arguments.output.write_text(json.dumps(content) + "\n")
    if arguments.report:
        write_report(arguments.report, results, max(arguments.metric_percentiles))


def _check(arguments: argparse.Namespace) -> None:
    ramp = [getattr(arguments, name) for name in _RAMP]
    if any(ramp) and not all(ramp):
        raise UsageError("--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps go together")
    if arguments.ramp_up_strategy and arguments.request_rate != [float("inf")]:
        raise UsageError("--request-rate and --ramp-up-strategy exclude each other")
    if (arguments.dataset_name == "text") != (arguments.dataset_path is not None):
        raise UsageError("--dataset-name text and --dataset-path go together")
    if arguments.report:
        if arguments.report.suffix.lower() not in (".png", ".html"):
            raise UsageError(f"--report: write a .png or a .html file, not {arguments.report.name}")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError("--report needs matplotlib: pip install matplotlib") from None
    if "state" in arguments.history and arguments.dataset_name != "multi-turn":
        raise UsageError("--history state takes --dataset-name multi-turn: other conversations have one turn")
    for path in (arguments.output, arguments.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {path.absolute().parent} to write {path.name} to")


async def _measure(arguments: argparse.Namespace, console: Console, results: list[dict[str, Any]]) -> None:
    """Send everything; the results of every run are added when it is over."""
    headers = dict(arguments.header)
    if key := os.environ.get("OPENAI_API_KEY"):
        headers = {"Authorization": f"Bearer {key}"} | headers
    async with open_session(headers) as session:
        targets = [await _target(arguments, Server(session, url)) for url in arguments.compare or [arguments.base_url]]
        loads = [_load(arguments, number, *setting) for number, setting in enumerate(_settings(arguments))]
        requests = sum(len(conversation.turns) for load in loads for conversation in load.conversations)
        with _progress(console, requests * len(targets), hidden=arguments.disable_tqdm) as noticed:
            for load in loads:
                runs = await send(load, targets, noticed)
                limits, noted = dict(arguments.goodput), _noted(arguments)
                results += [
                    noted | figures(run, limits=limits, percentiles=arguments.metric_percentiles) for run in runs
                ]


def _noted(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result says of how it was made, as ``vllm bench serve`` names it; the figures name the rest."""
    noted = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": arguments.backend,
        "backend": arguments.backend,
        **dict(arguments.metadata),
        "burstiness": arguments.burstiness,
    }
    if arguments.ramp_up_strategy:
        noted |= {name: getattr(arguments, name) for name in _RAMP}
    return noted


async def _target(arguments: argparse.Namespace, server: Server) -> Target:
    """A server that answers, and has been warmed up."""
    deadline = time.monotonic() + arguments.ready_check_timeout_sec
    while True:
        try:
            model = arguments.model or await server.first_model()
            break
        except ServerError:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(_READY_EVERY)
    if "state" in arguments.history:
        await server.request("GET", "/v1/states")
    fields: dict[str, Any] = {"ignore_eos": True} if arguments.ignore_eos else {}
    for name in ("temperature", *SAMPLING):
        if (value := getattr(arguments, name)) is not None:
            fields[name] = value
    target = Target(server, model, arguments.backend, fields | arguments.extra_body)
    await _warm_up(target, arguments)
    return target


async def _warm_up(target: Target, arguments: argparse.Namespace) -> None:
    """Ask once or more; nothing that is sent later begins like it."""
    turn = _conversations(arguments, "warm-up")[0].turns[0]
    prompt = [{"role": "user", "content": str(turn.prompt)}] if arguments.backend == "openai-chat" else turn.prompt
    for _ in range(arguments.num_warmups):
        answer = await target.ask(prompt, turn.max_tokens)
        if not answer.ok:
            raise ServerError(f"{target.server.name} fails a first request: {answer.error}")


def _settings(arguments: argparse.Namespace) -> Iterator[tuple[float | Ramp, int | None, str]]:
    """Every rate with every limit on concurrency and every way to carry a conversation's history, one run each."""
    if arguments.ramp_up_strategy:
        rates: list[float | Ramp] = [
            Ramp(arguments.ramp_up_strategy, arguments.ramp_up_start_rps, arguments.ramp_up_end_rps)
        ]
    else:
        rates = arguments.request_rate
    for rate in rates:
        for most in arguments.max_concurrency:
            for history in arguments.history:
                yield rate, most, history


def _load(arguments: argparse.Namespace, number: int, rate: float | Ramp, most: int | None, history: str) -> Load:
    # Of its own, though drawn alike: a server that keeps prefixes would know those of the run before.
    conversations = _conversations(arguments, f"run {number}")
    moments = arrivals(random.Random(arguments.seed), len(conversations), rate, arguments.burstiness)
    named = None if isinstance(rate, Ramp) else rate
    return Load(conversations, moments, named, most, history, chat=arguments.backend == "openai-chat")


def _conversations(arguments: argparse.Namespace, purpose: str) -> list[Conversation]:
    rng = random.Random(f"{arguments.seed} {purpose}")
    number, ratio = arguments.num_prompts, arguments.random_range_ratio
    inputs, outputs = Lengths(arguments.random_input_len, ratio), Lengths(arguments.random_output_len, ratio)
    text = arguments.backend == "openai-chat"
    if arguments.dataset_name == "text":
        try:
            return passages(rng, number, arguments.dataset_path, inputs, outputs)
        except ValueError as error:
            raise UsageError(f"--dataset-path: {error}") from error
    if arguments.dataset_name == "prefix_repetition":
        prefixes, length = arguments.prefix_repetition_num_prefixes, arguments.prefix_repetition_prefix_len
        return shared_prefixes(rng, number, prefixes, length, inputs, outputs, text=text)
    turns = arguments.num_turns if arguments.dataset_name == "multi-turn" else 1
    return random_conversations(rng, number, inputs, outputs, turns=turns, text=text)


@dataclass(slots=True)
class _Counter:
    failed: int = 0
    tokens: int = 0


@contextmanager
def _progress(console: Console, requests: int, *, hidden: bool) -> Iterator[Callable[[Answer], None]]:
    """A bar on a terminal, nothing elsewhere; the value takes note of an answer."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    counter = _Counter()
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as progress:
        task = progress.add_task("requests", total=requests, note="")

        def noticed(answer: Answer) -> None:
            counter.failed += not answer.ok
            counter.tokens += answer.output_tokens
            elapsed = progress.tasks[0].elapsed or 1.0
            note = f"{counter.tokens / elapsed:,.0f} tokens/s"
            progress.update(task, advance=1, note=note + (f", {counter.failed} failed" if counter.failed else ""))

        yield noticed
