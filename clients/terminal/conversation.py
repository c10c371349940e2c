"""What has been said so far, and the request that asks for what comes next."""

from dataclasses import dataclass, field
from typing import Any, Protocol


class Conversation(Protocol):
    """A transcript that grows by turns: what the user typed, then what the model answered."""

    path: str
    """The route that continues it."""

    def begin(self, typed: str) -> None:
        """Add what the user typed."""

    def body(self) -> dict[str, Any]:
        """The request's fields that carry the transcript."""

    def end(self, answer: str) -> None:
        """Add what the model answered, whole or not."""

    def undo(self) -> str | None:
        """Take the last turn back; what the user had typed, or None if there is no turn."""

    def clear(self) -> None:
        """Forget everything."""


@dataclass(slots=True)
class Chat:
    """Messages of a user and an assistant, after an optional system message."""

    system: str | None = None
    path: str = "/v1/chat/completions"
    messages: list[dict[str, str]] = field(default_factory=list)

    def begin(self, typed: str) -> None:
        """Add the user's message."""
        self.messages.append({"role": "user", "content": typed})

    def body(self) -> dict[str, Any]:
        """The messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": system + self.messages}

    def end(self, answer: str) -> None:
        """Add the assistant's message; a turn without an answer is dropped, since roles must alternate."""
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def undo(self) -> str | None:
        """Take the last two messages back."""
        if not self.messages:
            return None
        self.messages.pop()
        return self.messages.pop()["content"]

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages.clear()


@dataclass(slots=True)
class Text:
    """One text that the user and the model write in turn."""

    path: str = "/v1/completions"
    turns: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, typed: str) -> None:
        """Add the user's part."""
        self.turns.append((typed, ""))

    def body(self) -> dict[str, Any]:
        """The text so far."""
        return {"prompt": self.text}

    def end(self, answer: str) -> None:
        """Add the model's part."""
        typed, _ = self.turns.pop()
        self.turns.append((typed, answer))

    def undo(self) -> str | None:
        """Take the last part of both back."""
        return self.turns.pop()[0] if self.turns else None

    def clear(self) -> None:
        """Begin an empty text."""
        self.turns.clear()

    @property
    def text(self) -> str:
        """All parts."""
        return "".join(part for turn in self.turns for part in turn)
