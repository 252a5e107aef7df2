"""A device that is none: the kernels' own sources, compiled for the CPU, behind the protocol of a driver.

Streams are lazy: what is queued runs when somebody waits for it, so that a result read too early is seen to be wrong.
"""

from __future__ import annotations

import bisect
import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from heatmill.kernels.binaries import SOURCES, write_whole
from heatmill.kernels.cuda import KERNELS
from heatmill.kernels.device import Argument, Array, Driver, OutOfMemory

FOLDER = Path(__file__).parent
FAULTS = {"divergent_barrier": True, "unexpected_barrier": False, "overrun": False}
NAMES = ("", "a barrier that only some threads of the block reach", "a barrier in a kernel that declares none")
KINDS = {"i": np.int32, "f": np.float32}
GUARD, GUARD_BYTE = 256, 0xA5


def entry_points() -> dict[str, bool]:
    """Every kernel, and whether it has barriers."""
    found = {}
    for stem, names in KERNELS.items():
        text = (SOURCES / f"{stem}.cu").read_text()
        found |= dict.fromkeys(names, "fold_block" in text or "__syncthreads" in text)
    return found


def build(*, sanitize: bool = False, extra: str = "") -> Path:
    """The shared library of all kernels, compiled at most once for these sources.

    Args:
        sanitize: with AddressSanitizer, whose library the process must then have loaded first.
        extra: further C++ after the kernels.
    """
    units = [*(f"{stem}.cu" for stem in KERNELS), "faults.cu"]
    launchers = [f"LAUNCHER({name}, {str(barriers).lower()})" for name, barriers in (entry_points() | FAULTS).items()]
    text = "\n".join(['#include "emulator.h"', *(f'#include "{unit}"' for unit in units), *launchers, extra])
    flags = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
    if sanitize:
        flags += ["-fsanitize=address", "-fno-omit-frame-pointer"]
    files = sorted([*SOURCES.iterdir(), *FOLDER.glob("*.h"), *FOLDER.glob("*.cu")])
    everything = [text, *flags, *(file.read_text() for file in files)]
    name = hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / "heatmill-emulator" / f"{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder, "kernels.cpp")
            unit.write_text(text)
            made = Path(folder, "kernels.so")
            include = [f"-I{SOURCES}", f"-I{FOLDER}"]
            subprocess.run(["g++", *flags, *include, str(unit), "-o", str(made), "-ldl"], check=True)
            write_whole(library, made.read_bytes())
    return library


