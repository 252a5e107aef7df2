"""onnx's own evaluator: slow, in Python, the reading of the standard that the other backends are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator

from ... import BackendError
from .base import Array, Offer, Profile, first_line


class ReferenceSession:
    backend = "reference"
    provider = "numpy"
    version = onnx.__version__
    flexible = True

    def __init__(self, proto: onnx.ModelProto, precision: str) -> None:
        self.precision = precision
        self._outputs = [output.name for output in proto.graph.output]
        self._evaluator: Any = ReferenceEvaluator(proto)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        values = dict(zip(self._outputs, self._evaluator.run(None, dict(feeds)), strict=True))
        return [values[name] for name in outputs]


def open(model: bytes, profile: Profile) -> ReferenceSession:
    """A session for a serialized model.

    Raises:
        BackendError: an operator that the evaluator lacks, or bf16.
    """
    if profile.precision == "bf16":
        raise BackendError("backend reference computes as the file says, not in bf16")
    try:
        return ReferenceSession(onnx.load_model_from_string(model), profile.precision)
    except Exception as err:
        raise BackendError(f"backend reference can't run the model: {first_line(err)}") from err


def survey(device: int = 0) -> list[Offer]:
    return [Offer("reference", "numpy", onnx.__version__, ("fp32", "fp16", "int8"), "slow; for checks on small models")]
