"""What a backend promises, and what it may know of the machine.

A backend module has `open(model, profile) -> Session` and `survey() -> list[Offer]`. A session runs one graph on one
device: `run` takes arrays of exactly `profile.batch_size` rows (or fewer, where `flexible`), gives the asked outputs in
order as arrays that are the caller's to keep, and never answers from a device or at a precision that was not asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]

PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Profile:
    """How a graph is to be run: rows per call, arithmetic, provider of the runtime (None: its first), threads.

    `lean` asks for less memory where the runtime's plan of it costs more than it saves: graphs that run both ways keep
    many values for long.
    """

    batch_size: int
    precision: str = "fp32"
    provider: str | None = None
    threads: int | None = None
    lean: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """A backend (and provider) on this machine: the precisions it gives, or why it can't be used."""

    backend: str
    provider: str
    version: str
    precisions: tuple[str, ...]
    note: str


class Session(Protocol):
    """A loaded graph, ready to run."""

    backend: str
    provider: str
    precision: str
    version: str
    flexible: bool

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]: ...


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
