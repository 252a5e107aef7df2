"""NVIDIA's run-time compiler: CUDA source to a cubin, in this process and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ... import BackendError


def compile_cubin(unit: str, headers: Mapping[str, str], flags: Sequence[str]) -> bytes:
    """The cubin of the source `unit`, which may include `headers` by name.

    Raises:
        BackendError: NVRTC is not installed, or refuses a flag or the source (with its first error).
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as err:  # the library is loaded at the first call
        raise BackendError(
            f"compiling kernels needs NVRTC ({_first(err)}): pip install 'heatmill[cuda-build]'"
        ) from err
    texts, names = ([part.encode() for part in parts] for parts in (headers.values(), headers.keys()))
    program = _done(nvrtc, nvrtc.nvrtcCreateProgram(unit.encode(), b"kernels.cu", len(names), texts, names))
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_done(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _done(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            told = [line for line in log.decode(errors="replace").rstrip("\0").splitlines() if "error" in line]
            raise BackendError(f"NVRTC refuses the kernels with {' '.join(flags)}: {(told or [result[0].name])[0]}")
        cubin = bytearray(_done(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _done(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _done(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """What a call gave besides its status."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed: {status.name}")
    return values[0] if values else None


def _first(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]
