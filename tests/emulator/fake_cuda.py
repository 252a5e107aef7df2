"""The packages that the drivers are written for, as far as they use them, over the emulated device.

Names, argument orders, results and errors are those of cuda-bindings 13 and PyCUDA 2026.
"""

from __future__ import annotations

import ctypes
import enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from heatmill.kernels.device import OutOfMemory
from tests.emulator.emulated import EmulatedDriver


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_VALUE = 1


def fake_bindings(emulated: EmulatedDriver, *, version: int = 13000, count: int = 1) -> ModuleType:
    """`cuda.bindings.driver`: every call gives a tuple that begins with its status."""
    module = ModuleType("cuda.bindings.driver")
    ok = CUresult.CUDA_SUCCESS

    def given(value: Any) -> tuple[Any, ...]:
        return ok, value

    def alloc(nbytes: int) -> tuple[Any, ...]:
        try:
            return ok, emulated.alloc(nbytes)
        except OutOfMemory:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0

    def host(pointer: int, nbytes: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))

    def launch(function, *rest: Any) -> tuple[Any, ...]:
        *sizes, shared, stream, (values, kinds), extra = rest
        assert (len(sizes), shared, extra) == (6, 0, 0)
        made = {ctypes.c_void_p: int, ctypes.c_int32: np.int32, ctypes.c_float: np.float32}
        arguments = [made[kind](value) for value, kind in zip(values, kinds, strict=True)]
        emulated.launch(function, tuple(sizes[:3]), tuple(sizes[3:]), arguments, stream)
        return (ok,)

    def done(call):
        def run(*given: Any) -> tuple[Any, ...]:
            call(*given)
            return (ok,)

        return run

    vars(module).update(
        CUresult=CUresult,
        CUdevice_attribute=SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
        ),
        CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1),
        CUevent_flags=SimpleNamespace(CU_EVENT_DEFAULT=0),
        cuInit=lambda flags: (ok,),
        cuDriverGetVersion=lambda: given(version),
        cuDeviceGetCount=lambda: given(count),
        cuDeviceGet=given,
        cuDeviceGetName=lambda length, device: given(b"a GPU\0".ljust(length, b"\0")),
        cuDeviceGetAttribute=lambda kind, device: given({75: 9, 76: 0}[kind]),
        cuDevicePrimaryCtxRetain=lambda device: given(object()),
        cuCtxSetCurrent=lambda context: (ok,),
        cuMemAlloc=alloc,
        cuMemFree=done(emulated.free),
        cuMemGetInfo=lambda: (ok, *emulated.memory()),
        cuStreamCreate=lambda flags: given(emulated.stream()),
        cuStreamSynchronize=done(emulated.synchronize),
        cuMemcpyHtoDAsync=done(lambda to, source, n, stream: emulated.to_device(to, host(source, n), stream)),
        cuMemcpyDtoHAsync=done(lambda to, source, n, stream: emulated.to_host(host(to, n), source, stream)),
        cuEventCreate=lambda flags: given(emulated.event()),
        cuEventRecord=done(emulated.record),
        cuStreamWaitEvent=done(lambda stream, event, flags: emulated.wait(stream, event)),
        cuEventElapsedTime=lambda start, stop: given(1000 * emulated.seconds(start, stop)),
        cuModuleLoadData=lambda binary: given(emulated.load(binary)),
        cuModuleGetFunction=lambda loaded, name: given(emulated.function(loaded, name.decode())),
        cuLaunchKernel=launch,
    )
    return module


def fake_pycuda(emulated: EmulatedDriver, *, count: int = 1) -> ModuleType:
    """`pycuda.driver`: objects that hold what they stand for."""
    module = ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    class NoMemory(Error):
        pass

    class Device:
        count = staticmethod(lambda: count)

        def __init__(self, index: int) -> None:
            self.index = index

        def name(self) -> str:
            return "a GPU"

        def compute_capability(self) -> tuple[int, int]:
            return 9, 0

        def retain_primary_context(self) -> Any:
            return SimpleNamespace(push=lambda: None)

    class DeviceAllocation:
        def __init__(self, pointer: int) -> None:
            self.pointer = pointer

        def __int__(self) -> int:
            return self.pointer

        def free(self) -> None:
            emulated.free(self.pointer)

    class Stream:
        def __init__(self) -> None:
            self.handle = emulated.stream()

        def synchronize(self) -> None:
            emulated.synchronize(self.handle)

        def wait_for_event(self, event: Any) -> None:
            emulated.wait(self.handle, event.number)

    class Event:
        def __init__(self) -> None:
            self.number = emulated.event()

        def record(self, stream: Stream) -> None:
            emulated.record(self.number, stream.handle)

        def time_since(self, start: Event) -> float:
            return 1000 * emulated.seconds(start.number, self.number)

    def mem_alloc(nbytes: int) -> DeviceAllocation:
        try:
            return DeviceAllocation(emulated.alloc(nbytes))
        except OutOfMemory as err:
            raise NoMemory(str(err)) from err

    def called(name: str) -> Any:
        function = emulated.function(1, name)

        def call(*values: Any, grid: Any, block: Any, shared: int, stream: Stream) -> None:
            assert shared == 0
            arguments = [int(value) if isinstance(value, np.uintp) else value for value in values]
            emulated.launch(function, grid, block, arguments, stream.handle)

        return call

    vars(module).update(
        Error=Error,
        MemoryError=NoMemory,
        init=lambda: None,
        Device=Device,
        Stream=Stream,
        Event=Event,
        mem_alloc=mem_alloc,
        mem_get_info=emulated.memory,
        memcpy_htod_async=lambda to, array, stream: emulated.to_device(to, array, stream.handle),
        memcpy_dtoh_async=lambda array, source, stream: emulated.to_host(array, source, stream.handle),
        module_from_buffer=lambda binary: SimpleNamespace(get_function=called),
    )
    return module


FAKES = {"cuda-bindings": ("cuda.bindings.driver", fake_bindings), "pycuda": ("pycuda.driver", fake_pycuda)}


def install(monkeypatch, name: str, emulated: EmulatedDriver, **options: int) -> Any:
    """Let the driver `name` find a stand-in for its package; returns the driver's module, freshly imported."""
    import sys
    from importlib import import_module

    from heatmill.kernels import cuda
    from heatmill.kernels.drivers import DRIVERS

    whole, make = FAKES[name]
    made = make(emulated, **options)
    *packages, last = whole.split(".")
    parent: ModuleType | None = None
    for i, part in enumerate(packages):
        package = ModuleType(".".join(packages[: i + 1]))
        package.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, package.__name__, package)
        if parent is not None:
            setattr(parent, part, package)
        parent = package
    setattr(parent, last, made)
    monkeypatch.setitem(sys.modules, whole, made)
    door = f"heatmill.kernels.drivers{DRIVERS[name][0]}"
    monkeypatch.setitem(sys.modules, door, made)  # so that the door, too, is as it was afterwards
    del sys.modules[door]
    monkeypatch.setattr(cuda, "binary_for", lambda architecture: b"")
    return import_module(door)
