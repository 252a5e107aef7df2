"""Packs rows of many requests into batches of one size. Policy only: it knows no arrays and no runtime.

A request first needs its image observed (one row); what the observation shows decides how many masked rows follow.
Observation rows ride in the same batches as masked rows, and are taken early, so that masked rows seldom run out.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any


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


@dataclass(slots=True)
class _Pending:
    rows: int
    issued: int = 0
    done: int = 0


class Scheduler:
    """First in, first out, always full batches while anything is left to fill them.

    Args:
        batch_size: slots of a batch.
        rows_expected: at most how many masked rows one observation brings; 0 for methods of a single pass. What the
            first observations bring takes its place.
    """

    def __init__(self, batch_size: int, rows_expected: int) -> None:
        self.batch_size = batch_size
        self._rows_expected = rows_expected
        self._ahead = 2 * batch_size if rows_expected else batch_size
        self._unobserved: deque[Hashable] = deque()
        self._pending: OrderedDict[Hashable, _Pending] = OrderedDict()
        self._waiting = 0
        self._observed = 0
        self._rows_added = 0
        self.slots_filled = 0
        self.slots_issued = 0

    @property
    def wants_images(self) -> bool:
        """Whether another image should be handed to `add_image` now."""
        expected = self._rows_added / self._observed if self._rows_added else self._rows_expected
        return self._waiting + len(self._unobserved) * max(expected, 1) < self._ahead

    def add_image(self, key: Hashable) -> None:
        """An image to observe."""
        self._unobserved.append(key)

    def add_rows(self, key: Hashable, rows: int) -> None:
        """Masked rows of a request; it is complete when all have been done."""
        if rows < 1 or key in self._pending:
            raise ValueError(f"request {key!r}: {rows} rows, or added twice")
        self._pending[key] = _Pending(rows)
        self._waiting += rows
        self._rows_added += rows

    def cancel(self, key: Hashable) -> None:
        """Forget a request: its rows not yet issued are dropped, those in flight are ignored when they are done."""
        pending = self._pending.pop(key, None)
        if pending is not None:
            self._waiting -= pending.rows - pending.issued

    def next_batch(self) -> tuple[Run, ...]:
        """The next rows to run, at most `batch_size`; empty when idle.

        Observations come first while less than two batches of masked rows wait, so that the next are ready in time.
        """
        runs: list[Run] = []
        slot = 0
        observe_now = self._waiting < self._ahead
        while observe_now and self._unobserved and slot < self.batch_size:
            runs.append(Run(self._unobserved.popleft(), 0, 1, slot, observe=True))
            self._observed += 1
            slot += 1
        for key, pending in self._pending.items():
            if slot == self.batch_size:
                break
            count = min(pending.rows - pending.issued, self.batch_size - slot)
            if count:
                runs.append(Run(key, pending.issued, pending.issued + count, slot))
                pending.issued += count
                self._waiting -= count
                slot += count
        if runs:
            self.slots_filled += slot
            self.slots_issued += self.batch_size
        return tuple(runs)

    def complete(self, run: Run) -> bool:
        """Note masked rows as done; true when the request has no row left."""
        pending = self._pending.get(run.key)
        if pending is None:
            return False
        pending.done += run.stop - run.start
        if pending.done < pending.rows:
            return False
        del self._pending[run.key]
        return True
