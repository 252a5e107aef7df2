"""Runs with backward passes: any company, any batch, any file of the network, the same maps; and whole jobs."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from heatmill import Explainer, InputError, open_run
from heatmill.engine.explainer import Engine
from heatmill.engine.jobs import job as jobs
from heatmill.engine.jobs import plan as plans
from heatmill.engine.jobs import report, store
from heatmill.engine.jobs.plan import Job
from heatmill.engine.methods import METHODS
from heatmill.engine.opening import load, open_best
from heatmill.engine.passes import open_passes
from heatmill.engine.trial import Trial
from heatmill.engine.types import Item, Target
from tests.graphs import with_a_batch_that_stays, without_scores_in_the_dark

SIZE = (17, 13)

# One of every way through the engine: no pass, with the observation, through the network, through a graph, and both.
TOGETHER = [
    *("score-cam", "rise:masks=30", "grad-cam", "grad-cam++", "hires-cam", "xgrad-cam", "layer-cam"),
    *("group-cam:groups=4", "cf-cam", "cf-cam:start=sglrp,score=logit", "saliency", "input-x-gradient"),
    *("guided-backprop", "integrated-gradients:steps=5", "smoothgrad:samples=3", "smoothgrad:base=grad-cam,samples=3"),
    *("smoothgrad:base=integrated-gradients,samples=2", "smoothgrad:base=lrp,samples=3", "lrp", "lrp:at=layer"),
    *("clrp", "clrp:variant=clrp2", "sglrp", "deep-taylor", "fg-cam:to=r1", "fg-cam:base=score-cam,to=image"),
    *("occlusion:window=6,stride=5", "lime:samples=20", "kernel-shap:samples=20,segments=6", "sidu"),
    *("faster-score-cam:channels=3", "cluster-cam:clusters=3", "ss-cam:samples=3", "is-cam:steps=3"),
    *("ablation-ca:samples=20,segments=6", "ablation-cam", "recipro-cam", "sise", "ada-sise", "xrai:steps=3"),
]


def pictures(n: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, *size)).astype(np.float32)


def streamed(path, methods, images, targets, batch_size=8, labels=None, names=None, **options):
    """Explanations by method, image and target; and the engine that made them."""
    loaded = load(path, methods, **options)
    session = open_best(loaded, batch_size=batch_size)
    engine = Engine(loaded, session, targets, batch_size, 3, passes=open_passes(loaded, session, targets, batch_size))
    labels = labels or [None] * len(images)
    each = enumerate(zip(images, labels, names or [None] * len(images), strict=True))
    items = (Item(i, image, label, name=name) for i, (image, label, name) in each)
    found: dict[str, dict[int, list]] = {}
    for explanation in engine.stream(items):
        found.setdefault(explanation.method.text, {}).setdefault(explanation.key, []).append(explanation)
    return found, engine


def assert_equal(maps, others, share=1e-5):
    maps, others = np.asarray(maps), np.asarray(others)
    np.testing.assert_allclose(maps, others, rtol=0, atol=share * np.abs(others).max())


def test_all_of_these_are_every_method(make_model):
    own_heads_and_files = {"cam", "l-cam"}
    assert {text.partition(":")[0] for text in TOGETHER} | own_heads_and_files == set(METHODS)


SHORT = [
    "cam",
    "grad-cam",
    "grad-cam++",
    "group-cam:groups=4",
    "cf-cam",
    "fg-cam:to=r1",
    "smoothgrad:base=grad-cam,samples=3",
]


@pytest.mark.parametrize(("head", "methods"), [("Dense", TOGETHER), ("Gemm", SHORT)], ids=["Dense", "Gemm"])
def test_methods_asked_together_give_the_maps_of_each_alone(make_model, head, methods):
    path, images = make_model(size=SIZE, head=head, seed=2), pictures(3)
    targets = [Target("top", 2), Target("class", 3), Target("predicted")]
    found, _ = streamed(path, methods, images, targets, 7)
    assert set(found) == set(methods)
    for method in methods:
        alone = Explainer(path, method=method, batch_size=7, seed=3).explain(images, targets=["top2", 3, "predicted"])
        together = [found[method][i] for i in range(3)]
        assert_equal([[e.map for e in row] for row in together], alone.maps)
        assert [[e.target for e in row] for row in together] == alone.targets.tolist()
        np.testing.assert_allclose([[e.score for e in row] for row in together], alone.scores, atol=1e-6)
        told = [[extras.keys() for extras in row] for row in alone.extras]
        assert [[e.extras.keys() for e in row] for row in together] == told


def test_the_map_does_not_depend_on_the_batch(make_model):
    path, images = make_model(size=SIZE, head="Dense", seed=2), pictures(4)
    targets = [Target("top", 2), Target("class", 4), Target("predicted")]
    names = ["a", "b", "c", "d"]
    whole, _ = streamed(path, TOGETHER, images, targets, 32, names=names)
    for rows in whole.values():
        for row in rows.values():
            assert [e.status for e in row] == ["ok"] * 4
            assert row[0].target == row[3].target == row[0].pred
            assert_equal(row[0].map, row[3].map)
    for size in (1, 5, 7):
        other, _ = streamed(path, TOGETHER, images, targets, size, names=names)
        for method, rows in whole.items():
            for i, row in rows.items():
                assert [e.target for e in other[method][i]] == [e.target for e in row]
                assert_equal([e.map for e in other[method][i]], [e.map for e in row])
    backwards, _ = streamed(path, TOGETHER, images[::-1], targets, 5, names=names[::-1])
    for method in TOGETHER:
        for i in range(4):
            assert_equal([e.map for e in backwards[method][3 - i]], [e.map for e in whole[method][i]])


def test_ranks_that_a_graph_resolves_are_those_of_the_scores(make_model):
    path, images = make_model(size=SIZE, head="Dense", seed=2), pictures(9)
    ranked = np.argsort(-ReferenceEvaluator(onnx.load(path)).run(None, {"input": images})[0], axis=1)
    explainer = Explainer(path, method="saliency")
    every = explainer.explain(images, targets=[0, 1, 2, 3, 4]).maps
    for targets, columns in (
        ("top5", [0, 1, 2, 3, 4]),
        ("predicted", [0]),
        (["top3", "predicted"], [0, 1, 2, 0]),
        (["predicted", "top1"], [0, 0]),
    ):
        result = explainer.explain(images, targets=targets)
        np.testing.assert_array_equal(result.targets, ranked[:, columns])
        assert_equal(result.maps, np.take_along_axis(every, ranked[:, columns, None, None], 1))
    mixed = explainer.explain(images, targets=["great white", "top2", 0])
    np.testing.assert_array_equal(mixed.targets, np.stack([ranked[:, 0] * 0 + 3, *ranked.T[:2], ranked[:, 0] * 0], 1))
    assert_equal(mixed.maps, np.take_along_axis(every, mixed.targets[:, :, None, None], 1))


@pytest.mark.parametrize("method", ["grad-cam", "saliency", "cf-cam", "fg-cam:to=image", "smoothgrad:samples=2"])
def test_a_label_is_each_images_own_class(make_model, method):
    path, images, labels = make_model(size=SIZE, head="Dense", seed=2), pictures(4), [4, 0, 2, 0]
    found, _ = streamed(path, [method], images, [Target("label"), Target("class", 1)], labels=labels)
    every = Explainer(path, method=method, seed=3).explain(images, targets=[0, 1, 2, 3, 4])
    for i, label in enumerate(labels):
        labelled, first = found[method][i]
        assert (labelled.target, labelled.target_source) == (label, "label")
        assert_equal(labelled.map, every.maps[i, label])
        assert_equal(first.map, every.maps[i, 1])
    with pytest.raises(InputError, match="an image has no label"):
        streamed(path, [method], images, [Target("label")])


def test_an_image_that_is_not_finite_loses_its_own_rows_only(make_model):
    path, images = make_model(size=SIZE, head="Dense", seed=2), pictures(5)
    images[1, 0, 3, 4] = np.nan
    images[4, 2] = np.inf
    targets = [Target("predicted"), Target("class", 3)]
    methods = [method for method in TOGETHER if "score-cam" not in method and "rise" not in method]
    found, _ = streamed(path, methods, images, targets, 4)
    clean, _ = streamed(path, methods, np.nan_to_num(images, posinf=1.0), targets, 4)
    for method in methods:
        for i in (0, 2, 3):
            assert [e.status for e in found[method][i]] == ["ok", "ok"]
            assert_equal([e.map for e in found[method][i]], [e.map for e in clean[method][i]])
        for i in (1, 4):
            assert [(e.status, e.map) for e in found[method][i]] == [("nonfinite", None)] * 2
            assert found[method][i][1].target == 3


def test_passes_back_that_are_not_finite_end_their_request_and_no_other(make_model):
    """A network that has no score in the dark: a path from black is lost, one from the image's own mean is not."""
    path = make_model(size=SIZE, head="Dense", seed=2)
    without_scores_in_the_dark(path)
    methods = [f"integrated-gradients:steps=40,baseline={baseline}" for baseline in ("black", "mean")]
    found, engine = streamed(path, methods, pictures(3) + 1, [Target("predicted"), Target("class", 2)], 4)
    lost, kept = (found[method] for method in methods)
    for i in range(3):
        assert [(e.status, e.map) for e in lost[i]] == [("nonfinite", None)] * 2
        assert [e.status for e in kept[i]] == ["ok", "ok"]
        assert all(np.isfinite(e.map).all() for e in kept[i])
    alone = Explainer(path, method=methods[1]).explain(pictures(3) + 1, targets=["predicted", 2])
    assert_equal([[e.map for e in kept[i]] for i in range(3)], alone.maps)
    assert engine.stages.rows < 3 * (1 + 2 * 41 + 41), "the rest of the lost requests was not run"


