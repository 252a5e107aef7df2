"""Stand-ins for the `tensorrt` and `tensorrt_rtx` modules, each with the names that the real one has and no others.

Plans hold the ONNX file; contexts compute with ONNX Runtime at the pointers they are given, so results are real. What
was called is in `CALLS`, of this process only.
"""

from __future__ import annotations

import ctypes
import enum
import pickle
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
from onnx import helper

CALLS: list[tuple] = []
REFUSED = "Det"  # an operator that the parser refuses
CRASHES = "Hardmax"  # an operator at which the builder dies
ROW_BYTES = 1000  # of activation memory

VALIDITY = enum.IntEnum("EngineValidity", {"VALID": 0, "SUBOPTIMAL": 1, "INVALID": 2})
DIAGNOSTICS = enum.IntEnum("EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})
CAPABILITY = enum.IntEnum("ComputeCapability", {"NONE": 0, "CURRENT": 1, "SM86": 86, "SM89": 89, "SM120": 120})
GRAPHS = enum.IntEnum("CudaGraphStrategy", {"DISABLED": 0, "WHOLE_GRAPH_CAPTURE": 1})
STRATEGY = enum.IntEnum("DynamicShapesKernelSpecializationStrategy", {"LAZY": 0, "EAGER": 1, "NONE": 2})


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Error:
    def __init__(self, node: onnx.NodeProto) -> None:
        self._node = node

    def desc(self) -> str:
        return "no importer\nregistered"

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class Config:
    def __init__(self, rtx: bool) -> None:
        self.set, self.cleared, self.profiles, self.targets = set(), set(), [], {}
        if rtx:
            self.num_compute_capabilities = 0
            self.set_compute_capability = self._target

    def set_flag(self, flag) -> None:
        self.set.add(flag.name)

    def clear_flag(self, flag) -> None:
        self.cleared.add(flag.name)

    def add_optimization_profile(self, profile) -> None:
        self.profiles.append(profile)

    def _target(self, capability, index: int) -> bool:
        assert index < self.num_compute_capabilities
        self.targets[index] = capability.name
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple] = {}

    def set_shape(self, name: str, least, usual, most) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        self.shapes[name] = (least, usual, most)


class Parser:
    def __init__(self, network, logger) -> None:
        self.network, self.errors = network, []

    num_errors = property(lambda self: len(self.errors))

    def parse_from_file(self, path: str) -> bool:
        self.network.proto = onnx.load(path)
        self.errors = [Error(node) for node in self.network.proto.graph.node if node.op_type == REFUSED]
        return not self.errors

    def get_error(self, index: int) -> Error:
        return self.errors[index]


class Context:
    def __init__(self, plan: dict) -> None:
        self._plan = plan
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._results: dict[tuple, dict[str, tuple[int, ...]]] = {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self._session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        graph = onnx.load_model_from_string(plan["onnx"]).graph
        self._types = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in graph.input
        }
        self._ends = [value.name for value in graph.output]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        CALLS.append(("set_input_shape", name, shape))
        least, _, most = self._plan["shapes"][name]
        fits = all(a <= size <= c for a, size, c in zip(least, shape, most, strict=True))
        if fits:
            self._shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert type(pointer) is int
        self._addresses[name] = pointer
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._types:
            return self._shapes.get(name, (-1,))
        key = tuple(sorted(self._shapes.items()))
        if key not in self._results:
            feeds = {name: np.zeros(shape, self._types[name]) for name, shape in self._shapes.items()}
            values = self._session.run(self._ends, feeds)
            self._results[key] = {name: value.shape for name, value in zip(self._ends, values, strict=True)}
        return self._results[key][name]

    def execute_async_v3(self, stream: int) -> bool:
        assert type(stream) is int
        assert self._addresses.keys() == {*self._types, *self._ends}
        CALLS.append(("execute_async_v3", stream))
        feeds = {}
        for name, dtype in self._types.items():
            feeds[name] = np.empty(self._shapes[name], dtype)
            ctypes.memmove(feeds[name].ctypes.data, self._addresses[name], feeds[name].nbytes)
        for name, value in zip(self._ends, self._session.run(self._ends, feeds), strict=True):
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


class RuntimeCache:
    def deserialize(self, data: bytes) -> bool:
        CALLS.append(("runtime cache read", data))
        return True

    def serialize(self) -> bytes:
        return b"kernels"


class Engine:
    def __init__(self, plan: dict, rtx: bool) -> None:
        self._plan = plan
        self.device_memory_size_v2 = ROW_BYTES * plan["rows"]
        if rtx:
            self.create_runtime_config = self._config

    def _config(self):
        def keep(cache) -> None:
            config.cache = cache

        config = SimpleNamespace(create_runtime_cache=RuntimeCache, set_runtime_cache=keep, cache=None)
        return config

    def create_execution_context(self, config=None) -> Context:
        if config is not None:
            assert isinstance(config.cache, RuntimeCache)
            CALLS.append(("context", config.cuda_graph_strategy.name))
        return Context(self._plan)


def library(name: str, version: str, creation: tuple[str, ...], flags: tuple[str, ...]) -> dict:
    """The names of a module."""
    rtx = name == "tensorrt_rtx"
    creating = enum.IntEnum("NetworkDefinitionCreationFlag", {flag: i for i, flag in enumerate(creation)})
    flag_type = enum.IntEnum("BuilderFlag", {flag: i for i, flag in enumerate(flags)})

    class Builder:
        def __init__(self, logger) -> None:
            self._logger = logger

        def create_network(self, flags: int):
            assert flags == 1 << creating.STRONGLY_TYPED
            return SimpleNamespace(proto=None)

        def create_builder_config(self) -> Config:
            return Config(rtx)

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network, config: Config):
            if any(node.op_type == CRASHES for node in network.proto.graph.node):
                ctypes.string_at(0)
            shapes = config.profiles[0].shapes
            rows = max(most[0] for _, _, most in shapes.values())
            self._logger.log(Severity.INFO, f"Total Activation Memory: {ROW_BYTES * rows} bytes")
            plan = {
                "library": name, "version": version, "onnx": network.proto.SerializeToString(), "shapes": shapes,
                "rows": rows, "set": config.set, "cleared": config.cleared, "targets": list(config.targets.values()),
            }  # fmt: skip
            return pickle.dumps(plan)

    class Runtime:
        def __init__(self, logger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: bytes):
            plan = pickle.loads(data)
            if (plan["library"], plan["version"]) != (name, version):
                self._logger.log(Severity.ERROR, f"Version tag does not match: {plan['version']}")
                return None
            return Engine(plan, rtx)

        if rtx:

            def get_engine_validity(self, data: bytes):
                if pickle.loads(data)["version"] != version:
                    return VALIDITY.INVALID, int(DIAGNOSTICS.VERSION_MISMATCH)
                return VALIDITY.VALID, 0

    names = {
        "__version__": version, "ILogger": ILogger, "Builder": Builder, "OnnxParser": Parser, "Runtime": Runtime,
        "NetworkDefinitionCreationFlag": creating, "BuilderFlag": flag_type,
    }  # fmt: skip
    if rtx:
        names |= {
            "EngineValidity": VALIDITY, "EngineInvalidityDiagnostics": DIAGNOSTICS, "ComputeCapability": CAPABILITY,
            "CudaGraphStrategy": GRAPHS, "DynamicShapesKernelSpecializationStrategy": STRATEGY,
            "IRuntimeCache": RuntimeCache,
        }  # fmt: skip
    return names


TENSORRT_10 = library("tensorrt", "10.16.1.11", ("EXPLICIT_BATCH", "STRONGLY_TYPED"), ("TF32", "FP16", "INT8"))
TENSORRT_11 = library("tensorrt", "11.4.0.106", ("STRONGLY_TYPED",), ("TF32",))
RTX = library("tensorrt_rtx", "1.7.1.116", ("STRONGLY_TYPED",), ("TF32",))
FAKES = {"10": ("tensorrt", "TENSORRT_10"), "11": ("tensorrt", "TENSORRT_11"), "rtx": ("tensorrt_rtx", "RTX")}
