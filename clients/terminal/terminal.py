"""One conversation with one server: answers as they come, commands, and how fast it all was."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from clients.server import Server, text_of
from clients.terminal.conversation import Conversation
from clients.terminal.states import SavedState, States

_HELP = """\
/new             forget the conversation
/go              continue without adding anything
/undo            take the last turn back
/retry           take the last answer back and ask again
/show            print the conversation
/set             show the settings
/set NAME VALUE  max_tokens, temperature, top_p, seed or stop; without VALUE: the server's default
/save [NAME]     save the conversation's state in the server; without NAME: where it was loaded from
/load NAME       go on from a saved state, by its name or id
/fork NAME       save the state under another name and go on there; the one before stays as it was
/states          list the saved states
/delete NAME     delete one
/quit            end, as does Ctrl-D
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "seed": int,
    "stop": lambda text: [text.encode().decode("unicode_escape")],
}
SETTINGS = tuple(_SETTINGS)
"""The fields of requests that can be set."""


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
        parts = [_count(tokens, "token"), f"first after {(self.first - self.sent) * 1e3:,.0f} ms"]
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

    Attributes:
        name: of the saved state that the conversation was loaded from or saved in; empty: of none.
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
        self.name = ""
        self._server = server
        self._states = States(server)
        self._model = model
        self._conversation = conversation
        self._settings = settings
        self._console = console
        self._out = out
        self._commands: dict[str, Callable[[str], Awaitable[str | None]]] = {
            "help": self._help,
            "new": self._new,
            "go": self._go,
            "undo": self._undo,
            "retry": self._retry,
            "show": self._show,
            "set": self._set,
            "save": self.save,
            "load": self.load,
            "fork": self._fork,
            "states": self._list,
            "delete": self._delete,
            "quit": self._quit,
        }

    def begin(self, typed: str) -> None:
        """Add what the user typed."""
        self._conversation.begin(typed)

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

    async def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; what to send instead of it, None: nothing.

        Raises:
            EOFError: it is to end.
            ServerError: a state cannot be had.
        """
        name, _, rest = line[1:].partition(" ")
        known = [command for command in self._commands if name and command.startswith(name)]
        if name in self._commands or len(known) == 1:
            return await self._commands[name if name in self._commands else known[0]](rest.strip())
        self._complain(f"/{name} is not a command; /help lists them")
        return None

    async def load(self, reference: str) -> None:
        """Go on from a saved state.

        Raises:
            ServerError: it cannot be had.
        """
        if not reference:
            self._complain("/load needs a name; /states lists them")
            return
        state = await self._states.find(reference)
        self._conversation.begin_anew(state.id)
        self.name = state.name or ""
        self._note(f"goes on from {state.name or state.id}, {_count(state.num_tokens, 'token')}")

    async def save(self, name: str) -> None:
        """Save the state of the conversation, under its own name if none is given.

        Raises:
            ServerError: it cannot be saved.
        """
        name = name or self.name
        if not name:
            self._complain("/save needs a name")
            return
        state = await self._saved(name)
        self.name = self.name or name
        if state and name == self.name and self._conversation.base is not None:
            # The state that the conversation began from has just lost its name, and with it its place in the server.
            self._conversation.begin_anew(state.id)

    async def _fork(self, name: str) -> None:
        if not name:
            self._complain("/fork needs a name for the new state")
        elif state := await self._saved(name):
            self._conversation.begin_anew(state.id)
            self.name = name

    async def _saved(self, name: str) -> SavedState | None:
        base, fields = self._conversation.base, self._conversation.saving()
        if not (fields.get("prompt") or fields.get("messages")):
            if base is None:
                self._complain("there is nothing to save yet")
                return None
            state = await self._states.fork(base, name)
        else:
            state = await self._states.save(self._conversation.path, {"model": self._model, **fields}, name)
        self._note(f"saved as {name}, {_count(state.num_tokens, 'token')}")
        return state

    async def _list(self, _: str) -> None:
        states = await self._states.all()
        if not states:
            self._note("no state is saved")
            return
        table = Table(box=None, header_style="dim", pad_edge=False)
        for heading in ("name", "id"):
            table.add_column(heading)
        for heading in ("tokens", "expires in"):
            table.add_column(heading, justify="right")
        for state in states:
            left = "" if state.expires is None else _duration(state.expires - time.time())
            mark = "* " if state.id == self._conversation.base else ""
            table.add_row(f"{mark}{state.name or ''}", state.id, f"{state.num_tokens:,}", left)
        self._console.print(table, highlight=False)

    async def _delete(self, reference: str) -> None:
        if not reference:
            self._complain("/delete needs a name; /states lists them")
            return
        state = await self._states.find(reference)
        await self._states.delete(state.id)
        self._note(f"deleted {state.name or state.id}")
        if state.id == self._conversation.base:
            self._conversation.begin_anew()
            self.name = ""
            self._note("the conversation went on from it, and begins anew")

    async def _help(self, _: str) -> None:
        self._console.print(_HELP, markup=False, highlight=False)

    async def _new(self, _: str) -> None:
        self._conversation.begin_anew()
        self.name = ""

    async def _go(self, _: str) -> str | None:
        if "prompt" in (body := self._conversation.body()) and (body["prompt"] or self._conversation.base):
            return ""
        self._complain("there is no text to continue: write what comes next")
        return None

    async def _undo(self, _: str) -> None:
        self._note("nothing to take back" if self._conversation.undo() is None else "taken back")

    async def _retry(self, _: str) -> str | None:
        typed = self._conversation.undo()
        if typed is None:
            self._note("nothing to ask again")
        return typed

    async def _quit(self, _: str) -> None:
        raise EOFError

    async def _show(self, _: str) -> None:
        body = self._conversation.body()
        if self._conversation.base is not None:
            self._note(f"behind the saved state {self.name or self._conversation.base}:")
        if "prompt" in body:
            self._out(f"{body['prompt']}\n")
            return
        for entry in body["messages"]:
            self._console.print(f"[bold]{entry['role']}[/bold]", highlight=False)
            self._out(f"{entry['content']}\n")

    async def _set(self, words: str) -> None:
        name, _, value = words.partition(" ")
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
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _complain(self, text: str) -> None:
        self._console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    """The largest unit of which there are two or more."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
