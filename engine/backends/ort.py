"""ONNX Runtime: its own CPU kernels, OpenVINO as a plugin provider behind the same calls, and GPUs of NVIDIA.

On a GPU nothing falls back to the CPU: ONNX Runtime would do so without a word, where a library is missing or an
operator has no kernel. onnxruntime and onnxruntime-gpu share their name in Python: only one may be installed.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from ... import BackendError, ModelError
from ...kernels.device import DeviceArray, Driver
from ...models.graph.precision import HALF, typed
from .base import Array, DeviceSession, Offer, Profile, Session, cpu_flags, first_line, open_driver, usable_cores

OPENVINO = "OpenVINOExecutionProvider"
HINTS = {"fp32": "f32", "bf16": "bf16"}
RTX_PLUGIN, RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"
DTYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names of types, where NumPy's differ
QUIET = 3  # errors only: the library's warnings are about graph clean-ups a user can't act on


@dataclass(frozen=True, slots=True)
class DeviceProvider:
    """A provider that runs on a GPU.

    Attributes:
        name: ONNX Runtime's own.
        gives: the precisions of it. Where fp32 is not among them, it has no switch that keeps fp32 from being tf32.
        install: how to get it.
        by_name: whether it is taken only where it is asked for.
        options: its own options for a precision.
    """

    name: str
    gives: tuple[str, ...]
    install: str
    by_name: bool
    options: Mapping[str, Mapping[str, str]]


GPU = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]' in its place"
DEVICES = {
    "cuda": DeviceProvider(
        "CUDAExecutionProvider",
        ("fp32", "tf32", "fp16"),
        GPU,
        False,
        {"fp32": {"use_tf32": "0"}, "tf32": {"use_tf32": "1"}, "fp16": {"use_tf32": "0"}},
    ),
    "tensorrt": DeviceProvider(
        "TensorrtExecutionProvider", ("tf32", "fp16"), f"{GPU}; and TensorRT 10 (libnvinfer.so.10)", True, {}
    ),
    "nv-tensorrt-rtx": DeviceProvider(
        "NvTensorRTRTXExecutionProvider", ("tf32", "fp16"), f"pip install {RTX_PACKAGE}", True, {}
    ),
}


class OrtSession:
    backend = "onnxruntime"
    version = ort.__version__

    def __init__(self, session: Any, provider: str, precision: str, flexible: bool) -> None:
        self._session = session
        self.provider = provider
        self.precision = precision
        self.flexible = flexible

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        return list(self._session.run(list(outputs), dict(feeds)))


class OrtDeviceSession(OrtSession):
    """A session on a GPU, or wherever `place` (ONNX Runtime's name of the memory, and its number) is."""

    memory_per_row = 0
    engine_bytes = 0

    def __init__(
        self, session: Any, provider: str, precision: str, place: tuple[str, int], driver: Driver, stream: int
    ) -> None:
        super().__init__(session, provider, precision, flexible=False)
        self.stream = stream
        self.driver = driver
        self._place = place
        self._inputs = {value.name: _dtype(value.type) for value in session.get_inputs()}
        self._outputs = {value.name: (tuple(value.shape), _dtype(value.type)) for value in session.get_outputs()}
        self.input_dtype: np.dtype[Any] = next(iter(self._inputs.values()))

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Host arrays in and out; ONNX Runtime copies them."""
        given = {name: np.ascontiguousarray(values, self._inputs[name]) for name, values in feeds.items()}
        try:
            return super().run(given, outputs)
        except Exception as err:
            raise self._failed(err) from err

    def described(
        self, feeds: Mapping[str, DeviceArray], outputs: Sequence[str]
    ) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        return [self._outputs[name] for name in outputs]

    def run_on_device(self, feeds: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Queue one batch.

        Raises:
            ValueError: an array of another type than the graph's input.
            BackendError: the GPU or its memory failed.
        """
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if array.dtype != self._inputs[name]:
                raise ValueError(f"{name} is {array.dtype}; the graph has {self._inputs[name]}")
            binding.bind_input(name, *self._place, array.dtype.type, array.shape, array.pointer)
        for name, array in outputs.items():
            binding.bind_output(name, *self._place, array.dtype.type, array.shape, array.pointer)
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as err:
            raise self._failed(err) from err

    def _failed(self, err: Exception) -> BackendError:
        return BackendError(f"onnxruntime ({self.provider}) failed on GPU {self.driver.index}: {first_line(err)}")


def open(model: bytes, profile: Profile) -> Session:
    """A session for a serialized model.

    Raises:
        BackendError: unknown provider or precision on this machine, or the runtime refuses the model.
    """
    provider = profile.provider or "cpu"
    offers = {offer.provider: offer for offer in survey(profile.device)}
    if provider not in offers:
        raise BackendError(f"onnxruntime has no provider {provider!r} here; known: {', '.join(offers)}")
    offer = offers[provider]
    if profile.precision not in offer.precisions:
        gives = ", ".join(offer.precisions) or "nothing on this machine"
        raise BackendError(f"provider {provider} gives {gives}, not {profile.precision} ({offer.note})")
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = profile.threads or usable_cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = not profile.lean
    if provider in DEVICES:
        return _on_device(model, options, profile, provider)
    try:
        if provider == "cpu":
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        else:
            session = _openvino(model, options, profile)
    except Exception as err:
        raise BackendError(f"onnxruntime ({provider}) refuses the model: {first_line(err)}") from err
    return OrtSession(session, provider, profile.precision, flexible=provider == "cpu")


def _on_device(model: bytes, options: Any, profile: Profile, provider: str) -> DeviceSession:
    """Every node on the GPU, on a stream of the driver's, or a refusal."""
    found = DEVICES[provider]
    driver = open_driver(profile.device)
    stream = driver.stream()
    data = device_graph(model, profile, f"onnxruntime ({provider})")
    settings = {"device_id": str(profile.device), "user_compute_stream": str(stream)}
    settings.update(found.options.get(profile.precision, {}))
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    devices = _plugin_devices(profile.device) if provider == "nv-tensorrt-rtx" else []
    try:
        if devices:
            options.add_provider_for_devices(devices, settings)
            session = ort.InferenceSession(data, options, enable_fallback=0)
        else:
            _preload()
            session = ort.InferenceSession(data, options, providers=[(found.name, settings)], enable_fallback=0)
    except Exception as err:
        raise BackendError(f"onnxruntime ({provider}) refuses the model: {first_line(err)}") from err
    if session.get_providers()[0] != found.name:
        raise BackendError(
            f"onnxruntime ({provider}) could not load its libraries, and would have run on the CPU; it needs libcuda, "
            f"CUDA's libraries and cuDNN 9: {found.install}"
        )
    return OrtDeviceSession(session, provider, profile.precision, ("cuda", profile.device), driver, stream)


def device_graph(model: bytes, profile: Profile, who: str) -> bytes:
    """The graph as a GPU gets it: of the profile's rows, and in its precision.

    With every size fixed ONNX Runtime works out what exporters compute from shapes, nodes that it would put on the CPU.

    Raises:
        BackendError: a size that is open, or a graph that can't be made in half precision.
    """
    proto = onnx.load_model_from_string(model)
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, (profile.batch_size, *profile.input_shape), strict=False):
            if not dim.dim_value:
                dim.dim_value = size
        if not all(dim.dim_value for dim in dims):
            raise BackendError(f"{who}: input {value.name!r} has open sizes; give the model's input size")
    if profile.precision in HALF:
        try:
            proto = typed(proto, profile.precision, half_input=True)
        except ModelError as err:
            raise BackendError(f"{who}: {err}") from err
    return bytes(proto.SerializeToString())