FIXED = [
    "grad-cam",
    "group-cam:groups=3",
    "saliency",
    "integrated-gradients:steps=4",
    "cf-cam",
    "lrp",
    "fg-cam:to=image",
]


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 4}, {"batch": 4, "head": "Reshape"}])
def test_files_of_a_fixed_batch_give_the_same_maps(make_model, options):
    images, targets = pictures(5), [Target("top", 2), Target("class", 0)]
    head = {"head": options.get("head", "Dense")}
    plain, _ = streamed(make_model("plain.onnx", size=SIZE, seed=2, **head), FIXED, images, targets, 6)
    path = make_model("fixed.onnx", size=SIZE, seed=2, **{**head, **options})
    for size in (options["batch"], 6):
        fixed, _ = streamed(path, FIXED, images, targets, size)
        for method in FIXED:
            for i in range(5):
                assert_equal([e.map for e in fixed[method][i]], [e.map for e in plain[method][i]])
    alone = Explainer(path, method="saliency", batch_size=options["batch"]).explain(images, targets=["top2", 0])
    assert_equal(alone.maps, [[e.map for e in plain["saliency"][i]] for i in range(5)])


def test_a_fixed_batch_that_can_not_be_opened_is_followed_back_at_its_size(make_model):
    images, path = pictures(4), make_model("hard.onnx", size=SIZE, batch=3, head="Reshape")
    with_a_batch_that_stays(path)
    plain = make_model("plain.onnx", size=SIZE)
    for method in ("group-cam:groups=3", "integrated-gradients:steps=4", "fg-cam:to=image"):
        hard = Explainer(path, method=method)
        assert hard._rows == 3
        assert_equal(hard.explain(images).maps, Explainer(plain, method=method).explain(images).maps)


