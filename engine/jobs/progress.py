"""Progress on stderr: a bar on a terminal, else a line every 30 seconds or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_SECONDS = 30.0


class Progress:
    """Counts images; used as a context manager around the work.

    Args:
        total: images of the run.
        style: "auto" is a bar on a terminal and lines elsewhere; "json" is one object per line; "quiet" is nothing.
        doing: what the bar says.
    """

    def __init__(self, total: int, style: str = "auto", doing: str = "explaining") -> None:
        self.total, self.done, self.bad = total, 0, 0
        self._style = "bar" if style == "auto" and sys.stderr.isatty() else style
        self._began = self._told = time.monotonic()
        self._first = 0
        self._doing = doing
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._style == "bar":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[bad]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._doing, total=self.total, bad="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line()

    def start(self, done: int) -> None:
        """Images that an earlier call has done."""
        self.done = self._first = done
        self._show()

    def advance(self, images: int, bad: int = 0) -> None:
        """Images done just now, and how many of them were bad."""
        self.done, self.bad = self.done + images, self.bad + bad
        self._show()

    def note(self, text: str) -> None:
        """A line of its own."""
        self.tell(text, "note", text=text)

    def tell(self, line: str, event: str, /, **values: Any) -> None:
        """A line of its own; to machines the values of an event in its place."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        elif self._style == "json":
            print(json.dumps({"event": event, **values}), file=sys.stderr, flush=True)
        elif self._style != "quiet":
            print(line, file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, bad=f"{self.bad} bad" if self.bad else "")
        elif time.monotonic() - self._told > LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        self._told = time.monotonic()
        seconds = max(self._told - self._began, 1e-9)
        rate = (self.done - self._first) / seconds
        if self._style == "json":
            event = {"event": "progress", "done": self.done, "total": self.total, "bad": self.bad}
            print(json.dumps({**event, "seconds": round(seconds, 1)}), file=sys.stderr, flush=True)
        elif self._style != "quiet":
            left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
            bad = f", {self.bad} bad" if self.bad else ""
            print(f"{self.done}/{self.total} images{bad}, {rate:.2f} images/s{left}", file=sys.stderr, flush=True)
