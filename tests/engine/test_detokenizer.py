"""Stop strings in a text that arrives in pieces."""

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from server.engine.detokenizer import StopMatcher


def run(stops: tuple[str, ...], pieces: list[bytes], *, include: bool = False) -> tuple[bytes, str | None]:
    matcher = StopMatcher(stops, include=include)
    out = b""
    for piece in pieces:
        text, found = matcher.feed(piece)
        out += text
        if found is not None:
            return out, found
    return out + matcher.flush(), None


def test_a_stop_string_across_pieces_is_cut_out() -> None:
    assert run(("END",), [b"some E", b"N", b"D of it"]) == (b"some ", "END")


def test_a_beginning_that_comes_to_nothing_is_released() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.feed(b"EN") == (b"", None)
    assert matcher.feed(b"EN") == (b"EN", None)
    assert matcher.feed(b"ERGY") == (b"ENERGY", None)
    assert matcher.flush() == b""


def test_the_first_match_wins_whatever_the_order_of_the_stops() -> None:
    assert run(("world", "lo"), [b"hello world"]) == (b"hel", "lo")


def test_stop_inside_multibyte_text() -> None:
    text = "naïve ☃ end".encode()
    assert run(("☃",), [text[i : i + 1] for i in range(len(text))]) == ("naïve ".encode(), "☃")


@given(
    text=st.text("ab☃", max_size=30),
    stops=st.lists(st.text("ab☃", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 90), max_size=10),
)
def test_pieces_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    out, found = run(tuple(stops), pieces)
    positions = [data.find(stop.encode()) for stop in stops]
    hits = [position for position in positions if position != -1]
    # Seen in pieces, a short stop may complete before a longer one that begins earlier; both are stop
    # strings in the text, and nothing from the reported one on is output.
    if hits:
        assert found is not None
        assert data.startswith(out + found.encode())
        assert not any(stop.encode() in out for stop in stops)
        assert run(tuple(stops), pieces, include=True) == (out + found.encode(), found)
    else:
        assert (out, found) == (data, None)


@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=4),
    size=st.integers(1, 5),
)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str], size: int) -> None:
    matcher, out, seen = StopMatcher(tuple(stops)), b"", b""
    for start in range(0, len(text), size):
        piece = text[start : start + size].encode()
        released, found = matcher.feed(piece)
        if found is not None:
            return
        out, seen = out + released, seen + piece
        held = seen[len(out) :]
        beginnings = {stop.encode()[:length] for stop in stops for length in range(1, len(stop))}
        longest = max((end for end in beginnings if seen.endswith(end)), key=len, default=b"")
        assert held == longest


def test_text_that_is_held_back_costs_little_however_many_the_stop_strings() -> None:
    """The engine does this for every token, and all requests wait for it."""

    def seconds(stops: tuple[str, ...]) -> float:
        matcher = StopMatcher(stops)
        matcher.feed(b"a" * 1000)
        begun = time.process_time()
        for _ in range(50):
            assert matcher.feed(b"a") == (b"a", None)
        return time.process_time() - begun

    held = "a" * 500 + "Z"
    others = tuple("b" * 500 + str(number) for number in range(31))
    # Some 10 times as long; with a look at every length of every stop string, it was 1000 times.
    assert min(seconds((*others, held)) for _ in range(3)) < 200 * min(seconds((held,)) for _ in range(3))
