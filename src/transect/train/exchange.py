"""Small values of all processes, in a communication group of their own: usable in any thread, at any time."""

from typing import Any, Protocol

from torch import distributed


class Peers(Protocol):
    """What is needed of a `World`: how many processes there are, and which is this one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...


class Exchange:
    """Every process makes one, at the same place of the program; alone it needs no process group.

    Its group is gloo's, so that a thread that writes files can use it while training communicates on the GPUs.
    """

    def __init__(self, peers: Peers) -> None:
        self._size = peers.size
        self._group = distributed.new_group(backend="gloo") if peers.size > 1 else None

    def all(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; returns when the last of them has given its own."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._size
        distributed.all_gather_object(values, value, group=self._group)
        return values
