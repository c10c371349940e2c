"""A radix tree over token ids: sequences that begin alike share their beginning. Torch-free.

Token ids are int32 bytes (:func:`server.types.pack_tokens`), since bytes are compared and cut at the speed of memory;
positions and depths count tokens.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

V = TypeVar("V")

TOKEN_BYTES = 4
_FIRST_BLOCK = 16
_LARGEST_BLOCK = 16384


@dataclass(slots=True, eq=False)
class Node(Generic[V]):
    """The end of a beginning that something is known of, or the place where known beginnings diverge.

    Attributes:
        parent: None for the root.
        label: the tokens from the parent to here.
        depth: tokens from the root to here.
        children: by the first token of their labels.
        value: what is known; None only at the root and where beginnings diverge.
    """

    parent: "Node[V] | None"
    label: bytes
    depth: int
    children: dict[bytes, "Node[V]"] = field(default_factory=dict)
    value: V | None = None


class RadixTree(Generic[V]):
    """Values by sequence of tokens, found by any sequence that begins with theirs.

    A node that has a value is the same object until :meth:`discard` is called for it.
    """

    def __init__(self) -> None:
        self.root: Node[V] = Node(None, b"", 0)

    def walk(self, tokens: bytes) -> tuple[list[Node[V]], int]:
        """Follow a sequence from the root as far as the tree goes with it.

        Returns:
            The nodes on the way that have a value, the deepest last; and how many tokens the sequence has in common
            with some sequence of the tree.
        """
        found: list[Node[V]] = []
        node, depth = self.root, 0
        while (child := node.children.get(_token(tokens, depth))) is not None:
            common = common_tokens(child.label, tokens, depth)
            depth += common
            if depth < child.depth:
                break
            node = child
            if node.value is not None:
                found.append(node)
        return found, depth

    def insert(self, tokens: bytes, end: int | None = None, *, below: Node[V] | None = None) -> Node[V]:
        """The node at the end of a sequence of at least one token, made if need be; the caller gives it a value.

        Args:
            tokens: the sequence.
            end: how many of its tokens count; None: all.
            below: a node with a value at, or above, that end, from which on to look; None: from the root.
        """
        node = self.root if below is None else below
        depth, end = node.depth, len(tokens) // TOKEN_BYTES if end is None else end
        while depth < end:
            key = _token(tokens, depth)
            child = node.children.get(key)
            if child is None:
                label = _cut(tokens, depth, end - depth)
                node.children[key] = child = Node(node, label, end)
                return child
            common = min(common_tokens(child.label, tokens, depth), end - depth)
            depth += common
            node = child if depth == child.depth else self._split(child, common)
        return node

    def discard(self, node: Node[V]) -> None:
        """Remove a node's value, and whatever the tree does not need without it."""
        node.value = None
        while node.value is None and node.parent is not None:
            parent = node.parent
            if not node.children:
                del parent.children[_token(node.label, 0)]
            elif len(node.children) == 1:
                (child,) = node.children.values()
                child.label = node.label + child.label
                child.parent = parent
                parent.children[_token(child.label, 0)] = child
                return
            else:
                return
            node = parent

    @staticmethod
    def _split(node: Node[V], at: int) -> Node[V]:
        """Put a node on the edge above another one, so many tokens below its parent."""
        parent = node.parent
        assert parent is not None
        cut = at * TOKEN_BYTES
        upper: Node[V] = Node(parent, node.label[:cut], parent.depth + at)
        parent.children[_token(node.label, 0)] = upper
        node.label = node.label[cut:]
        node.parent = upper
        upper.children[_token(node.label, 0)] = node
        return upper


def common_tokens(label: bytes, tokens: bytes, start: int) -> int:
    """How many tokens the beginning of a label has in common with a sequence from a position on."""
    # Most of the way to what is known is labels that agree whole: they are compared where they lie.
    if tokens.startswith(label, start * TOKEN_BYTES):
        return len(label) // TOKEN_BYTES
    limit = min(len(label), len(tokens) - start * TOKEN_BYTES) // TOKEN_BYTES

    def equal(begin: int, end: int) -> bool:
        return _cut(label, begin, end - begin) == _cut(tokens, start + begin, end - begin)

    low, block = 0, _FIRST_BLOCK
    while low < limit and equal(low, min(low + block, limit)):
        low = min(low + block, limit)
        block = min(2 * block, _LARGEST_BLOCK)
    high = min(low + block, limit)
    # The first `low` tokens agree; if high > low, the first `high` do not.
    while high - low > 1:
        middle = (low + high) // 2
        if equal(low, middle):
            low = middle
        else:
            high = middle
    return low


def _cut(tokens: bytes, start: int, length: int) -> bytes:
    return tokens[start * TOKEN_BYTES : (start + length) * TOKEN_BYTES]


def _token(tokens: bytes, position: int) -> bytes:
    return _cut(tokens, position, 1)
