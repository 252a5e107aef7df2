"""Work that threads do while what came before it is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(pool: ThreadPoolExecutor, window: int, values: Iterable[T], work: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Values in their order with what threads make of them; at most `window` wait."""
    waiting = iter(values)
    coming: deque[tuple[T, Future[U]]] = deque()
    while True:
        coming.extend((value, pool.submit(work, value)) for value in islice(waiting, window - len(coming)))
        if not coming:
            return
        value, future = coming.popleft()
        yield value, future.result()
