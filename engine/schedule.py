"""Packs rows of many requests into batches of one size. Policy only: it knows no arrays and no runtime.

A request first needs its image observed (one row); what the observation shows decides how many further rows follow.
Rows of one lane go through one graph, and a batch is of one lane. Where observations and rows share a graph,
observation rows ride in the same batches, and are taken early, so that rows seldom run out.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

NETWORK = "network"
OBSERVE = "observe"
HEAD = "head"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows `start` .. `stop` of one request, at `slot` of a batch; `observe` marks its unperturbed row."""

    key: Any
    start: int
    stop: int
    slot: int
    observe: bool = False

    @property
    def slots(self) -> slice:
        """The places in the batch."""
        return slice(self.slot, self.slot + self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Batch:
    """What runs at once: rows of one lane, at most `size`."""

    lane: Hashable
    size: int
    runs: tuple[Run, ...]


@dataclass(slots=True)
class _Pending:
    rows: int
    lane: Hashable
    issued: int = 0
    done: int = 0


class Scheduler:
    """First in, first out, always full batches while anything is left to fill them.

    Args:
        batch_size: slots of a batch of the lane `NETWORK`.
        rows_expected: at most how many further rows one observation brings; 0 for methods of a single pass. What the
            first observations bring takes its place.
        lanes: slots of a batch in every other lane. With `OBSERVE` among them observations have batches of their own.
    """

    def __init__(self, batch_size: int, rows_expected: int, lanes: Mapping[Hashable, int] | None = None) -> None:
        self._sizes: dict[Hashable, int] = {NETWORK: batch_size, **(lanes or {})}
        self._apart = OBSERVE in self._sizes
        self._rows_expected = rows_expected
        self._ahead = 2 * batch_size if rows_expected else batch_size
        self._unobserved: deque[Hashable] = deque()
        self._pending: OrderedDict[Hashable, _Pending] = OrderedDict()
        self._waiting: dict[Hashable, int] = dict.fromkeys(self._sizes, 0)
        self._observed = 0
        self._rows_added = 0
        self.slots_filled = 0
        self.slots_issued = 0

    @property
    def wants_images(self) -> bool:
        """Whether another image should be handed to `add_image` now."""
        if self._apart:
            return len(self._unobserved) < self._sizes[OBSERVE] and self._full_lane() is None
        expected = self._rows_added / self._observed if self._rows_added else self._rows_expected
        return self._waiting[NETWORK] + len(self._unobserved) * max(expected, 1) < self._ahead

    def add_image(self, key: Hashable) -> None:
        """An image to observe."""
        self._unobserved.append(key)

    def add_rows(self, key: Hashable, rows: int, lane: Hashable = NETWORK) -> None:
        """Further rows of a request; it is complete when all have been done."""
        if rows < 1 or key in self._pending:
            raise ValueError(f"request {key!r}: {rows} rows, or added twice")
        self._pending[key] = _Pending(rows, lane)
        self._waiting[lane] += rows
        self._rows_added += rows

    def cancel(self, key: Hashable) -> None:
        """Forget a request: its rows not yet issued are dropped, those in flight are ignored when they are done."""
        pending = self._pending.pop(key, None)
        if pending is not None:
            self._waiting[pending.lane] -= pending.rows - pending.issued

    def next_batch(self, full: bool = False) -> Batch | None:
        """The next rows to run; None when idle, or, asked for a `full` batch, when there is none.

        Sharing a graph, observations come first while less than two batches of rows wait, so that the next are ready
        in time. Apart, they wait until no other lane can fill a batch, and so do batches that stay part-filled.
        """
        if not self._apart:
            observing = self._waiting[NETWORK] < self._ahead
            ready = self._waiting[NETWORK] + len(self._unobserved) * observing
            return None if full and ready < self._sizes[NETWORK] else self._packed(NETWORK, observing)
        lane = self._full_lane()
        if lane is None and self._unobserved:
            return None if full and len(self._unobserved) < self._sizes[OBSERVE] else self._packed(OBSERVE, True)
        if lane is None and not full:
            lane = next((pending.lane for pending in self._pending.values() if pending.issued < pending.rows), None)
        return None if lane is None else self._packed(lane, observing=False)

    def _full_lane(self) -> Hashable | None:
        return next((lane for lane, rows in self._waiting.items() if rows >= self._sizes[lane]), None)

    def _packed(self, lane: Hashable, observing: bool) -> Batch | None:
        size = self._sizes[lane]
        runs: list[Run] = []
        slot = 0
        while observing and self._unobserved and slot < size:
            runs.append(Run(self._unobserved.popleft(), 0, 1, slot, observe=True))
            self._observed += 1
            slot += 1
        for key, pending in self._pending.items():
            if slot == size:
                break
            count = min(pending.rows - pending.issued, size - slot) if pending.lane == lane else 0
            if count:
                runs.append(Run(key, pending.issued, pending.issued + count, slot))
                pending.issued += count
                self._waiting[lane] -= count
                slot += count
        if not runs:
            return None
        self.slots_filled += slot
        self.slots_issued += size
        return Batch(lane, size, tuple(runs))

    def complete(self, run: Run) -> bool:
        """Note rows as done; true when the request has no row left."""
        pending = self._pending.get(run.key)
        if pending is None:
            return False
        pending.done += run.stop - run.start
        if pending.done < pending.rows:
            return False
        del self._pending[run.key]
        return True
