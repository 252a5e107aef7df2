"""TensorRT 10 and 11, and TensorRT-RTX: one module that asks a library what it has, never which version it is.

A graph is built into a plan in a process of its own (a builder may crash), the plan is kept in a folder under a key of
all that it depends on, and a session runs it on device memory. Graphs are strongly typed: fp16 and bf16 are made in the
graph (`models.graph.precision`), int8 and fp8 come as QDQ operators of the file. Sources: NVIDIA's API pages of the
three libraries, and their Python bindings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ... import BackendError
from ...kernels.device import DeviceArray, Driver
from ...models.graph.precision import HALF, describe_outputs, typed
from .base import Array, DeviceSession, Offer, Plan, Profile, first_line, open_driver

LIBRARIES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # provider -> module
INSTALL = {
    "tensorrt": "install tensorrt from NVIDIA's own package index",
    "rtx": "pip install 'heatmill[rtx]'",
}
GIVES = ("fp32", "tf32", "bf16", "fp16", "int8")
LADDER = (1, 8, 32, 64, 256, 1024, 4096)  # a plan is built for up to so many rows, and serves every smaller batch
SCHEMA = 1  # of the cache: raise it where the same key would mean another plan

log = logging.getLogger("heatmill")


def open(model: bytes, profile: Profile) -> DeviceSession:
    """A session for a serialized model; its plan is built unless it is in the cache.

    Raises:
        BackendError: no library or GPU here, or an operator that TensorRT refuses (named).
    """
    provider = pick_provider(profile.provider)
    library = _library(provider)
    driver = open_driver(profile.device)
    graph = _graph(model, profile)
    own = _capability(driver.architecture) in getattr(getattr(library, "ComputeCapability", None), "__members__", ())
    orders = [
        _Order(graph, profile, provider, library, targets, driver)
        for targets in ([(driver.architecture,), ()] if own else [()])
    ]
    for order in orders:
        plan = order.cached()
        if plan is not None:
            break
    else:
        order = orders[0]
        plan = order.built()
    try:
        return TrtSession(library, plan, profile, provider, driver)
    except _Unusable as err:
        if not plan.cached:
            raise BackendError(str(err)) from err
        log.warning("%s: a kept plan can't be used here (%s); it is built anew", plan.path.name, err)
    try:
        return TrtSession(library, order.built(), profile, provider, driver)
    except _Unusable as err:
        raise BackendError(str(err)) from err


def build_plan(model: bytes, profile: Profile, target: str | None = None) -> Plan:
    """Build a plan, or find it in the cache, without running it.

    Args:
        target: the GPU it is for, as sm_89; None is every GPU that the library takes by itself, or this one.

    Raises:
        BackendError: the library is missing, can't build for the target, needs a GPU, or refuses an operator (named).
    """
    provider = pick_provider(profile.provider)
    library = _library(provider)
    portable = hasattr(library, "ComputeCapability")
    if target is not None and not portable:
        raise BackendError("--target-gpu: only TensorRT-RTX builds for other GPUs (--provider rtx)")
    if target is not None:
        names = [name for name in library.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
        known = [name.lower().replace("sm", "sm_") for name in names]
        if target not in known:
            builds = f"TensorRT-RTX {library.__version__} builds for {', '.join(known)}"
            raise BackendError(f"--target-gpu {target}: {builds}")
    driver = None if portable else open_driver(profile.device)
    order = _Order(_graph(model, profile), profile, provider, library, (target,) if target else (), driver)
    return order.cached() or order.built()


def survey(device: int = 0) -> list[Offer]:
    """Both libraries, or why they can't be used here."""
    try:
        driver: Driver | None = open_driver(device)
        reason = ""
    except BackendError as err:
        driver, reason = None, str(err)
    offers = []
    for provider, module in LIBRARIES.items():
        if find_spec(module) is None:
            offers.append(
                Offer("tensorrt", provider, "", (), f"not installed: {INSTALL[provider]}", True, on_device=True)
            )
            continue
        version = _version(module)
        if driver is None:
            note = f"{reason}; heatmill compile builds ahead" if provider == "rtx" else reason
            offers.append(Offer("tensorrt", provider, version, (), note, True, on_device=True))
        else:
            note = f"{driver.device}, {driver.architecture}; int8 as the file has it"
            offers.append(Offer("tensorrt", provider, version, GIVES, note, True, on_device=True))
    return offers


