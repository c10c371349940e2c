"""What the benches share: where and when a run was made, tables, and the file that holds its figures."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Row = dict[str, float | int | str | None]
"""One measurement, or one line of a table."""


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--plot``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as a PNG; needs matplotlib")


def environment(device: str | None = None) -> dict[str, str]:
    """What a figure means nothing without: device, versions, date, command.

    Args:
        device: default: the first GPU, or the processor.
    """
    import torch  # here, since the HTTP clients must start quickly

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "fla-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device is None:
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        )
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec is not None else Path(sys.argv[0]).stem
    return {
        "device": device,
        **found,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def finish(args: argparse.Namespace, bench: str, env: Mapping[str, str], figures: Mapping[str, object]) -> None:
    """Write and draw what ``--json`` and ``--plot`` ask for.

    Args:
        bench: ``kernels``, ``engine`` or ``http``; :mod:`tests.bench.plot` draws by it.
        figures: everything that was measured.
    """
    report = {"bench": bench, "environment": dict(env), **figures}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        from tests.bench.plot import draw

        draw(report, args.plot)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Aligned columns; what a row does not have is left out."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max([len(name), *(len(line[i]) for line in cells)]) for i, name in enumerate(columns)]
    for line in [list(columns), *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value}" if not isinstance(value, int) else f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def pivot(rows: Iterable[Row], keys: Sequence[str], column: str, value: str) -> list[Row]:
    """One line per combination of the keys, one column per value of ``column``; columns in order of appearance."""
    lines: dict[tuple[object, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        line[str(row[column])] = row.get(value)
    return list(lines.values())


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None
