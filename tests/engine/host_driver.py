"""A device driver whose device is the host's own memory: pointers are real, copies happen at once."""

from __future__ import annotations

import ctypes

import numpy as np

from heatmill.kernels.device import DeviceArray


class HostDriver:
    """What a session needs of a `kernels.device.Driver`; it counts what is held."""

    name, index = "host", 0

    def __init__(self, architecture: str = "sm_89", total: int = 1 << 30, device: str = "Test GPU") -> None:
        self.architecture, self.total, self.device = architecture, total, device
        self.held: dict[int, np.ndarray] = {}
        self.synchronized: list[int] = []

    def alloc(self, nbytes: int) -> int:
        memory = np.full(max(1, nbytes), 0xFF, np.uint8)  # what nobody wrote is not a number
        self.held[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, pointer: int) -> None:
        del self.held[pointer]

    def memory(self) -> tuple[int, int]:
        return self.total - sum(memory.nbytes for memory in self.held.values()), self.total

    def stream(self) -> int:
        return 77

    def synchronize(self, stream: int) -> None:
        self.synchronized.append(stream)

    def finish(self) -> None:
        self.synchronized.append(0)

    def to_device(self, pointer: int, array: np.ndarray, stream: int) -> None:
        assert array.flags.c_contiguous
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def to_host(self, array: np.ndarray, pointer: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def put(self, array: np.ndarray) -> DeviceArray:
        pointer = self.alloc(array.nbytes)
        self.to_device(pointer, np.ascontiguousarray(array), 0)
        return DeviceArray(pointer, array.shape, array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: type) -> DeviceArray:
        return self.put(np.zeros(shape, dtype))

    def get(self, array: DeviceArray) -> np.ndarray:
        found = np.empty(array.shape, array.dtype)
        self.to_host(found, array.pointer, 0)
        return found
