"""What has been said so far, and the request that asks for what comes next."""

from dataclasses import dataclass, field
from typing import Any, Protocol


class Conversation(Protocol):
    """A transcript that grows by turns: what the user typed, then what the model answered."""

    path: str
    """The route that continues it."""
    base: str | None
    """Id of the saved state that it continues, and of which the transcript is what came after; None: of none."""

    def begin(self, typed: str) -> None:
        """Add what the user typed."""

    def body(self) -> dict[str, Any]:
        """The request's fields that carry the transcript."""

    def saving(self) -> dict[str, Any]:
        """The fields of a request that reads the transcript and generates nothing, so that its state can be saved."""

    def end(self, answer: str) -> None:
        """Add what the model answered, whole or not."""

    def undo(self) -> str | None:
        """Take the last turn back; what the user had typed, or None if there is no turn."""

    def begin_anew(self, base: str | None = None) -> None:
        """Forget everything, and go on from a saved state if one is given."""


@dataclass(slots=True)
class Chat:
    """Messages of a user and an assistant, after an optional system message."""

    system: str | None = None
    path: str = "/v1/chat/completions"
    base: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def begin(self, typed: str) -> None:
        """Add the user's message."""
        self.messages.append({"role": "user", "content": typed})

    def body(self) -> dict[str, Any]:
        """The messages; a state has read the system message, if there was one."""
        if self.base is not None:
            return {"state": self.base, "messages": self.messages}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": system + self.messages}

    def saving(self) -> dict[str, Any]:
        """The messages, of which the last is not over."""
        unfinished = {"continue_final_message": True, "add_generation_prompt": False}
        return self.body() | {"max_completion_tokens": 0} | (unfinished if self.messages else {})

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

    def begin_anew(self, base: str | None = None) -> None:
        """Forget all but the system message."""
        self.base = base
        self.messages.clear()


@dataclass(slots=True)
class Text:
    """One text that the user and the model write in turn."""

    path: str = "/v1/completions"
    base: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, typed: str) -> None:
        """Add the user's part."""
        self.turns.append((typed, ""))

    def body(self) -> dict[str, Any]:
        """The text so far."""
        return {"prompt": self.text} | ({} if self.base is None else {"state": self.base})

    def saving(self) -> dict[str, Any]:
        """The text so far."""
        return self.body() | {"max_tokens": 0}

    def end(self, answer: str) -> None:
        """Add the model's part."""
        typed, _ = self.turns.pop()
        self.turns.append((typed, answer))

    def undo(self) -> str | None:
        """Take the last part of both back."""
        return self.turns.pop()[0] if self.turns else None

    def begin_anew(self, base: str | None = None) -> None:
        """Begin an empty text."""
        self.base = base
        self.turns.clear()

    @property
    def text(self) -> str:
        """All parts."""
        return "".join(part for turn in self.turns for part in turn)
