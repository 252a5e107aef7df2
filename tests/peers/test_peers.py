"""Score-CAM's library variants against the libraries and RISE against a literal loop, on a small network in torch."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from heatmill import Explainer
from heatmill.engine.methods.rise import share
from heatmill.engine.opening import load

torch = pytest.importorskip("torch")
try:
    pytest.importorskip("torchvision")
except RuntimeError:  # its compiled operators don't fit this torch: declared, they no longer block the import
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
torchcam_methods = pytest.importorskip("torchcam.methods")

from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

pytestmark = pytest.mark.peers

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE = (45, 61)
CLASSES = 7
CONSTANT, DEAD, TWINS = 2, 5, (3, 8)


def small_network():
    """conv-bn-relu three times, pooling, linear; its last layer has a constant, a dead and two equal channels."""
    torch.manual_seed(3)
    layers = []
    for before, after, stride in ((3, 12, 2), (12, 16, 2), (16, 20, 2)):
        layers += [
            torch.nn.Conv2d(before, after, 3, stride=stride, padding=1),
            torch.nn.BatchNorm2d(after, momentum=None),
            torch.nn.ReLU(),
        ]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(20, CLASSES)]
    network = torch.nn.Sequential(*layers, *head)
    with torch.no_grad():
        network.train()(images(64))  # running statistics
        conv, norm, linear = network[6], network[7], network[-1]
        norm.bias.normal_(0, 0.3)
        for part in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            part[TWINS[1]] = part[TWINS[0]]
        for channel, level in ((CONSTANT, 0.5), (DEAD, -1.0)):
            norm.weight[channel], norm.bias[channel] = 0, level
        logits = network.eval()(images(64))
        linear.weight *= 3 / logits.std(0).mean()
        linear.bias -= network(images(64)).mean(0)
    return network


def images(n):
    """Smooth random pictures: coarse noise enlarged, so that feature maps have structure."""
    noise = torch.randn(n, 3, 6, 8, generator=torch.Generator().manual_seed(n))
    return torch.nn.functional.interpolate(noise, SIZE, mode="bicubic", align_corners=False)


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "small.onnx"
    axes = {"input": {0: "n"}, "logits": {0: "n"}}
    names = {"input_names": ["input"], "output_names": ["logits"]}
    torch.onnx.export(network, (images(1),), path, **names, dynamic_axes=axes, dynamo=False)
    spec = {"input_size": [3, *SIZE], "mean": [0.5] * 3, "std": [0.25] * 3, "output": "logits"}
    path.with_suffix(".json").write_text(json.dumps(spec))
    return path


def features(network, x):
    with torch.no_grad():
        return network[:9](x)


def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def grad_cam(network, x, target):
    with pytorch_grad_cam.ScoreCAM(model=network, target_layers=[network[8]]) as cam:
        return cam(input_tensor=x, targets=[ClassifierOutputTarget(target)])[0]


def torchcam(network, x, target, normalized):
    with torchcam_methods.ScoreCAM(network, "8", input_shape=(3, *SIZE)) as extractor:
        return extractor(target, network(x), normalized)[0]


def test_network_is_not_degenerate(network):
    """Were the maps flat, or the weights even, any formula would pass."""
    x = images(4)
    maps = features(network, x)
    spread = maps.flatten(2).amax(2) - maps.flatten(2).amin(2)
    constant = (spread == 0).all(0)
    assert constant[[CONSTANT, DEAD]].all()
    assert constant.sum() < 8
    assert torch.equal(maps[:, TWINS[0]], maps[:, TWINS[1]])
    assert maps[:, CONSTANT].min() > 0
    with torch.no_grad():
        classes = network(x).argmax(1)
    assert len(set(classes.tolist())) > 1
    for i in range(len(x)):
        of_package = grad_cam(network, x[i : i + 1], int(classes[i]))
        even = torch.nn.functional.interpolate(maps[i : i + 1].mean(1)[None], SIZE, mode="bilinear")[0, 0]
        assert np.std(of_package) > 0.05
        assert cosine(of_package - of_package.mean(), even - even.mean()) < 0.98


@pytest.mark.parametrize("target", ["predicted", 0, CLASSES - 1])
def test_grad_cam_variant_is_pytorch_grad_cams(network, model, target):
    x = images(4)
    result = Explainer(model, method="score-cam:variant=grad-cam", precision="fp32").explain(x.numpy(), targets=target)
    saliency = result.saliency()
    for i in range(len(x)):
        theirs = grad_cam(network, x[i : i + 1], int(result.targets[i, 0]))
        assert cosine(saliency[i, 0], theirs) >= 0.9999
        np.testing.assert_allclose(saliency[i, 0], theirs, atol=1e-4)


@pytest.mark.parametrize("target", ["predicted", 0, CLASSES - 1])
def test_torchcam_variant_is_torchcams(network, model, target):
    x = images(4)
    result = Explainer(model, method="score-cam:variant=torchcam", precision="fp32").explain(x.numpy(), targets=target)
    saliency = result.saliency()
    for i in range(len(x)):
        chosen = int(result.targets[i, 0])
        raw = torchcam(network, x[i : i + 1], chosen, normalized=False)[0].detach().numpy()
        shown = torchcam(network, x[i : i + 1], chosen, normalized=True)
        shown = torch.nn.functional.interpolate(shown[None], SIZE, mode="bilinear", align_corners=False)[0, 0].detach()
        assert cosine(np.maximum(result.maps[i, 0], 0), raw) >= 0.9999
        assert cosine(saliency[i, 0], shown) >= 0.9999
        np.testing.assert_allclose(np.maximum(result.maps[i, 0], 0), raw, atol=1e-4)
        np.testing.assert_allclose(saliency[i, 0], shown, atol=1e-4)


def literal_rise(logits, x, bits, offsets, p):
    """RISE (c, H, W) as its paper words it, mask by mask; x is (1, 3, H, W)."""
    height, width = x.shape[2:]
    s = bits.shape[1]
    cell_y, cell_x = math.ceil(height / s), math.ceil(width / s)
    total = 0
    for grid, (top, left) in zip(bits, offsets, strict=True):
        axes = []
        for start, side, cell in ((top, height, cell_y), (left, width, cell_x)):
            position = (torch.arange(side) + int(start) + 0.5) * s / ((s + 1) * cell) - 0.5
            axes.append(position / (s - 1) * 2 - 1)
        v, u = torch.meshgrid(*axes, indexing="ij")
        cells = torch.from_numpy(grid.astype(np.float32))[None, None]
        where = torch.stack([u, v], dim=-1)[None]
        mask = torch.nn.functional.grid_sample(cells, where, "bilinear", "reflection", align_corners=True)[0, 0]
        total = total + torch.softmax(logits(x * mask)[0], 0)[:, None, None] * mask
    return total / (len(bits) * p)


def check_rise(path, logits, x, targets):
    method = "rise:masks=64,cells=6,p=0.4"
    loaded = load(path, [method])
    bank = share(loaded.facts, loaded.calls[0].parameters, 5)
    with torch.no_grad():
        literal = literal_rise(logits, x, bank.bits, bank.offsets, 0.4).numpy()
    result = Explainer(path, method=method, precision="fp32", seed=5).explain(x.numpy(), targets=targets)
    for k, target in enumerate(result.targets[0]):
        assert np.ptp(literal[target]) > 0.01 * literal[target].max()
        np.testing.assert_allclose(result.maps[0, k], literal[target], rtol=1e-4, atol=1e-6)


def test_rise_is_the_literal_loop(network, model):
    check_rise(model, network, images(1), ["predicted", 0])


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the shared models are not beside the checkout")
def test_rise_is_the_literal_loop_on_a_photograph():
    path = SHARED / "models" / "efficientnet_lite0.onnx"
    session = onnxruntime.InferenceSession(path)
    photograph = sorted((SHARED / "images").rglob("*.jpg"))[0]
    x = torch.from_numpy(preprocessed(path, photograph))
    check_rise(path, lambda rows: torch.from_numpy(session.run(None, {"input": rows.numpy()})[0]), x, "top3")


def preprocessed(path, photograph):
    from heatmill.models.preprocess import decode, normalise, view

    spec = Explainer(path, method="rise:masks=1").spec
    return normalise(view(decode(photograph.read_bytes()), spec)[0], spec, "float32")[None]
