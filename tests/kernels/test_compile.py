"""What the compilers make of the kernels: a cubin for every architecture, and a sanitized run on the emulator."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heatmill.kernels.binaries import compile_kernels
from heatmill.kernels.build import ARCHITECTURES
from heatmill.kernels.cuda import KERNELS
from tests.emulator import emulated

pytestmark = pytest.mark.cuda
NAMES = [name for names in KERNELS.values() for name in names]


def tool(name: str) -> Path:
    nvidia = pytest.importorskip("nvidia")
    found = [path for folder in nvidia.__path__ for path in Path(folder).rglob(f"bin/{name}")]
    if not found:
        pytest.skip(f"{name} is not installed: pip install 'heatmill[cuda-build]'")
    found[0].chmod(0o755)
    return found[0]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def listing(request, tmp_path_factory) -> dict[str, str]:
    """The machine code of every kernel, by name."""
    pytest.importorskip("cuda.bindings.nvrtc")
    cubin = tmp_path_factory.mktemp("cubins") / f"{request.param}.cubin"
    cubin.write_bytes(compile_kernels(request.param))
    command = [str(tool("nvdisasm")), "--print-code", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_kernel_is_there_and_spills_nothing(listing):
    assert set(NAMES) <= listing.keys()
    for name in NAMES:
        spilled = re.findall(r"\b(?:LDL|STL)\b", listing[name])
        assert not spilled, name


def test_blends_are_stored_by_sixteen_bytes(listing):
    for name in KERNELS["blend"]:
        assert re.search(r"\bSTG\.E(?:\.\w+)*\.128\b", listing[name]), name


def sanitized() -> dict[str, str]:
    """The environment of a process that has AddressSanitizer loaded first."""
    command = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return {**os.environ, "LD_PRELOAD": str(Path(library).resolve()), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.skipif(emulated.missing() is not None, reason="g++ is not installed")
def test_the_emulated_kernels_under_address_sanitizer():
    """All tests of the kernels once more, in a process where every access outside an allocation ends it."""
    environment = sanitized() | {"HEATMILL_SANITIZE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "emulated", str(Path(__file__).with_name("test_cuda.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


@pytest.mark.skipif(emulated.missing() is not None, reason="g++ is not installed")
def test_the_sanitizer_names_the_line_of_an_overrun():
    """So that the run before this one is known to see one."""
    program = (
        "import numpy as np; from tests.emulator import emulated as e; "
        "d = e.EmulatedDriver(library=e.build(sanitize=True), guard=0); "
        "s = d.stream(); p = d.alloc(64); "
        "d.launch(d.function(1, 'overrun'), (1, 1, 1), (32, 1, 1), [p, np.int32(16)], s); d.synchronize(s)"
    )
    environment = sanitized() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "faults.cu" in run.stderr
