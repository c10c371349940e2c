"""The flags of ``gale bench``. They have the names that ``vllm bench serve`` gives them; nothing heavy is imported."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
"""Backend -> route."""
DATASETS = ("random", "prefix_repetition", "multi-turn", "text")
HISTORIES = ("resend", "state")
"""How a turn carries what was said before it."""
LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
"""vLLM's short names, and what they stand for. Milliseconds everywhere."""
SAMPLING = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
GOODPUT = ("ttft", "tpot", "e2el")
"""Latencies that a request has one of, so that it can meet a limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of the command."""
    target = parser.add_argument_group("server")
    target.add_argument("--base-url", metavar="URL", default="http://127.0.0.1:8000", help="[%(default)s]")
    target.add_argument(
        "--compare", metavar="URL", nargs=2, help="two servers in one run, which get every request in turn"
    )
    target.add_argument("--model", metavar="NAME", help="the name to send; default: what /v1/models lists first")
    target.add_argument("--backend", choices=list(ENDPOINTS), default="openai", help="completions or chat [openai]")
    target.add_argument(
        "--header", metavar="KEY=VALUE", nargs="+", action="extend", type=_pair, default=[], help="of every request"
    )
    target.add_argument(
        "--extra-body", metavar="JSON", type=_json_object, default={}, help="further fields of every request"
    )
    target.add_argument(
        "--ready-check-timeout-sec", metavar="S", type=_seconds, default=0.0, help="wait so long for the server [0]"
    )

    data = parser.add_argument_group("what is sent")
    data.add_argument("--dataset-name", choices=DATASETS, default="random", help="[random]")
    data.add_argument("--dataset-path", metavar="FILE", type=Path, help="of the dataset 'text'")
    data.add_argument("--num-prompts", metavar="N", type=_positive, default=200, help="conversations [200]")
    data.add_argument(
        "--random-input-len", "--input-len", metavar="N", type=_positive, default=512, help="tokens or words [512]"
    )
    data.add_argument("--random-output-len", "--output-len", metavar="N", type=_positive, default=128, help="[128]")
    data.add_argument(
        "--random-range-ratio", metavar="X", type=_share, default=0.0, help="lengths vary by this share [0]"
    )
    data.add_argument("--prefix-repetition-num-prefixes", metavar="N", type=_positive, default=10, help="[10]")
    data.add_argument("--prefix-repetition-prefix-len", metavar="N", type=_positive, default=1024, help="[1024]")
    data.add_argument("--num-turns", metavar="N", type=_positive, default=4, help="of 'multi-turn' [4]")
    data.add_argument(
        "--history",
        metavar="HOW[,HOW]",
        type=_histories,
        default=["resend"],
        help="'resend' all that was said with every turn, or go on from a saved 'state' (Gale) [resend]",
    )
    data.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="answers have their full length [yes]"
    )
    data.add_argument("--temperature", metavar="X", type=float, default=0.0, help="[0]")
    for name in SAMPLING:
        kind = int if name == "top_k" else float
        data.add_argument(f"--{name.replace('_', '-')}", metavar="N" if kind is int else "X", type=kind)
    data.add_argument("--seed", metavar="N", type=int, default=0, help="[0]")

    load = parser.add_argument_group("how fast")
    load.add_argument(
        "--request-rate", metavar="X[,X]", type=_rates, default=[float("inf")], help="per second [inf: all at once]"
    )
    load.add_argument("--burstiness", metavar="X", type=_above_zero, default=1.0, help="1: Poisson; less: bursts [1]")
    load.add_argument("--max-concurrency", metavar="N[,N]", type=_counts, default=[None], help="[no limit]")
    load.add_argument("--ramp-up-strategy", choices=["linear", "exponential"])
    load.add_argument("--ramp-up-start-rps", metavar="X", type=_above_zero)
    load.add_argument("--ramp-up-end-rps", metavar="X", type=_above_zero)
    load.add_argument("--num-warmups", metavar="N", type=int, default=1, help="requests beforehand [1]")

    out = parser.add_argument_group("what is reported")
    out.add_argument(
        "--goodput", metavar="NAME:MS", nargs="+", type=_limit, default=[], help="limits on ttft, tpot, e2el"
    )
    out.add_argument("--metric-percentiles", metavar="P[,P]", type=_percentiles, default=[90.0, 99.0], help="[90,99]")
    out.add_argument(
        "--percentile-metrics",
        metavar="NAME[,NAME]",
        type=_latencies,
        default=list(LATENCIES),
        help=f"latencies to show [{','.join(LATENCIES)}]",
    )
    out.add_argument(
        "--metadata",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        type=_pair,
        default=[],
        help="to be noted in --output",
    )
    out.add_argument("--output", metavar="FILE.json", type=Path, help="all figures; a list if there are several runs")
    out.add_argument("--report", metavar="FILE", type=Path, help="curves, as .png or .html; needs matplotlib")
    out.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _number(text: str, least: float, *, open_end: bool = False) -> float:
    value = float(text)
    if not value >= least or (open_end and value == least):
        raise argparse.ArgumentTypeError(f"must be {'above' if open_end else 'at least'} {least:g}")
    return value


def _positive(text: str) -> int:
    return int(_number(str(int(text)), 1))


def _above_zero(text: str) -> float:
    return _number(text, 0, open_end=True)


def _share(text: str) -> float:
    value = _number(text, 0)
    if value >= 1:
        raise argparse.ArgumentTypeError("must be below 1")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0)


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found or not key.strip():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()


def _names(text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
    return names


def _histories(text: str) -> list[str]:
    return _names(text, HISTORIES)


def _latencies(text: str) -> list[str]:
    return _names(text, LATENCIES)


def _rates(text: str) -> list[float]:
    return [_above_zero(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _percentiles(text: str) -> list[float]:
    values = [_number(part, 0) for part in text.split(",")]
    if max(values) > 100:
        raise argparse.ArgumentTypeError("must be at most 100")
    return values


def _limit(text: str) -> tuple[str, float]:
    name, _, milliseconds = text.partition(":")
    if name not in GOODPUT or not milliseconds:
        raise argparse.ArgumentTypeError(f"expected NAME:MILLISECONDS with a name of {', '.join(GOODPUT)}")
    return name, _number(milliseconds, 0)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value