class _Unusable(Exception):
    """A plan that this library, driver or GPU does not take."""


class TrtSession:
    """A plan with its execution context.

    Every batch has exactly the profile's rows: a library may make kernels for every new shape.
    """

    backend = "tensorrt"
    flexible = False

    def __init__(self, library: Any, plan: Plan, profile: Profile, provider: str, driver: Driver) -> None:
        self.provider = provider
        self.precision = profile.precision
        self.version = str(library.__version__)
        self.driver = driver
        self.engine_bytes = len(plan.data)
        self._logger = _logger(library)
        self._runtime = library.Runtime(self._logger)
        self._check(library, plan.data)
        self._engine = self._runtime.deserialize_cuda_engine(plan.data)
        if self._engine is None:
            raise _Unusable(f"it is of another TensorRT or GPU: {self._logger.text()}")
        needed = int(self._engine.device_memory_size_v2)
        self.memory_per_row = -(-needed // int(plan.about["rows"]))
        free = driver.memory()[0]
        if needed > free:
            raise BackendError(
                f"out of memory: a batch of {profile.batch_size} rows needs {needed >> 20} MB of the GPU, "
                f"{free >> 20} MB are free; take a smaller --batch-size"
            )
        self._kept = plan.path.with_suffix(f".{_digest([driver.device, driver.architecture])[:12]}.runtime")
        self._cache: Any = None
        self._context = self._make_context(library)
        if self._context is None:
            raise BackendError(f"TensorRT made no execution context: {self._logger.text()}")
        self.stream = driver.stream()
        self._inputs: dict[str, np.dtype[Any]] = _types(plan.about["inputs"])
        self._outputs: dict[str, np.dtype[Any]] = _types(plan.about["outputs"])
        self.input_dtype = next(iter(self._inputs.values()))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> pointer, bytes
        self._fresh = True

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Host arrays in and out, copied by the driver."""
        given = {}
        for name, values in feeds.items():
            array = np.ascontiguousarray(values, self._inputs[name])
            given[name] = self._buffer(name, array.shape, array.dtype)
            self.driver.to_device(given[name].pointer, array, self.stream)
        self._set_shapes(given)
        asked = {name: self._buffer(name, self._shape(name), self._outputs[name]) for name in outputs}
        self.run_on_device(given, asked)
        results = [np.empty(asked[name].shape, asked[name].dtype) for name in outputs]
        for array, name in zip(results, outputs, strict=True):
            self.driver.to_host(array, asked[name].pointer, self.stream)
        self.driver.synchronize(self.stream)
        return results

    def described(
        self, feeds: Mapping[str, DeviceArray], outputs: Sequence[str]
    ) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        self._set_shapes(feeds)
        return [(self._shape(name), self._outputs[name]) for name in outputs]

    def run_on_device(self, feeds: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Queue one batch.

        Raises:
            ValueError: an array of another type or shape than the plan's.
            BackendError: TensorRT refuses the call.
        """
        self._set_shapes(feeds)
        for name, kind in {**self._inputs, **self._outputs}.items():
            array = feeds.get(name) or outputs.get(name) or self._buffer(name, self._shape(name), kind)
            if array.dtype != kind or array.shape != self._shape(name):
                raise ValueError(f"{name} is {array.dtype} {array.shape}; the plan has {kind} {self._shape(name)}")
            if not self._context.set_tensor_address(name, array.pointer):
                raise BackendError(f"TensorRT refuses an address for {name}: {self._logger.text()}")
        if not self._context.execute_async_v3(self.stream):
            raise BackendError(f"TensorRT could not run: {self._logger.text()}")
        self._keep_kernels()

    def _check(self, library: Any, data: bytes) -> None:
        """Ask a library that can tell whether it takes a plan."""
        if not hasattr(library.Runtime, "get_engine_validity"):
            return
        validity, bits = self._runtime.get_engine_validity(data)
        if validity != library.EngineValidity.INVALID:
            return
        members = library.EngineInvalidityDiagnostics.__members__
        reasons = [name.lower().replace("_", " ") for name, bit in members.items() if int(bits) & int(bit)]
        raise _Unusable(", ".join(reasons) or "no usable GPU or driver")

    def _make_context(self, library: Any) -> Any:
        if not hasattr(library, "IRuntimeCache"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        with suppress(OSError):
            self._cache.deserialize(self._kept.read_bytes())  # one of another driver is refused, and made anew
        config.set_runtime_cache(self._cache)
        if hasattr(library, "DynamicShapesKernelSpecializationStrategy"):
            eager = library.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if hasattr(library, "CudaGraphStrategy"):
            config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        """The kernels that the library made for a new shape are kept beside the plan."""
        if self._cache is not None and self._fresh:
            with suppress(OSError):
                _write(self._kept, bytes(self._cache.serialize()))
        self._fresh = False

    def _set_shapes(self, feeds: Mapping[str, DeviceArray]) -> None:
        for name, array in feeds.items():
            if self._shapes.get(name) != array.shape:
                if not self._context.set_input_shape(name, array.shape):
                    raise ValueError(f"{name} {array.shape} is not what the plan was built for")
                self._shapes[name] = array.shape
                self._fresh = True

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self._context.get_tensor_shape(name))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Memory of the session's own for a value that no caller gave; it grows with the largest batch."""
        array = DeviceArray(0, shape, dtype)
        pointer, size = self._buffers.get(name, (0, 0))
        if array.nbytes > size:
            if pointer:
                self.driver.synchronize(self.stream)
                self.driver.free(pointer)
            pointer = self.driver.alloc(array.nbytes)
            self._buffers[name] = (pointer, array.nbytes)
        return DeviceArray(pointer, shape, dtype, self)

    def __del__(self) -> None:
        if getattr(self, "_buffers", None):
            self.driver.synchronize(self.stream)
        for pointer, _ in getattr(self, "_buffers", {}).values():
            self.driver.free(pointer)


# ----- plans -----


class _Order:
    """What a plan is to be, its key, and where it is kept."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        profile: Profile,
        provider: str,
        library: Any,
        targets: tuple[str, ...],
        driver: Driver | None,
    ) -> None:
        self._graph = proto.SerializeToString(deterministic=True)
        self._provider = provider
        rows = _rows(proto, profile.batch_size)
        shapes = {value.name: _ranges(value, rows, profile) for value in proto.graph.input}
        portable = hasattr(library, "ComputeCapability")
        self._options = {
            "module": LIBRARIES[provider],
            "shapes": shapes,
            "rows": rows,
            "tf32": profile.precision == "tf32",
            "targets": list(targets) if portable else [],
        }
        self._device = None if portable else profile.device
        if not portable:
            self._targets = driver.device if driver else "this GPU"
        else:
            self._targets = ", ".join(targets) or "every GPU that the library takes by itself"
        self._document = {
            "schema": SCHEMA,
            "graph": hashlib.sha256(self._graph).hexdigest(),
            "version": str(library.__version__),
            "options": self._options,
            "precision": profile.precision,
            "platform": None if portable else f"{platform.system()}-{platform.machine()}",
            "device": None if portable or driver is None else [driver.device, driver.architecture],
        }
        self._path = (profile.cache or _cache_folder()) / f"{_digest(self._document)}.plan"

    def cached(self) -> Plan | None:
        """The plan, where it is kept and whole."""
        try:
            about = json.loads(self._path.with_suffix(".json").read_text())
            data = self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            about, data = None, b""
        whole = {"sha256": hashlib.sha256(data).hexdigest(), "key": self._document}
        if not isinstance(about, dict) or any(about.get(name) != value for name, value in whole.items()):
            log.warning("%s: the kept plan is damaged; it is built anew", self._path.name)
            return None
        return Plan(data, self._path, about, True)

    def built(self) -> Plan:
        """The plan, built in a child process and kept: the JSON first, the plan last, each by a rename."""
        self._tell_of_others()
        with tempfile.TemporaryDirectory(prefix="heatmill-") as name:
            folder = Path(name)
            (folder / "model.onnx").write_bytes(self._graph)
            (folder / "options.json").write_text(json.dumps(self._options))
            start = time.monotonic()
            answer = _in_child(folder, self._provider, self._device)
            data = (folder / "plan").read_bytes()
        about = {
            **answer,
            "targets": self._targets,
            "rows": self._options["rows"],
            "seconds": round(time.monotonic() - start, 2),
            "sha256": hashlib.sha256(data).hexdigest(),
            "key": self._document,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write(self._path.with_suffix(".json"), json.dumps(about, indent=1).encode())
            _write(self._path, data)
        except OSError as err:
            log.warning("%s: the plan can't be kept (%s)", self._path, first_line(err))
        return Plan(data, self._path, about, False)

    def _tell_of_others(self) -> None:
        """Say why the plan of the same graph that comes nearest does not serve."""
        reasons: list[list[str]] = []
        for path in self._path.parent.glob("*.json") if self._path.parent.is_dir() else ():
            try:
                key = json.loads(path.read_text())["key"]
                if all(key[name] == self._document[name] for name in ("schema", "graph", "options", "precision")):
                    differ = [name for name in ("version", "device", "platform") if key[name] != self._document[name]]
                    reasons.append([f"{name} {key[name]}" for name in differ])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        nearest = min(filter(None, reasons), key=len, default=None)
        if nearest:
            log.warning("a kept plan of this graph is of %s; it is built anew", " and ".join(nearest))


def _graph(model: bytes, profile: Profile) -> onnx.ModelProto:
    """The graph in the profile's precision, every output with its type."""
    try:
        proto = onnx.load_model_from_string(model)
        if profile.precision in HALF:
            proto = typed(proto, profile.precision, half_input=profile.precision == "fp16")
        describe_outputs(proto)
    except Exception as err:  # no ONNX file, or one whose types can't be worked out
        raise BackendError(f"tensorrt refuses the model: {first_line(err)}") from err
    return proto


def _in_child(folder: Path, provider: str, device: int | None) -> dict[str, Any]:
    """Build in a process that the builder may end, and that sees no GPU but the one it builds for.

    Raises:
        BackendError: it was refused, or the process died.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if device is not None:
        seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = seen[device] if device < len(seen) and seen[device] else str(device)
    command = [sys.executable, "-m", f"{__package__}.trt", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, cwd=folder)
    try:
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    except (OSError, ValueError):
        code = ended.returncode
        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = " ".join(ended.stderr.split())[-300:]
        raise BackendError(
            f"tensorrt ({provider}): its builder died on this graph ({died}){': ' if said else ''}{said}; "
            "--backend onnxruntime runs it"
        ) from None
    if "error" in answer:
        raise BackendError(f"tensorrt ({provider}) {answer['error']}")
    return answer


def build(library: Any, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Parse folder/model.onnx and write folder/plan.

    Returns:
        What is known of the plan; or under "error" why there is none, with the operator's name.
    """
    logger = _logger(library)
    builder = library.Builder(logger)
    flags = 0
    if hasattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / "model.onnx")):
        reasons = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        return {"error": f"refuses {'; '.join(dict.fromkeys(reasons)) or logger.text()}"}
    config = builder.create_builder_config()
    if hasattr(library.BuilderFlag, "TF32"):
        (config.set_flag if options["tf32"] else config.clear_flag)(library.BuilderFlag.TF32)
    if options["targets"]:
        config.num_compute_capabilities = len(options["targets"])
        for i, target in enumerate(options["targets"]):
            config.set_compute_capability(getattr(library.ComputeCapability, _capability(target)), i)
    profile = builder.create_optimization_profile()
    for name, ranges in options["shapes"].items():
        profile.set_shape(name, *(tuple(sizes) for sizes in ranges))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"error": f"refuses the graph: {logger.text()}"}
    (folder / "plan").write_bytes(bytes(plan))
    graph = onnx.load_model(folder / "model.onnx").graph
    return {
        "library": library.__name__,
        "inputs": {value.name: _described(value) for value in graph.input},
        "outputs": {value.name: _described(value) for value in graph.output},
        "activation_bytes": logger.activation,
    }


def _parser_error(error: Any) -> str:
    operator, name = error.node_operator(), error.node_name()
    where = f"operator {operator} {name!r}: " if operator or name else ""
    return where + " ".join(str(error.desc()).split())[:300]


def _logger(library: Any) -> Any:
    """A logger of the library's that keeps its errors, and the memory that it tells of."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(library.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))
            found = re.search(r"Total Activation Memory: (\d+) bytes", message)
            if found:
                self.activation = int(found[1])

        def text(self) -> str:
            return "; ".join(dict.fromkeys(self.errors))[:400] or "it says no reason"

    return Log()


def _rows(proto: onnx.ModelProto, batch_size: int) -> int:
    """The most rows of a plan: the file's fixed batch, or the step of the ladder that holds the batch."""
    fixed = [value.type.tensor_type.shape.dim[0].dim_value for value in proto.graph.input]
    return max(fixed) or next((rows for rows in LADDER if rows >= batch_size), batch_size)


def _ranges(value: onnx.ValueInfoProto, rows: int, profile: Profile) -> list[list[int]]:
    """The least, the usual (which is the largest) and the largest shape of an input."""
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    rest = [size or given for size, given in zip(dims[1:], profile.input_shape or dims[1:], strict=False)]
    if len(rest) != len(dims) - 1 or 0 in rest:
        raise BackendError(f"tensorrt: input {value.name!r} has open sizes {dims[1:]}; give the model's input size")
    return [[dims[0] or least, *rest] for least in (1, rows, rows)]


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    return {"dtype": TensorProto.DataType.Name(kind.elem_type), "shape": sizes}


def _types(described: Mapping[str, Mapping[str, Any]]) -> dict[str, np.dtype[Any]]:
    kinds = TensorProto.DataType
    return {
        name: np.dtype(helper.tensor_dtype_to_np_dtype(kinds.Value(one["dtype"]))) for name, one in described.items()
    }


def pick_provider(provider: str | None) -> str:
    """The asked provider, or the first that is installed.

    Raises:
        BackendError: it is not one of TensorRT's.
    """
    if provider is None:
        return next((name for name, module in LIBRARIES.items() if find_spec(module) is not None), "tensorrt")
    if provider not in LIBRARIES:
        raise BackendError(f"backend tensorrt has no provider {provider!r}; known: {', '.join(LIBRARIES)}")
    return provider


def _library(provider: str) -> Any:
    try:
        return import_module(LIBRARIES[provider])
    except (ImportError, OSError, RuntimeError) as err:
        raise BackendError(
            f"backend tensorrt ({provider}) can't be loaded ({first_line(err)}): {INSTALL[provider]}"
        ) from err


def _version(module: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(module.replace("_", "-"))
    return ""


def _capability(target: str) -> str:
    return target.upper().replace("_", "")


def _digest(document: object) -> str:
    """sha256 over canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "heatmill" / "plans"


def _write(path: Path, data: bytes) -> None:
    """By a rename: a reader sees all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    try:
        answer = build(import_module(options["module"]), folder, options)
    except Exception as err:
        answer = {"error": f"could not build: {type(err).__name__}: {first_line(err)}"}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
