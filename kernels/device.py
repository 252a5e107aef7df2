"""Device memory, streams and kernels as plain numbers: what a driver promises, whoever provides it.

Pointers, streams, events, modules and functions are ints, so that a runtime, our kernels and a user's own arrays can
share one device without knowing of one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import BackendError

Array = npt.NDArray[Any]
Argument = int | np.generic


class OutOfMemory(BackendError):
    """The device has no room for an allocation; a smaller batch may fit."""


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A C-contiguous array in a device's memory; `owner` keeps the memory alive where it is not a driver's."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> DeviceArray:
        """The rows `start` .. `stop` of its first axis, in the same memory."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of an array of {self.shape[0]}")
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.pointer + start * step, (stop - start, *self.shape[1:]), self.dtype, self.owner)


class Driver(Protocol):
    """One device of one machine.

    Copies, launches and events are queued on a stream in order; `synchronize` waits for them. Copies of host arrays
    return when the host array may be changed (to the device) or read (to the host, after `synchronize`).

    Attributes:
        name: the provider, as a user names it.
        index: the device's number on this machine.
        device: what the device calls itself.
        architecture: what kernels are compiled for, as "sm_90".
    """

    name: str
    index: int
    device: str
    architecture: str

    def alloc(self, nbytes: int) -> int:
        """Memory at a multiple of 256 bytes, or OutOfMemory."""
        ...

    def free(self, pointer: int) -> None:
        """Give memory back, once what is queued so far has run."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def stream(self) -> int: ...

    def synchronize(self, stream: int) -> None: ...

    def finish(self) -> None:
        """Wait for all that anybody of this process has queued on the device."""
        ...

    def to_device(self, pointer: int, array: Array, stream: int) -> None: ...

    def to_host(self, array: Array, pointer: int, stream: int) -> None: ...

    def event(self) -> int: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None:
        """Let what is queued on `stream` from now on wait for `event`."""
        ...

    def seconds(self, start: int, stop: int) -> float:
        """The time between two events that have happened."""
        ...

    def load(self, binary: bytes) -> int:
        """A module of compiled kernels."""
        ...

    def function(self, module: int, name: str) -> int: ...

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        stream: int,
        shared: int = 0,
    ) -> None:
        """Queue a kernel; pointers are ints, other arguments NumPy scalars of the kernel's own types."""
        ...
