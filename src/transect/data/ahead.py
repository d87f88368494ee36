"""The next batches made in the background, while the model is busy with this one."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Ahead(Generic[T], Iterator[T]):
    """make(first), make(first + 1), ..., make(last - 1), made by a thread that is at most `depth` of them ahead.

    last: None, without end. An exception of `make` arrives in the caller where its result would have, and ends the
    iteration. Used in a `with` statement, or closed by hand: that waits until the thread has ended.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int | None = None, depth: int = 2) -> None:
        self._make, self._last, self._depth = make, last, depth
        self._made: deque[tuple[T | None, BaseException | None]] = deque()
        self._left = None if last is None else max(last - first, 0)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(first,), name="batches ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._closed or self._left == 0)
            if self._closed or self._left == 0:
                raise StopIteration
            result, error = self._made.popleft()
            if self._left is not None:
                self._left -= 1
            self._changed.notify_all()
        if error is not None:
            self.close()
            raise error
        return result  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """End the thread and drop what it has made; nothing more comes."""
        with self._changed:
            self._closed = True
            self._made.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, number: int) -> None:
        error = None
        while error is None and (self._last is None or number < self._last):
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._made) < self._depth)
                if self._closed:
                    return
            result = None
            try:
                result = self._make(number)
            except BaseException as raised:  # the caller's to handle, whatever it is
                error = raised
            with self._changed:
                self._made.append((result, error))
                self._changed.notify_all()
            number += 1
