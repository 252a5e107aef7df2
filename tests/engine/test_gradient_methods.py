"""Every method that follows scores back, against a slow reading of its formula that shares no code with the graphs.

Gradients are central differences of the network in float64; relevance is divided over dense matrices, one entry for
each pair of an input and an output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from zlib import crc32

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from heatmill import Explainer, InputError
from heatmill.engine.explainer import Engine, Result
from heatmill.engine.methods import METHODS, parse_method
from heatmill.engine.methods.smoothgrad import BASES
from heatmill.engine.opening import load, open_best
from heatmill.engine.passes import Passes, open_passes
from heatmill.engine.types import Explanation, Item, Target, parse_targets
from heatmill.kernels import reference

SIZE, SMALL = (17, 13), (9, 9)
STEP = 1e-6  # of the central differences


def pictures(n: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """Network inputs with smooth structure, (n, 3, H, W)."""
    rng = np.random.default_rng(seed)
    return reference.upsample(rng.normal(size=(n * 3, 5, 4)), size).reshape(n, 3, *size).astype(np.float32)


def scale(array: np.ndarray) -> np.ndarray:
    return (array - array.min()) / (array.max() - array.min())


def up(array: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    return reference.upsample(array[None], size)[0]


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return e / e.sum()


def near(found: np.ndarray, literal: np.ndarray, share: float = 1e-4, what: str = "") -> None:
    """Equal within a share of the oracle's greatest magnitude; the oracle shows something."""
    size = np.abs(literal).max()
    assert found.shape == literal.shape, what
    assert np.ptp(literal) > 1e-3 * size > 0, f"{what}: the oracle is degenerate"
    assert np.abs(found - literal).max() <= share * size, what


def explained(path, methods, images, targets="predicted", batch_size=5, seed=0, **options) -> dict[str, Result]:
    """Some methods in one run."""
    loaded = load(path, methods, **options)
    session = open_best(loaded, batch_size=batch_size)
    asked = parse_targets([str(target) for target in ([targets] if isinstance(targets, str) else targets)], 5, ())
    engine = Engine(loaded, session, asked, batch_size, seed, passes=open_passes(loaded, session, asked, batch_size))
    rows: dict[str, list[list[Explanation]]] = {text: [[] for _ in images] for text in methods}
    texts = {call.text: text for call, text in zip(loaded.calls, methods, strict=True)}
    for explanation in engine.stream(Item(i, image) for i, image in enumerate(images)):
        rows[texts[explanation.method.text]][explanation.key].append(explanation)
    return {
        text: Result(
            maps=np.array([[e.map for e in row] for row in found]),
            targets=np.array([[e.target for e in row] for row in found]),
            scores=np.array([[e.score for e in row] for row in found]),
            predictions=np.array([row[0].pred for row in found]),
            statuses=np.array([[e.status for e in row] for row in found]),
            extras=tuple(tuple(e.extras for e in row) for row in found),
            size=loaded.facts.size,
            finish=call.method.finish(call.parameters),
        )
        for (text, found), call in zip(rows.items(), loaded.calls, strict=True)
    }


# ----- the network, for the oracles -----


class Network:
    """The file in float64 by onnx.reference, whole or from an inner value on."""

    def __init__(self, path) -> None:
        self.model = onnx.load(path)
        graph = self.model.graph
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.parts: dict[tuple[str, str], ReferenceEvaluator] = {}

    def part(self, start: str, end: str, values: np.ndarray) -> np.ndarray:
        """What some `end`s are where `start` holds `values` (n, ...)."""
        if (start, end) not in self.parts:
            needed, nodes = {end}, []
            for node in reversed(self.model.graph.node):
                if needed.intersection(node.output) and start not in node.output:
                    nodes.insert(0, node)
                    needed.update(node.input)
            inputs, outputs = ([onnx.ValueInfoProto(name=name)] for name in (start, end))
            graph = helper.make_graph(nodes, "part", inputs, outputs, list(self.model.graph.initializer))
            self.parts[start, end] = ReferenceEvaluator(helper.make_model(graph, opset_imports=self.model.opset_import))
        return self.parts[start, end].run(None, {start: values.astype(np.float64)})[0]

    def at(self, name: str, image: np.ndarray) -> np.ndarray:
        """An inner value of one image."""
        return self.part("input", name, image[None])[0]

    def logits(self, image: np.ndarray) -> np.ndarray:
        return self.at("logits", image)

    def posterior(self, image: np.ndarray) -> np.ndarray:
        return softmax(self.logits(image))

    def slopes(self, value: np.ndarray, start: str = "input") -> np.ndarray:
        """d logits / d `start` at `value`, (classes, *value.shape)."""
        moves = STEP * np.eye(value.size).reshape(-1, *value.shape)
        above, below = (self.part(start, "logits", value[None] + sign * moves) for sign in (1, -1))
        return ((above - below) / (2 * STEP)).T.reshape(-1, *value.shape)


# ----- the CAMs that weigh by gradients -----


def grad_cam(A, G):
    """Equations 1 and 2 of Selvaraju et al."""
    return sum(g.mean() * a for a, g in zip(A, G, strict=True))


def hires_cam(A, G):
    return sum(g * a for a, g in zip(A, G, strict=True))


def layer_cam(A, G):
    """Equations 5 and 6 of Jiang et al."""
    return sum(np.maximum(g, 0) * a for a, g in zip(A, G, strict=True))


def xgrad_cam(A, G):
    """Equation 9 of Fu et al., with their code's 1e-6."""
    return sum((g * a).sum() / (a.sum() + 1e-6) * a for a, g in zip(A, G, strict=True))


def grad_cam_pp(A, G):
    """Equation 19 of Chattopadhay et al., position by position."""
    total = np.zeros(A.shape[1:])
    for a, g in zip(A, G, strict=True):
        weight = 0.0
        for slope in g.ravel():
            below = 2 * slope**2 + a.sum() * slope**3
            alpha = slope**2 / below if below != 0 else 0.0
            weight += alpha * max(slope, 0)
        total += weight * a
    return total


def grad_cam_pp_official(A, G):
    """The authors' code: alphas divided by their sum over the positions of positive gradient; 0 counts as 1."""
    total = np.zeros(A.shape[1:])
    for a, g in zip(A, G, strict=True):
        below = 2 * g**2 + a.sum() * g**3
        alpha = g**2 / np.where(below != 0, below, 1)
        whole = alpha[g > 0].sum()
        alpha = alpha / (whole if whole != 0 else 1)
        total += (alpha * np.maximum(g, 0)).sum() * a
    return total


def grad_cam_pp_library(A, G):
    """pytorch-grad-cam: 1e-6 in the denominator, nothing where the gradient is zero."""
    total = np.zeros(A.shape[1:])
    for a, g in zip(A, G, strict=True):
        alpha = np.where(g != 0, g**2 / (2 * g**2 + a.sum() * g**3 + 1e-6), 0)
        total += (alpha * np.maximum(g, 0)).sum() * a
    return total


CAMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "grad-cam": grad_cam,
    "grad-cam++": grad_cam_pp,
    "grad-cam++:variant=official": grad_cam_pp_official,
    "grad-cam++:variant=grad-cam": grad_cam_pp_library,
    "hires-cam": hires_cam,
    "xgrad-cam": xgrad_cam,
    "layer-cam": layer_cam,
}


