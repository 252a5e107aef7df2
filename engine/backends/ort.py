"""ONNX Runtime: its own CPU kernels, and OpenVINO as a plugin provider behind the same calls."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ... import BackendError
from .base import Array, Offer, Profile, cpu_flags, first_line, usable_cores

OPENVINO = "OpenVINOExecutionProvider"
HINTS = {"fp32": "f32", "bf16": "bf16"}
QUIET = 3  # errors only: the library's warnings are about graph clean-ups a user can't act on


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


def open(model: bytes, profile: Profile) -> OrtSession:
    """A session for a serialized model.

    Raises:
        BackendError: unknown provider or precision on this machine, or the runtime refuses the model.
    """
    provider = profile.provider or "cpu"
    offers = {offer.provider: offer for offer in survey()}
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
    try:
        if provider == "cpu":
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        else:
            session = _openvino(model, options, profile)
    except Exception as err:
        raise BackendError(f"onnxruntime ({provider}) refuses the model: {first_line(err)}") from err
    return OrtSession(session, provider, profile.precision, flexible=provider == "cpu")


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


def survey() -> list[Offer]:
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
