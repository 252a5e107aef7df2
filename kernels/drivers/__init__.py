"""The packages that reach a CUDA device, by name: each is imported in the one file that is its door."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ... import BackendError
from ..device import Driver

__all__ = ["DRIVERS", "open_driver"]

# name -> (module, what installs it); the first that opens is what "auto" means
DRIVERS: dict[str, tuple[str, str]] = {
    "cuda-bindings": (".bindings", "heatmill[gpu]"),
    "pycuda": (".pycuda", "heatmill[pycuda]"),
}


def open_driver(name: str = "auto", index: int = 0) -> Driver:
    """The driver of one device, the same object each time.

    Raises:
        BackendError: unknown or not installed (with the pip line), no NVIDIA driver, one too old, or no such device.
    """
    if name != "auto":
        return _open(name, index)
    refusals = []
    for known in DRIVERS:
        try:
            return _open(known, index)
        except BackendError as err:
            refusals.append(str(err))
    raise BackendError("; ".join(dict.fromkeys(refusals)))


@cache
def _open(name: str, index: int) -> Driver:
    if name not in DRIVERS:
        raise BackendError(f"no driver {name!r}; known: auto, {', '.join(DRIVERS)}")
    module, extra = DRIVERS[name]
    try:
        door = import_module(module, __package__)
    except ModuleNotFoundError as err:
        raise BackendError(f"driver {name!r} needs {err.name}: pip install '{extra}'") from err
    driver: Driver = door.open(index)
    return driver
