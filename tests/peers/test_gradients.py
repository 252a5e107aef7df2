"""Gradients of whole networks, as PyTorch exports them, against its autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from heatmill.models.graph.backward import TARGETS, Built, build
from heatmill.models.graph.canonize import Graph, canonize
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.request import Request
from heatmill.models.load import open_model

torch = pytest.importorskip("torch")
try:
    pytest.importorskip("torchvision")
except RuntimeError:  # its compiled operators don't fit this torch: declared, they no longer block the import
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
models = pytest.importorskip("torchvision.models")

from torch.nn import functional  # noqa: E402

pytestmark = pytest.mark.peers

CLASSES = 7
CHOSEN = np.array([[0, 4], [5, 2]])  # of each row, two classes


@dataclass(frozen=True)
class Network:
    """A network of random weights, the size it is run at, and the module whose output is tapped."""

    make: Callable[[], torch.nn.Module]
    size: int
    tap: str


def of(name: str, size: int, tap: str, **options) -> Network:
    return Network(lambda: getattr(models, name)(num_classes=CLASSES, **options), size, tap)


def small_vgg() -> torch.nn.Module:
    """Pooled to where its classifier is small, which its own can't be exported at."""
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    linear = torch.nn.Linear
    return torch.nn.Sequential(features, torch.nn.Flatten(), linear(2048, 64), torch.nn.ReLU(), linear(64, CLASSES))


def small_vit() -> torch.nn.Module:
    network = models.VisionTransformer(48, 16, 3, 4, 64, 128, num_classes=CLASSES)
    torch.nn.init.normal_(network.heads.head.weight)
    return network


def small_maxvit() -> torch.nn.Module:
    return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES)


PLAIN = {"aux_logits": False, "transform_input": False, "init_weights": False}
NETWORKS = {
    "resnet18": of("resnet18", 64, "layer3"),
    "vgg11_bn": Network(small_vgg, 64, "0.20"),
    "mobilenet_v2": of("mobilenet_v2", 64, "features.10"),
    "mobilenet_v3_small": of("mobilenet_v3_small", 64, "features.8"),
    "efficientnet_b0": of("efficientnet_b0", 64, "features.5"),
    "densenet121": of("densenet121", 64, "features.transition2"),
    "googlenet": of("googlenet", 64, "inception4b", **PLAIN),
    "inception_v3": of("inception_v3", 96, "Mixed_6b", **PLAIN),
    "squeezenet1_1": of("squeezenet1_1", 64, "features.9"),
    "shufflenet_v2_x0_5": of("shufflenet_v2_x0_5", 64, "stage3"),
    "regnet_y_400mf": of("regnet_y_400mf", 64, "trunk_output.block3"),
    "mnasnet0_5": of("mnasnet0_5", 64, "layers.10"),
    "convnext_tiny": of("convnext_tiny", 64, "features.5"),
    "vit": Network(small_vit, 48, "encoder.layers.encoder_layer_1"),
    "swin_t": of("swin_t", 64, "features.3"),
    "swin_v2_t": of("swin_v2_t", 64, "features.3"),
    "maxvit": Network(small_maxvit, 64, "blocks.0"),
}


# ----- windows in float64, which ONNX Runtime lacks -----


def to_torch(*arrays):
    return [None if array is None else torch.from_numpy(np.array(array)) for array in arrays]


def padded(x, pads, value=0.0):
    rank = x.ndim - 2
    both = [(pads[i], pads[rank + i]) for i in range(rank)] if pads else []
    return functional.pad(x, [n for pair in reversed(both) for n in pair], value=value)


class Conv(OpRun):
    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=1, kernel_shape=None, pads=None, strides=None):
        x, w, b = to_torch(x, w, b)
        return (functional.conv2d(padded(x, pads), w, b, strides or 1, 0, dilations or 1, group or 1).numpy(),)


class ConvTranspose(OpRun):
    def _run(
        self,
        x,
        w,
        b=None,
        auto_pad=None,
        dilations=None,
        group=1,
        kernel_shape=None,
        output_padding=None,
        output_shape=None,
        pads=None,
        strides=None,
    ):
        x, w, b = to_torch(x, w, b)
        full = functional.conv_transpose2d(x, w, b, strides or 1, 0, 0, group or 1, dilations or 1)
        return (padded(full, [-pad for pad in pads or []]).numpy(),)


class MaxPool(OpRun):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=0,
        dilations=None,
        kernel_shape=None,
        pads=None,
        storage_order=0,
        strides=None,
    ):
        (x,) = to_torch(x)
        pads = (pads or [0, 0])[:2]
        options = (kernel_shape, strides, pads, dilations or 1, bool(ceil_mode))
        value, place = functional.max_pool2d(x, *options, return_indices=True)
        planes = torch.arange(len(x) * x.shape[1]).reshape(len(x), -1, 1, 1) * x.shape[2] * x.shape[3]
        return (value.numpy(), (place + planes).numpy())[: len(self.output)]


class AveragePool(OpRun):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=0,
        count_include_pad=0,
        dilations=None,
        kernel_shape=None,
        pads=None,
        strides=None,
    ):
        (x,) = to_torch(x)
        if count_include_pad:
            x, pads = padded(x, pads), None
        pads = (pads or [0, 0])[:2]
        options = (kernel_shape, strides or 1, pads, bool(ceil_mode), bool(count_include_pad))
        return (functional.avg_pool2d(x, *options).numpy(),)


class Erf(OpRun):
    def _run(self, x):
        return (torch.erf(torch.from_numpy(x)).numpy(),)


def evaluate(proto: onnx.ModelProto, feed: dict[str, np.ndarray], *, inner: bool = False):
    """All outputs by name; with `inner`, all values."""
    evaluator = ReferenceEvaluator(proto, new_ops=[Conv, ConvTranspose, MaxPool, AveragePool, Erf])
    if inner:
        return evaluator.run(None, feed, intermediate=True)
    return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))


# ----- the networks -----


def images(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32))


def prepared(network: Network) -> torch.nn.Module:
    """With running statistics that fit its weights, and nothing done in place."""
    torch.manual_seed(1)
    module = network.make()
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
        if isinstance(part, torch.nn.LayerNorm | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, 0, 0.2)
    with torch.no_grad():
        module.train()(torch.randn(8, 3, network.size, network.size))
    return module.eval()


def autograd(module: torch.nn.Module, tap: str, x: np.ndarray):
    """In float64: the tapped value, the scores, and their gradients at the image and at the tap, by target."""
    module = module.double()
    held = []
    hook = module.get_submodule(tap).register_forward_hook(lambda part, given, out: held.append(out))
    image = torch.from_numpy(x).requires_grad_()
    scores = module(image)
    hook.remove()
    found = []
    for column in CHOSEN.T:
        chosen = scores[torch.arange(len(x)), torch.from_numpy(column)].sum()
        found.append([g.numpy() for g in torch.autograd.grad(chosen, [image, held[0]], retain_graph=True)])
    at_image, at_tap = (np.stack(parts) for parts in zip(*found, strict=True))
    return held[0].detach().numpy(), scores.detach().numpy(), at_image, at_tap


def found_tap(graph: Graph, value: np.ndarray, x: np.ndarray) -> str:
    """The first of the graph's values that is the module's output."""
    values = evaluate(graph.proto, {graph.input: x}, inner=True)
    alike = [name for op in graph.ops for name in op.outputs if np.shape(values.get(name)) == value.shape]
    nearest = min(alike, key=lambda name: distance(values[name], value))
    assert distance(values[nearest], value) < 1e-6, "the tapped module's output is not in the graph"
    return nearest


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def in_float32(built: Built, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(built.proto.SerializeToString())
    return [np.stack(session.run(list(output.values), feed)) for output in built.outputs]


@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_autograds(name, dynamo, tmp_path):
    if dynamo:
        pytest.importorskip("onnxscript")
    network = NETWORKS[name]
    module, x = prepared(network), images(network.size)
    options = {} if dynamo else {"training": torch.onnx.TrainingMode.PRESERVE}  # or BatchNorm is folded in float32
    names = {"input_names": ["x"], "output_names": ["scores"], "dynamic_axes": {"x": {0: "N"}, "scores": {0: "N"}}}
    torch.onnx.export(module, (x,), tmp_path / "m.onnx", dynamo=dynamo, **names, **options)
    model, sides = open_model(tmp_path / "m.onnx"), (network.size, network.size)
    value, scores, at_image, at_tap = autograd(module, network.tap, x.double().numpy())
    exact = {"x": x.double().numpy(), TARGETS: CHOSEN}

    tap = found_tap(canonize(model, sides, raw_scores(model), dtype=np.float64), value, exact["x"])
    requests, wanted = [Request(), Request(at=tap)], (at_image, at_tap)
    double, single = (
        [build(graph, requests, targets=2, keep=[tap], portable=portable) for portable in (False, True)]
        for graph in (
            canonize(model, sides, raw_scores(model), [tap], dtype=dtype) for dtype in (np.float64, np.float32)
        )
    )
    differ = double[0].proto.graph.node != double[1].proto.graph.node
    for built, rough in zip(double[: 1 + differ], single[: 1 + differ], strict=True):
        onnx.checker.check_model(built.proto, full_check=True)
        results = evaluate(built.proto, exact)
        assert distance(results[raw_scores(model)], scores) < 1e-6
        found = [np.stack([results[name] for name in output.values]) for output in built.outputs]
        errors = [distance(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
        found = in_float32(rough, {"x": x.numpy(), TARGETS: CHOSEN})
        roughly = [distance(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
        print(f"{name}: float64 {errors[0]:.1e} {errors[1]:.1e}, float32 {roughly[0]:.1e} {roughly[1]:.1e}")
        assert max(errors) < 1e-6
        assert max(roughly) < 0.05  # a ReLU or a pooling that decides otherwise