def missing() -> str | None:
    """Why the emulator can't be built here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


@dataclass
class _Stream:
    queue: list[Callable[[], None]] = field(default_factory=list)
    queued: int = 0
    ran: int = 0


@dataclass
class _Event:
    stream: int = 0
    position: int = 0
    at: float | None = None


class EmulatedDriver:
    """A driver over host memory.

    Args:
        total: bytes of memory that it has; more is OutOfMemory.
        library: what `build` gave; built now if none is given.
        guard: bytes around every allocation, which no kernel may write to. Zero leaves that to AddressSanitizer.
        lazy: whether work waits until somebody waits for it.
    """

    name = "emulated"
    device = "emulated device"
    architecture = "emulated"

    def __init__(
        self,
        index: int = 0,
        *,
        total: int = 1 << 30,
        library: Path | None = None,
        guard: int = GUARD,
        lazy: bool = True,
    ) -> None:
        self.index = index
        self.launches: list[str] = []
        self._library = ctypes.CDLL(str(library or build()))
        self._libc = ctypes.CDLL(None)
        self._libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._total, self._guard, self._lazy = total, guard, lazy
        self._memory: dict[int, int] = {}
        self._objects: dict[int, Any] = {}
        self._lock = threading.RLock()

    def alloc(self, nbytes: int) -> int:
        with self._lock:
            free = self.memory()[0]
            if nbytes > free:
                raise OutOfMemory(f"{self.device}: no room for {nbytes} bytes, {free} of {self._total} are free")
            place = ctypes.c_void_p()
            if self._libc.posix_memalign(ctypes.byref(place), 256, nbytes + 2 * self._guard) or place.value is None:
                raise MemoryError(f"the host has no room for {nbytes} bytes")
            base = place.value
            ctypes.memset(base, GUARD_BYTE, nbytes + 2 * self._guard)
            ctypes.memset(base + self._guard, 0xFF, nbytes)  # NaN, so that what nobody wrote is seen
            self._memory[base + self._guard] = nbytes
            return base + self._guard

    def free(self, pointer: int) -> None:
        with self._lock:
            self.finish()
            if pointer not in self._memory:
                raise ValueError(f"{pointer:#x} is no allocation")
            self._check_guards("what ran before")
            del self._memory[pointer]
            self._libc.free(pointer - self._guard)

    def memory(self) -> tuple[int, int]:
        return self._total - sum(self._memory.values()), self._total

    def stream(self) -> int:
        return self._keep(_Stream())

    def synchronize(self, stream: int) -> None:
        with self._lock:
            self._run(stream, self._stream(stream).queued)

    def finish(self) -> None:
        with self._lock:
            for stream in [number for number, held in self._objects.items() if isinstance(held, _Stream)]:
                self.synchronize(stream)

    def to_device(self, pointer: int, array: Array, stream: int) -> None:
        copy = np.ascontiguousarray(array).copy()
        self._check_range(pointer, copy.nbytes)
        self._queue(stream, lambda: ctypes.memmove(pointer, copy.ctypes.data, copy.nbytes))

    def to_host(self, array: Array, pointer: int, stream: int) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("a copy to the host needs a contiguous array")
        self._check_range(pointer, array.nbytes)
        ctypes.memset(array.ctypes.data, 0xFF, array.nbytes)  # so that what is read too early is seen
        self._queue(stream, lambda: ctypes.memmove(array.ctypes.data, pointer, array.nbytes))

    def event(self) -> int:
        return self._keep(_Event())

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            held = self._objects[event]
            held.stream, held.position, held.at = stream, self._stream(stream).queued + 1, None

            def happen() -> None:
                held.at = time.perf_counter()

            self._queue(stream, happen)

    def wait(self, stream: int, event: int) -> None:
        held = self._objects[event]
        other, position = held.stream, held.position
        if other:
            self._queue(stream, lambda: self._run(other, position))

    def seconds(self, start: int, stop: int) -> float:
        begin, end = self._objects[start].at, self._objects[stop].at
        if begin is None or end is None:
            raise ValueError("an event has not happened yet")
        return float(end - begin)

    def load(self, binary: bytes) -> int:
        return 1

    def function(self, module: int, name: str) -> int:
        return self._keep(name)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        stream: int,
        shared: int = 0,
    ) -> None:
        name = self._objects[function]
        kinds = getattr(self._library, f"kinds_{name}")
        kinds.restype = ctypes.c_char_p
        self._check_arguments(name, kinds().decode(), arguments)
        if min(*grid, *block) < 1 or max(grid[1:]) > 65535 or np.prod(block) > 1024:
            raise ValueError(f"{name}: no GPU takes a grid of {grid} blocks of {block}")
        values = [ctypes.c_uint64(value) if isinstance(value, int) else value.copy() for value in arguments]
        holders = [value if isinstance(value, ctypes.c_uint64) else np.atleast_1d(value) for value in values]
        places = [ctypes.addressof(h) if isinstance(h, ctypes.c_uint64) else h.ctypes.data for h in holders]

        def run() -> None:
            triple = ctypes.c_uint * 3
            run_it = getattr(self._library, f"launch_{name}")
            fault = run_it(triple(*grid), triple(*block), (ctypes.c_void_p * len(places))(*places))
            del holders[:]
            self.launches.append(name)
            if fault:
                raise RuntimeError(f"{name}: {NAMES[fault]}")
            self._check_guards(name)

        self._queue(stream, run)

    def _keep(self, held: Any) -> int:
        with self._lock:
            number = len(self._objects) + 1
            self._objects[number] = held
            return number

    def _stream(self, stream: int) -> _Stream:
        held = self._objects.get(stream)
        if not isinstance(held, _Stream):
            raise ValueError(f"{stream} is no stream")
        return held

    def _queue(self, stream: int, work: Callable[[], object]) -> None:
        with self._lock:
            held = self._stream(stream)
            held.queue.append(work)  # type: ignore[arg-type]
            held.queued += 1
            if not self._lazy:
                self._run(stream, held.queued)

    def _run(self, stream: int, position: int) -> None:
        """Run what was queued on a stream up to a position."""
        held = self._stream(stream)
        while held.ran < position:
            held.ran += 1
            held.queue.pop(0)()

    def _check_arguments(self, name: str, kinds: str, arguments: Sequence[Argument]) -> None:
        if len(arguments) != len(kinds):
            raise TypeError(f"{name} takes {len(kinds)} arguments, not {len(arguments)}")
        for i, (kind, value) in enumerate(zip(kinds, arguments, strict=True)):
            if kind == "p":
                if type(value) is not int:
                    raise TypeError(f"{name}: argument {i} is a pointer, so an int, not {type(value).__name__}")
                if value:
                    self._check_range(value, 1)
            elif type(value) is not KINDS[kind]:
                raise TypeError(f"{name}: argument {i} is {KINDS[kind].__name__}, not {type(value).__name__}")

    def _check_range(self, pointer: int, nbytes: int) -> None:
        starts = sorted(self._memory)
        at = bisect.bisect_right(starts, pointer) - 1
        if nbytes and (at < 0 or pointer + nbytes > starts[at] + self._memory[starts[at]]):
            raise ValueError(f"{nbytes} bytes at {pointer:#x} lie outside every allocation")

    def _check_guards(self, name: str) -> None:
        for pointer, nbytes in self._memory.items():
            for start in (pointer - self._guard, pointer + nbytes):
                if ctypes.string_at(start, self._guard) != bytes([GUARD_BYTE]) * self._guard:
                    raise RuntimeError(f"{name} wrote outside an allocation of {nbytes} bytes")


def open(index: int) -> Driver:
    """So that a test may add a row to DRIVERS."""
    return EmulatedDriver(index)


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
