"""PyCUDA, for those who have it: the same device and its primary context, by the package's own objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import BackendError
from ..device import Argument, Array, OutOfMemory

try:
    import pycuda.driver as cuda
except ImportError as err:
    if isinstance(err, ModuleNotFoundError):
        raise
    raise BackendError(f"pycuda is installed and can't be loaded ({err}): it needs NVIDIA's driver") from err


class PycudaDriver:
    """One GPU by its primary context, never by one of PyCUDA's own, which nothing else would share. For one thread."""

    name = "pycuda"

    def __init__(self, index: int) -> None:
        try:
            cuda.init()
            count = cuda.Device.count()
        except cuda.Error as err:
            raise BackendError(f"no usable NVIDIA driver on this machine ({err})") from err
        if not 0 <= index < count:
            raise BackendError(f"no GPU {index}: this machine has {count}")
        device = cuda.Device(index)
        self.index = index
        self.device = device.name()
        major, minor = device.compute_capability()
        self.architecture = f"sm_{major}{minor}"
        self._context = device.retain_primary_context()
        self._context.push()
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._held: dict[int, Any] = {}

    def alloc(self, nbytes: int) -> int:
        try:
            memory = cuda.mem_alloc(nbytes)
        except cuda.MemoryError as err:
            raise OutOfMemory("the GPU is out of memory; a smaller --batch-size needs less") from err
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        self._memory.pop(pointer).free()

    def memory(self) -> tuple[int, int]:
        free, total = cuda.mem_get_info()
        return int(free), int(total)

    def stream(self) -> int:
        stream = cuda.Stream()
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def finish(self) -> None:
        cuda.Context.synchronize()

    def to_device(self, pointer: int, array: Array, stream: int) -> None:
        cuda.memcpy_htod_async(pointer, array, self._streams[stream])

    def to_host(self, array: Array, pointer: int, stream: int) -> None:
        cuda.memcpy_dtoh_async(array, pointer, self._streams[stream])

    def event(self) -> int:
        return self._keep(cuda.Event())

    def record(self, event: int, stream: int) -> None:
        self._held[event].record(self._streams[stream])

    def wait(self, stream: int, event: int) -> None:
        self._streams[stream].wait_for_event(self._held[event])

    def seconds(self, start: int, stop: int) -> float:
        return float(self._held[stop].time_since(self._held[start])) / 1000

    def load(self, binary: bytes) -> int:
        return self._keep(cuda.module_from_buffer(binary))

    def function(self, module: int, name: str) -> int:
        return self._keep(self._held[module].get_function(name))

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        stream: int,
        shared: int = 0,
    ) -> None:
        values = [np.uintp(value) if isinstance(value, int) else value for value in arguments]
        self._held[function](*values, grid=grid, block=block, shared=shared, stream=self._streams[stream])

    def _keep(self, held: Any) -> int:
        """A number for one of PyCUDA's objects."""
        self._held[id(held)] = held
        return id(held)


def open(index: int) -> PycudaDriver:
    """The driver of one GPU.

    Raises:
        BackendError: no NVIDIA driver or no such GPU.
    """
    return PycudaDriver(index)