@pytest.mark.parametrize("method", ["saliency", "layer-cam", "lrp", "fg-cam:to=image", "smoothgrad:samples=3"])
def test_ways_back_are_in_batches_that_the_budget_holds(make_model, method):
    """Whatever layer they end at; the way to the last layer holds next to nothing."""
    path = make_model(size=SIZE, head="Dense")
    first, last = (open_sizes(load(path, [method], layer=layer), budget=200_000) for layer in ("r1", None))
    assert first[0] < 32
    ends_at_the_layer = method == "layer-cam"
    assert (last[0] == 32) == ends_at_the_layer
    assert open_sizes(load(path, [method], layer="r1"), budget=1) == [1]
    more = open_sizes(load(path, [method], layer="r1"), budget=200_000, targets=(Target("top", 5),))
    assert more[0] == first[0] if method in ("fg-cam:to=image", "smoothgrad:samples=3") else more[0] < first[0]


def open_sizes(loaded, budget: int, targets: tuple[Target, ...] = (Target("predicted"),)) -> list[int]:
    """Rows of the graph that its ways back to the image or the layer go through."""
    session = open_best(loaded, batch_size=32)
    passes = open_passes(loaded, session, targets, 32, budget=budget)
    through = [taken.batch_size for taken in passes.through.values()]
    return through or [passes.observe.batch_size]


