"""Draws what the benches wrote with ``--json``, as PNGs beside the files.

    python -m tests.bench.plot kernels.json engine.json http.json

Several files of one bench become one picture beside the first: of the kernels, for further shapes; of the engine, for
further types of states, which join the panel of decode.

Needs matplotlib (``pip install -c constraints.txt '.[bench]'``).
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

matplotlib.use("Agg")

_OURS = ("#0b4f9e", "#2f86d6", "#6cb4ee", "#a7d3f5")
_PEERS = {"fla": "#d9601a", "FlashAttention-2": "#2a8a57", "cuDNN attention": "#7d55b0"}
_TEXT = "#222222"
_STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
}
Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a bench's report as a PNG."""
    panels = {"kernels": _kernels, "engine": _engine, "http": _http}[report["bench"]](report)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * columns, 4.1 * lines + 0.7), layout="constrained", dpi=130)
        for number, panel in enumerate(panels, 1):
            panel(figure.add_subplot(lines, columns, number))
        env = report["environment"]
        versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton", "fla-core") if name in env)
        figure.suptitle(f"{env['device']} · {versions} · {env['date']}", fontsize=9, color="#555555", x=0.01, ha="left")
        figure.savefig(path)


def _kernels(report: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    rows: Sequence[Row] = report["rows"]
    panels: list[Callable[[Axes], None]] = []
    for shape in _distinct(rows, "shape"):
        panels.append(lambda axes, shape=shape: _decode_panel(axes, _select(rows, op="decode", shape=shape), shape))
    for shape in _distinct(rows, "shape"):
        chosen = _select(rows, op="prefill", shape=shape, spans=1)
        if len(_distinct(chosen, "length")) > 1:
            panels.append(lambda axes, chosen=chosen, shape=shape: _prefill_panel(axes, chosen, shape))
    for shape in _distinct(_select(rows, op="context"), "shape"):
        panels.append(lambda axes, shape=shape: _context_panel(axes, _select(rows, op="context", shape=shape), shape))
    return panels


def _decode_panel(axes: Axes, rows: Sequence[Row], shape: str) -> None:
    scaled = [dict(row, each=row["us"] / row["batch"]) for row in rows]
    floors = {
        name: [(row["batch"], row["floor us"] / row["batch"]) for row in _select(scaled, implementation=name)]
        for name in _distinct([row for row in rows if row.get("floor us")], "implementation")
    }
    _lines(axes, scaled, "batch", "each", floors)
    axes.set(title=f"Decode kernel, {shape}", xlabel="batch", ylabel="µs per sequence and layer")


def _prefill_panel(axes: Axes, rows: Sequence[Row], shape: str) -> None:
    ours = rows[0]["implementation"]
    floor = [(row["length"], row["floor us"] * 1e3 / row["length"]) for row in _select(rows, implementation=ours)]
    _lines(axes, rows, "length", "ns/token", {ours: sorted(floor)})
    axes.set(title=f"Prefill kernel, {shape}, one prompt", xlabel="tokens", ylabel="ns per token and layer")


def _context_panel(axes: Axes, rows: Sequence[Row], shape: str) -> None:
    _lines(axes, rows, "context", "us")
    title = f"One more token after a context, {shape}, batch {rows[0]['batch']}"
    axes.set(title=title, xlabel="tokens of context", ylabel="µs per step and layer")


def _engine(report: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    rows: Sequence[Row] = report["rows"]
    setting = report["setting"]
    panels: list[Callable[[Axes], None]] = []
    if decode := _select(rows, op="decode"):

        def decode_panel(axes: Axes) -> None:
            _lines(axes, decode, "batch", "tokens/s")
            title = f"Decode: {setting['model']}, {setting['dtype']} weights"
            axes.set(title=title, xlabel="sequences", ylabel="tokens per second")

        panels.append(decode_panel)

    def curve(op: str, key: str, value: str, title: str, xlabel: str, ylabel: str) -> None:
        # The first context is measured again at the end, to see whether the machine has changed.
        chosen = _select(rows, op=op, implementation=f"gale {setting['state dtype']}")
        points = list({row[key]: (row[key], row[value]) for row in reversed(chosen)}.values())[::-1]

        def panel(axes: Axes) -> None:
            _curve(axes, points, _OURS[0])
            for x, y in points:
                axes.annotate(_short(y), (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
            _axes(axes, [x for x, _ in points], bottom=0)
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)

        if points:
            panels.append(panel)

    curve("prefill", "length", "tokens/s", "Prefill by prompt length", "tokens of a prompt", "tokens per second")
    curve("context", "context", "ms median", "A token after a context", "tokens of context", "ms per token")
    if mixed := _select(rows, op="mixed", implementation=f"gale {setting['state dtype']}"):
        panels.append(lambda axes: _mixed_panel(axes, mixed))
    return panels


def _mixed_panel(axes: Axes, rows: Sequence[Row]) -> None:
    bars = {"quiet, median": "quiet ms", "loaded, median": "ms median", "loaded, p99": "ms p99"}
    for index, (label, key) in enumerate(bars.items()):
        places = [place + (index - 1) * 0.26 for place in range(len(rows))]
        drawn = axes.bar(places, [row[key] for row in rows], 0.24, label=label, color=_OURS[2 - index])
        axes.bar_label(drawn, [f"{row[key]:.1f}" for row in rows], fontsize=8, padding=2)
    axes.set_xticks(range(len(rows)), [f"{row['running']} running" for row in rows])
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left")
    axes.set(xlim=(-0.7, len(rows) - 0.3), ylim=(0, axes.get_ylim()[1] * 1.2))
    axes.set(title="Running requests while 8k prompts arrive", ylabel="ms between tokens")


def _http(report: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    panels: list[Callable[[Axes], None]] = [lambda axes: _streams_panel(axes, report)]
    if report.get("starts"):
        panels.append(lambda axes: _starts_panel(axes, report))
    return panels


def _streams_panel(axes: Axes, report: Mapping[str, Any]) -> None:
    rows = report["rows"]
    for index, (label, key) in enumerate({"bare engine": "bare engine tokens/s", "over HTTP": "tokens/s"}.items()):
        places = [place + (index - 0.5) * 0.4 for place in range(len(rows))]
        values = [row.get(key) or 0.0 for row in rows]
        drawn = axes.bar(places, values, 0.38, label=label, color=_OURS[2 - 2 * index])
        axes.bar_label(drawn, [_short(value) if value else "" for value in values], fontsize=9, padding=2)
    axes.set_xticks(range(len(rows)), [f"{row['streams']} streams" for row in rows])
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", ncols=2)
    axes.set(xlim=(-0.7, len(rows) - 0.3), ylim=(0, axes.get_ylim()[1] * 1.12))
    count = report.get("api_server_count")
    title = f"Throughput, {count} API process{'es' * (count > 1)}" if count else "Throughput"
    axes.set(title=title, ylabel="tokens per second")


def _starts_panel(axes: Axes, report: Mapping[str, Any]) -> None:
    labels = {"cold": "nothing compiled yet", "warm": "kernels compiled before"}
    values = [report["starts"][key] for key in labels]
    drawn = axes.barh(range(2), values, 0.5, color=_OURS[0])
    axes.bar_label(drawn, [f"{value:.1f} s" for value in values], padding=4)
    axes.set_yticks(range(2), list(labels.values()))
    axes.grid(axis="y", visible=False)
    axes.set(title="From process start to the first token", xlabel="seconds", xlim=(0, max(values) * 1.2))


def _lines(axes: Axes, rows: Sequence[Row], x: str, y: str, floors: Mapping[str, Points] | None = None) -> None:
    """One curve for each implementation, its name at its end; its floor, where it has one, dashed in its color."""
    ours = iter(_OURS)
    ends: list[tuple[float, str, str]] = []
    for name in _distinct(rows, "implementation"):
        points = sorted((row[x], row[y]) for row in _select(rows, implementation=name) if row[y])
        color = _PEERS.get(name) or next(ours)
        if points:
            _curve(axes, points, color)
            ends.append((points[-1][1], name, color))
        if floors and name in floors:
            axes.plot(*zip(*floors[name], strict=True), color=color, linestyle=(0, (4, 3)), linewidth=1.1)
    if floors:
        axes.text(0.98, 0.96, "dashed: floor", transform=axes.transAxes, color="#666666", fontsize=8, ha="right")
    axes.set_yscale("log")
    _axes(axes, sorted({row[x] for row in rows}))
    _label_ends(axes, ends)


def _curve(axes: Axes, points: Points, color: str) -> None:
    axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.8)


def _label_ends(axes: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Names right of the last points, moved apart where they would touch."""
    height = 0.06
    transform = axes.transData + axes.transAxes.inverted()
    right = max(line.get_xdata()[-1] for line in axes.lines)
    labels = sorted(ends)
    places = [transform.transform((right, y))[1] for y, _, _ in labels]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + height)
    ceiling = 1.0
    for index in reversed(range(len(places))):
        places[index] = ceiling = min(places[index], ceiling)
        ceiling -= height
    for place, (_, name, color) in zip(places, labels, strict=True):
        axes.text(1.02, place, name, transform=axes.transAxes, color=color, fontsize=9, va="center")


def _axes(axes: Axes, values: Sequence[float], *, bottom: float | None = None) -> None:
    """A logarithmic x axis with a tick at each of a few values, and numbers that are read at a glance."""
    axes.set_xscale("log")
    ticks = sorted(set(values))
    axes.set_xticks(ticks[:: -(-len(ticks) // 6)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log" and high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_ylim(low if bottom is None else bottom, high * 1.08)


def _short(value: float) -> str:
    """1500 as 1.5k; powers of two from 2048 on in units of 1024, as such sizes are named."""
    whole = int(value)
    if value == whole and whole >= 1024 and whole & (whole - 1) == 0:
        return f"{whole >> 20}M" if whole >= 1 << 20 else f"{whole >> 10}k"
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _distinct(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="FILE.json")
    pictures: dict[str, tuple[dict[str, Any], Path]] = {}
    for path in parser.parse_args().reports:
        report = json.loads(path.read_text())
        if report["bench"] in pictures:
            pictures[report["bench"]][0]["rows"] += report["rows"]
        else:
            pictures[report["bench"]] = report, path.with_suffix(".png")
    for report, path in pictures.values():
        draw(report, path)
        print(path)


if __name__ == "__main__":
    main()
