"""Tries a model once, in a process of its own with bounded memory and time, before anything is planned on it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from ... import HeatmillError, ModelError
from ..backends import first_line, open_driver, survey
from ..opening import Loaded, blank_batch, load
from ..passes import open_passes, row_seconds
from ..trial import Trial, ran_out_of_memory, try_model
from ..types import Target
from .child import describe_exit, settle, shielded

DEADLINE = 180.0

log = logging.getLogger("heatmill")


def probe(
    arguments: Mapping[str, Any],
    *,
    backend: str = "auto",
    provider: str | None = None,
    precision: str = "auto",
    batch_size: int | None = None,
    rows: int = 0,
    targets: tuple[Target, ...] = (Target("predicted"),),
    deadline: float = DEADLINE,
    memory: int | None = None,
    devices: tuple[int, ...] = (),
) -> Trial:
    """Load and run a model in a child process.

    Args:
        arguments: of `opening.load`.
        batch_size: rows per call; None measures which is best, where `rows` (the work planned) is worth it.
        targets: the run's, which backward graphs are made for.
        deadline: seconds until the child is killed.
        memory: bytes the child may map on top of what it starts with; None is what the machine has.
        devices: numbers of the GPUs; the model is tried on the first, the others must be there.

    Raises:
        HeatmillError: what the child was refused; ModelError where it was killed or ran out of memory or time.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    limit = memory or psutil.virtual_memory().total
    how = (backend, provider, precision, batch_size, rows, None, devices[0] if devices else None)
    options = (dict(arguments), targets, how, devices[1:])
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
    result: Trial = answer
    for note in result.notes:  # what the child itself says is not heard
        log.warning("%s: %s", Path(name).name, note)
    return result


def _child(answers: Connection, memory: int, options: tuple[Any, ...]) -> None:
    settle()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # runtimes write their own lines on a failure, beside the error they raise
    name = str(options[0]["model"])
    answer: Trial | Exception
    try:
        if not any(offer.on_device and offer.precisions for offer in survey()):
            _limit_memory(memory)  # not beside a GPU: its driver maps more addresses than there is memory
        arguments, targets, how, others = options
        answer = _tried(load(**arguments), targets, how)
        for device in others:
            open_driver(device)
    except HeatmillError as err:
        answer = err
    except Exception as err:
        if ran_out_of_memory(err):
            answer = ModelError(f"{name}: running the model needs more memory than this machine has")
        else:
            answer = ModelError(f"{name}: running the model failed ({first_line(err)[:300]})")
    answers.send_bytes(pickle.dumps(answer))


def _tried(loaded: Loaded, targets: Sequence[Target], how: Sequence[Any]) -> Trial:
    """The trial, and where methods follow scores back, what that takes."""
    trial, session = try_model(loaded, *how)
    if not loaded.needs_weights:
        return trial
    passes = open_passes(loaded, session, targets, trial.batch_size)
    loaded.release()
    observe, through, head = row_seconds(passes, blank_batch(loaded, trial.batch_size))
    return replace(trial, observe_seconds=observe, through_seconds=through, head_seconds=head)


def _limit_memory(memory: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory + psutil.Process().memory_info().vms
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
