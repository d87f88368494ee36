"""The same work on many batches, in this process or in several, with the results in the order of the batches."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from transect.errors import InputError

_AHEAD = 3  # batches waiting for each process
_SWITCH = "TOKENIZERS_PARALLELISM"
_held: list[Callable[[Any], Any]] = []  # of a worker process: what it does with a batch


@contextmanager
def tokenizer_threads(many: bool) -> Iterator[None]:
    """Let the tokenizers library use all cores, or one, inside the block."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "true" if many else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def in_order(make: Callable[[], Callable[[Any], Any]], batches: Iterable[Any], workers: int) -> Iterator[Any]:
    """`make()(batch)` of every batch, in order; each process calls `make` once, so both must be picklable.

    Few batches wait at any time, so memory does not grow with their number. Raises InputError when a process is lost.
    """
    if workers == 1:
        with tokenizer_threads(many=False):
            yield from map(make(), batches)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(make,))
    waiting: deque[Future] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_call, batch))
            if len(waiting) > _AHEAD * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future) -> Any:
    from concurrent.futures.process import BrokenProcessPool

    try:
        return future.result()
    except BrokenProcessPool as error:
        raise InputError("a worker process was ended, perhaps for memory; run again with fewer --workers") from error


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    """In a worker: one thread, no say in Ctrl-C, and no life after the process that started it."""
    os.environ[_SWITCH] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    _held.append(make())


def _call(batch: Any) -> Any:
    return _held[0](batch)
