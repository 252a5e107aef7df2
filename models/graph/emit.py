"""Writes new nodes and constants beside an existing graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ... import ModelError

Array = npt.NDArray[Any]
Operand = str | float | Array | Sequence[int] | None

PREFIX = "heatmill/"
MAX_HOLLOW = 4096


class Emitter:
    """Collects nodes and constants whose names collide with nothing in the graph.

    What it writes is valid from opset 13 on: reductions are ReduceSum with the axes as an input, and shapes change by
    Reshape only. Operands may be value names, numbers (of the graph's own floating type), arrays, lists of integers
    (int64), or None for an input that is left out.

    Args:
        taken: the names that the graph already uses.
        dtype: the floating type that the graph computes in.
        hollow: large constants are not stored; the graph can be checked, not run.
    """

    def __init__(self, taken: Iterable[str], dtype: npt.DTypeLike = np.float32, hollow: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.dtype = np.dtype(dtype)
        self.hollow = hollow
        self._graph = frozenset(taken)
        self._taken = set(taken)
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # by digest: constants may be large
        self._count = 0

    def op(self, kind: str, *operands: Operand, **attributes: Any) -> str:
        """One node with one output; returns the output's name."""
        return self.ops(kind, 1, *operands, **attributes)[0]

    def ops(self, kind: str, outputs: int, *operands: Operand, **attributes: Any) -> list[str]:
        """One node with several outputs; attributes that are None are left out."""
        inputs = ["" if operand is None else self._named(operand) for operand in operands]
        while inputs and not inputs[-1]:
            inputs.pop()
        name = self.name(kind)
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **given))
        return names

    def mask(self, condition: str) -> str:
        """1 where a condition holds and 0 elsewhere: to multiply with, which ONNX Runtime does six times as fast as its
        Where."""
        return self.op("Cast", condition, to=helper.np_dtype_to_tensor_dtype(self.dtype))

    def named(self, name: str, value: str) -> str:
        """The value under a name of the caller's choice, as an output needs it.

        Raises:
            ModelError: the graph has a value of this name.
        """
        if name in self._graph:
            raise ModelError(f"the model has a value named {name!r}, which is kept for what heatmill puts out")
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        return name

    def const(self, value: float | Array | Sequence[int]) -> str:
        """A constant; equal ones are stored once."""
        if isinstance(value, np.ndarray):
            array = value.astype(self.dtype, copy=False) if np.issubdtype(value.dtype, np.floating) else value
        elif isinstance(value, int | float):
            array = np.asarray(value, self.dtype)
        else:
            array = np.asarray(value, np.int64)
        if self.hollow and array.size > MAX_HOLLOW:
            name = self.name("const")
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.constants.append(onnx.TensorProto(name=name, data_type=kind, dims=array.shape))
            return name
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, hashlib.blake2b(array.data, digest_size=16).digest())
        if key not in self._known:
            name = self._known[key] = self.name("const")
            self.constants.append(numpy_helper.from_array(array, name))
        return self._known[key]

    def name(self, stem: str) -> str:
        """A name that nothing has yet."""
        while True:
            self._count += 1
            name = f"{PREFIX}{stem}_{self._count}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def _named(self, operand: float | str | Array | Sequence[int]) -> str:
        return operand if isinstance(operand, str) else self.const(operand)
