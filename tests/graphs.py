"""Graphs written line by line, and changes to model files that several tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Writer:
    """net("Conv", "x", weight, strides=[2, 2]) -> its output's name."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes, self.weights = [], []

    def __call__(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = []
        for given in inputs:
            if not isinstance(given, str | None):
                array = np.asarray(given)
                array = array.astype(np.float32) if array.dtype == np.float64 else array
                self.weights.append(numpy_helper.from_array(array, f"k{len(self.weights)}"))
                given = self.weights[-1].name
            names.append(given or "")
        results = [f"v{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, results, name=f"n{len(self.nodes)}", **attributes))
        return results[0] if outputs == 1 else results


def without_scores_in_the_dark(path: Path) -> None:
    """Scores that are not numbers where the image's mean is below 0.5."""
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("ReduceMean", ["input"], ["light"], axes=[1, 2, 3], keepdims=0))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "least"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.node.append(helper.make_node("Sub", ["light", "least"], ["above"]))
    model.graph.node.append(helper.make_node("Sqrt", ["above"], ["root"]))
    model.graph.node.append(helper.make_node("Unsqueeze", ["root", "axis"], ["column"]))
    model.graph.node.append(helper.make_node("Add", ["raw", "column"], ["logits"]))
    onnx.save(model, path)


def with_a_batch_that_stays(path: Path) -> None:
    """A Reshape's target that comes out of a node, so that its fixed batch can't be opened."""
    model = onnx.load(path)
    model.graph.node.insert(0, helper.make_node("Identity", ["batch_shape"], ["flat_shape"]))
    for tensor in model.graph.initializer:
        if tensor.name == "flat_shape":
            tensor.name = "batch_shape"
    onnx.save(model, path)
