"""The methods that hide parts of the image or of its feature maps, against slow literal loops over their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from zlib import crc32

import numpy as np
import onnx
import pytest
from scipy.cluster.vq import kmeans2

from heatmill import Explainer, InputError
from heatmill.engine.canvas import random_key
from heatmill.engine.explainer import Engine
from heatmill.engine.methods import METHODS, parse_method
from heatmill.engine.methods.kernel_shap import coalitions, values_of
from heatmill.engine.opening import load, open_best
from heatmill.engine.passes import open_passes
from heatmill.engine.types import Item, Observation, Target
from heatmill.kernels import reference
from heatmill.models.preprocess import denormalise
from heatmill.models.superpixels import Segmentation, cut
from tests.engine.test_methods import Classifier, pictures, scale, softmax, up

SIZE = (33, 29)
OFF: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "zero": lambda x, segments: np.zeros_like(x),
    "mean": lambda x, segments: np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape),
    "segment-mean": reference.segment_means,
}


def shown(x: np.ndarray, segments: np.ndarray, parts, baseline: str) -> np.ndarray:
    """The picture with these superpixels, the others filled."""
    return np.where(np.isin(segments, list(parts)), x, OFF[baseline](x, segments)).astype(np.float32)


def patches(n: int) -> np.ndarray:
    """Network inputs of four colours each, a little noise on them, that leave no class certain."""
    rng = np.random.default_rng(4)
    coarse = rng.normal(size=(n, 3, 2, 2)).repeat(17, axis=2).repeat(15, axis=3)[:, :, : SIZE[0], : SIZE[1]]
    return (0.3 * (coarse + 0.3 * rng.normal(size=coarse.shape))).astype(np.float32)


def asked_of(explainer: Explainer, image: np.ndarray, position: int = 0) -> tuple[Observation, np.ndarray]:
    """What an image's method sees of it, where nothing else is asked: its superpixels and its random numbers."""
    engine_call = explainer._loaded.calls[0]
    picture = denormalise(image, explainer.spec)
    segments = tuple(cut(picture, how) for how in engine_call.method.superpixels(engine_call.parameters))
    key = random_key(0, Item(position, image))
    return Observation(image, np.zeros(0), np.zeros(0), None, segments=segments, key=key), key


def drawn(key: np.ndarray, stream: str) -> np.random.Generator:
    """The random numbers of an image: a counter for each purpose."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, crc32(stream.encode())]))


@pytest.mark.parametrize("options", ["", ",stride=8,baseline=zero", ",window=40"])
def test_occlusion_is_the_literal_loop(make_model, options):
    path = make_model()
    net, x = Classifier(path), pictures(1, SIZE)[0]
    text = f"occlusion:window=12,stride=5{options}".replace("window=12,stride=5,window", "stride=5,window")
    text = text.replace("stride=5,stride", "stride")
    parameters = parse_method(text).parameters
    window, stride = parameters["window"], parameters["stride"]
    result = Explainer(path, method=text, batch_size=7).explain(x[None], targets=["predicted", 2])
    places = [sorted({*range(0, max(side - window, 0), stride), max(side - window, 0)}) for side in SIZE]
    for k, c in enumerate(result.targets[0]):
        falls, counts = np.zeros(SIZE), np.zeros(SIZE)
        for top in places[0]:
            for left in places[1]:
                hidden = x.copy()
                box = (slice(None), slice(top, top + window), slice(left, left + window))
                hidden[box] = OFF[parameters["baseline"]](x, None)[box]
                falls[box[1:]] += net.posterior(x)[c] - net.posterior(hidden)[c]
                counts[box[1:]] += 1
        assert counts.min() >= 1
        np.testing.assert_allclose(result.maps[0, k], falls / counts, atol=1e-6)
    assert result.extras[0][0]["passes"] == 1 + len(places[0]) * len(places[1])


def test_occlusion_by_a_window_over_everything_is_flat_and_says_so(make_model):
    result = Explainer(make_model(), method="occlusion:window=64").explain(pictures(1, SIZE))
    assert result.extras[0][0]["reason"].startswith("flat")
    with pytest.raises(InputError, match="stride 5 exceeds window 4"):
        Explainer(make_model(), method="occlusion:window=4,stride=5")


def literal_lime(net, x, c, segments, bits, baseline):
    """scikit-learn's Ridge by its definition: an unpenalised column of ones, rows weighed."""
    count = bits.shape[1]
    scores = np.array([net.posterior(shown(x, segments, np.flatnonzero(row), baseline))[c] for row in bits])
    ones = np.ones(count)
    cosine = [row @ ones / (np.linalg.norm(row) * np.sqrt(count)) if row.any() else 0.0 for row in bits.astype(float)]
    weights = np.sqrt(np.exp(-((1 - np.array(cosine)) ** 2) / 0.25**2))
    design = np.column_stack([np.ones(len(bits)), bits]).astype(float)
    penalty = np.diag([0.0] + [1.0] * count)
    whole = np.linalg.inv(design.T @ np.diag(weights) @ design + penalty) @ design.T @ np.diag(weights) @ scores
    return whole[1:]


@pytest.mark.parametrize(("kind", "baseline"), [("slic", "segment-mean"), ("quickshift", "zero")])
def test_lime_is_weighted_ridge_regression(make_model, kind, baseline):
    path = make_model()
    net, images = Classifier(path), patches(2)
    asked = f"superpixels={kind}" + (",segments=9" if kind == "slic" else "")
    method = f"lime:samples=40,{asked},baseline={baseline}"
    explainer = Explainer(path, method=method, batch_size=16, seed=3)
    result = explainer.explain(images, targets=[1, 2])
    x = images[0]
    (observation, key) = asked_of(explainer, x)
    key[0] = 3
    segments = observation.segments[0]
    count = segments.max() + 1
    assert count > 1
    bits = drawn(key, "coin flips").random((40, count)) < 0.5
    bits[0] = True
    for k, c in enumerate(result.targets[0]):
        literal = literal_lime(net, x, c, segments, bits, baseline)
        assert np.ptp(literal) > 1e-4
        np.testing.assert_allclose(result.maps[0, k], literal[segments], atol=2e-3 * np.ptp(literal))
        assert 0 < result.extras[0][k]["fit"] <= 1


def shapley(value: Callable[[tuple[int, ...]], float], count: int) -> np.ndarray:
    """The mean rise that a part brings, over all orders of arrival."""
    values = np.zeros(count)
    for part in range(count):
        others = [other for other in range(count) if other != part]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for group in combinations(others, size):
                values[part] += weight * (value((*group, part)) - value(group))
    return values


@pytest.mark.parametrize("baseline", ["mean", "segment-mean"])
def test_kernel_shap_over_all_coalitions_is_the_shapley_value(make_model, baseline):
    path = make_model()
    net, x = Classifier(path), pictures(1, SIZE)[0]
    explainer = Explainer(path, method=f"kernel-shap:segments=6,samples=600,baseline={baseline}", batch_size=16)
    result = explainer.explain(x[None], targets=["predicted", 1])
    segments = asked_of(explainer, x)[0].segments[0]
    count = segments.max() + 1
    assert 3 < count < 10
    assert result.extras[0][0]["passes"] == 2**count
    for k, c in enumerate(result.targets[0]):
        scores = {
            parts: net.posterior(shown(x, segments, parts, baseline))[c]
            for size in range(count + 1)
            for parts in combinations(range(count), size)
        }
        literal = shapley(lambda parts, scores=scores: scores[tuple(sorted(parts))], count)
        np.testing.assert_allclose(result.maps[0, k], literal[segments], atol=1e-5)


def test_kernel_shap_by_samples_is_exact_where_parts_add_up():
    rng = np.random.default_rng(0)
    worth = rng.normal(size=20)
    bits, weights = coalitions(20, 200, rng)
    assert len(bits) == 200
    assert set(bits.sum(axis=1)) <= set(range(1, 20))
    np.testing.assert_allclose(weights[:40], weights[0])
    mass = sum(19 / (s * (20 - s)) for s in range(1, 20))
    np.testing.assert_allclose(weights.sum(), mass)
    np.testing.assert_allclose(weights[:40].sum(), 2 * 19 / 19)
    found = values_of(bits.astype(float), weights, bits @ worth, worth.sum())
    np.testing.assert_allclose(found, worth, atol=1e-9)


def test_a_picture_of_one_superpixel_is_a_flat_map_with_its_reason(make_model):
    x = np.zeros((1, 3, *SIZE), np.float32)
    for method in ("lime:superpixels=felzenszwalb,samples=20", "kernel-shap:superpixels=felzenszwalb,samples=20"):
        result = Explainer(make_model(), method=method).explain(x)
        assert result.statuses[0, 0] == "ok"
        assert result.extras[0][0]["segments"] == 1
        assert "one superpixel" in result.extras[0][0]["reason"]
        assert not result.saliency().any()


def test_scores_that_hiding_does_not_change_are_said_to_be_so(make_model):
    """Hiding by the colour that everything has leaves every picture as it is."""
    rng = np.random.default_rng(1)
    x = np.full((1, 3, *SIZE), 0.5, np.float32) + rng.normal(size=(1, 3, 1, 1)).astype(np.float32)
    for method in ("lime:superpixels=slic,segments=8,samples=30", "kernel-shap:segments=8,samples=30"):
        result = Explainer(make_model(), method=method).explain(x)
        assert result.extras[0][0]["segments"] > 1
        assert "same whatever is hidden" in result.extras[0][0]["reason"]
        assert not result.maps.any()
        assert not result.saliency().any()


def test_a_score_that_is_small_and_changes_has_a_map(make_model):
    """Hiding changes a posterior of 1e-7 as much as any: what counts is how far it changes beside what it is."""
    path = make_model()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "b3":
            bias = onnx.numpy_helper.to_array(tensor).copy()
            bias[2] -= 14
            tensor.CopyFrom(onnx.numpy_helper.from_array(bias, "b3"))
    onnx.save(model, path)
    for method in ("lime:superpixels=slic,segments=8,samples=60", "kernel-shap:segments=8,samples=60"):
        result = Explainer(path, method=method).explain(patches(1), targets=[2])
        assert 0 < result.scores[0, 0] < 1e-5
        assert "reason" not in result.extras[0][0]
        assert np.ptp(result.maps[0, 0]) > 0.01 * result.scores[0, 0]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("lime:segments=20", "segments=20 is a number of slic's; quickshift finds its own"),
        ("ablation-ca:superpixels=felzenszwalb,segments=10", "felzenszwalb finds its own"),
        ("ablation-ca:samples=1000000,segments=1000", "1000000 pictures of 1000 segments each are too many"),
        ("ablation-ca:pairs=exact,segments=1000", "too many: at most 268435456 bits"),
    ],
)
def test_superpixels_that_nothing_reads_or_that_are_too_many_are_refused(make_model, method, told):
    path = make_model()
    assert load(path, ["kernel-shap:samples=100000,segments=1000"])
    with pytest.raises(InputError, match=told):
        load(path, [method])


def kin_literal(name, net, x, c, key):
    """Weights by the mean posterior of the tried masks, the feature maps summed up and scaled at full size."""
    A = net(x)[1].astype(np.float32)
    random = drawn(key, name)
    live = [i for i, a in enumerate(A) if a.max() > a.min()]
    distinct = sorted({A[i].tobytes() for i in live})
    score = lambda mask: net.posterior(x * mask)[c]  # noqa: E731
    weights = np.zeros(len(A))
    if name == "faster-score-cam":
        for i in sorted(live, key=lambda i: -A[i].std())[:4]:
            weights[i] = score(scale(up(A[i], SIZE)))
    elif name == "is-cam":
        for i in live:
            weights[i] = np.mean([score(scale(up(A[i], SIZE)) * step / 3) for step in (1, 2, 3)])
    elif name == "ss-cam":
        noise = random.standard_normal((len(distinct), 3, *A.shape[1:]), dtype=np.float32)
        for i in live:
            draws = noise[distinct.index(A[i].tobytes())]
            weights[i] = np.mean([score(scale(up(A[i] + np.float32(0.5) * draw, SIZE))) for draw in draws])
    else:
        low = {i: scale_like_the_full(A[i]) for i in live}
        once = [np.frombuffer(text, np.float32) for text in sorted({mask.tobytes() for mask in low.values()})]
        _, labels = kmeans2(np.array(once, np.float64), 3, iter=50, minit="++", rng=random)
        for i in live:
            mine = labels[[other.tobytes() for other in once].index(low[i].tobytes())]
            middle = np.mean([mask for mask, label in zip(once, labels, strict=True) if label == mine], axis=0)
            weights[i] = score(scale(up(middle.reshape(A.shape[1:]), SIZE)))
    return scale(np.maximum(sum(w * up(a, SIZE) for w, a in zip(weights, A, strict=True)), 0))


def scale_like_the_full(a):
    full = up(a, SIZE)
    return ((a - full.min()) / (full.max() - full.min())).astype(np.float32)


KIN_CASES = {
    "faster-score-cam": ("channels=4", 4),
    "cluster-cam": ("clusters=3", 3),
    "ss-cam": ("samples=3,noise=0.5", 27),
    "is-cam": ("steps=3", 27),
}


@pytest.mark.parametrize("name", [name for name in METHODS if name in KIN_CASES])
def test_score_cams_kin_are_the_literal_loops(make_model, name):
    path = make_model()
    net, x = Classifier(path), pictures(1, SIZE)[0]
    options, most = KIN_CASES[name]
    explainer = Explainer(path, method=f"{name}:{options}", batch_size=7)
    result = explainer.explain(x[None], targets=["predicted", 2])
    key = asked_of(explainer, x)[1]
    assert 0 < result.extras[0][0]["passes"] <= most
    for k, c in enumerate(result.targets[0]):
        literal = kin_literal(name, net, x, c, key)
        assert literal.std() > 0.05
        np.testing.assert_allclose(result.saliency()[0, k], literal, atol=2e-4)


@pytest.mark.parametrize("difference", ["class", "all"])
def test_sidu_is_the_literal_loop(make_model, difference):
    path = make_model()
    net, x = Classifier(path), pictures(1, SIZE)[0]
    explainer = Explainer(path, method=f"sidu:difference={difference},threshold=0.3", batch_size=7)
    result = explainer.explain(x[None], targets=["predicted", 2])
    masks = [up((a > 0.3).astype(float), SIZE, "mirror") for a in net(x)[1]]
    P = [net.posterior(x * mask) for mask in masks]
    whole = net.posterior(x)
    unlike = np.array([sum(np.linalg.norm(p - q) for q in P) for p in P])
    unlike = scale(unlike)
    for k, c in enumerate(result.targets[0]):
        total = np.zeros(SIZE)
        for mask, p, u in zip(masks, P, unlike, strict=True):
            fall = (whole[c] - p[c]) ** 2 if difference == "class" else ((whole - p) ** 2).sum()
            total += math.exp(-fall / (2 * 0.25**2)) * u * mask / (len(masks) * 0.5)
        assert np.ptp(total) > 1e-3
        np.testing.assert_allclose(result.maps[0, k], total, atol=2e-5)
    assert result.extras[0][0]["duplicate"] > 0


def test_sidu_of_equal_masks_is_a_zero_map_with_its_reason(make_model):
    result = Explainer(make_model(), method="sidu:threshold=1000").explain(pictures(1, SIZE))
    assert not result.maps.any()
    assert result.extras[0][0]["reason"].startswith("every mask leaves the same scores")


def test_sidu_of_a_network_that_sees_nothing_is_a_zero_map_with_its_reason(make_model):
    """Many masks, the same scores from each: what their distances differ by is rounding."""
    path = make_model()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "w3":
            weights = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(weights), "w3"))
    onnx.save(model, path)
    result = Explainer(path, method="sidu").explain(pictures(1, SIZE))
    assert result.extras[0][0]["passes"] > 3
    assert not result.maps.any()
    assert result.extras[0][0]["reason"].startswith("every mask leaves the same scores")


def head_scores(path, features):
    """The raw scores of maps that take the layer's place, by the file's own weights."""
    graph = onnx.load(path).graph
    weights = {t.name: onnx.numpy_helper.to_array(t).astype(float) for t in graph.initializer}
    if "w4" in weights:
        hidden = np.maximum(weights["w4"] @ features.ravel() + weights["b4"], 0)
        return weights["w3"] @ hidden + weights["b3"]
    bend = np.tanh if any(node.op_type == "Tanh" for node in graph.node) else np.asarray
    return weights["w3"] @ bend(features.mean(axis=(1, 2))) + weights["b3"]


@pytest.mark.parametrize("batch", ["N", 1, 4])
@pytest.mark.parametrize("head", ["Dense", "Tanh"])
def test_ablation_cam_is_the_literal_loop(make_model, head, batch):
    path = make_model(head=head, batch=batch)
    images = pictures(2, SIZE)
    net = Classifier(make_model("loose.onnx", head=head))
    explainer = Explainer(path, method="ablation-cam", batch_size=batch if batch != "N" else 5)
    result = explainer.explain(images, targets=["top2", 3])
    for i, x in enumerate(images):
        y, A = net(x)
        for k, c in enumerate(result.targets[i]):
            weights = []
            for channel in range(len(A)):
                without = A.copy()
                without[channel] = 0
                weights.append((y[c] - head_scores(path, without)[c]) / abs(y[c]))
            literal = np.tensordot(weights, A, 1)
            assert np.ptp(literal) > 1e-2
            np.testing.assert_allclose(result.maps[i, k], literal, atol=1e-4 * np.abs(literal).max())
        assert result.extras[i][0]["passes"] == 1 + sum(a.any() for a in A)


