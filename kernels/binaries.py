"""The compiled kernels of an architecture: shipped with the package, kept from an earlier time, or compiled now."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
SHIPPED = Path(__file__).parent / "cubins"
FLAGS = ("--std=c++17",)


def sources() -> dict[str, str]:
    """The text of every file of `src` by its name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())}


@cache
def digest() -> str:
    """What stands for the sources and the compiler's flags in a file's name."""
    text = "\0".join([*FLAGS, *(part for item in sources().items() for part in item)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(architecture: str) -> str:
    return f"{architecture}-{digest()}.cubin"


def compile_kernels(architecture: str) -> bytes:
    """A cubin of all kernels for `architecture`, as "sm_90".

    Raises:
        BackendError: NVRTC is not installed or does not know the architecture.
    """
    from .drivers.nvrtc import compile_cubin

    files = sources()
    unit = "".join(f'#include "{name}"\n' for name in files if name.endswith(".cu"))
    return compile_cubin(unit, files, [f"--gpu-architecture={architecture}", *FLAGS])


def binary_for(architecture: str) -> bytes:
    """What a driver of `architecture` loads; a driver that is no GPU's brings its kernels with it and loads nothing.

    Raises:
        BackendError: there is no cubin for it, and NVRTC can't make one.
    """
    if not architecture.startswith("sm_"):
        return b""
    shipped = _shipped(architecture)
    if shipped is not None:
        return shipped.read_bytes()
    kept = _cache_folder() / file_name(architecture)
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    binary = compile_kernels(architecture)
    with contextlib.suppress(OSError):  # a cache that can't be written costs time, not the run
        write_whole(kept, binary)
    return binary


def write_whole(path: Path, data: bytes) -> None:
    """Write a file by rename: it is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _shipped(architecture: str) -> Path | None:
    """The shipped cubin that runs on it: the same major version, the greatest minor one up to its own."""
    major, minor = _version(architecture)
    found = {
        _version(path.name): path
        for path in SHIPPED.glob(f"*-{digest()}.cubin")
        if _version(path.name)[0] == major and _version(path.name)[1] <= minor
    }
    return found[max(found)] if found else None


def _version(name: str) -> tuple[int, int]:
    number = re.match(r"sm_(\d+)", name)
    return divmod(int(number[1]), 10) if number else (0, 0)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heatmill" / "kernels"