def _preload() -> None:
    """CUDA's and cuDNN's libraries out of NVIDIA's packages; what is missing is seen when the session opens."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _dtype(kind: str) -> np.dtype[Any]:
    """The NumPy type of ONNX Runtime's `tensor(float)`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype(DTYPES.get(name, name))


@cache
def _registered_plugin() -> str:
    """Register NVIDIA's plugin once; why it could not be, or nothing."""
    try:
        plugin = import_module(RTX_PLUGIN)
        ort.register_execution_provider_library("heatmill_tensorrt_rtx", plugin.get_library_path())
    except Exception as err:  # its library needs libcuda and libnvidia-ml
        return first_line(err)
    return ""


def _plugin_devices(index: int) -> list[Any]:
    """The plugin's device of this number, in a list as ONNX Runtime takes it."""
    reason = _registered_plugin()
    name = DEVICES["nv-tensorrt-rtx"].name
    found = [] if reason else [device for device in ort.get_ep_devices() if device.ep_name == name]
    if index >= len(found):
        raise BackendError(f"the plugin offers no GPU {index} ({reason or 'it knows 8.6, 8.9 and from 12.0 on'})")
    return found[index : index + 1]


def _openvino(model: bytes, options: Any, profile: Profile) -> Any:
    """The plugin's own default is bf16 wherever the processor has it, so the precision is always pinned."""
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS.get(profile.precision, "f32"), "NUM_STREAMS": "1"}
    config["INFERENCE_NUM_THREADS"] = str(profile.threads or usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "openvino.json"
        path.write_text(json.dumps({"CPU": config}))
        options.add_provider_for_devices(_openvino_devices(), {"load_config": str(path)})
        return ort.InferenceSession(model, options)


@cache
def _openvino_devices() -> list[Any]:
    """The plugin's CPU devices; empty where it is not installed or does not offer itself on this processor."""
    try:
        plugin = import_module("onnxruntime_ep_openvino")
    except ModuleNotFoundError:
        return []
    ort.register_execution_provider_library("heatmill_openvino", plugin.get_library_path())
    devices = ort.get_ep_devices()
    return [found for found in devices if found.ep_name == OPENVINO and found.ep_metadata.get("ov_device") == "CPU"]


def survey(device: int = 0) -> list[Offer]:
    return [*_survey_cpu(), *(_survey_device(provider, device) for provider in DEVICES)]


def _survey_device(provider: str, device: int) -> Offer:
    found = DEVICES[provider]

    def offer(version: str, gives: tuple[str, ...], note: str) -> Offer:
        return Offer("onnxruntime", provider, version, gives, note, True, found.by_name, True)

    version = str(ort.__version__)
    if provider == "nv-tensorrt-rtx":
        try:
            version = metadata.version(RTX_PACKAGE)
        except metadata.PackageNotFoundError:
            return offer("", (), f"not installed: {found.install}")
    elif found.name not in ort.get_available_providers():
        return offer("", (), f"not installed: {found.install}")
    try:
        driver = open_driver(device)
        if provider == "nv-tensorrt-rtx":
            _plugin_devices(device)
    except BackendError as err:
        return offer(version, (), str(err))
    note = "" if "fp32" in found.gives else "; it has no switch that keeps fp32 from being tf32"
    return offer(version, found.gives, f"{driver.device}, {driver.architecture}{note}")


def _survey_cpu() -> list[Offer]:
    offers = [
        Offer("onnxruntime", "cpu", ort.__version__, ("fp32", "fp16", "int8"), "fp16 and int8 as the file has it")
    ]
    try:
        version = metadata.version("onnxruntime-ep-openvino")
    except metadata.PackageNotFoundError:
        note = "not installed: pip install 'heatmill[openvino]'"
        return [*offers, Offer("onnxruntime", "openvino", "", (), note)]
    if not _openvino_devices():
        note = "installed, but it offers no device on this processor"
        return [*offers, Offer("onnxruntime", "openvino", version, (), note)]
    if "amx_bf16" in cpu_flags():
        offer = Offer("onnxruntime", "openvino", version, ("fp32", "bf16", "fp16", "int8"), "amx_bf16: bf16 is native")
    else:
        offer = Offer(
            "onnxruntime", "openvino", version, ("fp32", "fp16", "int8"), "no amx_bf16: bf16 would be emulated"
        )
    return [*offers, offer]
