"""Results for people: a table in the terminal, curves of latency against throughput as PNG or HTML."""

import base64
import html
import io
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from clients.bench.flags import LATENCIES

Result = dict[str, Any]
"""What :func:`clients.bench.metrics.figures` returns."""
_COUNTS = (
    ("Requests completed", "completed", "{:,.0f}"),
    ("Requests failed", "failed", "{:,.0f}"),
    ("Duration, s", "duration", "{:,.2f}"),
    ("Input tokens", "total_input_tokens", "{:,.0f}"),
    ("  of these cached", "total_cached_tokens", "{:,.0f}"),
    ("Output tokens", "total_output_tokens", "{:,.0f}"),
    ("Requests/s", "request_throughput", "{:,.2f}"),
    ("Goodput, requests/s", "request_goodput", "{:,.2f}"),
    ("Output tokens/s", "output_throughput", "{:,.1f}"),
    ("Input and output tokens/s", "total_token_throughput", "{:,.1f}"),
    ("Output tokens in the fullest second", "max_output_tokens_per_s", "{:,.0f}"),
    ("Most requests at once", "max_concurrent_requests", "{:,.0f}"),
)
_RATES = ("throughput", "goodput", "_per_s")
"""Ends of the names of counts whose ratio says which server is faster."""
_TITLE_WIDTH, _COLUMN_WIDTH, _RATIO_WIDTH = 36, 17, 10
_SHOWN_ERRORS = 3
_SHOWN_TURNS = 8


def label(result: Result) -> str:
    """What tells a run from the others: its rate and its limit on concurrency."""
    rate, most = result["request_rate"], result["max_concurrency"]
    parts = (
        []
        if rate == "inf" and most
        else ["ramp" if rate is None else "all at once" if rate == "inf" else f"{rate:g}/s"]
    )
    parts += [f"{most} concurrent"] if most else []
    return ", ".join([*parts, *_history(result)])


def _history(result: Result) -> list[str]:
    """How turns carried what was said before, where there were any."""
    several = any(result["turns"])
    return [{"resend": "history resent", "state": "by state"}[result["history"]]] if several else []


