"""Arrays of other libraries on a GPU, by stand-ins whose memory is the host's."""

from __future__ import annotations

import numpy as np
import pytest

from heatmill.kernels.foreign import as_device_array, on_device, to_host
from tests.engine.host_driver import HostDriver


class ByInterface:
    """As CuPy and PyTorch describe an array."""

    def __init__(self, array: np.ndarray, strides: bool = True, **more) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            **({"strides": array.strides} if strides else {}),
            **more,
        }


class ByDlpack:
    """As JAX describes an array: NumPy's own capsule, said to be of a GPU."""

    def __init__(self, array: np.ndarray, device: int = 2) -> None:
        self.array, self.device, self.streams = array, device, []

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()


ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.arange(6, dtype=np.uint8).reshape(1, 6)[:, 2:],
    np.arange(5, dtype=np.float16)[3:4],
    np.zeros((0, 3), np.float64),
    np.array([True, False]),
    np.arange(-3, 3, dtype=np.int64),
]


@pytest.mark.parametrize("array", ARRAYS, ids=str)
@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_memory_is_shared_and_values_are_read(kind, array):
    driver = HostDriver()
    given = kind(array)
    assert on_device(given)
    found = as_device_array(given, driver)
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert found.pointer == array.ctypes.data or array.size == 0
    np.testing.assert_array_equal(to_host(given, driver, 77), array)


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_what_is_still_written_is_waited_for(kind):
    driver, given = HostDriver(), kind(np.zeros(3, np.float32))
    as_device_array(given, driver)
    assert driver.synchronized == [0], "all of the device"
    if kind is ByDlpack:
        assert given.streams == [-1], "nothing more is asked of the array's library"


def test_arrays_elsewhere_and_those_that_are_not_handed_out():
    driver, given = HostDriver(), ByDlpack(np.zeros(3, np.float32))
    driver.index = 1
    with pytest.raises(ValueError, match="an array on GPU 0, and heatmill works on GPU 1"):
        as_device_array(given, driver)

    def refuse(stream=None):
        raise BufferError("it is part of a gradient")

    given.__dlpack__ = refuse
    with pytest.raises(ValueError, match="a ByDlpack that its library does not hand out: it is part of a gradient"):
        as_device_array(given, HostDriver())


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_elements_that_do_not_follow_one_another_are_refused(kind):
    for array in (np.zeros((4, 6), np.float32)[:, ::2], np.zeros((4, 6), np.float32).T):
        with pytest.raises(ValueError, match="is not C-contiguous"):
            as_device_array(kind(array), HostDriver())
    lone = np.zeros((3, 1, 4), np.float32).transpose(1, 0, 2)
    assert as_device_array(kind(lone), HostDriver()).shape == (1, 3, 4)


def test_what_is_no_array_of_a_gpu():
    assert not on_device(np.zeros(3))
    assert not on_device("cat.jpg")
    for value in (np.zeros(3), "cat.jpg", ByDlpack(np.zeros(3), device=1)):
        with pytest.raises(ValueError, match="is no array on a GPU"):
            as_device_array(value, HostDriver())
    with pytest.raises(ValueError, match="no type for an array of DLPack's type 5"):
        as_device_array(ByDlpack(np.zeros(3, np.complex64)), HostDriver())
