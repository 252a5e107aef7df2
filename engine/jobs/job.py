"""A run from start to end: plan it, keep a worker at it, say how it went."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq

from ... import BackendError, HeatmillError, IncompleteError, InputError, ModelError, RunError
from ..backends import usable_cores
from ..opening import Loaded
from ..trial import Trial
from ..types import Target, class_index
from . import plan as plans
from . import store, worker
from .child import SIGNALS, describe_exit, shielded
from .probe import DEADLINE, probe
from .progress import Progress
from .sources import Source

DEATH_BUDGET = 20
KILLS_TO_BLAME = 2
STALL_SECONDS = 600.0
STALL_BATCHES = 20.0  # where that many batches take longer, it is the limit
EXIT_COMPLETE, EXIT_BAD = 0, 3


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


class Failed(Exception):
    """A bug of ours in the worker; its traceback is a note."""


class Signals:
    """SIGINT, SIGTERM and SIGUSR1: while a worker is `busy`, the first is only noted; any other stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.busy = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere the host program owns the signals
            self._before = {number: signal.signal(number, self._caught) for number in SIGNALS}
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if not (first and self.busy):
            raise KeyboardInterrupt


def explain(job: plans.Job, style: str = "auto", deadline: float | None = None) -> Summary:
    """Explain every image of a job into `job.out`; what an earlier call committed is kept.

    Args:
        style: of the progress, see `Progress`.

    Raises:
        HeatmillError: refused, or incomplete and resumable; `exit_code` says which.
        KeyboardInterrupt: interrupted by the user, after the batch in flight.
    """
    with resumable(job.out) as signals:
        return _explain(job, style, deadline, signals)


@contextmanager
def resumable(run: Path) -> Iterator[Signals]:
    """Around a run's work: a signal ends it in words.

    Raises:
        IncompleteError: stopped by a signal.
        KeyboardInterrupt: interrupted by the user.
    """
    with Signals() as signals:
        try:
            yield signals
        except KeyboardInterrupt:
            if signals.number in (None, signal.SIGINT):
                raise KeyboardInterrupt(f"{run}: interrupted; the same command resumes") from None
            name = signal.Signals(signals.number).name
            raise IncompleteError(f"{run}: stopped by {name}; the same command resumes") from None


def _explain(job: plans.Job, style: str, deadline: float | None, signals: Signals) -> Summary:
    began = time.monotonic()
    exists = plans.check_folder(job.out, job.overwrite)
    loaded, source, targets = plans.open_job(job)
    if exists:
        plan = plans.reopen(job.out)
        plans.check_same(job.out, plan, plans.identity(job, loaded, targets))
        _note_changes(source, plan, style)
    else:
        plan = plans.freeze(job, loaded, source, targets, probe_job(job, loaded, source, targets, deadline))
    del loaded, source
    with lock(job.out):
        if not exists:
            _begin(job, plan)
        done = store.committed(job.out)
        todo = [shard for shard in plan.shards if shard not in done]
        with Progress(plan.images.num_rows, style) as progress:
            progress.start(sum(len(plan.rows(shard)) for shard in plan.shards if shard in done))
            supervisor = Supervisor(job, plan, progress, signals)
            supervisor.run(todo)
        return _summarise(job, plan, len(todo), supervisor, time.monotonic() - began)


def probe_job(
    job: plans.Job, loaded: Loaded, source: Source, targets: tuple[Target, ...], deadline: float | None
) -> Trial:
    arguments = {
        "model": str(job.model),
        "methods": list(job.methods),
        "layer": job.layer,
        "preprocess": job.preprocess,
        "labels": str(job.labels) if job.labels else None,
        "output": job.output,
        "scores": job.scores,
    }
    passes = sum(call.method.passes(loaded.facts, call.parameters) for call in loaded.calls)
    probed = probe(
        arguments,
        backend=job.backend,
        provider=job.provider,
        precision=job.precision,
        batch_size=job.batch_size,
        rows=(1 + passes) * source.table.num_rows,
        targets=targets,
        deadline=deadline or DEADLINE,
        devices=job.devices,
    )
    _check_classes(source, targets, loaded.spec.label_names, probed.classes)
    return probed


def _check_classes(source: Source, targets: tuple[Target, ...], names: tuple[str, ...], classes: int) -> None:
    """Refuse targets that only the run model shows to be out of range, where its file leaves the classes open."""
    for target in targets:
        if target.kind == "class":
            class_index(target.text, classes, names)
        elif target.kind == "top" and target.value > classes:
            raise InputError(f"target {target.text!r}: the model has {classes} classes")
        elif target.kind == "label":
            for identity, label in zip(*(source.table[name].to_pylist() for name in ("id", "target")), strict=True):
                if label >= classes:
                    raise InputError(f"label of {identity!r}: class {label}; the model has classes 0 to {classes - 1}")