def test_ablation_cam_of_a_linear_head_is_known_without_a_pass(make_model):
    """The same map as by leaving each channel out."""
    path, images = make_model(), pictures(2, SIZE)
    net = Classifier(path)
    weights = {t.name: onnx.numpy_helper.to_array(t).astype(float) for t in onnx.load(path).graph.initializer}
    result = Explainer(path, method="ablation-cam").explain(images, targets=["predicted", 3])
    assert result.extras[0][0]["passes"] == 0
    for i, x in enumerate(images):
        y, A = net(x)
        for k, c in enumerate(result.targets[i]):
            falls = []
            for channel in range(len(A)):
                without = A.copy()
                without[channel] = 0
                falls.append(y[c] - (weights["w3"][c] @ without.mean(axis=(1, 2)) + weights["b3"][c]))
            literal = np.tensordot(np.array(falls) / abs(y[c]), A, 1)
            np.testing.assert_allclose(result.maps[i, k], literal, atol=1e-4 * np.abs(literal).max())


@pytest.mark.parametrize("spread", ["gaussian", "none"])
@pytest.mark.parametrize("head", ["Dense", "Tanh", None])
def test_recipro_cam_is_the_literal_loop(make_model, head, spread):
    path = make_model(**({"head": head} if head else {}))
    net, x = Classifier(path), pictures(1, SIZE)[0]
    result = Explainer(path, method=f"recipro-cam:spread={spread}", batch_size=7).explain(x[None], targets=[0, 2])
    A = net(x)[1]
    h, w = A.shape[1:]
    maps = np.zeros((2, h, w))
    for y in range(h):
        for z in range(w):
            placed = np.zeros_like(A)
            for dy in (-1, 0, 1):
                for dz in (-1, 0, 1):
                    weight = (2 - abs(dy)) * (2 - abs(dz)) / 16 if spread == "gaussian" else float(dy == dz == 0)
                    if 0 <= y + dy < h and 0 <= z + dz < w:
                        placed[:, y + dy, z + dz] = weight * A[:, y + dy, z + dz]
            maps[:, y, z] = softmax(head_scores(path, placed))[[0, 2]]
    assert (np.ptp(maps, axis=(1, 2)) > 1e-4).all()
    np.testing.assert_allclose(result.maps[0], maps, atol=1e-6)
    assert result.extras[0][0]["passes"] == (h * w if head else 0), "a linear head is not run"
    literal = np.stack([up(scale(each), SIZE) for each in maps])
    np.testing.assert_allclose(result.saliency()[0], literal, atol=1e-2)


def test_the_head_cams_share_a_run_with_others_and_refuse_what_the_head_reads_besides(make_model):
    path, images = make_model(head="Dense"), pictures(3, SIZE)
    texts = ["ablation-cam", "recipro-cam", "grad-cam", "score-cam", "saliency"]
    loaded, targets = load(path, texts), [Target("predicted"), Target("class", 1)]
    session = open_best(loaded, batch_size=5)
    engine = Engine(loaded, session, targets, 5, passes=open_passes(loaded, session, targets, 5))
    found = list(engine.stream(Item(i, image) for i, image in enumerate(images)))
    assert len(found) == 3 * 5 * 2
    for text in texts:
        alone = Explainer(path, method=text, batch_size=3).explain(images, targets=["predicted", 1])
        for explanation in found:
            if explanation.method.text == text:
                map_alone = alone.maps[explanation.key, int(explanation.target_source == "class")]
                np.testing.assert_allclose(explanation.map, map_alone, atol=1e-5 * np.abs(map_alone).max())
    around = make_model("sum.onnx", body="sum")
    for method in ("ablation-cam", "recipro-cam"):
        with pytest.raises(InputError, match="goes around layer c2"):
            Explainer(around, method=method, layer="c2")


def test_superpixels_that_come_with_an_image_are_the_ones_that_are_used(make_model):
    loaded = load(make_model(), ["lime:samples=20,superpixels=slic,segments=9"])
    assert loaded.segmentations == (Segmentation("slic", 9),)
    engine = Engine(loaded, open_best(loaded), [Target("predicted")], 8)
    halves = np.zeros(SIZE, np.int32)
    halves[10:] = 1
    (found,) = engine.stream([Item(0, pictures(1, SIZE)[0], None, {Segmentation("slic", 9): halves})])
    assert found.extras["segments"] == 2
    assert np.ptp(found.map[:10]) == np.ptp(found.map[10:]) == 0
