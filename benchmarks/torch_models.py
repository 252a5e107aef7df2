"""The benchmark networks in PyTorch, rebuilt from the ONNX files so that every package runs the same weights."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

Constants = dict[str, np.ndarray]


def conv(node: onnx.NodeProto, constants: Constants) -> nn.Module:
    attrs = attributes(node)
    weight = constants[node.input[1]]
    top, left, bottom, right = attrs.get("pads", [0, 0, 0, 0])
    symmetric = (top, left) == (bottom, right)
    layer = nn.Conv2d(
        weight.shape[1] * attrs.get("group", 1),
        weight.shape[0],
        weight.shape[2:],
        stride=tuple(attrs.get("strides", [1, 1])),
        padding=(top, left) if symmetric else 0,
        dilation=tuple(attrs.get("dilations", [1, 1])),
        groups=attrs.get("group", 1),
        bias=len(node.input) > 2,
    )
    load(layer, node, constants)
    return layer if symmetric else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), layer)


def gemm(node: onnx.NodeProto, constants: Constants) -> nn.Module:
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    if {**plain, "transB": 0, **attributes(node)} != plain:
        raise ValueError(f"Gemm {node.name!r} is not a plain linear layer")
    out_features, in_features = constants[node.input[1]].shape
    layer = nn.Linear(in_features, out_features)
    load(layer, node, constants)
    return layer


def clip(node: onnx.NodeProto, constants: Constants) -> nn.Module:
    low, high = (float(constants[name]) for name in node.input[1:])
    return nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)


def max_pool(node: onnx.NodeProto, constants: Constants) -> nn.Module:
    attrs = attributes(node)
    top, left, bottom, right = attrs.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise ValueError(f"MaxPool {node.name!r} pads its sides differently")
    return nn.MaxPool2d(tuple(attrs["kernel_shape"]), tuple(attrs["strides"]), (top, left))


LAYERS: dict[str, Callable[[onnx.NodeProto, Constants], nn.Module]] = {
    "Clip": clip,
    "Conv": conv,
    "Flatten": lambda node, constants: nn.Flatten(),
    "Gemm": gemm,
    "GlobalAveragePool": lambda node, constants: nn.AdaptiveAvgPool2d(1),
    "MaxPool": max_pool,
    "Relu": lambda node, constants: nn.ReLU(),
}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attr.name: helper.get_attribute_value(attr) for attr in node.attribute}


def load(layer: nn.Conv2d | nn.Linear, node: onnx.NodeProto, constants: Constants) -> None:
    with torch.no_grad():
        for parameter, name in zip((layer.weight, layer.bias), node.input[1:], strict=False):
            parameter.copy_(torch.from_numpy(constants[name].astype(np.float32)))


def layer_name(output: str) -> str:
    """The submodule that makes an ONNX value."""
    return output.strip("/").replace("/", "_").replace(".", "_")


def torch_model(path: Path) -> fx.GraphModule:
    """The network of an ONNX file as straight-line PyTorch; each layer is a submodule, see `layer_name`.

    Activations and residual sums work in place where nothing else reads their input, as torchvision's networks do.
    """
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    root, traced = nn.Module(), fx.Graph()
    values = {graph.input[0].name: traced.placeholder("x")}
    for node in graph.node:
        output = node.output[0]
        if node.op_type == "Cast":  # a weight that is stored in half precision
            constants[output] = constants[node.input[0]].astype(np.float32)
        elif node.op_type == "Add":
            first, second = (values[name] for name in node.input)
            add = operator.iadd if readers[node.input[0]] == 1 else operator.add
            values[output] = traced.call_function(add, (first, second))
        else:
            layer = LAYERS[node.op_type](node, constants)
            if isinstance(layer, nn.ReLU | nn.Hardtanh):
                layer.inplace = readers[node.input[0]] == 1
            root.add_module(layer_name(output), layer)
            values[output] = traced.call_module(layer_name(output), (values[node.input[0]],))
    traced.output(values[graph.output[0].name])
    return fx.GraphModule(root, traced).eval()


AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}
FORWARDS = (
    "eager-fp32",
    "channels-last-fp32",
    "jit-fp32",
    "compile-fp32",
    "compile-channels-last-fp32",
    "channels-last-bf16",
    "jit-channels-last-bf16",
    "compile-channels-last-bf16",
)


def fast_forward(model: nn.Module, name: str, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A batch's scores the way `name`, one of FORWARDS, has it; made for batches of the example's shape."""
    channels_last, bf16 = "channels-last" in name, name.endswith("bf16")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network: Callable[[torch.Tensor], torch.Tensor] = copy.deepcopy(model).to(memory_format=layout)
    example = example.contiguous(memory_format=layout)
    if name.startswith("compile"):
        network = torch.compile(network, dynamic=False, options={"freezing": True})
    elif name.startswith("jit"):
        with torch.no_grad(), torch.autocast(**AUTOCAST, enabled=bf16, cache_enabled=False):
            network = torch.jit.freeze(torch.jit.trace(network, example))
        if not bf16:
            network = torch.jit.optimize_for_inference(network)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(**AUTOCAST, enabled=bf16 and not name.startswith("jit")):
            return network(x.contiguous(memory_format=layout)).float()

    return forward


def import_torchvision() -> Any:
    """torchvision; where its compiled operators don't fit torch, those that block the import are declared first."""
    try:
        import torchvision
    except RuntimeError:
        for operator_name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator_name}", schema)
        import torchvision
    return torchvision


def save_small_network(path: Path) -> None:
    """A seeded convolutional network of 10 classes on 64x64 images, to try the benchmark itself in a minute."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        network[-1].weight.mul_(10)
    axes = {"input": {0: "n"}, "logits": {0: "n"}}
    torch.onnx.export(
        network,
        (torch.randn(1, 3, 64, 64),),
        path,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )
