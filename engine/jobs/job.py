"""A run from start to end: plan it, keep a worker at it, say how it went."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq

from ... import BackendError, HeatmillError, IncompleteError, InputError, ModelError, RunError
from ..opening import Loaded
from ..types import Target
from . import plan as plans
from . import store, worker
from .probe import DEADLINE, Probe, describe_exit, probe
from .progress import Progress
from .sources import Source

DEATH_BUDGET = 20
KILLS_TO_BLAME = 2
STALL_SECONDS = 600.0
EXIT_COMPLETE, EXIT_BAD, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 0, 3, 4, 130


@dataclass(slots=True)
class Summary:
    """How a call of `explain` ended; written to RUN/summary.json."""

    run: str
    exit_code: int
    images: int
    rows: int
    statuses: dict[str, int]
    bad: int
    seconds: float
    computed: int
    deaths: int
    stages: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """A bug of ours in the worker; the argument is its traceback."""


def explain(job: plans.Job, style: str = "auto", deadline: float | None = None) -> Summary:
    """Explain every image of a job into `job.out`; what an earlier call committed is kept.

    Args:
        style: of the progress, see `Progress`.

    Raises:
        HeatmillError: refused, or incomplete and resumable; `exit_code` says which.
        KeyboardInterrupt: interrupted by the user, after the batch in flight.
    """
    began = time.monotonic()
    exists = plans.check_folder(job.out, job.overwrite)
    loaded, source, targets = plans.open_job(job)
    if exists:
        plan = plans.reopen(job.out)
        plans.check_same(job.out, plan, plans.identity(job, loaded, targets))
        _warn_of_changes(source.table["id"].to_pylist(), plan, style)
    else:
        plan = plans.freeze(job, loaded, source, targets, _probe(job, loaded, source, targets, deadline))
    del loaded, source
    with _lock(job.out):
        if not exists:
            _commit_plan(job.out, plan)
        done = store.committed(job.out)
        todo = [shard for shard in plan.shards if shard not in done]
        with Progress(plan.images.num_rows, style) as progress:
            progress.start(sum(len(plan.rows(shard)) for shard in done))
            supervisor = Supervisor(job.out, plan, job.workers, progress)
            supervisor.run(todo)
        return _summarise(job, plan, len(todo), supervisor, time.monotonic() - began)


def _probe(
    job: plans.Job, loaded: Loaded, source: Source, targets: tuple[Target, ...], deadline: float | None
) -> Probe:
    arguments = {
        "model": str(job.model), "methods": list(job.methods), "layer": job.layer, "preprocess": job.preprocess,
        "labels": str(job.labels) if job.labels else None, "output": job.output, "scores": job.scores,
    }
    passes = sum(call.method.passes(loaded.facts, call.parameters) for call in loaded.calls)
    probed = probe(
        arguments,
        backend=job.backend,
        provider=job.provider,
        precision=job.precision,
        batch_size=job.batch_size,
        rows=(1 + passes) * source.table.num_rows,
        deadline=deadline or DEADLINE,
    )
    for target in targets:
        if target.kind == "class" and target.value >= probed.classes:
            raise InputError(f"class {target.value} is out of range: the model has classes 0 to {probed.classes - 1}")
    return probed


def _commit_plan(run: Path, plan: plans.Plan) -> None:
    try:
        plans.create(run, plan)
    except OSError as err:
        raise IncompleteError(f"{run}: the plan can't be written ({err.strerror}); nothing was started") from err


def _warn_of_changes(listed: list[str], plan: plans.Plan, style: str) -> None:
    now, then = set(listed), set(plan.images["id"].to_pylist())
    if now != then:
        told = f"{len(now - then)} new images and lacks {len(then - now)}"
        Progress(0, style).note(f"note: the input now lists {told}; this run keeps its own plan")


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    """One process per run.

    Raises:
        InputError: another process holds it, or the folder can't be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "_tmp").mkdir(exist_ok=True)
        handle = (run / "_tmp" / "lock").open("w")
    except OSError as err:
        raise InputError(f"{run}: can't be written ({err.strerror}); give another folder with -o") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{run}: another heatmill is at work on this run; wait for it or stop it") from None
        for left in (run / "_tmp").iterdir():
            if left.name != "lock":
                left.unlink(missing_ok=True)
        yield