def _begin(job: plans.Job, plan: plans.Plan) -> None:
    """Write the plan of a new run; nobody else is at it."""
    if (job.out / "run.json").exists():
        if not job.overwrite:
            raise InputError(f"{job.out}: another heatmill has just made a run there; the same command resumes it")
        plans.clear(job.out)
    try:
        plans.create(job.out, plan)
    except OSError as err:
        raise IncompleteError(f"{job.out}: the plan can't be written ({err.strerror}); nothing was started") from err


def _note_changes(source: Source, plan: plans.Plan, style: str) -> None:
    """Tell what differs from when the run began and does not change it."""
    now, then = (
        dict(zip(*(t[name].to_pylist() for name in ("id", "label")), strict=True)) for t in (source.table, plan.images)
    )
    counts = {
        "new images": len(now.keys() - then.keys()),
        "images fewer": len(then.keys() - now.keys()),
        "other labels": sum(now[key] != label for key, label in then.items() if key in now),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    notes = [f"the input now has {told}; this run keeps its own plan"] if told else []
    here = plans.versions()
    notes += [
        f"the run began with {name} {began}, {here[name]} goes on"
        for name, began in plan.settings.get("versions", {}).items()
        if here.get(name, began) != began
    ]
    for note in notes:
        Progress(0, style).note(f"note: {note}")


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """One process per run.

    Raises:
        InputError: another process holds it, or the folder can't be written.
        IncompleteError: no space is left.
    """
    try:
        (run / "_tmp").mkdir(parents=True, exist_ok=True)
        handle = (run / "_tmp" / "lock").open("w")
    except OSError as err:
        if err.errno in store.SPACE_GONE:
            raise IncompleteError(store.write_refusal(run, err)) from None
        raise InputError(f"{run}: can't be written ({err.strerror}); give another folder with -o") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run}: another heatmill is at work on this run; wait for it or stop it") from None
        except OSError:  # a file system without locks, as some clusters have; parts are whole even if two write them
            pass
        for left in (run / "_tmp").iterdir():
            if left.name != "lock":
                left.unlink(missing_ok=True)
        yield