def print_results(
    console: Console, results: Sequence[Result], percentiles: Sequence[float], metrics: Sequence[str]
) -> None:
    """A column per run, behind the second of two servers one of ratios, in as many tables as the console's width takes.

    What went wrong comes last.

    Args:
        console: where to.
        results: of every run; those of two servers alternate.
        percentiles: of the latencies, in percent.
        metrics: the latencies to show, of :data:`clients.bench.flags.LATENCIES`.
    """
    paired = len({result["backend_server"] for result in results}) > 1
    width = 2 * _COLUMN_WIDTH + _RATIO_WIDTH if paired else _COLUMN_WIDTH
    fitting = max(1, (console.width - _TITLE_WIDTH) // width) * (2 if paired else 1)
    for first in range(0, len(results), fitting):
        table = _Table(results[first : first + fitting], named=paired or len(results) == 1, paired=paired)
        console.print(table.filled(percentiles, metrics))
    for result in results:
        errors = Counter(error for error in result["errors"] if error)
        for error, times in errors.most_common(_SHOWN_ERRORS):
            console.print(f"{times} x failed: {error}", style="red", markup=False, highlight=False)
        if len(errors) > _SHOWN_ERRORS:
            console.print(
                f"and {len(errors) - _SHOWN_ERRORS} other kinds of failure; --output has them all", style="red"
            )


class _Table:
    """A table of some runs.

    Args:
        results: of the runs.
        named: whether columns name their servers.
        paired: whether every second column is of the second server, and followed by ratios.
    """

    def __init__(self, results: Sequence[Result], *, named: bool, paired: bool) -> None:
        self._results = results
        self._paired = paired
        self._table = Table(
            title=f"{results[0]['model_id']}", title_justify="left", header_style="bold", box=rich.box.SIMPLE_HEAD
        )
        self._table.add_column("", width=_TITLE_WIDTH - 6)
        for index, result in enumerate(results):
            server = f"{result['backend_server']}\n" if named else ""
            heading = label(result).replace(", ", "\n")
            self._table.add_column(f"{server}{heading}", justify="right", overflow="fold")
            if self._paired and index % 2:
                self._table.add_column("second\nto first", justify="right", style="dim")

    def filled(self, percentiles: Sequence[float], metrics: Sequence[str]) -> Table:
        """With all its rows."""
        for title, name, form in _COUNTS:
            if any(result[name] is not None for result in self._results):
                self._row(title, [result[name] for result in self._results], form, compared=name.endswith(_RATES))
        kinds = [("mean", "mean"), ("median", "median"), *((f"p{p:g}", f"p{p:g}") for p in percentiles if p != 50)]
        for name in metrics:
            self._begin(LATENCIES[name])
            for heading, kind in kinds:
                self._row(f"  {heading}", [result[f"{kind}_{name}_ms"] for result in self._results])
        found = [turn_medians(result) for result in self._results]
        turns = max(map(len, found))
        if turns > 1:
            self._begin("Median time to first token by turn")
            for turn in sorted({round(step * (turns - 1) / (_SHOWN_TURNS - 1)) for step in range(_SHOWN_TURNS)}):
                self._row(f"  {turn + 1}", [own[turn] if turn < len(own) else None for own in found])
        return self._table

    def _begin(self, title: str) -> None:
        self._table.add_section()
        self._table.add_row(f"[bold]{title}[/bold], ms")

    def _row(self, title: str, values: Sequence[float | None], form: str = "{:,.2f}", *, compared: bool = True) -> None:
        cells = []
        for index, value in enumerate(values):
            cells.append("" if value is None else form.format(value))
            if self._paired and index % 2:
                first = values[index - 1]
                cells.append(f"{value / first:.2f}x" if compared and first and value is not None else "")
        self._table.add_row(title, *cells)


def turn_medians(result: Result) -> list[float]:
    """The median time to the first token of every turn, ms, over the requests that succeeded."""
    values: dict[int, list[float]] = {}
    for turn, seconds, error in zip(result["turns"], result["ttfts"], result["errors"], strict=True):
        if not error:
            values.setdefault(turn, []).append(seconds * 1e3)
    return [statistics.median(values[turn]) for turn in sorted(values)]


def write_report(path: Path, results: Sequence[Result], percentile: float) -> None:
    """Draw the results to a ``.png``, or to a ``.html`` page that needs no other file.

    Args:
        path: of the file.
        results: of every run.
        percentile: shown beside the medians, one of those that the results have.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    high = f"p{percentile:g}"
    image = _draw(results, high)
    if path.suffix.lower() != ".html":
        path.write_bytes(image)
        return
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(str(cell))}</td>"
            for cell in (
                result["backend_server"],
                label(result),
                f"{result['completed']:,} of {result['num_prompts']:,}",
                f"{result['output_throughput']:,.1f}",
                *(f"{result[f'{kind}_{name}_ms']:,.1f}" for name in LATENCIES for kind in ("median", high)),
            )
        )
        + "</tr>"
        for result in results
    )
    heads = ["server", "load", "completed", "output tokens/s"]
    heads += [f"{name.upper()} {kind}, ms" for name in LATENCIES for kind in ("median", high)]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>gale bench</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
        "img{max-width:100%}table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}"
        f"</style><h1>{html.escape(str(results[0]['model_id']))}</h1>"
        f'<img alt="Latency against throughput" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table></html>"
    )
    path.write_text(page, encoding="utf-8")


def _draw(results: Sequence[Result], high: str) -> bytes:
    """Latencies against throughput with a curve per server; for a single run, how each latency is distributed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    servers: dict[str, list[Result]] = {}
    for result in results:
        servers.setdefault(", ".join([result["backend_server"], *_history(result)]), []).append(result)
    curves = max(map(len, servers.values())) > 1
    for panel, (name, title) in zip(panels, LATENCIES.items(), strict=True):
        for index, (server, own) in enumerate(servers.items()):
            color = f"C{index}"
            if curves:
                ordered = sorted(own, key=lambda result: float(result["output_throughput"]))
                rates = [result["output_throughput"] for result in ordered]
                for kind, style in (("median", "-"), (high, "--")):
                    values = [result[f"{kind}_{name}_ms"] for result in ordered]
                    panel.plot(rates, values, style, marker="o", color=color, label=f"{server}, {kind}")
            else:
                values = _sorted_latencies(own[0], name)
                shares = [(place + 1) / len(values) * 100 for place in range(len(values))]
                panel.plot(values, shares, color=color, label=server)
        panel.set_title(title, loc="left")
        panel.set_xlabel("output tokens/s" if curves else "ms")
        panel.set_ylabel("ms" if curves else "% of all at most so long")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _sorted_latencies(result: Result, name: str) -> list[float]:
    ok = [index for index, error in enumerate(result["errors"]) if not error]
    if name == "ttft":
        values = [result["ttfts"][index] for index in ok]
    elif name == "e2el":
        values = [result["latencies"][index] for index in ok]
    elif name == "itl":
        values = [gap for index in ok for gap in result["itls"][index]]
    else:
        values = [
            (result["latencies"][index] - result["ttfts"][index]) / (result["output_lens"][index] - 1)
            for index in ok
            if result["output_lens"][index] > 1
        ]
    return sorted(value * 1e3 for value in values)
