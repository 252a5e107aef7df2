"""onnx's own evaluator: slow, in Python, the reading of the standard that the other backends are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator

from ... import BackendError
from .base import Array, Offer, Profile


class ReferenceSession:
    backend = "reference"
    provider = "numpy"
    precision = "fp32"
    version = onnx.__version__
    flexible = True

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._outputs = [output.name for output in proto.graph.output]
        self._evaluator: Any = ReferenceEvaluator(proto)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        values = dict(zip(self._outputs, self._evaluator.run(None, dict(feeds)), strict=True))
        return [values[name] for name in outputs]


def open(model: bytes, profile: Profile) -> ReferenceSession:
    """A session for a serialized model.

    Raises:
        BackendError: an operator that the evaluator lacks, or another precision than fp32.
    """
    if profile.precision != "fp32":
        raise BackendError(f"backend reference computes in fp32, not {profile.precision}")
    try:
        return ReferenceSession(onnx.load_model_from_string(model))
    except Exception as err:
        raise BackendError(f"backend reference can't run the model: {str(err).splitlines()[0]}") from err


def survey() -> list[Offer]:
    return [Offer("reference", "numpy", onnx.__version__, ("fp32",), "slow; for checks on small models")]
