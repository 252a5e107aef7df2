"""Every method against a slow literal loop over full-resolution masks, written from the formula."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from heatmill import Explainer, InputError
from heatmill.engine.methods import METHODS, parse_method
from heatmill.engine.methods.score_cam import VARIANTS
from heatmill.kernels import reference


def pictures(n: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Network inputs with smooth structure, (n, 3, H, W)."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(n * 3, 5, 4))
    return reference.upsample(coarse, size).reshape(n, 3, *size).astype(np.float32)


class Classifier:
    """The network as the formulas need it: one image in, logits and tapped maps out, by ONNX Runtime alone."""

    def __init__(self, path) -> None:
        model = onnx.load(path)
        model.graph.output.append(helper.make_empty_tensor_value_info("features"))
        if not any(output.name == "logits" for output in model.graph.output):
            model.graph.output.append(helper.make_empty_tensor_value_info("logits"))
        self.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, features = self.session.run(["logits", "features"], {"input": image[None].astype(np.float32)})
        return logits[0].astype(np.float64), features[0].astype(np.float64)

    def posterior(self, image: np.ndarray) -> np.ndarray:
        logits, _ = self(image)
        e = np.exp(logits - logits.max())
        return e / e.sum()


def scale(array: np.ndarray) -> np.ndarray:
    return (array - array.min()) / (array.max() - array.min())


def up(array: np.ndarray, size, rule="half-pixel") -> np.ndarray:
    return reference.upsample(array[None], size, rule)[0]


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return e / e.sum()


def official(net, x, c):
    """Authors' code: raw upsampled maps weighted by posteriors of min-max masked images; constant maps skipped."""
    size, (_, A) = x.shape[1:], net(x)
    total = np.zeros(size)
    for a in A:
        u = up(a, size)
        if a.max() > a.min():
            total += net.posterior(x * scale(u))[c] * u
    return scale(np.maximum(total, 0))


def paper(net, x, c):
    """Algorithm 1 of the second arXiv version, baseline the black (zero) image, softmax over channels."""
    size, (_, A) = x.shape[1:], net(x)
    base = net.posterior(x * 0)[c]
    increase = []
    for a in A:
        mask = scale(up(a, size)) if a.max() > a.min() else np.zeros(size)
        increase.append(net.posterior(x * mask)[c] - base)
    total = sum(w * up(a, size) for w, a in zip(softmax(np.array(increase)), A, strict=True))
    return scale(np.maximum(total, 0))


def grad_cam_library(net, x, c):
    """pytorch-grad-cam 1.5: align-corners masks with eps, logits, channel softmax, scaled before and after resizing."""
    size, (_, A) = x.shape[1:], net(x)
    scores = []
    for a in A:
        u = up(a, size, "align-corners")
        scores.append(net(x * ((u - u.min()) / (u.max() - u.min() + 1e-8)))[0][c])
    low = np.maximum(np.tensordot(softmax(np.array(scores)), A, 1), 0)
    return scale(up(scale(low), size))


def torchcam(net, x, c):
    """torch-cam 0.5: maps scaled before upsampling, logits, channel softmax; shown scaled at low resolution."""
    size, (_, A) = x.shape[1:], net(x)
    scores = [net(x * up((a - a.min()) / (a.max() - a.min() + 1e-8), size))[0][c] for a in A]
    low = np.maximum(np.tensordot(softmax(np.array(scores)), A, 1), 0)
    return up(scale(low), size)


def yiskw713(net, x, c):
    """ReLU, upsampled, over its range without subtracting the minimum; the masks themselves are summed."""
    size, (_, A) = x.shape[1:], net(x)
    total = np.zeros(size)
    for a in A:
        u = up(np.maximum(a, 0), size)
        span = u.max() - u.min()
        mask = u / (span if a.clip(0).max() > a.clip(0).min() else 1)
        total += net.posterior(x * mask)[c] * mask
    return scale(np.maximum(total, 0))


ORACLES = {
    "official": official,
    "paper": paper,
    "grad-cam": grad_cam_library,
    "torchcam": torchcam,
    "yiskw713": yiskw713,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 3])
def test_score_cam_is_the_literal_loop(make_model, variant, seed):
    path = make_model(seed=seed)
    net = Classifier(path)
    images = pictures(2, (33, 29), seed)
    explainer = Explainer(path, method=f"score-cam:variant={variant}", batch_size=7)
    result = explainer.explain(images, targets=["predicted", 2])
    finished = result.saliency()
    for i, x in enumerate(images):
        assert result.predictions[i] == net(x)[0].argmax()
        for k, c in enumerate(result.targets[i]):
            literal = ORACLES[variant](net, x, c)
            assert literal.std() > 0.05, "the oracle is degenerate"
            np.testing.assert_allclose(finished[i, k], literal, atol=1e-4)


def test_score_cam_counts_what_it_saves(make_model):
    path = make_model()
    features = Classifier(path)(pictures(1, (33, 29))[0])[1]
    constant = sum(a.max() == a.min() for a in features)
    result = Explainer(path).explain(pictures(1, (33, 29)))
    extras = result.extras[0][0]
    assert constant >= 2
    assert extras == {"passes": 12 - constant - 1, "channels": 12, "constant": constant, "duplicate": 1}


def rise_literal(net, x, c, bits, offsets, p):
    masks = reference.grid_masks(bits, offsets, x.shape[1:])
    return sum(net.posterior(x * m)[c] * m for m in masks) / (len(masks) * p)


def test_rise_is_the_literal_loop(make_model):
    path = make_model()
    net, images = Classifier(path), pictures(2, (33, 29))
    explainer = Explainer(path, method="rise:masks=60,cells=4,p=0.3", batch_size=16, seed=5)
    call = parse_method("rise:masks=60,cells=4,p=0.3")
    bank = METHODS["rise"].share(explainer._loaded.facts, call.parameters, 5)
    assert bank.counts.sum() == len(bank.bits) == 60
    assert abs(bank.bits.mean() - 0.3) < 0.06
    result = explainer.explain(images, targets=["predicted", "bee"])
    for i, x in enumerate(images):
        for k, c in enumerate(result.targets[i]):
            literal = rise_literal(net, x, c, bank.bits, bank.offsets, 0.3)
            np.testing.assert_allclose(result.maps[i, k], literal, atol=1e-5)


def test_rise_that_shows_everything_is_the_score_everywhere(make_model):
    result = Explainer(make_model(), method="rise:masks=10,p=1").explain(pictures(1, (33, 29)))
    np.testing.assert_allclose(result.maps[0, 0], result.scores[0, 0], atol=1e-6)
    assert result.extras[0][0]["passes"] == 1
    assert result.extras[0][0]["reason"].startswith("flat")


def test_rise_draws_masks_by_counter(make_model):
    """Fewer masks are a prefix of more, whatever the batch; another seed draws others."""
    facts = Explainer(make_model(), method="rise")._loaded.facts
    share = METHODS["rise"].share
    few = share(facts, parse_method("rise:masks=20").parameters, 1)
    many = share(facts, parse_method("rise:masks=50").parameters, 1)
    other = share(facts, parse_method("rise:masks=20").parameters, 2)
    np.testing.assert_array_equal(few.bits, many.bits[:20])
    np.testing.assert_array_equal(few.offsets, many.offsets[:20])
    assert (few.bits != other.bits).any()
    assert (few.offsets >= 0).all()
    assert (few.offsets.max(axis=0) < [5, 5]).all()


@pytest.mark.parametrize("head", ["Gemm", "Reshape"])
def test_cam_is_the_class_weights_on_the_maps(make_model, head):
    path = make_model(head=head)
    net, images = Classifier(path), pictures(3, (33, 29))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    result = Explainer(path, method="cam").explain(images, targets="top2")
    for i, x in enumerate(images):
        logits, features = net(x)
        for k, c in enumerate(np.argsort(-logits)[:2]):
            assert result.targets[i, k] == c
            literal = np.tensordot(weights["w3"][c].astype(float), features, 1)
            np.testing.assert_allclose(result.maps[i, k], literal, atol=1e-5)
            assert abs(literal.mean() + weights["b3"][c] - logits[c]) < 1e-4
            assert result.extras[i][k]["completeness_error"] < 1e-4


def test_cam_refuses_a_head_that_is_not_linear(make_model):
    with pytest.raises(InputError, match="Tanh 'bend' stands between"):
        Explainer(make_model(head="Tanh"), method="cam")


def test_a_flat_map_has_its_reason_and_shows_nothing(make_model):
    """With zero convolutions every feature map is constant."""
    path = make_model()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, path)
    for method in ("score-cam", "score-cam:variant=paper", "cam"):
        result = Explainer(path, method=method).explain(pictures(1, (33, 29)))
        assert np.ptp(result.maps) < 1e-6
        assert result.extras[0][0]["reason"].startswith("flat")
        assert not result.saliency().any()


