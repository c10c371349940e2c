"""The command line. The flags of ``gale serve`` are generated from :class:`server.settings.Settings`."""

import argparse
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from clients.bench.flags import add_arguments as add_bench_arguments
from clients.terminal.flags import add_arguments as add_terminal_arguments
from server import __version__
from server.errors import GaleError, SettingsError
from server.settings import Settings

_WIDTH = 110


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=_WIDTH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as on the command line; None takes the process's own.

    Returns:
        The exit code: 2 for flags that cannot work, 1 for other failures.
    """
    parsed = vars(build_parser().parse_args(arguments))
    command: Callable[[dict[str, Any]], int] = parsed.pop("command")
    return command(parsed)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="gale",
        description="Serve Gated Linear Attention models over an OpenAI-style HTTP API.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"gale {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_serve(commands)
    _add_bench(commands)
    _add_terminal(commands)
    return parser


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "serve",
        help="start the server",
        description="Start the server. Without arguments it serves the model shipped with Gale on http://127.0.0.1:8000.",
        usage="gale serve [MODEL] [--flag value ...]",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.set_defaults(command=_serve)
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help="the same as --model")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        group = _extra(field)["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name.replace('_', '-')}", dest=name, **_argument(field))


def _serve(parsed: dict[str, Any]) -> int:
    try:
        settings = Settings.from_flags(_flags(parsed))
    except SettingsError as error:
        return _complain(error, 2)
    # Imported here: other commands do without it.
    from server.children import ChildError
    from server.launch import serve

    try:
        return serve(settings)
    except SettingsError as error:
        return _complain(error, 2, settings)
    except ChildError as error:
        return _complain(error, error.exit_code, settings)
    except GaleError as error:
        return _complain(error, 1, settings)


def _add_bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure an OpenAI-style server under load",
        description="Measure an OpenAI-style server under load: throughput, time to first token, time between tokens.",
        usage="gale bench [--flag value ...]",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.set_defaults(command=_bench)
    add_bench_arguments(parser)


def _bench(parsed: dict[str, Any]) -> int:
    from clients.bench.cli import run  # here, since its libraries take a while to load

    return run(argparse.Namespace(**parsed))


def _add_terminal(commands: "argparse._SubParsersAction[_Parser]") -> None:
    for name, what, usage in (
        ("complete", "continue texts", "gale complete [PROMPT ...] [--flag value ...]"),
        ("chat", "chat", "gale chat [--flag value ...]"),
    ):
        parser = commands.add_parser(
            name,
            help=f"{what} in the terminal, with an OpenAI-style server",
            description=f"{what.capitalize()} in the terminal, with an OpenAI-style server. A key is taken from the "
            "environment variable OPENAI_API_KEY.",
            usage=usage,
            allow_abbrev=False,
            formatter_class=_Help,
        )
        parser.set_defaults(command=partial(_terminal, chat=name == "chat"))
        add_terminal_arguments(parser, chat=name == "chat")


def _terminal(parsed: dict[str, Any], *, chat: bool) -> int:
    from clients.terminal.cli import run

    return run(argparse.Namespace(**parsed), chat=chat)


def _complain(error: GaleError, exit_code: int, settings: Settings | None = None) -> int:
    if settings is not None and settings.log_format == "json":
        logging.getLogger(__name__).error("%s", error)
    else:
        sys.stderr.write(f"gale serve: error: {error}\n")
    return exit_code


def _flags(parsed: dict[str, Any]) -> dict[str, object]:
    """The flags that were given, by field name; the environment fills in for those that were not."""
    model = parsed.pop("positional_model", None)
    if model is not None and parsed.setdefault("model", model) != model:
        raise SettingsError(f"two models are named: {model} and --model {parsed['model']}")
    for name, field in Settings.model_fields.items():
        variable = _extra(field)["env"]
        if variable is not None and name not in parsed and os.environ.get(variable):
            parsed[name] = [os.environ[variable]] if _is_list(field) else os.environ[variable]
        if variable is not None and get_args(field.annotation)[:1] == (SecretStr,):
            os.environ.pop(variable, None)  # Child processes have no use for it.
    return parsed


def _argument(field: FieldInfo) -> dict[str, Any]:
    """How argparse is told of a field. Values stay strings: the settings convert and check them."""
    extra = _extra(field)
    help_text = (field.description or "").replace("%", "%%")
    if extra["env"] is not None:
        help_text += f" Environment: {extra['env']}."
    argument: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text}
    if field.annotation is bool:
        return argument | {"action": "store_true"}
    if field.default not in (None, ()):
        argument["help"] += f" [{field.default:g}]" if isinstance(field.default, float) else f" [{field.default}]"
    if get_origin(field.annotation) is Literal:
        return argument | {"choices": get_args(field.annotation)}
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = get_args(kind)[0]
    argument["metavar"] = extra["metavar"] or {int: "N", float: "X"}.get(kind, "NAME")  # type: ignore[arg-type]
    if _is_list(field):
        argument |= {"action": "extend", "nargs": "+"} if extra["several"] else {"action": "append"}
    return argument


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra
