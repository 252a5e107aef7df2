"""Relevance composites against zennit in float64, on small networks like VGG and ResNet with random weights."""

from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from heatmill.models.graph.backward import TARGETS, build
from heatmill.models.graph.canonize import canonize
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.request import Request
from heatmill.models.load import open_model

torch = pytest.importorskip("torch")
try:
    pytest.importorskip("torchvision")  # which zennit imports
except RuntimeError:  # its compiled operators don't fit this torch: declared, they no longer block the import
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
pytest.importorskip("zennit")

from torch import nn  # noqa: E402
from torch.nn.utils.fusion import fuse_conv_bn_eval  # noqa: E402
from zennit import composites as theirs  # noqa: E402
from zennit.attribution import Gradient  # noqa: E402
from zennit.layer import Sum  # noqa: E402

pytestmark = pytest.mark.peers

SIZE, CLASSES = (48, 48), 10
CHOSEN = np.array([[3], [7]])
LOW, HIGH = np.array([-2.1, -2.0, -1.8]), np.array([2.2, 2.4, 2.6])


class Block(nn.Module):
    """Two convolutions around which the input, or a projection of it, is added."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.side = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.side_norm = nn.BatchNorm2d(after) if stride > 1 else nn.Identity()
        self.sum, self.inner, self.outer = Sum(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.second_norm(self.second(self.inner(self.first_norm(self.first(x)))))
        return self.outer(self.sum(torch.stack([y, self.side_norm(self.side(x))], dim=-1)))


def resnet():
    stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def vgg():
    layers = []
    for before, after, pooled in ((3, 16, False), (16, 16, True), (16, 32, True), (32, 48, False), (48, 48, True)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
    head = [nn.Linear(48 * 9, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, CLASSES)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), *head)


def fused(network):
    """Every batch normalisation in the convolution before it: zennit passes over those that are left."""
    for module in network.modules():
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network


def images(n):
    noise = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
    return nn.functional.interpolate(noise, SIZE, mode="bicubic").clamp(-1.8, 2.2)


@pytest.fixture(scope="module", params=[resnet, vgg], ids=lambda make: make.__name__)
def network(request):
    torch.manual_seed(0)
    made = request.param()
    with torch.no_grad():
        made.train()(images(32))  # running statistics
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return fused(made.eval())


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("relevance") / "network.onnx"
    names = {"input_names": ["input"], "output_names": ["logits"]}
    axes = {"input": {0: "n"}, "logits": {0: "n"}}
    torch.onnx.export(network, (images(1),), path, **names, dynamic_axes=axes, dynamo=False)
    return open_model(path)


def bounded(**options):
    low, high = (torch.tensor(edge).reshape(1, 3, 1, 1) for edge in (LOW, HIGH))
    return theirs.EpsilonGammaBox(low=low, high=high, **options)


COMPOSITES = {
    "epsilon-plus": theirs.EpsilonPlus,
    "epsilon-plus-flat": theirs.EpsilonPlusFlat,
    "epsilon-gamma-box": bounded,
    "epsilon-alpha2-beta1": theirs.EpsilonAlpha2Beta1,
}


@pytest.mark.parametrize("composite", COMPOSITES)
def test_composite(composite, network, model):
    x = images(2)
    hot = torch.eye(CLASSES, dtype=torch.float64)[torch.tensor(CHOSEN[:, 0])]
    with Gradient(model=network.double(), composite=COMPOSITES[composite]()) as attributor:
        scores, wanted = attributor(x.double(), attr_output=lambda output: hot * output)
    network.float()
    scores, wanted = scores.detach().numpy(), wanted.detach().numpy()
    graph = canonize(model, SIZE, raw_scores(model), dtype=np.float64)
    request = Request("relevance", composite=composite)
    built = build(graph, [request], targets=1, portable=True, bounds=(LOW, HIGH))
    onnx.checker.check_model(built.proto, full_check=True)
    evaluator = ReferenceEvaluator(built.proto)
    found = dict(zip(evaluator.output_names, evaluator.run(None, {"input": x.numpy(), TARGETS: CHOSEN}), strict=True))
    np.testing.assert_allclose(found[graph.scores], scores, rtol=1e-6, atol=1e-7)
    relevance = found[built.outputs[0].values[0]]
    apart = np.linalg.norm(relevance - wanted) / np.linalg.norm(wanted)
    assert apart < 1e-10
    (share,) = (found[name] for name in built.outputs[0].kept)
    whole = (hot.numpy() * scores).sum(1)
    np.testing.assert_allclose(share, wanted.sum((1, 2, 3)) / whole, rtol=1e-5)