@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_baselines_stand_where_a_mask_is_zero(make_model, baseline):
    path = make_model()
    net, x = Classifier(path), pictures(1, (33, 29))[0]
    below = {
        "black": (0 - np.array([0.5, 0.45, 0.4])[:, None, None]) / np.array([0.25, 0.2, 0.3])[:, None, None],
        "mean": x.mean(axis=(1, 2), keepdims=True),
        "blur": reference.blur(x, 51, 50.0),
    }[baseline]
    total = np.zeros((33, 29))
    c = net(x)[0].argmax()
    for a in net(x)[1]:
        if a.max() > a.min():
            u = up(a, (33, 29))
            total += net.posterior(x * scale(u) + below * (1 - scale(u)))[c] * u
    result = Explainer(path, method=f"score-cam:baseline={baseline}").explain(x[None])
    np.testing.assert_allclose(result.saliency()[0, 0], scale(np.maximum(total, 0)), atol=1e-4)


@pytest.mark.parametrize("end", ["Softmax", "Sigmoid"])
def test_a_posterior_output_is_not_squashed_twice(make_model, end):
    path = make_model(end=end)
    net, x = Classifier(path), pictures(1, (33, 29))[0]
    logits = net(x)[0]
    expected = softmax(logits) if end == "Softmax" else 1 / (1 + np.exp(-logits))
    result = Explainer(path).explain(x[None], targets=[0, 1, 2, 3, 4])
    np.testing.assert_allclose(result.scores[0], expected, atol=1e-6)
    if end == "Softmax":
        np.testing.assert_allclose(result.saliency()[0, 2], official(net, x, 2), atol=1e-4)


def test_the_posterior_variants_of_one_model_agree_with_and_without_a_softmax_at_its_end(make_model):
    images = pictures(1, (33, 29))
    bare = Explainer(make_model("bare.onnx"), method="score-cam:variant=grad-cam").explain(images)
    ended = Explainer(make_model("ended.onnx", end="Softmax"), method="score-cam:variant=grad-cam").explain(images)
    np.testing.assert_allclose(bare.maps, ended.maps, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_it_comes_from_and_parses_by_any_spelling(name):
    method = METHODS[name]
    assert any(char.isdigit() for char in method.citation)
    assert method.summary
    spelled = name.replace("-", "_").upper()
    assert parse_method(spelled).method is method
    for key, parameter in method.parameters.items():
        assert parameter.doc
        assert parse_method(f"{name}:{key}={parameter.default}").parameters == parse_method(name).parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorecan", "no method 'scorecan'; nearest: score-cam"),
        ("score-cam:varant=paper", "no parameter 'varant'; nearest: variant"),
        ("score-cam:variant=offical", "no choice 'offical'; nearest: official"),
        ("rise:masks=many", "'many' is not a whole number"),
        ("rise:p=2", "lies outside 0.001 .. 1"),
        ("rise:p=nan", "lies outside"),
        ("rise:masks", "give 'masks' once, as masks=VALUE"),
        ("rise:masks=3,masks=4", "give 'masks' once"),
        ("cam:x=1", "has no parameter 'x'"),
    ],
)
def test_a_wrong_call_names_the_way_out(text, message):
    with pytest.raises(InputError) as caught:
        parse_method(text)
    assert message in str(caught.value)


def test_a_call_is_written_as_it_is_read():
    for text in ("score-cam", "score-cam:variant=paper", "rise:masks=100,p=0.25"):
        assert parse_method(text).text == text
        assert parse_method(parse_method(text).text) == parse_method(text)


def test_equal_random_masks_are_one_pass_and_count_as_often_as_drawn(make_model):
    """One cell, shown or not: two masks in all, the mean is that of every draw."""
    path, x = make_model(), pictures(1, (33, 29))
    net = Classifier(path)
    result = Explainer(path, method="rise:masks=200,cells=1,p=0.4").explain(x)
    assert {"passes": 2, "masks": 200, "duplicate": 198}.items() <= result.extras[0][0].items()
    shown = result.maps[0, 0] / net.posterior(x[0])[result.predictions[0]] * 0.4
    assert np.ptp(shown) < 1e-6
    assert abs(shown.mean() - 0.4) < 0.1
    assert abs(shown.mean() * 200 - round(shown.mean() * 200)) < 1e-3, "a whole number of the draws showed it"
