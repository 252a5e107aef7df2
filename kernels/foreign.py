"""Arrays of other libraries that lie on a GPU: CuPy, PyTorch, PyCUDA, JAX, by the two protocols they share."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .device import DeviceArray, Driver

CUDA = (2, 13)  # DLPack's device types: CUDA's own memory, managed memory
NO_WAIT = -1  # DLPack's way to say that the consumer waits by itself
KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLPack's type codes that NumPy has


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def on_device(value: object) -> bool:
    """Whether a value is an array on a GPU."""
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) in CUDA
    return hasattr(value, "__cuda_array_interface__")


def as_device_array(value: Any, driver: Driver) -> DeviceArray:
    """A GPU's array by DLPack or `__cuda_array_interface__`, without a copy; what is still written to it is waited for.

    Raises:
        ValueError: it is not on the driver's GPU, not C-contiguous, of a type that NumPy does not have, or its library
            does not hand it out.
    """
    if not on_device(value):
        raise ValueError(f"a {type(value).__name__} is no array on a GPU")
    driver.finish()
    if hasattr(value, "__dlpack_device__"):
        return _by_dlpack(value, driver)
    described = value.__cuda_array_interface__
    shape, dtype = tuple(described["shape"]), np.dtype(described["typestr"])
    strides = described.get("strides")
    if strides is not None and math.prod(shape) > 1:
        _contiguous(shape, tuple(int(step) // dtype.itemsize for step in strides))
    return DeviceArray(int(described["data"][0]), shape, dtype, value)


def to_host(value: Any, driver: Driver, stream: int) -> npt.NDArray[Any]:
    """A GPU's array as one of NumPy, copied on a stream of the driver's."""
    array = as_device_array(value, driver)
    result = np.empty(array.shape, array.dtype)
    driver.to_host(result, array.pointer, stream)
    driver.synchronize(stream)
    return result


def _by_dlpack(value: Any, driver: Driver) -> DeviceArray:
    index = int(value.__dlpack_device__()[1])
    if index != driver.index:
        raise ValueError(f"an array on GPU {index}, and heatmill works on GPU {driver.index}")
    try:
        capsule = value.__dlpack__(stream=NO_WAIT)
    except (BufferError, RuntimeError) as err:  # PyTorch's that are part of a gradient
        raise ValueError(f"a {type(value).__name__} that its library does not hand out: {err}") from err
    read = ctypes.pythonapi.PyCapsule_GetPointer
    read.restype, read.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = ctypes.cast(read(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    kind = KINDS.get(tensor.code)
    if kind is None or tensor.lanes != 1:
        raise ValueError(f"NumPy has no type for an array of DLPack's type {tensor.code}; give float32 or uint8")
    dtype = np.dtype(f"{kind}{tensor.bits // 8}")
    if tensor.strides and math.prod(shape) > 1:
        _contiguous(shape, tuple(tensor.strides[axis] for axis in range(tensor.ndim)))
    return DeviceArray(tensor.data + tensor.byte_offset, shape, dtype, capsule)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Refuse elements that do not follow one another; an axis of one element may have any stride."""
    expected = 1
    for side, step in zip(reversed(shape), reversed(strides), strict=True):
        if side != 1 and step != expected:
            raise ValueError(f"an array of {shape} with strides {strides} is not C-contiguous; make it so first")
        expected *= side
