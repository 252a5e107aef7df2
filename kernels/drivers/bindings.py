"""NVIDIA's own bindings of the driver API (the package cuda-bindings): the default way to a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver as cuda

from ... import BackendError
from ..device import Argument, Array, OutOfMemory

LEAST_DRIVER = 13000  # CUDA 13.0, which the shipped cubins are made for
KINDS: dict[type, Any] = {np.int32: ctypes.c_int32, np.float32: ctypes.c_float, int: ctypes.c_void_p}


class BindingsDriver:
    """One GPU by its primary context, which other libraries of the process share."""

    name = "cuda-bindings"

    def __init__(self, index: int) -> None:
        try:
            _done(cuda.cuInit(0))
        except RuntimeError as err:  # libcuda is looked for at the first call
            raise BackendError(f"no NVIDIA driver on this machine ({_first(err)})") from err
        version = _done(cuda.cuDriverGetVersion())
        if version < LEAST_DRIVER:
            told = f"CUDA {version // 1000}.{version % 1000 // 10}"
            raise BackendError(f"the NVIDIA driver knows {told}; CUDA 13 is needed: update the driver")
        count = _done(cuda.cuDeviceGetCount())
        if not 0 <= index < count:
            raise BackendError(f"no GPU {index}: this machine has {count}")
        device = _done(cuda.cuDeviceGet(index))
        self.index = index
        self.device = _done(cuda.cuDeviceGetName(128, device)).split(b"\0")[0].decode()
        kinds = cuda.CUdevice_attribute
        major, minor = (
            _done(cuda.cuDeviceGetAttribute(kind, device))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.architecture = f"sm_{major}{minor}"
        self._context = _done(cuda.cuDevicePrimaryCtxRetain(device))
        self._enter()

    def _enter(self) -> None:
        """Make the context this thread's."""
        _done(cuda.cuCtxSetCurrent(self._context))

    def alloc(self, nbytes: int) -> int:
        self._enter()
        return int(_done(cuda.cuMemAlloc(nbytes)))

    def free(self, pointer: int) -> None:
        self._enter()
        _done(cuda.cuMemFree(pointer))

    def memory(self) -> tuple[int, int]:
        self._enter()
        free, total = _done(cuda.cuMemGetInfo())
        return int(free), int(total)

    def stream(self) -> int:
        self._enter()
        return int(_done(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))))

    def synchronize(self, stream: int) -> None:
        self._enter()
        _done(cuda.cuStreamSynchronize(stream))

    def finish(self) -> None:
        self._enter()
        _done(cuda.cuCtxSynchronize())

    def to_device(self, pointer: int, array: Array, stream: int) -> None:
        self._enter()
        _done(cuda.cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, stream))

    def to_host(self, array: Array, pointer: int, stream: int) -> None:
        self._enter()
        _done(cuda.cuMemcpyDtoHAsync(array.ctypes.data, pointer, array.nbytes, stream))

    def event(self) -> int:
        self._enter()
        return int(_done(cuda.cuEventCreate(int(cuda.CUevent_flags.CU_EVENT_DEFAULT))))

    def record(self, event: int, stream: int) -> None:
        self._enter()
        _done(cuda.cuEventRecord(event, stream))

    def wait(self, stream: int, event: int) -> None:
        self._enter()
        _done(cuda.cuStreamWaitEvent(stream, event, 0))

    def seconds(self, start: int, stop: int) -> float:
        self._enter()
        return float(_done(cuda.cuEventElapsedTime(start, stop))) / 1000

    def load(self, binary: bytes) -> int:
        self._enter()
        return int(_done(cuda.cuModuleLoadData(binary)))

    def function(self, module: int, name: str) -> int:
        self._enter()
        return int(_done(cuda.cuModuleGetFunction(module, name.encode())))

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        stream: int,
        shared: int = 0,
    ) -> None:
        self._enter()
        values = tuple(value if isinstance(value, int) else value.item() for value in arguments)
        kinds = tuple(KINDS[type(value)] for value in arguments)
        _done(cuda.cuLaunchKernel(function, *grid, *block, shared, stream, (values, kinds), 0))


def open(index: int) -> BindingsDriver:
    """The driver of one GPU.

    Raises:
        BackendError: no NVIDIA driver, one too old, or no such GPU.
    """
    return BindingsDriver(index)


def _done(result: tuple[Any, ...]) -> Any:
    """What a call gave besides its status: nothing, one value, or several."""
    status, *values = result
    if status == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory("the GPU is out of memory; a smaller --batch-size needs less")
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the GPU's driver failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _first(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]