class _Life:
    """One worker: its process, the shards it was given, and what stands in shared memory of it."""

    def __init__(self, context: Any, order: worker.Order) -> None:
        self.order = order
        self.marks = worker.Marks(context)
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=worker.main, args=(order, theirs, self.marks))
        with shielded():
            self.process.start()
        theirs.close()

    def end(self) -> None:
        """Kill it, if it still lives."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


class Supervisor:
    """Keeps a worker on every device at a run's shards, replaces what dies, and finds the image that kills."""

    def __init__(self, job: plans.Job, plan: plans.Plan, progress: Progress, signals: Signals) -> None:
        self.job, self.plan, self.progress = job, plan, progress
        self.stages: Counter[str] = Counter()
        self.deaths = 0
        self._signals = signals
        self._kills: Counter[int] = Counter(dict.fromkeys(self._blamed(), KILLS_TO_BLAME))
        self._careful: set[int] = set()  # shards with images that may have killed a worker
        self._lives: dict[int, _Life] = {}
        self._context = multiprocessing.get_context("spawn")
        seconds = plan.settings["batch_size"] / max(plan.settings["rows_per_second"], 1e-3)
        self._stall = max(STALL_SECONDS, STALL_BATCHES * seconds)

    def run(self, todo: list[int]) -> None:
        """Do the shards.

        Raises:
            IncompleteError: no space, or too many deaths.
            KeyboardInterrupt: stopped by a signal.
        """
        left = list(todo)
        failure: HeatmillError | None = None
        self._signals.busy = True
        try:
            while left or self._lives:
                if self._signals.number is None and failure is None:
                    self._start(left)
                elif not self._lives:
                    break
                wait([end for life in self._lives.values() for end in (life.connection, life.process.sentinel)], 0.2)
                for device, life in list(self._lives.items()):
                    try:
                        over = self._over(life, left)
                    except HeatmillError as err:  # the others end with what they have in hand
                        failure, over = failure or err, True
                    if over:
                        del self._lives[device]
                        life.end()
                        done = store.committed(self.job.out)  # a worker may die between a commit and its message
                        left = [shard for shard in left if shard not in done]
                    elif failure is not None:
                        life.marks.stop()
        finally:
            for life in self._lives.values():
                life.end()
            self._lives.clear()
        self._signals.busy = False
        if failure is not None:
            raise failure
        if left:
            raise KeyboardInterrupt

    def _start(self, left: Sequence[int]) -> None:
        """Give what nobody has to the devices that have nothing; several get a part, and come back for more."""
        held = {shard for life in self._lives.values() for shard in life.order.todo}
        free = [shard for shard in left if shard not in held]
        devices = self.job.devices or (0,)
        crashed = frozenset(row for row, kills in self._kills.items() if kills >= KILLS_TO_BLAME)
        threads = self.job.workers or max(1, usable_cores() // len(devices))
        for device in devices:
            if device in self._lives or not free:
                continue
            careful = [shard for shard in free if shard in self._careful]
            part = len(free) if len(devices) == 1 else -(-len(free) // (2 * len(devices)))
            shards = careful or free[:part]
            free = [shard for shard in free if shard not in shards]
            order = worker.Order(self.job.out, self.job.model, tuple(shards), crashed, bool(careful), threads, device)
            self._lives[device] = _Life(self._context, order)

    def _over(self, life: _Life, left: list[int]) -> bool:
        """Take what a worker has sent; true when its life is over."""
        while life.connection.poll():
            try:
                message = life.connection.recv()
            except (EOFError, OSError):  # OSError: killed in the middle of a message
                self._died(life)
                return True
            if self._handle(message, left):
                life.process.join(10)
                self._careful -= set(life.order.todo)
                return True
        if not life.process.is_alive() and not life.connection.poll():
            self._died(life)
            return True
        if life.marks.idle_seconds > self._stall:
            self.progress.note(f"the worker got nothing done for {self._stall:g} s; ending it")
            self._event("stall")
            life.process.kill()
            life.process.join()
        if self._signals.number is not None:
            life.marks.stop()
        return False

    def _handle(self, message: tuple[Any, ...], left: list[int]) -> bool:
        """Take one message; true when the worker has ended by itself."""
        kind = message[0]
        if kind == "committed":
            if message[1] in left:  # unless the folder has told already
                left.remove(message[1])
            self._event("committed", shard=message[1])
        elif kind == "progress":
            self.progress.advance(*message[1:])
        elif kind == "ready":
            self._event("ready", seconds=round(message[1], 3))
            began = self.plan.settings["versions"]["backend"]
            if message[2] != began:
                name = self.plan.settings["backend"]
                self.progress.note(f"note: the run began with {name} {began}, {message[2]} goes on")
        elif kind == "done":
            self.stages.update(message[1])
            self._event("done", **{name: round(value, 4) for name, value in message[1].items()})
            return True
        elif kind == "stopped":
            return True
        elif kind == "refused":
            known = {
                error.__name__: error for error in (BackendError, IncompleteError, InputError, ModelError, RunError)
            }
            raise known.get(message[1], HeatmillError)(message[2])
        else:
            failure = Failed(message[1])
            failure.add_note(message[2])
            raise failure
        return False

    def _died(self, life: _Life) -> None:
        life.process.join()
        suspects = life.marks.rows()
        code = life.process.exitcode
        self.deaths += 1
        self._event("death", exit=describe_exit(code), rows=suspects)
        if self._signals.number is not None:
            return
        if life.order.careful:
            self._kills.update(suspects)
            for row in suspects:
                self._event("kill", row=row, kills=self._kills[row])
        if self.deaths >= DEATH_BUDGET or (not suspects and self.deaths >= 3):
            raise IncompleteError(
                f"{self.job.out}: the worker died {self.deaths} times, last {describe_exit(code)}; "
                "the same command resumes (a smaller --batch-size needs less memory)"
            )
        told = f"row {suspects[0]}" if len(suspects) == 1 else f"{len(suspects)} images in flight"
        where = f" of device {life.order.device}" if len(self.job.devices) > 1 else ""
        self.progress.note(f"the worker{where} died ({describe_exit(code)}, {told}); starting another")
        self._careful -= set(life.order.todo)
        self._careful |= {row // self.plan.shard_rows for row in suspects}

    def _blamed(self) -> set[int]:
        """Rows that an earlier call has found to kill: without them, a run with many would never end."""
        blamed: set[int] = set()
        for path in (self.job.out / "events").glob("*.jsonl"):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    event = json.loads(line)
                    if event["event"] == "kill" and event["kills"] >= KILLS_TO_BLAME:
                        blamed.add(int(event["row"]))
                except (ValueError, LookupError, TypeError):  # a line cut short by a kill
                    continue
        return blamed

    def _event(self, kind: str, **values: Any) -> None:
        path = self.job.out / "events" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values})
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError:  # events are never needed; a full disk shows where it matters, at the next commit
            pass


def _summarise(job: plans.Job, plan: plans.Plan, computed: int, supervisor: Supervisor, seconds: float) -> Summary:
    statuses: Counter[str] = Counter()
    passes = rows = 0
    bad_images: set[int] = set()
    for shard in plan.shards:
        part = job.out / store.part_name(shard)
        with store.naming(part):
            table = pq.read_table(part, columns=["row", "status", "extras"], page_checksum_verification=True)
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
    body = {
        name: getattr(summary, name) for name in ("images", "rows", "statuses", "bad", "seconds", "deaths", "stages")
    }
    try:
        store.commit(job.out, "summary.json", (json.dumps({**body, "passes": passes}, indent=1) + "\n").encode())
    except OSError as err:
        raise IncompleteError(store.write_refusal(job.out, err)) from err
    return summary