@pytest.mark.parametrize(("body", "seed"), [("plain", 0), ("pool", 1), ("sum", 3), ("norm", 2)])
def test_gradient_cams_are_their_formulas(make_model, body, seed):
    path = make_model(size=SIZE, head="Dense", body=body, seed=seed)
    net, images = Network(path), pictures(2, seed=seed)
    results = explained(path, CAMS, images, ["predicted", 2])
    for i, x in enumerate(images):
        A = net.at("features", x)
        G = net.slopes(A, "features")
        for method, result in results.items():
            assert result.predictions[i] == net.logits(x).argmax()
            for k, c in enumerate(result.targets[i]):
                assert np.ptp(G[c], axis=(1, 2)).max() > 0.1 * np.abs(G[c]).max(), "the gradient varies over the map"
                literal = CAMS[method](A, G[c])
                near(result.maps[i, k], literal, what=method)
                if literal.max() > 0:
                    finished = scale(up(np.maximum(literal, 0)))
                    np.testing.assert_allclose(result.saliency()[i, k], finished, atol=1e-3, err_msg=method)


@pytest.mark.parametrize(
    ("options", "layer"), [({"head": "Tokens"}, "tokens"), ({"head": "Dense", "seed": 4}, "c2")], ids=["tokens", "c2"]
)
def test_gradient_cams_at_tokens_and_before_the_activation(make_model, options, layer):
    """Of tokens (n, t, c), and of maps that are negative in places."""
    path = make_model(size=SIZE, **options)
    net, x = Network(path), pictures(1)[0]
    values = net.at(layer, x)
    G = net.slopes(values, layer)
    if layer == "tokens":
        values, G = values.T.reshape(12, 5, 4), G.transpose(0, 2, 1).reshape(-1, 12, 5, 4)
    else:
        assert (values < 0).any()
    for method, result in explained(path, CAMS, x[None], [1, 3], layer=layer).items():
        for k, c in enumerate((1, 3)):
            near(result.maps[0, k], CAMS[method](values, G[c]), 5e-4, method)


@pytest.mark.parametrize("head", ["Gemm", "Reshape"])
def test_on_a_linear_head_no_gradient_is_computed_and_four_cams_are_one(make_model, head):
    """CAM = h w Grad-CAM = h w XGrad-CAM = h w HiResCAM on pooling and one linear layer."""
    path, images = make_model(size=SIZE, head=head), pictures(3)
    cam = Explainer(path, method="cam").explain(images, targets=["top2", 4]).maps
    for name in ("grad-cam", "xgrad-cam", "hires-cam"):
        explainer = Explainer(path, method=name)
        assert not explainer._loaded.needs_weights
        assert explainer._passes_for((Target("predicted"),)) == Passes()
        found = explainer.explain(images, targets=["top2", 4])
        near(20 * found.maps, cam, 1e-5)
        assert explainer._passes == {}
        assert found.extras[0][0]["passes"] == 0


def test_the_shortcut_of_a_linear_head_gives_what_the_graph_gives(make_model):
    path, methods = make_model(size=SIZE), [*CAMS, "group-cam:groups=5"]
    short = explained(path, methods, pictures(3), ["top2", 4])
    loaded = load(path, methods)
    assert not loaded.needs_weights
    loaded = replace(loaded, facts=replace(loaded.facts, head="to be followed back"))
    targets, session = [Target("top", 2), Target("class", 4)], open_best(loaded, batch_size=4)
    passes = open_passes(loaded, session, targets, 4)
    assert passes.observe is not None
    places = {(i, k): 0 for i in range(3) for k in ("top1", "top2", "class")}
    for explanation in Engine(loaded, session, targets, 4, passes=passes).stream(map(Item, range(3), pictures(3))):
        expected = short[explanation.method.text].maps
        place = ["top1", "top2", "class"].index(explanation.target_source)
        found = explanation.map - expected[explanation.key, place]
        assert np.abs(found).max() <= 1e-5 * np.abs(expected).max(), explanation.method.text
        places[explanation.key, explanation.target_source] += 1
    assert set(places.values()) == {len(methods)}


# ----- Group-CAM -----


def group_cam(net: Network, x: np.ndarray, c: int, groups: int, variant: str = "paper") -> np.ndarray:
    """Neighbouring maps weighed and summed; what each group shows over the blurred image weighs it."""
    A = net.at("features", x)
    G = net.slopes(A, "features")[c]
    blurred = reference.blur(x.astype(np.float64), 51, 50.0)
    base = net.posterior(blurred)[c]
    count = -(-len(A) // groups)  # as torch.chunk: each group has as many but the last
    total = np.zeros(x.shape[1:])
    for first in range(0, len(A), count):
        whole = np.zeros(A.shape[1:])
        for k in range(first, min(first + count, len(A))):
            whole += G[k].mean() * A[k]
        whole = np.maximum(whole, 0)
        if variant == "official":
            whole[whole <= np.percentile(whole, 70)] = 0
        if np.ptp(whole) > 0:
            shown = up(whole)
            mask = scale(shown)
            risen = net.posterior(x * mask + blurred * (1 - mask))[c] - base
            total += risen * mask if variant == "official" else max(risen, 0) * shown
    return total


@pytest.mark.parametrize("variant", METHODS["group-cam"].parameters["variant"].choices)
@pytest.mark.parametrize(("head", "groups"), [("Gemm", 32), ("Dense", 5), ("Dense", 12), ("Gemm", 1)])
def test_group_cam_is_the_literal_loop(make_model, head, groups, variant):
    path = make_model(size=SIZE, head=head, seed=5)
    net, images = Network(path), pictures(2, seed=5)
    explainer = Explainer(path, method=f"group-cam:groups={groups},variant={variant}", batch_size=5)
    targets = ["predicted", 1, 3]
    result = explainer.explain(images, targets=targets)
    drawn = 0
    for i, x in enumerate(images):
        for k, c in enumerate(result.targets[i]):
            literal = group_cam(net, x, c, groups, variant)
            np.testing.assert_allclose(result.upsampled()[i, k], literal, rtol=0, atol=1e-5 * max(literal.max(), 1))
            if literal.max() > 1e-3:
                drawn += 1
                np.testing.assert_allclose(result.saliency()[i, k], scale(np.maximum(literal, 0)), atol=1e-3)
    assert drawn >= 2
    extras = result.extras[0][0]
    assert extras["groups"] == {32: 12, 12: 12, 5: 4, 1: 1}[groups], "5 groups of 12: four of three each"
    assert extras["passes"] <= 1 + 3 * extras["groups"]


# ----- what one pass to the image shows -----

RULES = {"max": lambda v: np.abs(v).max(0), "abs-sum": lambda v: np.abs(v).sum(0), "sum": lambda v: v.sum(0)}
OF_THE_IMAGE: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "saliency": ("max", lambda x, g: g),
    "input-x-gradient": ("sum", lambda x, g: x * g),
}


def by_rule(name: str, default: str) -> dict[str, str]:
    """A method's call for each rule of how channels become one map."""
    return {rule: name if rule == default else f"{name}:channels={rule}" for rule in RULES}


