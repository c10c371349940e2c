"""Stop strings, matched on the bytes of the generated text as they appear."""


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    Text that might still turn out to be the beginning of a stop string is held back. Matching bytes
    is exact for UTF-8: a stop string cannot match from the middle of a character.

    Args:
        stops: what to look for.
        include: whether the text ends with the stop string found; else before it.

    Attributes:
        num_dropped: bytes from the end of the text that was found to end earlier.
    """

    __slots__ = ("_include", "_longest", "_pending", "_stops", "num_dropped")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = [(stop.encode(), stop) for stop in stops]
        self._longest = max(len(encoded) for encoded, _ in self._stops)
        self._include = include
        self._pending = b""
        self.num_dropped = 0

    def feed(self, piece: bytes) -> tuple[bytes, str | None]:
        """Take the next piece.

        Returns:
            The bytes that are now certain to be output, and the stop string found, if one was. After
            a match the text from the stop string on, or behind it, is dropped.
        """
        text = self._pending + piece
        first, found = len(text), None
        for encoded, stop in self._stops:
            position = text.find(encoded)
            if position != -1 and position < first:
                first, found = position, stop
        if found is not None:
            self._pending = b""
            end = first + len(found.encode()) if self._include else first
            self.num_dropped = len(text) - end
            return text[:end], found
        certain = self._certain(text)
        self._pending = text[certain:]
        return text[:certain], None

    def flush(self) -> bytes:
        """The text held back, once it is known that nothing follows."""
        held, self._pending = self._pending, b""
        return held

    def _certain(self, text: bytes) -> int:
        """How many bytes of a text without a stop string cannot be the beginning of one.

        Each place is ruled out for all stop strings before the next is looked at, so that every byte is ruled out once:
        a long text that is held back costs nothing while it stays so.
        """
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(encoded.startswith(tail) for encoded, _ in self._stops):
                return start
        return len(text)
