"""Tries a model once, in a process of its own with bounded memory and time, before anything is planned on it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil

from ... import HeatmillError, ModelError
from ..backends import Session
from ..opening import DEFAULT_BATCH, Loaded, batch_is_free, blank_batch, load, open_best, require_classes
from ..types import Array
from .child import describe_exit, settle, shielded

DEADLINE = 180.0
TRIAL_SIZES = (8, 16, 32, 64)
TRIAL_SECONDS = 8.0  # a trial batch predicted to take longer is not tried
GAIN = 1.03  # a larger batch must be this much faster per row to be worth its memory


@dataclass(frozen=True, slots=True)
class Probe:
    """What one try of a model told: how it will be run, and how fast it is."""

    backend: str
    provider: str
    precision: str
    version: str
    batch_size: int
    free_batch: bool
    classes: int
    rows_per_second: float
    trials: Mapping[int, float] = field(default_factory=dict)


def probe(
    arguments: Mapping[str, Any],
    *,
    backend: str = "auto",
    provider: str | None = None,
    precision: str = "auto",
    batch_size: int | None = None,
    rows: int = 0,
    deadline: float = DEADLINE,
    memory: int | None = None,
) -> Probe:
    """Load and run a model in a child process.

    Args:
        arguments: of `opening.load`.
        batch_size: rows per call; None measures which is best, where `rows` (the work planned) is worth it.
        deadline: seconds until the child is killed.
        memory: bytes the child may map on top of what it starts with; None is what the machine has.

    Raises:
        HeatmillError: what the child was refused; ModelError where it was killed or ran out of memory or time.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    limit = memory or psutil.virtual_memory().total
    options = (dict(arguments), backend, provider, precision, batch_size, rows)
    child = context.Process(target=_child, args=(theirs, limit, options), daemon=True)
    with shielded():
        child.start()
    theirs.close()
    name = str(arguments["model"])
    try:
        if not ours.poll(deadline):
            raise ModelError(f"{name}: the model gave no answer within {deadline:.0f} s")
        answer = ours.recv()
    except EOFError:
        child.join()
        raise ModelError(f"{name}: the process that tried the model died ({describe_exit(child.exitcode)})") from None
    finally:
        child.kill()
        child.join()
    if isinstance(answer, Exception):
        raise answer
    result: Probe = answer
    return result


def _child(answers: Connection, memory: int, options: tuple[Any, ...]) -> None:
    settle()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # runtimes write their own lines on a failure, beside the error they raise
    _limit_memory(memory)
    name = str(options[0]["model"])
    answer: Probe | Exception
    try:
        answer = _try(*options)
    except HeatmillError as err:
        answer = err
    except Exception as err:
        if ran_out_of_memory(err):
            answer = ModelError(f"{name}: running the model needs more memory than this machine has")
        else:
            line = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            answer = ModelError(f"{name}: running the model failed ({line[:300]})")
    answers.send_bytes(pickle.dumps(answer))


def ran_out_of_memory(err: Exception) -> bool:
    """Whether an error of Python or of a runtime says that no memory was left."""
    text = str(err).lower()
    return isinstance(err, MemoryError) or "failed to allocate memory" in text or "bad_alloc" in text


def _limit_memory(memory: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory + psutil.Process().memory_info().vms
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _try(
    arguments: dict[str, Any],
    backend: str,
    provider: str | None,
    precision: str,
    batch_size: int | None,
    rows: int,
) -> Probe:
    loaded = load(**arguments)
    free = batch_is_free(loaded, backend, provider, precision)
    fixed = loaded.model.input.batch

    def opened(size: int) -> Session:
        return open_best(loaded, backend, provider, precision, size)

    size = batch_size or DEFAULT_BATCH
    if not free and fixed is not None:
        size = fixed
    session = opened(size)
    try:
        apart = _rows_apart(loaded, session, min(size, 2) if session.flexible and free else size)
    except Exception as err:
        if fixed is not None or ran_out_of_memory(err):
            raise
        apart = False  # the graph hard-codes a batch of 1 behind an axis that it calls open
    if not apart:
        if fixed is not None:
            raise ModelError(
                f"{loaded.model.path.name}: in its batch of {fixed}, an image's scores depend on the other images; "
                "export it with a dynamic batch, or a batch of 1"
            )
        size, free, session = 1, False, opened(1)
    classes = _check(loaded, session, 1 if session.flexible and free else size)
    trials: dict[int, float] = {}
    if free and batch_size is None and session.flexible and rows > 20 * DEFAULT_BATCH:
        trials = _trials(lambda count: _seconds(loaded, session, count))
        size = next(count for count, speed in trials.items() if speed * GAIN >= max(trials.values()))
        speed = trials[size]
    else:
        count = min(size, 8) if session.flexible and free else size
        speed = count / _seconds(loaded, session, count)
    return Probe(
        session.backend, session.provider, session.precision, session.version, size, free, classes, speed, trials
    )


def _trials(seconds: Callable[[int], float]) -> dict[int, float]:
    """Rows per second by batch size, until a batch would take too long."""
    speeds: dict[int, float] = {}
    for count in TRIAL_SIZES:
        if speeds and count / max(speeds.values()) > TRIAL_SECONDS:
            break
        try:
            speeds[count] = count / min(seconds(count), seconds(count))
        except Exception as err:
            if not speeds or not ran_out_of_memory(err):
                raise
            break
    return speeds


def _seconds(loaded: Loaded, session: Session, rows: int) -> float:
    batch = blank_batch(loaded, rows)
    start = time.perf_counter()
    session.run({loaded.model.input.name: batch}, [loaded.scores])
    return time.perf_counter() - start


def _rows_apart(loaded: Loaded, session: Session, rows: int) -> bool:
    """Whether the first of `rows` keeps its scores when the others change.

    The others are ten times brighter, which also shows where one scale is computed for the whole batch.
    """
    batch = np.random.default_rng(0).random(blank_batch(loaded, rows).shape) * 0.1
    scores: list[Array] = []
    for brightness in (1, 10):
        batch[1:] *= brightness
        feed = (batch * 255 if loaded.model.input.dtype == "uint8" else batch).astype(loaded.model.input.dtype)
        scores.append(session.run({loaded.model.input.name: feed}, [loaded.scores])[0].reshape(rows, -1)[0])
    alone, beside = scores
    return bool(np.allclose(alone, beside, rtol=1e-2, atol=1e-3 * float(np.abs(alone).max()), equal_nan=True))


def _check(loaded: Loaded, session: Session, rows: int) -> int:
    """Run a blank batch; what comes out must be what the graph and the spec say. Returns the number of classes."""
    name = loaded.model.path.name
    outputs = [loaded.scores, *([loaded.tap.name] if loaded.tap else [])]
    values = session.run({loaded.model.input.name: blank_batch(loaded, rows)}, outputs)
    raw = values[0].reshape(rows, -1).astype(np.float64)
    require_classes(loaded, raw.shape[1])
    if loaded.spec.output == "probabilities" and loaded.posterior == "none" and abs(raw[0].sum() - 1) > 1e-2:
        raise ModelError(f"{name}: the spec says probabilities, and a row of scores sums to {raw[0].sum():.3g}")
    if loaded.tap is not None:
        loaded.tap.to_nchw(values[1])
    return int(raw.shape[1])