class Supervisor:
    """Keeps one worker at a run's shards, replaces it when it dies, and finds the image that kills it."""

    def __init__(self, run: Path, plan: plans.Plan, workers: int | None, progress: Progress) -> None:
        self.run_path, self.plan, self.workers, self.progress = run, plan, workers, progress
        self.stages: Counter[str] = Counter()
        self.deaths = 0
        self._kills: Counter[int] = Counter()
        self._context = multiprocessing.get_context("spawn")
        self._marks = worker.Marks(self._context)
        self._stop = self._context.Event()
        self._signal: int | None = None

    def run(self, todo: list[int]) -> None:
        """Do the shards.

        Raises:
            IncompleteError: stopped by SIGTERM, no space, or too many deaths.
            KeyboardInterrupt: stopped by SIGINT.
        """
        left = list(todo)
        with self._signals():
            careful: list[int] = []
            while left:
                shards = [shard for shard in careful if shard in left] or left
                suspects = self._attempt(shards, bool(careful), left)
                careful = sorted({row // self.plan.shard_rows for row in suspects})
                if self._signal is not None and left:
                    break
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None and left:
            raise IncompleteError(f"{self.run_path}: stopped by a signal; the same command resumes")

    def _attempt(self, shards: list[int], careful: bool, left: list[int]) -> list[int]:
        """One worker's life; what it commits leaves `left`. Returns the suspects of its death, empty if it ended well."""
        ours, theirs = self._context.Pipe(duplex=False)
        self._marks.clear()
        crashed = [row for row, kills in self._kills.items() if kills >= KILLS_TO_BLAME]
        arguments = (str(self.run_path), shards, crashed, careful, self.workers, theirs, self._marks, self._stop)
        process = self._context.Process(target=worker.main, args=arguments)
        process.start()
        theirs.close()
        try:
            while True:
                wait([ours, process.sentinel], timeout=1.0)
                while ours.poll():
                    try:
                        message = ours.recv()
                    except EOFError:
                        return self._died(process, careful)
                    if self._handle(message, left):
                        process.join()
                        return []
                if not process.is_alive() and not ours.poll():
                    return self._died(process, careful)
                if self._marks.idle_seconds > STALL_SECONDS:
                    process.kill()
                if self._signal is not None:
                    self._stop.set()
        finally:
            if process.is_alive():
                process.kill()
            process.join()
            ours.close()

    def _handle(self, message: tuple[Any, ...], left: list[int]) -> bool:
        """Take one message; true when the worker has ended by itself."""
        kind = message[0]
        if kind == "committed":
            left.remove(message[1])
            self._event("committed", shard=message[1])
        elif kind == "progress":
            self.progress.advance(*message[1:])
        elif kind == "ready":
            self._event("ready", seconds=round(message[1], 3))
        elif kind == "done":
            self.stages.update(message[1])
            self._event("done", **{name: round(value, 4) for name, value in message[1].items()})
            return True
        elif kind == "stopped":
            return True
        elif kind == "refused":
            known = {error.__name__: error for error in (BackendError, IncompleteError, InputError, ModelError, RunError)}
            raise known.get(message[1], HeatmillError)(message[2])
        else:
            raise Failed(f"{message[1]}\n{message[2]}")
        return False

    def _died(self, process: Any, careful: bool) -> list[int]:
        process.join()
        suspects = self._marks.rows()
        self.deaths += 1
        self._event("death", exit=describe_exit(process.exitcode), rows=suspects)
        if self._signal is not None:
            return []
        if careful:
            self._kills.update(suspects)
        if self.deaths >= DEATH_BUDGET or (not suspects and self.deaths >= 3):
            raise IncompleteError(
                f"{self.run_path}: the worker died {self.deaths} times, last {describe_exit(process.exitcode)}; "
                "the same command resumes (a smaller --batch-size needs less memory)"
            )
        told = f"row {suspects[0]}" if len(suspects) == 1 else f"{len(suspects)} images in flight"
        self.progress.note(f"the worker died ({describe_exit(process.exitcode)}, {told}); starting another")
        return suspects

    def _event(self, kind: str, **values: Any) -> None:
        path = self.run_path / "events" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values})
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError:  # events are never needed; a full disk shows where it matters, at the next commit
            pass

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal lets the batch in flight finish; the second stops at once."""

        def caught(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        handlers: dict[int, Any] = {}
        handled: list[Callable[..., Any]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                handlers[number] = signal.signal(number, caught)
            except ValueError:  # not the main thread: the host program owns the signals
                handled.append(caught)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _summarise(job: plans.Job, plan: plans.Plan, computed: int, supervisor: Supervisor, seconds: float) -> Summary:
    statuses: Counter[str] = Counter()
    passes = rows = 0
    bad_images: set[int] = set()
    for shard in plan.shards:
        part = job.out / store.part_name(shard)
        table = pq.read_table(part, columns=["row", "status", "extras"])
        rows += table.num_rows
        for row, status, extras in zip(*(column.to_pylist() for column in table.columns), strict=True):
            statuses[status] += 1
            passes += json.loads(extras).get("passes", 0) if extras else 0
            if status != "ok":
                bad_images.add(row)
    too_many = len(bad_images) > job.max_bad * plan.images.num_rows
    summary = Summary(
        run=str(job.out),
        exit_code=EXIT_BAD if too_many else EXIT_COMPLETE,
        images=plan.images.num_rows,
        rows=rows,
        statuses=dict(sorted(statuses.items())),
        bad=len(bad_images),
        seconds=round(seconds, 2),
        computed=computed,
        deaths=supervisor.deaths,
        stages={name: round(value, 4) for name, value in supervisor.stages.items()},
    )
    body = {name: getattr(summary, name) for name in ("images", "rows", "statuses", "bad", "seconds", "deaths", "stages")}
    store.commit(job.out, "summary.json", (json.dumps({**body, "passes": passes}, indent=1) + "\n").encode())
    return summary