@pytest.mark.parametrize("body", ["plain", "pool", "sum", "norm"])
def test_gradients_at_the_image_are_central_differences(make_model, body):
    path = make_model(size=SMALL, head="Dense", body=body)
    net, images = Network(path), pictures(2, SMALL)
    slopes = [net.slopes(x) for x in images]
    calls = {(name, rule): text for name, (own, _) in OF_THE_IMAGE.items() for rule, text in by_rule(name, own).items()}
    results = explained(path, list(calls.values()), images, ["predicted", 3])
    for (name, rule), text in calls.items():
        assert results[text].maps.shape == (2, 2, *SMALL)
        for i, (x, G) in enumerate(zip(images, slopes, strict=True)):
            for k, c in enumerate(results[text].targets[i]):
                literal = RULES[rule](OF_THE_IMAGE[name][1](x, G[c]))
                near(results[text].maps[i, k], literal, what=text)
                shown = np.maximum(literal, 0) if name == "input-x-gradient" else literal
                np.testing.assert_allclose(results[text].saliency()[i, k], scale(shown), atol=1e-4)


@pytest.mark.parametrize("body", ["plain", "pool", "sum", "norm"])
def test_guided_backpropagation_gates_every_relu_twice(make_model, body):
    path = make_model(size=SMALL, head="Dense", body=body)
    net, images = Dense(path), pictures(2, SMALL)
    calls = by_rule("guided-backprop", "max")
    results = explained(path, list(calls.values()), images, ["predicted", 3])
    for i, x in enumerate(images):
        values, G = net.values(x), Network(path).slopes(x)
        for rule, text in calls.items():
            for k, c in enumerate(results[text].targets[i]):
                one = np.eye(5)[c]
                near(net.back(values, "logits", one, "input", gradient), G[c], 1e-5)
                literal = net.back(values, "logits", one, "input", guided)
                assert np.abs(literal - G[c]).max() > 0.1 * np.abs(G).max(), "the second gate matters"
                near(results[text].maps[i, k], RULES[rule](literal), 1e-5, text)


def test_guided_backpropagation_needs_a_relu(make_model):
    path = make_model(size=SIZE)
    model = onnx.load(path)
    for node in model.graph.node:
        node.op_type = "Sigmoid" if node.op_type == "Relu" else node.op_type
    onnx.save(model, path)
    for method in ("guided-backprop", "smoothgrad:base=guided-backprop"):
        with pytest.raises(InputError, match="it is defined for ReLU and ReLU6 only, and the model has none"):
            Explainer(path, method=method)
    assert Explainer(path, method="saliency").explain(pictures(1)).maps.any()


def test_a_model_that_gives_posteriors_only_is_followed_from_its_logits_or_refused(make_model):
    methods = ["saliency", "lrp", "deep-taylor", "integrated-gradients:steps=9", "smoothgrad:base=grad-cam,samples=9"]
    images = pictures(1)
    bare = explained(make_model("bare.onnx", size=SIZE), methods, images)
    ended = explained(make_model("ended.onnx", size=SIZE, end="Softmax"), methods, images)
    path = make_model("spelled.onnx", size=SIZE, spec={"output": "sigmoid"})
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("HardSigmoid", ["raw"], ["logits"]))
    onnx.save(model, path)
    for method in methods:
        np.testing.assert_array_equal(bare[method].maps, ended[method].maps)
        with pytest.raises(InputError, match="it follows the raw score back, and the model gives sigmoid only"):
            Explainer(path, method=method)


BY_LAYOUT = [
    *("saliency", "input-x-gradient", "guided-backprop", "integrated-gradients:steps=4", "lrp", "clrp", "sglrp"),
    *("lrp:composite=epsilon-gamma-box", "deep-taylor", "fg-cam:to=image", "grad-cam", "cf-cam", "group-cam"),
]


