"""What a backend promises, and what it may know of the machine.

A backend module has `open(model, profile) -> Session` and `survey(device) -> list[Offer]`. A session runs one graph on
one device: `run` takes arrays of exactly `profile.batch_size` rows (or fewer, where `flexible`), and gives the asked
outputs in order as arrays that are the caller's to keep. It never answers from a device or at a precision that was not
asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ... import BackendError
from ...kernels.device import DeviceArray, Driver

Array = npt.NDArray[Any]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Profile:
    """How a graph is to be run: rows per call, arithmetic, provider of the runtime (None: its first), threads.

    `lean` asks for less memory where the runtime's plan of it costs more than it saves: graphs that run both ways keep
    many values for long.

    Runtimes of a GPU read the rest: `device` is its number, `input_shape` the sizes of one row of the image, for files
    that leave them open, and `cache` the folder of what was built (None: the user's cache folder).
    """

    batch_size: int
    precision: str = "fp32"
    provider: str | None = None
    threads: int | None = None
    lean: bool = False
    device: int = 0
    input_shape: tuple[int, ...] = ()
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """A backend (and provider) on this machine: the precisions it gives, or why it can't be used.

    `halves` says that a file in fp32 may be run in fp16 too; `by_name` that it is only taken where it is asked for;
    `on_device` that it runs on a GPU.
    """

    backend: str
    provider: str
    version: str
    precisions: tuple[str, ...]
    note: str
    halves: bool = False
    by_name: bool = False
    on_device: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a backend built of a graph, and what is known of it without opening it.

    Attributes:
        data: what the runtime's library made.
        path: where it is kept.
        about: the JSON beside it: inputs and outputs with shapes and types, rows, seconds, memory, key.
        cached: whether it was there already.
    """

    data: bytes
    path: Path
    about: Mapping[str, Any]
    cached: bool


class Session(Protocol):
    """A loaded graph, ready to run."""

    backend: str
    provider: str
    precision: str
    version: str
    flexible: bool

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]: ...


@runtime_checkable
class DeviceSession(Session, Protocol):
    """A session whose values may stay in the memory of a GPU.

    Attributes:
        stream: what `run_on_device` queues its work on.
        driver: of the memory and the stream.
        input_dtype: the type in which the image is taken; `run` casts to it.
        memory_per_row: bytes of the device that a row needs while the graph runs, 0 where that is not known.
        engine_bytes: size of what was built, 0 where nothing is.
    """

    stream: int
    driver: Driver
    input_dtype: np.dtype[Any]
    memory_per_row: int
    engine_bytes: int

    def described(
        self, feeds: Mapping[str, DeviceArray], outputs: Sequence[str]
    ) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of what `run_on_device` writes for such feeds."""
        ...

    def run_on_device(self, feeds: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Queue one batch on `stream`: from arrays on the device into arrays on the device."""
        ...


def device_of(session: Session) -> int:
    """The number of the GPU that a session is on; 0 where it is on none."""
    return session.driver.index if isinstance(session, DeviceSession) else 0


def open_driver(index: int) -> Driver:
    """The driver of a GPU.

    Raises:
        BackendError: there is none here that can be used.
    """
    try:
        driver: Driver = import_module("...kernels.drivers", __package__).open_driver(index=index)
    except BackendError:
        raise
    except Exception as err:  # a driver's own error, or a library of it that is missing
        raise BackendError(f"no GPU {index} can be used here: {first_line(err)}") from err
    return driver


def first_line(err: BaseException) -> str:
    """An error's first line, or its type where it says nothing."""
    return next(iter(str(err).strip().splitlines()), type(err).__name__)


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags (Linux; empty elsewhere)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()
