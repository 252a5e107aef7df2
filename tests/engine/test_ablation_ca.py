"""Ablation-CA on classifiers whose truth is known, and its estimators against literal readings."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy import stats

from heatmill import Explainer, InputError
from heatmill.engine.explainer import Engine
from heatmill.engine.methods import parse_methods
from heatmill.engine.methods.ablation_ca import contributions, correlations, linked
from heatmill.engine.opening import load, open_best
from heatmill.engine.types import Explanation, Item, Target
from heatmill.models.superpixels import Segmentation
from tests.engine.test_methods import Classifier
from tests.engine.test_perturbation_methods import OFF, patches, shown
from tests.graphs import Writer

OBJECTS, SIDE = 12, 4
STRIPS = np.repeat(np.arange(OBJECTS, dtype=np.int32), SIDE)[None].repeat(8, axis=0)


def logical(path, truth) -> None:
    """Logits (truth(write, a, b, c), 0); a, b, c are 1 while the strips 2, 5, 7 of a bright picture are shown."""
    write = Writer()
    parts = []
    for strip in (2, 5, 7):
        window = [np.array(values) for values in ([strip * SIDE], [(strip + 1) * SIDE], [3])]
        part = write("Slice", "input", *window)
        parts.append(write("Reshape", write("ReduceMean", part, axes=[1, 2, 3], keepdims=0), np.array([-1, 1])))
    value = truth(write, *parts)
    logits = write("Concat", value, write("Mul", value, np.array(0.0)), axis=1)
    write.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    width = OBJECTS * SIDE
    graph = helper.make_graph(
        write.nodes,
        "logical",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 8, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        write.weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    spec = {"input_size": [3, 8, width], "mean": [0.0] * 3, "std": [1.0] * 3, "output": "logits"}
    path.with_suffix(".json").write_text(json.dumps(spec))


def both(write, a, b, c):
    return write("Mul", a, b)


def either(write, a, b, c):
    return write("Sub", write("Add", a, b), write("Mul", a, b))


def added(write, a, b, c):
    return write("Add", write("Add", a, write("Mul", b, np.array(2.0))), write("Mul", c, np.array(-1.5)))


def parity(write, a, b, c):
    turned = [write("Sub", np.array(1.0), write("Mul", part, np.array(2.0))) for part in (a, b, c)]
    return write("Mul", write("Mul", turned[0], turned[1]), turned[2])


def constant(write, a, b, c):
    return write("Mul", a, np.array(0.0))


def explained(path, options: str = "", keys=(0,), strips=STRIPS) -> list[Explanation]:
    method = f"ablation-ca:score=logit,baseline=zero{options}"
    loaded = load(path, [method])
    engine = Engine(loaded, open_best(loaded, batch_size=64), [Target("class", 0)], 64)
    bright = np.ones((3, *strips.shape), np.float32)
    cut = {Segmentation("slic", 40): strips}
    return list(engine.stream(Item(key, bright, None, cut) for key in keys))


@pytest.mark.parametrize(("truth", "r", "d"), [(both, 1 / np.sqrt(3), -1), (either, -1 / np.sqrt(3), 1)])
def test_a_conjunction_and_a_disjunction_are_found(tmp_path, truth, r, d):
    logical(tmp_path / "model.onnx", truth)
    (found,) = explained(tmp_path / "model.onnx", ",pairs=exact")
    arrays, error = found.arrays, found.extras["correlation_error"]
    assert error == pytest.approx(1 / np.sqrt(2048), rel=1e-3)
    assert abs(arrays["correlation"][2, 5] - r) < 3 * error
    np.testing.assert_array_equal(arrays["correlation"], arrays["correlation"].T)
    np.testing.assert_array_equal(arrays["links"], [[2, 5]])
    assert found.extras["groups"] == [[2, 5]]
    np.testing.assert_array_equal(np.flatnonzero(arrays["group"] == 0), [2, 5])
    exact = np.zeros((OBJECTS, OBJECTS))
    exact[2, 5] = exact[5, 2] = d
    np.testing.assert_allclose(arrays["pair_excess"], exact, atol=1e-5)
    worth = np.zeros(OBJECTS)
    worth[[2, 5]] = 0.5
    assert (np.abs(arrays["contribution"] - worth) < 4 * np.maximum(arrays["contribution_error"], 1e-9)).all()
    np.testing.assert_allclose(arrays["single"], 2 * worth if truth is both else 0 * worth, atol=1e-5)
    np.testing.assert_allclose(found.map, arrays["contribution"][STRIPS], atol=1e-6)


def test_contributions_that_add_up_are_not_linked(tmp_path):
    """Of 66 pairs in 40 pictures 0.17 are expected beyond four standard errors, and three are a chance of 1 in 1400."""
    logical(tmp_path / "model.onnx", added)
    found = explained(tmp_path / "model.onnx", ",samples=512", keys=range(40))
    assert sum(each.extras["linked"] for each in found) <= 2
    pairs = np.array([each.arrays["correlation"][np.triu_indices(OBJECTS, 1)] for each in found])
    assert abs(pairs.std() * np.sqrt(512) - 1) < 0.1, "the standard error is the stated one"
    worth = np.zeros(OBJECTS)
    worth[[2, 5, 7]] = 1, 2, -1.5
    scores = np.array([(each.arrays["contribution"] - worth) / each.arrays["contribution_error"] for each in found])
    assert abs(scores.std() - 1) < 0.1
    shares = np.mean([each.arrays["variance_share"] for each in found], axis=0)
    np.testing.assert_allclose(shares[[2, 5, 7]], worth[[2, 5, 7]] ** 2 / (worth**2).sum(), atol=0.03)
    np.testing.assert_allclose(found[0].arrays["single"], worth, atol=1e-5)


def test_a_parity_of_three_links_no_pair(tmp_path):
    logical(tmp_path / "model.onnx", parity)
    (found,) = explained(tmp_path / "model.onnx")
    assert found.extras["linked"] == 0
    assert found.extras["groups"] == []
    assert (found.arrays["group"] == -1).all()


def test_the_images_have_their_own_random_pictures_whatever_the_order(tmp_path):
    logical(tmp_path / "model.onnx", both)
    first, second = explained(tmp_path / "model.onnx", ",samples=64", keys=(0, 1))
    assert not np.array_equal(first.arrays["correlation"], second.arrays["correlation"])
    (again,) = explained(tmp_path / "model.onnx", ",samples=64", keys=(1,))
    np.testing.assert_array_equal(again.arrays["correlation"], second.arrays["correlation"])


@pytest.mark.parametrize(
    ("truth", "strips", "reason"),
    [
        (constant, STRIPS, "same whatever is hidden"),
        (both, np.zeros_like(STRIPS), "one superpixel"),
    ],
)
def test_what_says_nothing_is_a_row_with_its_reason(tmp_path, truth, strips, reason):
    logical(tmp_path / "model.onnx", truth)
    (found,) = explained(tmp_path / "model.onnx", ",pairs=exact", strips=strips)
    assert found.status == "ok"
    assert reason in found.extras["reason"]
    assert found.extras["linked"] == 0
    assert not found.arrays["correlation"].any()
    assert all(np.isfinite(array).all() for array in found.arrays.values())


def test_the_estimators_are_what_they_are_called():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (200, 6))
    scores = signs[:, 0] * signs[:, 1] + 0.3 * signs[:, 2] + rng.normal(size=200)
    values, errors, shares = contributions(signs, scores)
    found = correlations(signs, scores)
    for i in range(6):
        shown_, hidden = scores[signs[:, i] > 0], scores[signs[:, i] < 0]
        assert values[i] == pytest.approx(shown_.mean() - hidden.mean())
        welch = np.sqrt(shown_.var() / len(shown_) + hidden.var() / len(hidden))
        assert errors[i] == pytest.approx(welch)
        assert shares[i] == pytest.approx(stats.pearsonr(scores, signs[:, i])[0] ** 2)
        for j in range(i):
            assert found[i, j] == pytest.approx(stats.pearsonr(scores, signs[:, i] * signs[:, j])[0])


def test_links_are_ranked_by_correlation_and_importance_and_joined_to_groups():
    correlation = np.zeros((6, 6))
    for i, j, r in ((0, 1, 0.5), (1, 2, -0.3), (4, 5, 0.9), (0, 3, 0.05)):
        correlation[i, j] = correlation[j, i] = r
    values = np.array([1.0, 0.5, -1.9, 9.0, 0.1, 0.1])
    pairs, groups = linked(correlation, values, 1600)
    np.testing.assert_array_equal(pairs, [[0, 1], [1, 2], [4, 5]])  # 0.375, 0.36, 0.09
    np.testing.assert_array_equal(groups, [0, 0, 0, -1, 1, 1])


def test_on_pictures_it_hides_what_slic_cut(make_model):
    path = make_model()
    net, x = Classifier(path), patches(1)[0]
    method = "ablation-ca:segments=6,samples=64,baseline=segment-mean"
    result = Explainer(path, method=method, batch_size=16).explain(x[None], targets=[1])
    arrays = result.arrays[0][0]
    segments, count = arrays["segments"], arrays["segments"].max() + 1
    assert count == result.extras[0][0]["segments"] > 2
    assert set(OFF) >= {"segment-mean"}
    whole = net.posterior(x)[1]
    for part in range(count):
        left = shown(x, segments, set(range(count)) - {part}, "segment-mean")
        assert arrays["single"][part] == pytest.approx(whole - net.posterior(left)[1], abs=1e-6)


def test_a_range_is_a_method_for_each_of_its_numbers():
    texts = [
        call.text for call in parse_methods(["ablation-ca:segments=10..40,pairs=exact", "rise:masks=5..9..2", "cam"])
    ]
    assert texts == [
        *(f"ablation-ca:pairs=exact{'' if n == 40 else f',segments={n}'}" for n in (10, 20, 30, 40)),
        *(f"rise:masks={n}" for n in (5, 7, 9)),
        "cam",
    ]
    for text, told in (
        ("ablation-ca:segments=40..10", "no value"),
        ("rise:masks=1..900..0", "no value"),
        ("rise:masks=1..9000..1", "more than 100"),
        ("rise:p=0..1", "lies outside"),
        ("lime:width=1..2", "not a whole number"),
        ("lime:samples=0..9", "lies outside"),
    ):
        with pytest.raises(InputError, match=told):
            parse_methods([text])


def test_an_explainer_has_one_method(make_model):
    with pytest.raises(InputError, match="stands for several"):
        Explainer(make_model(), method="ablation-ca:segments=10..20")