def test_a_network_that_takes_its_channels_last_has_the_same_maps(make_model):
    images = pictures(2)
    plain = explained(make_model("plain.onnx", size=SIZE, head="Dense"), BY_LAYOUT, images)
    path = make_model("last.onnx", size=SIZE, head="Dense", layout="NHWC")
    last = explained(path, BY_LAYOUT, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    for method in BY_LAYOUT:
        near(last[method].maps, plain[method].maps, 1e-5, method)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_network_that_takes_whole_pixels_has_the_maps_of_the_one_behind_its_scaling(make_model, layout):
    """It divides by 64 and takes 2 off: gradients are 64 times smaller, relevance and its bounds are the same."""
    slopes = {"saliency:channels=sum": 64, "guided-backprop": 64, "smoothgrad:samples=2,noise=0": 64}
    methods = [*slopes, "grad-cam", "lrp", "clrp", "deep-taylor", "fg-cam:to=image"]
    options = {"size": SIZE, "head": "Dense"}
    whole = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    path = make_model("pixels.onnx", dtype=TensorProto.UINT8, layout=layout, spec=whole, **options)
    pixels = np.clip(pictures(2) * 50 + 128, 0, 255).astype(np.uint8)
    found = explained(path, methods, pixels if layout == "NCHW" else pixels.transpose(0, 2, 3, 1), [0, 3])
    path = make_model("plain.onnx", spec={"mean": [128 / 255] * 3, "std": [64 / 255] * 3}, **options)
    plain = explained(path, methods, (pixels / 64 - 2).astype(np.float32), [0, 3])
    for method in methods:
        near(slopes.get(method, 1) * found[method].maps, plain[method].maps, 1e-5, method)


# ----- integrated gradients and SmoothGrad -----


def on_the_path(net: Network, x: np.ndarray, below: np.ndarray, c: int, steps: int) -> np.ndarray:
    """The gradient's integral from `below` to `x`, times their difference."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = np.zeros(x.shape)
    for point, weight in zip(points, weights, strict=True):
        total += weight / 2 * net.slopes(below + (point + 1) / 2 * (x - below))[c]
    return (x - below) * total


@pytest.mark.parametrize("baseline", ["zero", "black", "mean", "blur"])
def test_integrated_gradients_are_the_sum_over_the_path(make_model, baseline):
    path = make_model(size=SMALL, head="Dense", seed=1)
    net, x = Network(path), pictures(1, SMALL)[0].astype(np.float64)
    below = {
        "zero": np.zeros((3, 1, 1)),
        "black": (0 - np.array([0.5, 0.45, 0.4])[:, None, None]) / np.array([0.25, 0.2, 0.3])[:, None, None],
        "mean": x.mean(axis=(1, 2), keepdims=True),
        "blur": reference.blur(x, 51, 50.0),
    }[baseline] + np.zeros(x.shape)
    text = "integrated-gradients:steps=6" + (f",baseline={baseline}" if baseline != "zero" else "")
    calls = {"sum": text, "max": f"{text},channels=max", "abs-sum": f"{text},channels=abs-sum"}
    results = explained(path, list(calls.values()), x[None].astype(np.float32), ["predicted", 2], batch_size=4)
    for k, c in enumerate(results[text].targets[0]):
        literal = on_the_path(net, x, below, c, 6)
        risen = net.logits(x)[c] - net.logits(below)[c]
        for rule, call in calls.items():
            near(results[call].maps[0, k], RULES[rule](literal), what=call)
            told = results[call].extras[0][k]
            assert told["completeness_error"] == pytest.approx(
                abs(literal.sum() - risen) / abs(risen), rel=0.02, abs=1e-4
            )
            assert told["passes"] == 14, "six points and the baseline, for each target"


def test_integrated_gradients_are_complete(make_model):
    path = make_model(size=SMALL, head="Dense")
    net, images = Network(path), pictures(2, SMALL)
    result = Explainer(path, method="integrated-gradients:steps=200").explain(images, targets=[0, 1, 2, 3, 4])
    for i, x in enumerate(images):
        risen = net.logits(x) - net.logits(x * 0)
        off = np.abs(result.maps[i].sum(axis=(1, 2)) - risen)
        assert (off < 0.01 * np.abs(risen).max()).all()
        told = [extras["completeness_error"] for extras in result.extras[i]]
        np.testing.assert_allclose(told, off / np.abs(risen), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_path_of_whole_pixels_is_rounded_to_whole_pixels(make_model, layout):
    options = {"size": SMALL, "head": "Dense"}
    whole = {"mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 1.0}
    path = make_model("pixels.onnx", dtype=TensorProto.UINT8, layout=layout, spec=whole, **options)
    pixels = np.clip(pictures(1, SMALL)[0] * 50 + 128, 0, 255).astype(np.uint8)
    pictured = pixels.transpose(1, 2, 0)
    found = Explainer(path, method="integrated-gradients:steps=7").explain([pictured], targets=[0, 3])
    net = Network(make_model("plain.onnx", **options))
    points, weights = np.polynomial.legendre.leggauss(7)
    total = 0
    for point, weight in zip(points, weights, strict=True):
        total = total + weight / 2 * net.slopes(np.rint((point + 1) / 2 * pixels) / 64 - 2)
    near(found.maps[0], (pixels * total / 64).sum(1)[[0, 3]])


def noisy(x: np.ndarray, key: int, draw: int, noise: float, seed: int) -> np.ndarray:
    """The documented draw: a counter for each method and copy, keyed by the seed and the image."""
    digest = hashlib.blake2b(str(key).encode(), digest_size=8).digest()
    words = np.array([seed, int.from_bytes(digest, "little")], np.uint64)
    generator = np.random.Philox(key=words, counter=[0, 0, crc32(b"smoothgrad"), draw])
    drawn = np.random.Generator(generator).standard_normal(x.shape, dtype=np.float32)
    return x + np.float32(noise * (x.max() - x.min())) * drawn


def one_copy(path, base: str, x: np.ndarray, c: int) -> np.ndarray:
    """A base's own map of one copy, with its defaults."""
    net = Network(path)
    if base in CAMS:
        A = net.at("features", x)
        return CAMS[base](A, net.slopes(A, "features")[c])
    if base in OF_THE_IMAGE:
        rule, made = OF_THE_IMAGE[base]
        return RULES[rule](made(x, net.slopes(x)[c]))
    if base == "integrated-gradients":
        return on_the_path(net, x.astype(np.float64), x * 0.0, c, 25).sum(0)
    dense = Dense(path)
    values = dense.values(x)
    if base == "guided-backprop":
        return RULES["max"](dense.back(values, "logits", np.eye(5)[c], "input", guided))
    return relevance_map(dense, values, *RELEVANCES[base], c)[0].sum(0)


def share_that_arrived(path, base: str, x: np.ndarray, c: int) -> float:
    dense = Dense(path)
    return relevance_map(dense, dense.values(x), *RELEVANCES[base], c)[1]


@pytest.mark.parametrize("base", [*BASES, "integrated-gradients"])
def test_smoothgrad_is_the_mean_over_noisy_copies(make_model, base):
    path = make_model(size=SMALL, head="Dense", seed=2)
    images, samples = pictures(2, SMALL), 2 if base == "integrated-gradients" else 3
    explainer = Explainer(path, method=f"smoothgrad:base={base},samples={samples},noise=0.1", batch_size=4, seed=7)
    images = images[:1] if base == "integrated-gradients" else images
    result = explainer.explain(images, targets="predicted" if base == "integrated-gradients" else ["predicted", 1])
    for i, x in enumerate(images):
        for k, c in enumerate(result.targets[i]):
            copies = [noisy(x, i, draw, 0.1, 7) for draw in range(samples)]
            near(result.maps[i, k], sum(one_copy(path, base, copy, c) for copy in copies) / samples, 5e-4)
            assert result.extras[i][k]["samples"] == samples
            if base in RELEVANCES:
                shares = [share_that_arrived(path, base, copy, c) for copy in copies]
                assert result.extras[i][k]["kept"] == pytest.approx(np.mean(shares), rel=2e-3, abs=2e-5)
            assert ("kept" in result.extras[i][k]) == (base in RELEVANCES)
    assert result.finish == METHODS[base].finish(parse_method(base).parameters)


def test_smoothgrad_without_noise_is_its_base(make_model):
    path, images = make_model(size=SMALL, head="Dense"), pictures(2, SMALL)
    calls = {base: f"smoothgrad:base={base},samples=3,noise=0" for base in BASES if base != "saliency"}
    calls |= {"saliency": "smoothgrad:samples=3,noise=0"}
    calls |= {"integrated-gradients:steps=25": "smoothgrad:base=integrated-gradients,samples=3,noise=0"}
    results = explained(path, [*calls, *calls.values()], images, ["predicted", 3])
    for base, smooth in calls.items():
        near(results[smooth].maps, results[base].maps, 2e-5, base)


@pytest.mark.parametrize("base", ["saliency", "grad-cam", "integrated-gradients"])
def test_the_noise_belongs_to_the_seed_the_image_and_its_number(make_model, base):
    """Not to the batch or to what else runs; fewer copies are the first of more."""
    path, images = make_model(size=SMALL, head="Dense"), pictures(4, SMALL)
    text = f"smoothgrad:base={base},samples="
    whole = Explainer(path, method=text + "4", batch_size=32, seed=3).explain(images)
    for size in (1, 6):
        other = Explainer(path, method=text + "4", batch_size=size, seed=3).explain(images)
        np.testing.assert_allclose(other.maps, whole.maps, rtol=0, atol=1e-5 * np.abs(whole.maps).max())
    shorter = Explainer(path, method=text + "4", seed=3).explain(images[:2])
    np.testing.assert_allclose(shorter.maps, whole.maps[:2], rtol=0, atol=1e-5 * np.abs(whole.maps).max())
    reseeded = Explainer(path, method=text + "4", seed=4).explain(images)
    assert np.abs(reseeded.maps - whole.maps).max() > 1e-3 * np.abs(whole.maps).max()
    twice = Explainer(path, method=text + "4", seed=3).explain(np.stack([images[0], images[0]]))
    assert np.abs(twice.maps[0] - twice.maps[1]).max() > 1e-3 * np.abs(whole.maps).max(), "each image draws its own"


# ----- relevance over dense matrices -----


@dataclass
class Layer:
    """A linear layer with one entry for each pair of an output and an input; `taps` tells which are connected."""

    matrix: np.ndarray
    bias: np.ndarray
    taps: np.ndarray


def unrolled(weight: np.ndarray, shape: tuple[int, ...], stride: int, pad: int) -> np.ndarray:
    """A convolution as a matrix (outputs, inputs)."""
    out, _, kh, kw = weight.shape
    h, w = ((n + 2 * pad - k) // stride + 1 for n, k in zip(shape[1:], (kh, kw), strict=True))
    matrix = np.zeros((out, h, w, *shape))
    for y, x, i, j in np.ndindex(h, w, kh, kw):
        v, u = y * stride + i - pad, x * stride + j - pad
        if 0 <= v < shape[1] and 0 <= u < shape[2]:
            matrix[:, y, x, :, v, u] = weight[:, :, i, j]
    return matrix.reshape(out * h * w, -1)


def windows(shape: tuple[int, ...], node: onnx.NodeProto):
    """The inputs of each output of a max pool: pairs of an output's place and the places that it sees."""
    stride, k, pad = (helper.get_node_attr_value(node, name)[0] for name in ("strides", "kernel_shape", "pads"))
    for c, y, x in np.ndindex(shape[0], *((n + 2 * pad - k) // stride + 1 for n in shape[1:])):
        inside = [(y * stride + i - pad, x * stride + j - pad) for i, j in np.ndindex(k, k)]
        yield (c, y, x), [(c, v, u) for v, u in inside if 0 <= v < shape[1] and 0 <= u < shape[2]]


Rule = Callable[["Dense", dict[str, np.ndarray], onnx.NodeProto, np.ndarray], list[np.ndarray]]


class Dense:
    """The network on one image, layer by layer; `folded` works normalisation into the convolution before it."""

    def __init__(self, path, folded: bool = True) -> None:
        model = onnx.load(path)
        self.weights = {tensor.name: numpy_helper.to_array(tensor).astype(float) for tensor in model.graph.initializer}
        self.nodes, self.layers, self.norms = [], {}, {}
        for node in model.graph.node:
            if node.op_type == "BatchNormalization" and folded:
                conv = self.nodes[-1]
                self.norms[node.output[0]] = [self.weights[name] for name in node.input[1:]]
                conv.output[0] = node.output[0]
            else:
                self.nodes.append(node)

    def layer(self, node: onnx.NodeProto, x: np.ndarray) -> Layer:
        name = node.output[0]
        if name not in self.layers:
            weight = self.weights[node.input[1]]
            if node.op_type == "Conv":
                attributes = {found.name: helper.get_attribute_value(found) for found in node.attribute}
                place = (x.shape, attributes.get("strides", [1])[0], attributes.get("pads", [0])[0])
                matrix, taps = unrolled(weight, *place), unrolled(np.ones_like(weight), *place)
            else:
                matrix, taps = weight, np.ones_like(weight)
            bias = self.weights[node.input[2]] if len(node.input) > 2 else np.zeros(len(weight))
            bias = np.repeat(bias, len(matrix) // len(bias))
            if name in self.norms:
                gain, shift, mean, variance = (np.repeat(v, len(matrix) // len(v)) for v in self.norms[name])
                factor = gain / np.sqrt(variance + 1e-5)
                matrix, bias = matrix * factor[:, None], (bias - mean) * factor + shift
            self.layers[name] = Layer(matrix, bias, taps)
        return self.layers[name]

    def values(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Every value of the network."""
        found = {"input": image.astype(float)}
        for node in self.nodes:
            x = found[node.input[0]]
            if node.op_type in ("Conv", "Gemm"):
                layer = self.layer(node, x)
                y = layer.matrix @ x.ravel() + layer.bias
                if node.op_type == "Conv":
                    y = y.reshape(len(self.weights[node.input[1]]), -(-x.shape[1] // self.stride(node)), -1)
            elif node.op_type == "Relu":
                y = np.maximum(x, 0)
            elif node.op_type == "MaxPool":
                places = dict(windows(x.shape, node))
                y = np.zeros(tuple(np.max(list(places), axis=0) + 1))
                for place, seen in places.items():
                    y[place] = max(x[p] for p in seen)
            elif node.op_type == "GlobalAveragePool":
                y = x.mean(axis=(1, 2), keepdims=True)
            elif node.op_type == "Flatten":
                y = x.ravel()
            elif node.op_type == "BatchNormalization":
                gain, shift, mean, variance = (self.weights[name][:, None, None] for name in node.input[1:])
                y = (x - mean) / np.sqrt(variance + 1e-5) * gain + shift
            else:
                assert node.op_type == "Add"
                y = x + found[node.input[1]]
            found[node.output[0]] = y
        return found

    @staticmethod
    def stride(node: onnx.NodeProto) -> int:
        return next((found.ints[0] for found in node.attribute if found.name == "strides"), 1)

    def back(self, values, start: str, sent: np.ndarray, end: str, rule: Rule) -> np.ndarray:
        """What of `sent`, standing at `start`, a rule brings to `end`."""
        found = {start: sent}
        for node in reversed(self.nodes):
            if node.output[0] in found and node.output[0] != end:
                parts = rule(self, values, node, found.pop(node.output[0]))
                for name, part in zip(node.input, parts, strict=False):
                    found[name] = found.get(name, 0) + part.reshape(values[name].shape)
        return found[end]


def gradient(net: Dense, values, node, sent, gated=False) -> list[np.ndarray]:
    """The chain rule; with `gated` only what is positive goes through a ReLU."""
    x = values[node.input[0]]
    if node.op_type in ("Conv", "Gemm"):
        return [net.layer(node, x).matrix.T @ sent.ravel()]
    if node.op_type == "Relu":
        return [sent * (x > 0) * ((sent > 0) if gated else 1)]
    if node.op_type == "GlobalAveragePool":
        return [np.broadcast_to(sent / x[0].size, x.shape)]
    if node.op_type == "MaxPool":
        return [to_the_greatest(x, node, sent)]
    return [sent] * len(node.input)


guided = partial(gradient, gated=True)


def to_the_greatest(x: np.ndarray, node: onnx.NodeProto, sent: np.ndarray, ties: bool = False) -> np.ndarray:
    """Each window's share to the first of its greatest inputs, or evenly to all that are equal."""
    received = np.zeros(x.shape)
    for place, seen in windows(x.shape, node):
        winners = [p for p in seen if x[p] == max(x[q] for q in seen)]
        for p in winners if ties else winners[:1]:
            received[p] += sent[place] / (len(winners) if ties else 1)
    return received


def shared(parts: np.ndarray, whole: np.ndarray, sent: np.ndarray, eps: float) -> np.ndarray:
    """R_i = sum_j parts_ji / whole_j R_j; `eps` keeps the denominators from zero, without it 0 / 0 is 0."""
    return (parts * (sent / stable(whole, eps))[:, None]).sum(0)


def stable(whole: np.ndarray, eps: float) -> np.ndarray:
    return whole + np.where(whole >= 0, eps, -eps) if eps else np.where(np.abs(whole) < 1e-30, np.inf, whole)


def plus(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0)


def minus(values: np.ndarray) -> np.ndarray:
    return np.minimum(values, 0)


LinearRule = Callable[[Layer, np.ndarray, np.ndarray], np.ndarray]


def epsilon(eps: float = 1e-6) -> LinearRule:
    def rule(layer, x, sent):
        parts = layer.matrix * x
        return shared(parts, parts.sum(1) + layer.bias, sent, eps)

    return rule


def z_plus(eps: float = 1e-6, bias: bool = False) -> LinearRule:
    def rule(layer, x, sent):
        parts = plus(layer.matrix * x)
        return shared(parts, parts.sum(1) + (plus(layer.bias) if bias else 0), sent, eps)

    return rule


def alpha2_beta1(layer, x, sent):
    up, down = plus(layer.matrix * x), minus(layer.matrix * x)
    for_it = shared(up, up.sum(1) + plus(layer.bias), sent, 1e-6)
    return 2 * for_it - shared(down, down.sum(1) + minus(layer.bias), sent, 1e-6)


def gamma(layer, x, sent):
    """What agrees with the output's sign counts a quarter more."""
    parts, bias = layer.matrix * x, layer.bias
    z = parts.sum(1) + bias
    received = np.zeros(x.shape)
    for side, half in ((plus, z > 0), (minus, z < 0)):
        more = parts + 0.25 * side(parts)
        received += shared(more, more.sum(1) + bias + 0.25 * side(bias), sent * half, 1e-6)
    return received


def flat(layer, x, sent):
    return shared(layer.taps, layer.taps.sum(1), sent, 1e-6)


def z_box(eps: float = 1e-6, own: bool = False) -> LinearRule:
    """Between the pixels' bounds, by the spec; `own` takes the image's least and greatest number."""

    def rule(layer, x, sent):
        mean, std = np.array([0.5, 0.45, 0.4]), np.array([0.25, 0.2, 0.3])
        low, high = (np.repeat((edge - mean) / std, len(x) // 3) for edge in (0, 1))
        if own:
            low, high = x.min(), x.max()
        parts = layer.matrix * x - low * plus(layer.matrix) - high * minus(layer.matrix)
        return shared(parts, parts.sum(1), sent, eps)

    return rule


@dataclass
class Composite:
    """Which rule for what."""

    conv: LinearRule
    dense: LinearRule
    first: LinearRule | None = None
    pool: str = "winner"
    eps: float = 1e-6

    def __call__(self, net: Dense, values, node, sent) -> list[np.ndarray]:
        x = values[node.input[0]]
        if node.op_type in ("Conv", "Gemm"):
            rule = self.first if self.first and node.input[0] == "input" else None
            rule = rule or (self.conv if node.op_type == "Conv" else self.dense)
            return [rule(net.layer(node, x), x.ravel(), sent.ravel())]
        if node.op_type == "Add":
            return [values[name] * sent / stable(values[node.output[0]], self.eps) for name in node.input]
        if node.op_type == "GlobalAveragePool":
            x = plus(x) if self.pool == "proportional" else x
            return [x / x[0].size * sent / stable(x.mean(axis=(1, 2), keepdims=True), self.eps)]
        if node.op_type == "MaxPool":
            if self.pool == "proportional":
                sent = sent * (values[node.output[0]] > 0)
            return [to_the_greatest(x, node, sent, ties=self.pool == "ties")]
        return [sent]


COMPOSITES = {
    "epsilon": Composite(epsilon(), epsilon()),
    "epsilon-plus": Composite(z_plus(bias=True), epsilon()),
    "epsilon-plus-flat": Composite(z_plus(bias=True), epsilon(), flat),
    "epsilon-gamma-box": Composite(gamma, epsilon(), z_box()),
    "epsilon-alpha2-beta1": Composite(alpha2_beta1, epsilon()),
    "z-plus": Composite(z_plus(), z_plus()),
    "zero": Composite(epsilon(0), epsilon(0), eps=0),
    "deep-taylor": Composite(z_plus(), z_plus(), z_box()),
    "clrp": Composite(z_plus(1e-9), z_plus(1e-9), z_box(1e-9), "ties", 1e-9),
    "fg-cam": Composite(z_plus(0), z_plus(0), z_box(0, own=True), "proportional", 0),
}


def relevance_map(
    net: Dense, values, composite: str, start: str, c: int, end: str = "input"
) -> tuple[np.ndarray, float]:
    """What arrives at `end`, and its share of what was sent. Contrasts are two passes, one for and one against."""
    z, one = values["logits"], np.eye(5)[c]
    rule = COMPOSITES[composite]

    def sent(seed: np.ndarray, at: str = "logits") -> np.ndarray:
        return net.back(values, at, seed, end, rule)

    if start == "logit":
        found = sent(z * one)
        return found, found.sum() / z[c] if z[c] else 0.0
    if start == "clrp1":
        signed = one - (1 - one) / 4
        found = sent(signed)
        return found, np.abs(found).sum() / np.abs(signed).sum()
    at = "logits"
    if start == "clrp2":
        at, layer, x = "flat", net.layer(net.nodes[-1], values["flat"]), values["flat"]
        negated = Layer(-layer.matrix, layer.bias * 0, layer.taps)
        pair = [z_plus(1e-9)(form, x, abs(z) * one) for form in (layer, negated)]
    elif start == "clrp1-code":
        pair = [abs(z) * one, abs(z) * (1 - one)]
    else:
        chances = softmax(z)
        pair = [one * (chances[c] * (chances * (1 - one)).sum() + 1e-8), chances * (1 - one)]
    target, dual = (sent(seed, at) for seed in pair)
    shares = [ratio(part.sum(), seed.sum()) for part, seed in zip((target, dual), pair, strict=True)]
    if start == "sglrp":  # the others' map is scaled to the sum of the class's
        return target - dual * ratio(target.sum(), dual.sum()), min(shares)
    return ratio(target, target.sum()) - ratio(dual, dual.sum()), min(shares)


def ratio(part, whole):
    """0 / 0 is 0."""
    return part / whole if whole else part * 0


RELEVANCES = {
    "lrp": ("epsilon-plus", "logit"),
    "clrp": ("clrp", "clrp1"),
    "sglrp": ("deep-taylor", "sglrp"),
    "deep-taylor": ("deep-taylor", "logit"),
    "clrp:variant=clrp1-code": ("clrp", "clrp1-code"),
    "clrp:variant=clrp2": ("clrp", "clrp2"),
    **{
        f"lrp:composite={name}": (name, "logit")
        for name in ("epsilon", "epsilon-plus-flat", "epsilon-gamma-box", "epsilon-alpha2-beta1", "z-plus", "zero")
    },
}


@pytest.mark.parametrize(
    ("body", "head", "seed"),
    [("plain", "Gemm", 0), ("plain", "Dense", 1), ("pool", "Dense", 2), ("sum", "Gemm", 3), ("norm", "Dense", 4)],
)
def test_relevance_is_divided_as_over_dense_matrices(make_model, body, head, seed):
    size = SIZE if body == "plain" else SMALL
    path = make_model(size=size, body=body, head=head, seed=seed)
    net, images = Dense(path), pictures(2, size, seed)
    calls = {(method, "input"): method for method in RELEVANCES}
    calls |= {(method, "features"): method + (",at=layer" if ":" in method else ":at=layer") for method in RELEVANCES}
    results = explained(path, list(calls.values()), images, ["top2", 2])
    for i, x in enumerate(images):
        values = net.values(x)
        np.testing.assert_allclose(values["logits"], Network(path).logits(x), atol=1e-9)
        for (method, end), text in calls.items():
            for k, c in enumerate(results[text].targets[i]):
                found, share = relevance_map(net, values, *RELEVANCES[method], c, end)
                extras = results[text].extras[i][k]
                assert extras["kept"] == pytest.approx(share, rel=2e-3, abs=2e-5), text
                undivided = method == "deep-taylor" and values["logits"][c] <= 0
                assert ("warning" in extras) == (abs(extras["kept"]) < 0.01 and not undivided)
                if undivided:
                    assert not results[text].maps[i, k].any()
                    assert extras["reason"].endswith("is not positive: there is nothing to divide")
                else:
                    near(results[text].maps[i, k], found.sum(0), 2e-3 if "sglrp" in text else 5e-4, text)
    for (_, end), text in calls.items():
        shown = np.maximum(results[text].maps[0, 0].astype(float), 0)
        if shown.max() > 0:
            finished = scale(shown) if end == "input" else up(scale(shown), size)
            np.testing.assert_allclose(results[text].saliency()[0, 0], finished, atol=1e-4)


def test_the_contrast_is_one_pass_or_two(make_model):
    """CLRP's signed pass is the difference of its two maps, each of the mass that was sent, where rules conserve it."""
    path, x = make_model(size=SIZE, head="Dense", seed=1), pictures(1)[0]
    net = Dense(path)
    values = net.values(x)
    rule = COMPOSITES["z-plus"]
    c = int(values["logits"].argmax())
    one = np.eye(5)[c]
    for_it, against = (net.back(values, "logits", seed, "features", rule) for seed in (one, (1 - one) / 4))
    assert for_it.sum() == pytest.approx(1, abs=1e-4), "z+ without a bias conserves"
    assert against.sum() == pytest.approx(1, abs=1e-4)
    result = Explainer(path, method="clrp:at=layer").explain(x[None])
    near(result.maps[0, 0], (for_it / for_it.sum() - against / against.sum()).sum(0))


def test_without_biases_lrp_zero_is_input_times_gradient(make_model):
    path, images = make_model(size=SIZE, head="Dense"), pictures(2)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("b"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, path)
    relevance = Explainer(path, method="lrp:composite=zero").explain(images, targets="top3")
    product = Explainer(path, method="input-x-gradient").explain(images, targets="top3")
    near(relevance.maps, product.maps, 1e-5)
    assert all(extras["kept"] == pytest.approx(1, abs=1e-3) for extras in relevance.extras[0])


def test_deep_taylor_decomposes_only_what_is_positive(make_model):
    path, images = make_model(size=SIZE, head="Dense"), pictures(3)
    logits = np.array([Network(path).logits(x) for x in images])
    assert (logits < 0).any(axis=1).all()
    result = Explainer(path, method="deep-taylor").explain(images, targets=[0, 1, 2, 3, 4])
    np.testing.assert_array_equal(result.maps.any(axis=(2, 3)), logits > 0)
    assert result.maps.min() >= -1e-6 * result.maps.max()
    for row, scores in zip(result.extras, logits, strict=True):
        told = [extras.get("reason", "").endswith("there is nothing to divide") for extras in row]
        assert told == [score <= 0 for score in scores]


def test_a_score_of_zero_has_nothing_to_divide(make_model):
    """The class's own row of weights is zero: no warning of lost relevance, which none was."""
    path, images = make_model(size=SIZE), pictures(2)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in ("w3", "b3"):
            values = numpy_helper.to_array(tensor).copy()
            values[1] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    for method in ("lrp", "lrp:at=layer"):
        result = Explainer(path, method=method).explain(images, targets=[1, 2])
        for row in range(2):
            nothing, something = result.extras[row]
            assert nothing["reason"] == "the target's raw score is 0: there is nothing to divide"
            assert "warning" not in nothing
            assert not result.maps[row, 0].any()
            assert "reason" not in something
    contrast = Explainer(path, method="clrp").explain(images, targets=[1])
    assert contrast.maps.any(axis=(2, 3)).all()


def test_relevance_that_is_lost_is_told(make_model):
    """Great biases take nearly all."""
    path = make_model(size=SIZE)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "b3":
            tensor.CopyFrom(numpy_helper.from_array(np.full(5, 1e4, np.float32), "b3"))
    onnx.save(model, path)
    extras = Explainer(path, method="lrp").explain(pictures(1)).extras[0][0]
    assert abs(extras["kept"]) < 0.01
    assert extras["warning"].startswith("only 0.00")
    assert "warning" not in Explainer(path, method="deep-taylor").explain(pictures(1)).extras[0][0]


# ----- CF-CAM -----


def cf_cam(path, x, c, relevance="pixel", start="clrp1", signed="no", score="posterior", ksize=51, sigma=50.0):
    """Algorithm 1, map by map, at full resolution; and how many maps had nothing to mask with."""
    net, dense = Network(path), Dense(path)
    values = dense.values(x)
    R, _ = relevance_map(dense, values, "z-plus", start, c, "features")
    blurred = reference.blur(x.astype(np.float64), ksize, sigma)
    f = net.posterior if score == "posterior" else net.logits
    base = f(blurred)[c]
    total, skipped = np.zeros(x.shape[1:]), 0
    for k, A in enumerate(values["features"]):
        weight = R[k] if relevance == "pixel" else R[k].mean()
        product = weight * A if signed == "yes" else np.maximum(weight * A, 0)
        if np.ptp(product) == 0:
            skipped += 1
            continue
        mask = scale(up(product))
        total += (f(x * mask + blurred * (1 - mask))[c] - base) * mask
    return total, skipped


CF_CAMS: dict[str, dict] = {
    "cf-cam": {},
    "cf-cam:relevance=channel": {"relevance": "channel"},
    "cf-cam:signed=yes": {"signed": "yes"},
    "cf-cam:score=logit": {"score": "logit"},
    "cf-cam:start=clrp1-code": {"start": "clrp1-code"},
    "cf-cam:start=clrp2,score=logit": {"start": "clrp2", "score": "logit"},
    "cf-cam:start=sglrp,ksize=7,sigma=2.0": {"start": "sglrp", "ksize": 7, "sigma": 2.0},
    "cf-cam:relevance=channel,signed=yes,score=logit": {"relevance": "channel", "signed": "yes", "score": "logit"},
}


@pytest.mark.parametrize(("head", "seed"), [("Gemm", 5), ("Dense", 9)])
def test_cf_cam_is_algorithm_1(make_model, head, seed):
    path, images = make_model(size=SIZE, head=head, seed=seed), pictures(2, seed=seed)
    results = explained(path, CF_CAMS, images, ["predicted", 1, 2])
    for text, options in CF_CAMS.items():
        result, drawn = results[text], 0
        for i, x in enumerate(images):
            passed = 0
            for k, c in enumerate(result.targets[i]):
                literal, skipped = cf_cam(path, x, c, **options)
                size = np.abs(literal).max()
                off = np.abs(result.upsampled()[i, k] - literal).max()
                assert off <= 1e-4 * size + 2e-6, text
                passed += 12 - skipped
                drawn += size > 1e-2
                if literal.max() > 1e-2:
                    finished = scale(np.maximum(literal, 0))
                    np.testing.assert_allclose(result.saliency()[i, k], finished, atol=2e-3, err_msg=text)
            extras = result.extras[i][0]
            assert extras["channels"] == 12
            assert extras["skipped"] == 36 - passed > 0, "at least the dead map"
            assert extras["passes"] == passed - extras["duplicate"] + 1
        assert drawn >= 3, text


@pytest.mark.parametrize("method", ["cf-cam", "group-cam:groups=6"])
def test_a_mask_that_two_targets_share_is_one_pass(make_model, method):
    path, images = make_model(size=SIZE, head="Dense", seed=9), pictures(2, seed=9)
    once = explained(path, [method], images, "predicted")[method]
    twice = explained(path, [method], images, ["predicted", "top1"])[method]
    for i in range(2):
        np.testing.assert_array_equal(twice.maps[i], once.maps[i, [0, 0]])
        assert twice.extras[i][0]["passes"] == once.extras[i][0]["passes"] > 2
        if method == "cf-cam":
            assert twice.extras[i][0]["skipped"] == 2 * once.extras[i][0]["skipped"]
            live = 12 - once.extras[i][0]["skipped"]
            assert twice.extras[i][0]["duplicate"] == live + once.extras[i][0]["duplicate"]


def test_cf_cam_over_a_baseline_that_is_the_image_is_zero(make_model):
    path, x = make_model(size=SIZE, head="Dense"), np.zeros((1, 3, *SIZE), np.float32)
    x += np.array([0.7, -0.3, 1.1], np.float32)[:, None, None]
    result = Explainer(path, method="cf-cam").explain(x, targets=[0, 1])
    assert np.abs(result.maps).max() < 1e-5
    assert result.extras[0][0]["passes"] > 1, "there was something to mask"


def test_cf_cam_without_positive_relevance_says_so(make_model):
    """Where nothing speaks for a class, all that arrives is what speaks for the others."""
    path = make_model(size=SIZE)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "w3":
            weight = numpy_helper.to_array(tensor).copy()
            weight[3] = -np.abs(weight[3])
            tensor.CopyFrom(numpy_helper.from_array(weight, "w3"))
    onnx.save(model, path)
    result = Explainer(path, method="cf-cam").explain(pictures(2), targets=[0, 3])
    assert result.maps[:, 0].any()
    assert not result.maps[:, 1].any()
    for extras in result.extras:
        assert "reason" not in extras[0]
        assert extras[1]["reason"] == "no channel has positive relevance for the target"
    alone = Explainer(path, method="cf-cam").explain(pictures(2), targets=[3])
    assert [(extras[0]["passes"], extras[0]["skipped"]) for extras in alone.extras] == [(0, 12)] * 2


def test_a_blur_needs_a_middle(make_model):
    with pytest.raises(InputError, match="ksize 6 is even: a kernel has a middle"):
        Explainer(make_model(size=SIZE), method="cf-cam:ksize=6")


# ----- FG-CAM -----


def fg_cam(path, x, c, end="r1", base="grad-cam", denoise="no", bn="fold"):
    """A CAM's contributions by channel, carried back by z+ without bias; and the share that arrived."""
    net, dense = Network(path), Dense(path, folded=bn == "fold")
    values = dense.values(x)
    A = values["features"]
    if base == "grad-cam":
        weights = net.slopes(A, "features")[c].mean(axis=(1, 2))
    else:
        weights = [net.posterior(x * scale(up(a)))[c] if np.ptp(a) > 0 else 0 for a in A]
    parts = np.array(weights)[:, None, None] * A
    if denoise == "yes":
        flat = parts.reshape(len(A), -1)
        flat = flat - flat.mean(axis=1, keepdims=True)
        _, vectors = np.linalg.eigh(flat.T @ flat)
        leading = vectors[:, -max(1, int(0.1 * min(flat.shape))) :]
        parts = (flat @ leading @ leading.T).reshape(A.shape)
    found = dense.back(values, "features", parts, end, COMPOSITES["fg-cam"])
    size = np.abs if denoise == "yes" else lambda signed: signed  # without its means a map sums to nothing
    return found.sum(0), size(found).sum() / size(parts).sum()


FG_CAMS: dict[str, dict[str, dict]] = {
    "plain": {
        "fg-cam:to=image": {"end": "input"},
        "fg-cam:base=score-cam,to=r1": {"base": "score-cam"},
        "fg-cam:base=score-cam,to=image": {"base": "score-cam", "end": "input"},
        "fg-cam:to=r1,denoise=yes": {"denoise": "yes"},
    },
    "pool": {"fg-cam:to=image": {"end": "input"}, "fg-cam:base=score-cam,to=r1": {"base": "score-cam"}},
    "sum": {"fg-cam:to=image": {"end": "input"}, "fg-cam:to=r1": {}},
    "norm": {
        "fg-cam:to=image": {"end": "input"},
        "fg-cam:to=image,bn=paper": {"end": "input", "bn": "paper"},
        "fg-cam:base=score-cam,to=r1,denoise=yes,bn=paper": {"base": "score-cam", "denoise": "yes", "bn": "paper"},
    },
}


@pytest.mark.parametrize("body", FG_CAMS)
@pytest.mark.parametrize("head", ["Gemm", "Dense"])
def test_fg_cam_carries_the_contributions_back(make_model, body, head):
    path, images = make_model(size=SIZE, body=body, head=head, seed=2), pictures(2)
    results = explained(path, FG_CAMS[body], images, ["predicted", 2])
    for text, options in FG_CAMS[body].items():
        result = results[text]
        for i, x in enumerate(images):
            for k, c in enumerate(result.targets[i]):
                literal, share = fg_cam(path, x, c, **options)
                near(result.maps[i, k], literal, 1e-4, text)
                assert result.extras[i][k]["kept"] == pytest.approx(share, rel=1e-2), text
                if literal.max() > 0:
                    shown = scale(np.maximum(literal, 0))
                    np.testing.assert_allclose(
                        result.saliency()[i, k], shown if "end" in options else up(shown), atol=2e-3
                    )
        passes = result.extras[0][0]["passes"]
        assert passes == 2 if options.get("base") != "score-cam" else 2 < passes <= 14


def test_fg_cam_goes_to_the_deepest_layer_of_a_quarter_of_the_image(make_model):
    path, images = make_model(size=SIZE), pictures(2)
    for layer, end in (("features", "c2"), ("c2", "r1"), ("r1", "c1"), ("c1", "image")):
        found, named = (Explainer(path, method=f"fg-cam:to={to}", layer=layer).explain(images) for to in ("auto", end))
        np.testing.assert_array_equal(found.maps, named.maps)


def test_fg_cam_keeps_one_component_of_a_tiny_map(make_model):
    """A tenth of 12 channels is 1, a tenth of 9 positions is none."""
    path, x = make_model(size=SMALL, head="Dense"), pictures(1, SMALL)
    result = Explainer(path, method="fg-cam:denoise=yes,to=c2").explain(x, targets=[0, 1])
    for k in (0, 1):
        near(result.maps[0, k], fg_cam(path, x[0], k, "c2", denoise="yes")[0])


def test_fg_cam_refuses_a_layer_that_is_not_there(make_model):
    path = make_model(size=SIZE)
    for to, told in (("feature", "features"), ("imaeg", "image")):
        with pytest.raises(InputError, match=f"to={to} is no feature map of the model; nearest: {told}"):
            Explainer(path, method=f"fg-cam:to={to}")
    with pytest.raises(InputError, match="bn=paper passes over batch normalisation, and the file's is folded"):
        Explainer(path, method="fg-cam:bn=paper")


# ----- completeness of this file -----


def test_every_method_is_compared_with_a_literal_reading():
    here = {text.partition(":")[0] for table in (CAMS, OF_THE_IMAGE, RELEVANCES) for text in table}
    functions = {"group-cam": group_cam, "cf-cam": cf_cam, "fg-cam": fg_cam, "guided-backprop": guided}
    averaged = {"integrated-gradients": on_the_path, "smoothgrad": one_copy}
    elsewhere = {
        *("score-cam", "rise", "cam"),  # test_methods.py
        *("occlusion", "lime", "kernel-shap", "sidu", "ablation-cam", "recipro-cam"),  # test_perturbation_methods.py
        *("faster-score-cam", "cluster-cam", "ss-cam", "is-cam"),  # there too
        *("sise", "ada-sise", "xrai"),  # test_region_methods.py
        *("ablation-ca", "l-cam"),  # test_ablation_ca.py, test_l_cam.py
    }
    assert set(METHODS) == here | functions.keys() | averaged.keys() | elsewhere
    variants = {f"grad-cam++:variant={choice}" for choice in METHODS["grad-cam++"].parameters["variant"].choices}
    assert variants - {"grad-cam++:variant=paper"} <= CAMS.keys()
    composites = {f"lrp:composite={choice}" for choice in METHODS["lrp"].parameters["composite"].choices}
    assert composites - {"lrp:composite=epsilon-plus"} <= RELEVANCES.keys()
    contrasts = {f"clrp:variant={choice}" for choice in METHODS["clrp"].parameters["variant"].choices}
    assert contrasts - {"clrp:variant=clrp1"} <= RELEVANCES.keys()
    starts = {options.get("start", "clrp1") for options in CF_CAMS.values()}
    assert starts == set(METHODS["cf-cam"].parameters["start"].choices)
