"""What the terminal clients do with their flags: read a line, stream an answer, show how fast it came."""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from clients.server import FAILURES, Server, ServerError, open_session, text_of
from clients.terminal.conversation import Chat, Conversation, Text

_PROMPT = "> "
_HELP = """\
/new             forget the conversation
/undo            take the last turn back
/retry           take the last answer back and ask again
/show            print the conversation
/set             show the settings
/set NAME VALUE  max_tokens, temperature, top_p, seed or stop; without VALUE: the server's default
/quit            end, as does Ctrl-D
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "seed": int,
    "stop": lambda text: [text.encode().decode("unicode_escape")],
}


@dataclass(slots=True)
class Speed:
    """How fast an answer came. Seconds by ``time.perf_counter``."""

    sent: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    chunks: int = 0
    tokens: int = 0

    def line(self) -> str:
        """In words; empty if nothing came."""
        if self.first is None:
            return ""
        tokens = self.tokens or self.chunks
        parts = [f"{tokens} token{'s' * (tokens != 1)}", f"first after {(self.first - self.sent) * 1e3:,.0f} ms"]
        if tokens > 1 and self.last > self.first:
            parts.append(f"{(tokens - 1) / (self.last - self.first):,.0f} tokens/s")
        return " · ".join(parts)


class Terminal:
    """One conversation with one server.

    Args:
        server: who answers.
        model: the name sent.
        conversation: what is continued.
        settings: sampling fields of the requests.
        console: for everything but answers.
        out: gets the answers' text as it comes.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        conversation: Conversation,
        settings: dict[str, Any],
        console: Console,
        out: Callable[[str], None],
    ) -> None:
        self._server = server
        self._model = model
        self._conversation = conversation
        self._settings = settings
        self._console = console
        self._out = out

    async def answer(self) -> None:
        """Stream what comes next. If it is cancelled, what has come so far is kept.

        Raises:
            ServerError, and what :data:`clients.server.FAILURES` lists.
        """
        body = {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        body |= self._settings | self._conversation.body()
        speed, pieces = Speed(), []
        try:
            async for chunk in self._server.stream(self._conversation.path, body):
                if chunk.get("usage"):
                    speed.tokens = chunk["usage"]["completion_tokens"]
                if text := text_of(chunk):
                    speed.last = time.perf_counter()
                    speed.first = speed.first or speed.last
                    speed.chunks += 1
                    pieces.append(text)
                    self._out(text)
        finally:
            self._conversation.end("".join(pieces))
            self._out("\n")
            if line := speed.line():
                self._note(line)

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; what to send instead of it, if anything."""
        name, _, rest = line[1:].partition(" ")
        if name in ("help", "?"):
            self._console.print(_HELP, markup=False, highlight=False)
        elif name == "new":
            self._conversation.clear()
        elif name == "undo":
            self._note("nothing to take back" if self._conversation.undo() is None else "taken back")
        elif name == "retry":
            typed = self._conversation.undo()
            if typed is None:
                self._note("nothing to ask again")
            return typed
        elif name == "show":
            self._show()
        elif name == "set":
            self._set(*rest.split(None, 1))
        elif name in ("quit", "exit"):
            raise EOFError
        else:
            self._complain(f"/{name} is not a command; /help lists them")
        return None

    def begin(self, typed: str) -> None:
        """Add what the user typed."""
        self._conversation.begin(typed)

    def _show(self) -> None:
        body = self._conversation.body()
        if "prompt" in body:
            self._out(f"{body['prompt']}\n")
            return
        for entry in body["messages"]:
            self._console.print(f"[bold]{entry['role']}[/bold]", highlight=False)
            self._out(f"{entry['content']}\n")

    def _set(self, name: str = "", value: str = "") -> None:
        if not name:
            for known in _SETTINGS:
                self._note(f"{known:12} {self._settings.get(known, 'default of the server')}")
        elif name not in _SETTINGS:
            self._complain(f"{name} is not a setting; there are {', '.join(_SETTINGS)}")
        elif not value:
            self._settings.pop(name, None)
        else:
            try:
                self._settings[name] = _SETTINGS[name](value)
            except ValueError:
                self._complain(f"{value!r} is no value for {name}")

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)

    def _complain(self, text: str) -> None:
        self._console.print(text, style="red", markup=False, highlight=False)


def run(arguments: argparse.Namespace, *, chat: bool) -> int:
    """Talk until the user ends it; with a prompt on the command line, answer it and end.

    Returns:
        0; 1 if the server does not answer, or the one answer asked for failed; 130 if that was interrupted.
    """
    notes = Console(stderr=True)
    once = [] if chat else arguments.prompt
    with asyncio.Runner() as runner:
        try:
            terminal, close = runner.run(_connect(arguments, notes, chat=chat))
        except ServerError as error:
            notes.print(f"gale: error: {error}", style="red", markup=False, highlight=False)
            return 1
        try:
            if once or not sys.stdin.isatty():
                return _once(runner, terminal, once, notes)
            return _talk(runner, terminal, notes)
        finally:
            runner.run(close())


async def _connect(arguments: argparse.Namespace, notes: Console, *, chat: bool) -> tuple[Terminal, Callable[[], Any]]:
    key = os.environ.get("OPENAI_API_KEY")
    session = open_session({"Authorization": f"Bearer {key}"} if key else {})
    try:
        server = Server(session, arguments.base_url)
        model = arguments.model or await server.first_model()
    except BaseException:
        await session.close()
        raise
    names = ("max_tokens", "temperature", "top_p", "seed", "stop")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    conversation: Conversation = Chat(arguments.system) if chat else Text()
    if sys.stdin.isatty() and (chat or not arguments.prompt):
        notes.print(f"[bold]{model}[/bold] at {server.root} · /help, Ctrl-D ends", highlight=False)
    return Terminal(server, model, conversation, settings, notes, _write), session.close


def _once(runner: asyncio.Runner, terminal: Terminal, words: list[str], notes: Console) -> int:
    typed = " ".join(words) if words and words != ["-"] else sys.stdin.read()
    if not typed:
        notes.print("gale: error: the prompt is empty", style="red")
        return 1
    terminal.begin(typed)
    return 0 if _answer(runner, terminal, notes) else 1


def _talk(runner: asyncio.Runner, terminal: Terminal, notes: Console) -> int:
    # Importing it gives input() line editing and a history.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line: str | None = _read_line()
        except EOFError:
            notes.print()
            return 0
        except KeyboardInterrupt:
            notes.print()  # Ctrl-C at the prompt drops the line, as in a shell.
            continue
        if line and line.startswith("/"):
            try:
                line = terminal.command(line)
            except EOFError:
                return 0
        if line:
            terminal.begin(line)
            _answer(runner, terminal, notes)


def _answer(runner: asyncio.Runner, terminal: Terminal, notes: Console) -> bool:
    """Whether the answer came whole, or was stopped by the user."""
    try:
        runner.run(terminal.answer())
    except (KeyboardInterrupt, asyncio.CancelledError):  # the latter where a library took part in the cancelling
        notes.print("stopped", style="dim")
    except ServerError as error:
        notes.print(str(error), style="red", markup=False, highlight=False)
        return False
    except FAILURES as error:
        notes.print(f"the connection failed: {error}", style="red", markup=False, highlight=False)
        return False
    return True


def _read_line() -> str:
    line = input(_PROMPT)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("… ")
    return line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
