"""What a soak has shown: windows, thirds, and the checks that it must pass."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.ops.soak.traffic import Record
from tests.ops.soak.watch import GAUGES, Sample

GROWTH_BYTES = 24 << 20
GROWTH_SHARE = 0.02
"""By so much, whichever is more, the median of a process's memory may be larger in the last third than in the second:
the first third fills caches. Over half an hour that is 144 MiB an hour; a request that leaves 1 kB behind would be
seen after 24,000."""
MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Check:
    """Something that has to hold.

    Attributes:
        name: what.
        passed: whether it does.
        detail: the figures.
    """

    name: str
    passed: bool
    detail: str


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are at most; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def merge(records: Iterable[Record]) -> Record:
    whole = Record()
    for record in records:
        whole.outcomes += record.outcomes
        whole.kinds += record.kinds
        whole.statuses += record.statuses
        whole.first += record.first
        whole.gaps += record.gaps
        whole.lag += record.lag
    return whole


def thirds(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    cut = len(items) // 3
    return items[:cut], items[cut : len(items) - cut], items[len(items) - cut :]


def latencies(record: Record) -> dict[str, float]:
    """Percentiles, in milliseconds."""
    named = {"ttft": record.first, "gap": record.gaps, "client_lag": record.lag}
    return {
        f"{name}_p{percent}_ms": round(percentile(values, percent / 100) * 1000, 2)
        for name, values in named.items()
        for percent in ((50, 99) if name != "client_lag" else (99,))
    }


def window_row(number: int, record: Record, samples: Sequence[Sample]) -> dict[str, Any]:
    """One line of the report: a window of the load, and the last look within it."""
    last = samples[-1]
    return {
        "window": number,
        "requests": record.outcomes.total(),
        **{name: record.outcomes[name] for name in ("answered", "refused", "left", "wrong")},
        "5xx": sum(count for status, count in record.statuses.items() if status >= 500),
        **latencies(record),
        "slots_used": last.metrics.get("gale_slots_used", 0.0),
        "parked": {
            tier: last.metrics.get(f"gale_states_parked,tier={tier}", 0.0) for tier in ("device", "host", "disk")
        },
        "mib": {name: round(size / MIB, 1) for name, size in last.bytes.items()},
    }


def growth(samples: Sequence[Sample]) -> dict[str, tuple[float, float, float]]:
    """By process: its memory in the second third and in the last, medians, and what the last third's slope comes to in
    an hour; MiB. The slope is the median of those between samples half of the third apart (Theil and Sen's estimate,
    thinned)."""
    _, middle, last = thirds(samples)
    found = {}
    for name in sorted({name for sample in (*middle, *last) for name in sample.bytes}):
        sizes = [median(sample.bytes.get(name, 0) / MIB for sample in part) for part in (middle, last)]
        pairs = list(zip(last, last[len(last) // 2 :], strict=False))
        slopes = [
            (b.bytes.get(name, 0) - a.bytes.get(name, 0)) / MIB / (b.seconds - a.seconds) * 3600
            for a, b in pairs
            if b.seconds > a.seconds
        ]
        found[name] = (sizes[0], sizes[1], median(slopes) if slopes else 0.0)
    return found


def checks(
    records: Sequence[Record],
    samples: Sequence[Sample],
    idle: tuple[Sample, Sample],
    choices: Counter[str],
    cached: int,
    states_left: int,
    p99_factor: float,
) -> list[Check]:
    """Everything that has to hold.

    Args:
        records: of the windows.
        samples: taken under load.
        idle: before the load and after it.
        choices: answered in full, and those that perhaps were, of clients that hung up for instance.
        cached: prompt tokens that came from parked states.
        states_left: saved states after all that clients saved was deleted or had expired.
        p99_factor: by which the 99th percentiles of the last third may exceed those of the first.
    """
    whole = merge(records)
    before, after = idle
    counted = {name: value - before.metrics.get(name, 0.0) for name, value in after.metrics.items()}

    def ended(*reasons: str) -> int:
        return int(sum(counted.get(f"gale_requests_finished_total,reason={reason}", 0.0) for reason in reasons))

    def served(test: str) -> int:
        names = (name for name in counted if name.startswith("gale_http_requests_total") and test in name)
        return int(sum(counted[name] for name in names))

    found = [
        Check(
            "every request has one answer, and the right one",
            whole.outcomes["wrong"] == 0 and whole.outcomes["answered"] > 0,
            f"{dict(whole.outcomes)}",
        ),
        Check("no status of 5xx, as clients and as the server count", served("status=5") == 0, f"{served('status=5')}"),
        Check(
            "the engine ended as many choices as were asked for",
            choices["answered"] <= ended("stop", "length") <= choices["answered"] + choices["perhaps"],
            f"{choices['answered']} answered, {choices['perhaps']} perhaps; "
            f"{ended('stop', 'length')} ended, {ended('cancelled')} cancelled",
        ),
        Check(
            "every choice that was accepted has ended once",
            counted["gale_requests_accepted_total"] == ended("stop", "length", "cancelled", "error", "abort"),
            f"{counted['gale_requests_accepted_total']:g} accepted",
        ),
        Check("no choice failed", ended("error", "abort") == 0, f"{ended('error', 'abort')}"),
        Check("no engine died", counted["gale_engine_deaths_total"] == 0, f"{counted['gale_engine_deaths_total']:g}"),
        Check("parked states were used", cached > 0, f"{cached} tokens"),
        Check("no saved state is left", states_left == 0, f"{states_left}"),
        Check(
            "idle again: " + ", ".join(GAUGES),
            all(counted[name] == 0 for name in GAUGES),
            ", ".join(f"{after.metrics[name]:g}" for name in GAUGES),
        ),
    ]
    first, _, last = (latencies(merge(part)) for part in thirds(records))
    for name in ("ttft_p99_ms", "gap_p99_ms"):
        passed = 0 < last[name] <= p99_factor * first[name]
        detail = f"first third {first[name]:g}, last third {last[name]:g}, at most {p99_factor:g} times"
        found.append(Check(f"{name} is stable", passed, detail))
    for name, (middle, end, slope) in growth(samples).items():
        bound = max(GROWTH_BYTES / MIB, GROWTH_SHARE * middle)
        detail = f"MiB: second third {middle:.1f}, last third {end:.1f}, at most {bound:.0f} more; {slope:+.1f} an hour"
        found.append(Check(f"memory of {name} is flat", end - middle <= bound, detail))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    about = report["about"]
    lines = [f"# Soak: {about['minutes']:g} minutes of {about['model']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| holds | | figures |", "| --- | --- | --- |"]
    lines += [f"| {'yes' if c['passed'] else '**NO**'} | {c['name']} | {c['detail']} |" for c in report["checks"]]
    names = list(report["windows"][0]["mib"])
    head = ["window", "requests", "wrong", "5xx", "ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms"]
    head += ["client_lag_p99_ms", "slots_used"]
    titles = [*head, "parked", *(f"{name} MiB" for name in names)]
    lines += ["", "| " + " | ".join(titles) + " |", "| ---: " * len(titles) + "|"]
    for row in report["windows"]:
        cells = [f"{row[name]:g}" for name in head] + [f"{sum(row['parked'].values()):g}"]
        cells += [f"{row['mib'].get(name, 0):.0f}" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    if report["wrong"]:
        lines += ["", "Wrong answers, the first of them:", "", *(f"- {one}" for one in report["wrong"])]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Latencies and memory over time, as a PNG; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    latency, memory, slots = figure.subplots(3, 1, sharex=True)
    minutes = [row["window"] * report["about"]["window seconds"] / 60 for row in report["windows"]]
    for name in ("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms"):
        latency.plot(minutes, [row[name] for row in report["windows"]], label=name.removesuffix("_ms"))
    latency.set(ylabel="ms", yscale="log")
    times = [sample["seconds"] / 60 for sample in report["samples"]]
    for name in report["windows"][0]["mib"]:
        sizes = [sample["mib"].get(name, 0.0) for sample in report["samples"]]
        base = sizes[len(sizes) // 3]
        memory.plot(times, [size - base for size in sizes], label=f"{name} ({base:.0f})")
    memory.set(ylabel="MiB against a third of the way")
    for name in ("gale_slots_used", "gale_requests_waiting"):
        slots.plot(times, [sample[name] for sample in report["samples"]], label=name)
    slots.set(xlabel="minutes")
    for axes in (latency, memory, slots):
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
        axes.grid(color="#e6e6e6")
    figure.savefig(path)
