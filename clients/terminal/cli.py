"""What the terminal clients do with their flags: connect, read lines, show answers and failures."""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from rich.console import Console

from clients.server import FAILURES, Server, ServerError, open_session
from clients.terminal.conversation import Chat, Conversation, Text
from clients.terminal.terminal import SETTINGS, Terminal

_INTERRUPTED = 130
_BROKEN_PIPE = 141
"""What a shell says of a program that SIGINT, or SIGPIPE, has ended."""


def run(arguments: argparse.Namespace, *, chat: bool) -> int:
    """Talk until the user ends it; with a prompt on the command line or in a pipe, answer it and end.

    Returns:
        0; 1 if the server does not answer, or the one answer asked for failed; 130 if that was interrupted; 141 if
        nobody reads the output any more.
    """
    notes = Console(stderr=True)
    once = [] if chat else arguments.prompt
    with asyncio.Runner() as runner:
        try:
            terminal, close = runner.run(_connect(arguments, notes, chat=chat))
        except ServerError as error:
            _complain(notes, f"gale: error: {error}")
            return 1
        except KeyboardInterrupt:
            return _INTERRUPTED
        try:
            if once or not sys.stdin.isatty():
                return _once(runner, terminal, once, notes, save=arguments.save)
            return _talk(runner, terminal, notes, save=arguments.save)
        except BrokenPipeError:
            # Python flushes standard output once more at its end, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _BROKEN_PIPE
        finally:
            runner.run(close())


async def _connect(arguments: argparse.Namespace, notes: Console, *, chat: bool) -> tuple[Terminal, Callable[[], Any]]:
    key = os.environ.get("OPENAI_API_KEY")
    session = open_session({"Authorization": f"Bearer {key}"} if key else {})
    try:
        server = Server(session, arguments.base_url)
        model = arguments.model or await server.first_model()
        settings = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
        conversation: Conversation = Chat(arguments.system) if chat else Text()
        terminal = Terminal(server, model, conversation, settings, notes, _write)
        if sys.stdin.isatty() and (chat or not arguments.prompt):
            notes.print(f"[bold]{model}[/bold] at {server.root} · /help, Ctrl-D ends", highlight=False, soft_wrap=True)
        if arguments.load:
            await terminal.load(arguments.load)
    except BaseException:
        await session.close()
        raise
    return terminal, session.close


def _once(runner: asyncio.Runner, terminal: Terminal, words: list[str], notes: Console, *, save: str | None) -> int:
    typed = " ".join(words) if words and words != ["-"] else sys.stdin.read()
    if not typed and not terminal.name:
        _complain(notes, "gale: error: the prompt is empty")
        return 1
    terminal.begin(typed)
    done = _try(runner, terminal.answer(), notes)
    if done == 0 and save:
        done = _try(runner, terminal.save(save), notes)
    return done


def _talk(runner: asyncio.Runner, terminal: Terminal, notes: Console, *, save: str | None) -> int:
    # Importing it gives input() line editing and a history.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line: str | None = _read_line(f"{terminal.name}> ") or None
            if line and line.startswith("/"):
                line = _obey(runner, terminal, line, notes)
        except EOFError:
            notes.print()
            return _try(runner, terminal.save(save), notes) if save else 0
        except KeyboardInterrupt:
            notes.print()  # Ctrl-C at the prompt drops the line, as in a shell.
            continue
        if line is not None:
            terminal.begin(line)
            _try(runner, terminal.answer(), notes)


def _obey(runner: asyncio.Runner, terminal: Terminal, line: str, notes: Console) -> str | None:
    """What a command wants to be sent; None: nothing."""
    wanted: list[str | None] = []

    async def obey() -> None:
        wanted.append(await terminal.command(line))

    _try(runner, obey(), notes)
    return wanted[0] if wanted else None


def _try(runner: asyncio.Runner, work: Coroutine[Any, Any, None], notes: Console) -> int:
    """Run it and tell what went wrong: 0, 1 for a failure, 130 if the user stopped it."""
    try:
        runner.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):  # the latter where a library took part in the cancelling
        notes.print("stopped", style="dim")
        return _INTERRUPTED
    except ServerError as error:
        _complain(notes, str(error))
        return 1
    except BrokenPipeError:
        raise
    except FAILURES as error:
        _complain(notes, f"the connection failed: {error or type(error).__name__}")
        return 1
    return 0


def _complain(notes: Console, text: str) -> None:
    notes.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _read_line(prompt: str) -> str:
    line = input(prompt)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("… ")
    return line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
