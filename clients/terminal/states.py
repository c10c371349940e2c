"""Saved states of a server that has them, which is Gale: what its routes below ``/v1/states`` do."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from clients.server import Server, ServerError

_NO_SUCH_ROUTE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a server tells of one.

    Attributes:
        id: of the server's making.
        name: given by its user, if any.
        num_tokens: of its transcript.
        expires: Unix time in seconds; None: not told.
    """

    id: str
    name: str | None
    num_tokens: int
    expires: float | None

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "SavedState":
        """From the JSON of a route, or from the field ``state`` of an answer."""
        return cls(str(told["id"]), told.get("name"), int(told["num_tokens"]), told.get("expires"))


class States:
    """The states that a server has saved for the user of this key.

    Every method raises a ServerError if there is no such state, the server has no states, refuses, or does not answer.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    async def all(self) -> list[SavedState]:
        """The oldest first."""
        answer = await self._request("GET", "")
        return [SavedState.of(told) for told in answer["data"]]

    async def find(self, reference: str) -> SavedState:
        """By id or name."""
        return SavedState.of(await self._request("GET", f"/{quote(reference, safe='')}"))

    async def fork(self, reference: str, name: str) -> SavedState:
        """Save one once more, under another name."""
        return SavedState.of(await self._request("POST", f"/{quote(reference, safe='')}/fork", {"name": name}))

    async def delete(self, reference: str) -> None:
        """Forget one."""
        await self._request("DELETE", f"/{quote(reference, safe='')}")

    async def save(self, path: str, fields: Mapping[str, Any], name: str) -> SavedState:
        """Have a transcript read, and its state saved.

        Args:
            path: of the route that continues it.
            fields: of :meth:`clients.terminal.conversation.Conversation.saving`, and the model.
            name: of the new state.
        """
        # Another server would ignore the field, or refuse it in words that say nothing of states.
        await self.all()
        answer = await self._server.request("POST", path, {**fields, "save_state": name})
        try:
            return SavedState.of({**answer["state"], "name": name})
        except (LookupError, TypeError) as error:
            raise ServerError("the server answers, but tells of no saved state") from error

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return await self._server.request(method, f"/v1/states{path}", body)
        except ServerError as error:
            if error.status in _NO_SUCH_ROUTE and error.code != "state_not_found":
                raise ServerError(
                    f"the server at {self._server.root} saves no states: that takes Gale ('gale serve')", error.status
                ) from error
            raise