def test_rows_through_a_graph_are_all_run(make_model):
    path, images = make_model(size=SIZE, head="Dense"), pictures(12)
    found, engine = streamed(path, ["smoothgrad:samples=3"], images, [Target("predicted")], 32)
    assert len(found["smoothgrad:samples=3"]) == 12
    assert engine.stages.rows == 12 + 36


@pytest.fixture
def quick(monkeypatch):
    """Without the process that tries the model first."""
    known = Trial("onnxruntime", "cpu", "fp32", onnxruntime.__version__, 4, True, 5, 1000.0)
    monkeypatch.setattr(jobs, "probe_job", lambda job, *others: known)


def test_a_job_of_gradient_methods_holds_the_maps_of_the_python_api_and_resumes(
    make_model, photographs, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 2 * 2 * 3)  # shards of two images
    model, out = make_model(head="Dense"), tmp_path / "run"
    methods, targets = ("integrated-gradients:steps=6", "smoothgrad:base=grad-cam,samples=4"), ("predicted", "top2")
    job = Job(model=model, inputs=(photographs,), out=out, methods=methods, targets=targets)
    summary = jobs.explain(job, "quiet")
    assert (summary.images, summary.rows, summary.statuses) == (6, 36, {"ok": 36})
    whole = {(row.id, row.method, row.target_source): row for row in open_run(out).rows()}
    paths = sorted(photographs.rglob("*.png"), key=lambda path: str(path.relative_to(photographs)))
    result = Explainer(model, method=methods[0]).explain(paths, targets=list(targets))
    for i, path in enumerate(paths):
        for k, source in enumerate(("predicted", "top1", "top2")):
            row = whole[str(path.relative_to(photographs)), methods[0], source]
            assert row.target == result.targets[i, k]
            assert_equal(row.map, result.maps[i, k], 1e-3)  # stored in half precision
    (tmp_path / "last.csv").write_text(
        "id,uri\n" + "".join(f"{path.relative_to(photographs)},{path}\n" for path in paths[4:])
    )
    jobs.explain(Job(**{**asdict(job), "inputs": (tmp_path / "last.csv",), "out": tmp_path / "last"}), "quiet")
    for row in open_run(tmp_path / "last").rows():
        # noise belongs to an image's id, wherever it stands in a run
        assert_equal(row.map, whole[row.id, row.method, row.target_source].map, 1e-3)
    kept = sorted((out / "data").iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    resumed = jobs.explain(job, "quiet")
    assert resumed.exit_code == 0
    assert resumed.computed == 1, "one shard"
    again = {(row.id, row.method, row.target_source): row for row in open_run(out).rows()}
    assert again.keys() == whole.keys()
    for key, row in whole.items():
        np.testing.assert_array_equal(again[key].map, row.map)
        assert (again[key].target, again[key].score) == (row.target, row.score)
    assert store.verify(out)["ok"] == 36
    told = json.loads((out / "summary.json").read_text())
    assert told["statuses"] == {"ok": 36}
    page = report.write_report(open_run(out)).read_text()
    assert all(method in page for method in methods)
