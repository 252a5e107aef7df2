"""Metric rows beside a run's maps: complete, resumable, and no map is ever touched."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from zlib import crc32

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from scipy import stats

from heatmill import Explainer, IncompleteError, InputError, RunError, open_run
from heatmill.engine.canvas import _rank_masks
from heatmill.engine.evaluator import orders
from heatmill.engine.jobs import evaluate as evaluation
from heatmill.engine.jobs import job as jobs
from heatmill.engine.jobs import measures, store, worker
from heatmill.engine.jobs import plan as plans
from heatmill.engine.jobs.evaluate import Evaluation, evaluate, input_boxes
from heatmill.engine.jobs.plan import Job
from heatmill.engine.jobs.table import compare_metrics
from heatmill.engine.metrics import PRESETS, parse_metrics
from heatmill.engine.trial import Trial
from heatmill.engine.types import RankBank
from heatmill.kernels import reference
from heatmill.models.graph.shuffle import layers, shuffled, stages
from heatmill.models.preprocess import decode, normalise, view
from tests.engine.test_methods import Classifier
from tests.engine.test_metrics import literal_curve

METHODS = ("cam", "saliency")
TARGETS = ("predicted", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_model, save_photographs):
    """A model, photographs and a manifest with boxes: one has none, one's lies outside, one is not there."""
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "model.onnx")
    save_photographs(folder / "photos", 6)
    paths = sorted(path.relative_to(folder) for path in (folder / "photos").rglob("*.png"))
    boxes = ["5 5 30 30", "", "0 0 0.5 0.5", "10 10 20 38;3 4 9 9", "5 5 30 30", "5 5 30 30"]
    lines = ["uri,label,boxes,scene"]
    lines += [
        f"{path},{i % 5},{box},{'in' if i < 2 else 'out'}"
        for i, (path, box) in enumerate(zip(paths, boxes, strict=True))
    ]
    (folder / "val.csv").write_text("\n".join([*lines, "gone.png,1,1 1 9 9,out"]))
    return folder


@pytest.fixture(scope="module")
def explained(place):
    """A complete run of two methods and two targets in shards of 2 images; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        known = Trial("onnxruntime", "cpu", "fp32", onnxruntime.__version__, 4, True, 5, 1000.0)
        patch.setattr(jobs, "probe_job", lambda *others: known)
        patch.setattr(plans, "MAX_SHARD_ROWS", 8)
        job = Job(
            model=place / "model.onnx",
            inputs=(place / "val.csv",),
            out=place / "explained",
            methods=METHODS,
            targets=TARGETS,
            seed=5,
        )
        jobs.explain(job, "quiet")
    return place / "explained"


@pytest.fixture
def run(explained, tmp_path):
    """A copy of the run, without metrics."""
    shutil.copytree(explained, tmp_path / "run", ignore=shutil.ignore_patterns("metrics"))
    return tmp_path / "run"


def rows(run, **wanted):
    found = measures.read(open_run(run)).to_pylist()
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def image(place, row):
    spec = Explainer(place / "model.onnx", method="cam").spec
    with open(row.path, "rb") as file:
        return normalise(view(decode(file.read()), spec)[0], spec, "float32")


def test_a_row_for_every_image_target_method_and_metric(run, place):
    before = {path: path.read_bytes() for path in (run / "data").iterdir()}
    (found,) = evaluate(Evaluation(runs=(run,)), "quiet")
    assert {path: path.read_bytes() for path in (run / "data").iterdir()} == before
    metrics = [call.text for call in parse_metrics(PRESETS["standard"])]
    expected = [(row.id, row.method, row.target_source, metric) for row in open_run(run).rows() for metric in metrics]
    table = rows(run)
    assert [(row["id"], row["method"], row["target_source"], row["metric"]) for row in table] == expected
    assert sum(found.statuses.values()) == len(expected)
    assert found.shards == (4, 4)
    for row in table:
        assert (row["value"] is None) == (row["status"] != "ok")
        assert (row["reason"] is None) == (row["status"] == "ok")
        assert row["direction"] in ("higher", "lower")
    conventions = {row["metric"]: (row["baseline"], row["mask_space"], row["score"], row["steps"]) for row in table}
    assert conventions["insertion"] == ("rise-blur", "normalized", "posterior", 28)
    assert conventions["average-drop"] == ("zero", "normalized", "posterior", None)
    assert len(list((run / "metrics").iterdir())) == 4


def test_values_are_those_of_the_stored_maps(run, place):
    """From the run's own rows and the network alone."""
    net = Classifier(place / "model.onnx")
    evaluate(
        Evaluation(runs=(run,), metrics=("deletion:steps=9", "energy-pointing-game"), methods=("saliency",)), "quiet"
    )
    by_key = {(row["id"], row["target"], row["metric"]): row for row in rows(run)}
    stored = [row for row in open_run(run).rows(method="saliency", status="ok")]
    assert len(stored) == 12
    for row in stored[::3]:
        x, s = image(place, row), row.saliency()
        value, curve = literal_curve(net, x, row.target, s, 9, x, np.zeros_like(x))
        ours = by_key[row.id, row.target, "deletion:steps=9"]
        np.testing.assert_allclose(ours["curve"], curve, atol=1e-5)
        assert ours["value"] == pytest.approx(value, abs=1e-5)
    row = next(row for row in stored if row.id == "photos/sub/photo1.png")
    listed = store.read_plan(run, open_run(run).settings).slice(row.row, 1).to_pylist()[0]
    x0, y0, x1, y1 = row.crop_box
    inside, s = np.zeros(s.shape, bool), np.maximum(row.saliency(), 0)
    for y in range(s.shape[0]):
        for x in range(s.shape[1]):
            at_x, at_y = x0 + (x + 0.5) * (x1 - x0) / s.shape[1], y0 + (y + 0.5) * (y1 - y0) / s.shape[0]
            inside[y, x] = any(
                box["x0"] <= at_x < box["x1"] and box["y0"] <= at_y < box["y1"] for box in listed["boxes"]
            )
    assert len(listed["boxes"]) == 2
    ours = by_key[row.id, row.target, "energy-pointing-game"]["value"]
    assert ours == pytest.approx(s[inside].sum() / s.sum(), rel=1e-5)


def test_what_has_no_value_says_why(run):
    evaluate(Evaluation(runs=(run,)), "quiet")
    statuses = {(row["id"], row["metric"]): (row["status"], row["reason"]) for row in rows(run, method="cam")}
    assert statuses["photos/photo2.png", "pointing-game"] == ("no_boxes", "the image has no boxes")
    assert statuses["photos/photo4.png", "max-box-acc"][0] == "box_outside"
    assert statuses["photos/photo2.png", "deletion"] == ("ok", None)
    assert statuses["gone.png", "deletion"][0] == "missing"
    assert statuses["photos/photo0.png", "conservation"][0] == "not_stated"
    assert {row["status"] for row in rows(run, id="gone.png")} == {"missing"}
    assert set(measures.STATUSES) >= {row["status"] for row in rows(run)}


def test_a_photograph_that_is_gone_since_the_run_is_a_row(run, place, tmp_path):
    moved = tmp_path / "place"
    shutil.copytree(place, moved, ignore=shutil.ignore_patterns("explained"))
    job = Job(model=moved / "model.onnx", inputs=(moved / "photos",), out=tmp_path / "other", methods=("cam",), limit=2)
    jobs.explain(job, "quiet")
    (moved / "photos" / "photo0.png").unlink()
    evaluate(Evaluation(runs=(tmp_path / "other",), metrics=("increase", "max-sensitivity:samples=1")), "quiet")
    found = {(row["id"], row["metric"]): row["status"] for row in rows(tmp_path / "other")}
    assert found == {
        ("photo0.png", "increase"): "missing",
        ("photo0.png", "max-sensitivity:samples=1"): "missing",
        ("photo2.png", "increase"): "ok",
        ("photo2.png", "max-sensitivity:samples=1"): "ok",
    }


def test_an_image_without_a_map_is_not_opened_again(run, monkeypatch):
    """It may be what killed the worker."""
    part = run / "data" / "part-000001.parquet"
    table = pq.read_table(part)
    statuses = ["worker_crash"] * 4 + table["status"].to_pylist()[4:]
    at = table.column_names.index("status")
    pq.write_table(table.set_column(at, "status", [statuses]), part)
    opened, read = [], worker.sources.read
    monkeypatch.setattr(worker.sources, "read", lambda uri, *others: opened.append(uri) or read(uri, *others))
    evaluate(Evaluation(runs=(run,), metrics=("increase", "max-sensitivity:samples=1")), "quiet")
    killer = open_run(run).table()["uri"][8].as_py()
    assert len(set(opened)) == 5, "nor the one that was not there"
    assert killer not in opened
    found = {row["status"] for row in rows(run) if row["row"] == 2}
    assert found == {"worker_crash"}


# --- resume ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_where_it_stopped(run, monkeypatch):
    whole = run.parent / "whole"
    shutil.copytree(run, whole)
    job = {"metrics": ("average-drop", "insertion:steps=4", "sanity-cascade:stages=2")}
    evaluate(Evaluation(runs=(whole,), **job), "quiet")
    write, written = measures.write, []

    def stopping(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[1])
        write(*arguments)

    monkeypatch.setattr(measures, "write", stopping)
    with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
        evaluate(Evaluation(runs=(run,), **job), "quiet")
    kept = {path: path.read_bytes() for path in (run / "metrics").iterdir()}
    assert len(kept) == 2
    monkeypatch.setattr(measures, "write", lambda *arguments: written.append(arguments[1]) or write(*arguments))
    evaluate(Evaluation(runs=(run,), **job), "quiet")
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(written) == 2 * 4, "each shard of either kind once"
    key = lambda row: (row["row"], row["method"], row["target_source"], row["metric"])  # noqa: E731
    for one, other in zip(sorted(rows(run), key=key), sorted(rows(whole), key=key), strict=True):
        assert one.pop("value") == pytest.approx(other.pop("value"), abs=1e-5)
        for lists in (one, other):
            lists.pop("curve")
            lists.pop("notes")
        assert one == other


@pytest.mark.parametrize(
    ("number", "error", "told"),
    [
        (signal.SIGINT, KeyboardInterrupt, "interrupted; the same command resumes"),
        (signal.SIGTERM, IncompleteError, "stopped by SIGTERM; the same command resumes"),
    ],
)
def test_signals_end_it_and_keep_what_is_committed(run, monkeypatch, number, error, told):
    write = measures.write
    monkeypatch.setattr(measures, "write", lambda *arguments: write(*arguments) or signal.raise_signal(number))
    with pytest.raises(error, match=told):
        evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")
    assert len(list((run / "metrics").iterdir())) == 1


def test_what_is_there_is_not_computed_again(run, monkeypatch):
    evaluate(Evaluation(runs=(run,), metrics=("increase",), methods=("cam",)), "quiet")
    ran = []
    measure = evaluation.measure
    monkeypatch.setattr(
        evaluation, "measure", lambda work, group, *others: ran.append(group) or measure(work, group, *others)
    )
    (found,) = evaluate(Evaluation(runs=(run,), metrics=("increase", "sparseness")), "quiet")
    told = [([call.text for call in group.metrics], group.methods, group.blocks) for group in ran]
    blocks = (range(0, 2), range(2, 4), range(4, 6), range(6, 7))
    assert told == [(["sparseness"], ("cam",), blocks), (["increase", "sparseness"], ("saliency",), blocks)]
    assert sum(found.statuses.values()) == 7 * 2 * 2 * 2
    ran.clear()
    (found,) = evaluate(Evaluation(runs=(run,), metrics=("sparseness", "increase:keep=1")), "quiet")
    assert (ran, found.computed, found.stages) == ([], 0, {})


def test_blocks_are_about_a_minute_and_fit_together(run, monkeypatch):
    """Whatever the size of what is there, no image is judged twice."""
    opened = open_run(run)
    assert evaluation.block_rows(opened, parse_metrics(["rise"]), METHODS) == 2, "a shard at most"
    monkeypatch.setattr(evaluation, "BLOCK_SECONDS", 0.3)  # 300 rows of the network
    assert evaluation.block_rows(opened, parse_metrics(["rise"]), METHODS) == 1, "1 + 2 x 2 x 56 rows for an image"
    evaluate(Evaluation(runs=(run,), metrics=("deletion",)), "quiet")
    assert len(list((run / "metrics").iterdir())) == 4, "1 + 2 x 2 x 28 rows: two images"
    (found,) = evaluate(Evaluation(runs=(run,), metrics=("rise",)), "quiet")
    assert found.computed == 7
    assert len(rows(run)) == 7 * 2 * 2 * 2
    assert measures.verify(opened) == 7 * 2 * 2 * 2
    for samples, block in ((1, 1), (3, 1)):
        calls = parse_metrics([f"max-sensitivity:samples={samples}"])
        assert evaluation.block_rows(opened, calls, METHODS) == block
    assert evaluation.block_rows(opened, parse_metrics(["sanity-cascade"]), METHODS) == 2


def test_what_no_range_holds():
    done = [range(8, 10), range(12, 16)]
    assert evaluation.uncovered(range(8, 16), done) == [range(10, 12)]
    assert evaluation.uncovered(range(0, 8), done) == [range(0, 8)]
    assert evaluation.uncovered(range(12, 14), done) == []
    assert evaluation.uncovered(range(8, 12), [range(8, 9)]) == [range(9, 10), range(10, 12)]


def test_only_shards_with_maps_are_evaluated(run, capsys):
    (run / "data" / "part-000001.parquet").unlink()
    (found,) = evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "auto")
    assert found.shards == (3, 4)
    assert "has 3 of 4 shards" in capsys.readouterr().err
    assert {row["row"] for row in rows(run)} == {0, 1, 4, 5, 6}
    opened = store.open_run(run)
    calls = [method["call"] for method in opened.settings["methods"]]
    table = compare_metrics([opened], ["sparseness"], [calls])
    assert table.notes == (f"{run}: 3 of 4 shards have maps; the images of the others are left out",)
    for part in (run / "data").iterdir():
        part.unlink()
    with pytest.raises(InputError, match="no maps yet"):
        evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")


def test_overwriting_a_run_removes_its_metrics(run):
    evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")
    assert plans.check_folder(run, overwrite=True) is False
    plans.clear(run)
    assert not (run / "metrics").exists()


# --- refusals -------------------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_before_anything_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", None)
    for job, told in (
        (Evaluation(runs=(run,), methods=("rise",)), "no run has the method 'rise'; known: cam, saliency"),
        (Evaluation(runs=(run,), metrics=("pointing",)), "no metric or preset 'pointing'; nearest: pointing-game"),
        (Evaluation(runs=(run, run)), "given twice"),
        (Evaluation(runs=()), "give a run"),
        (Evaluation(runs=(run,), by=("scenery",)), "no such column .* nearest: scene"),
    ):
        with pytest.raises(InputError, match=told):
            evaluate(job, "quiet")
    with pytest.raises(RunError, match="not a run"):
        evaluate(Evaluation(runs=(tmp_path / "nothing",)), "quiet")


def test_another_model_is_refused(run, place, tmp_path, save_model):
    other = save_model(tmp_path / "other.onnx", seed=1)
    with pytest.raises(RunError, match="the file has changed"):
        evaluate(Evaluation(runs=(run,), metrics=("increase",), model=other), "quiet")
    moved = shutil.copy(place / "model.onnx", tmp_path / "moved.onnx")
    assert evaluate(Evaluation(runs=(run,), metrics=("increase",), model=moved), "quiet")[0].computed


def test_damage_and_strangers_are_named(run):
    evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")
    part = sorted((run / "metrics").iterdir())[1]
    good = part.read_bytes()
    part.write_bytes(good[: len(good) // 2])
    with pytest.raises(
        RunError, match=f"{part.name}: damaged .* heatmill evaluate with the same metrics makes it again"
    ):
        evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")
    table = pq.read_table(part.parent / sorted(p.name for p in part.parent.iterdir())[0])
    footer = {**json.loads(table.schema.metadata[b"heatmill"]), "plan_hash": "another"}
    pq.write_table(table.replace_schema_metadata({b"heatmill": json.dumps(footer).encode()}), part)
    with pytest.raises(RunError, match="belongs to another run"):
        evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")
    part.unlink()
    evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")
    assert part.read_bytes() == good


def test_every_byte_of_metric_rows_is_verified(run):
    assert measures.verify(open_run(run)) == 0
    evaluate(Evaluation(runs=(run,), metrics=("sparseness", "increase")), "quiet")
    assert measures.verify(open_run(run)) == 7 * 2 * 2 * 2
    part = sorted((run / "metrics").iterdir())[0]
    good = part.read_bytes()
    noticed = 0
    for at in range(60, len(good) - 8, len(good) // 40):
        part.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            measures.verify(open_run(run))
        except RunError as err:
            noticed += part.name in str(err)
    assert noticed > 20, "the pages and most of the footer"
    part.write_bytes(good)
    table = pq.read_table(part)
    pq.write_table(table.slice(1), part)
    with pytest.raises(RunError, match="are not the 16 expected"):
        measures.verify(open_run(run))


def test_a_full_disk_can_be_resumed(run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "commit", full)
    with pytest.raises(IncompleteError, match=r"no space is left; .* the same command resumes"):
        evaluate(Evaluation(runs=(run,), metrics=("sparseness",)), "quiet")


# --- boxes ----------------------------------------------------------------------------------------------------


def test_boxes_follow_the_crop():
    boxes = [{"x0": 20, "y0": 0, "x1": 60, "y1": 50}, {"x0": 0, "y0": 0, "x1": 5, "y1": 5}]
    # the model saw columns 10 to 90 and rows 20 to 120 at half the size
    seen, status = input_boxes(boxes, (10, 20, 90, 120), (50, 40))
    assert (seen.tolist(), status) == ([[5, 0, 25, 15]], "ok")
    assert input_boxes(boxes[1:], (10, 20, 90, 120), (50, 40))[1] == "box_outside"
    for none in (None, []):
        assert input_boxes(none, (0, 0, 1, 1), (50, 40))[1] == "no_boxes"
    padded, _ = input_boxes(boxes[:1], (-10, 0, 90, 100), (50, 50))  # a border of 10 columns on the left
    assert padded.tolist() == [[15, 0, 35, 25]]


# --- maps made again ------------------------------------------------------------------------------------------


def test_max_sensitivity_is_the_literal_maximum(run, place):
    metric = "max-sensitivity:radius=0.3,samples=3"
    evaluate(Evaluation(runs=(run,), metrics=(metric,)), "quiet")
    found = {(row["id"], row["method"], row["target"]): row for row in rows(run, status="ok")}
    explainers = {method: Explainer(place / "model.onnx", method=method) for method in METHODS}
    assert len(found) == 6 * 2 * 2
    for row in list(open_run(run).rows(status="ok"))[::5]:
        x = image(place, row)
        digest = hashlib.blake2b(row.id.encode(), digest_size=8).digest()
        key = np.array([5, int.from_bytes(digest, "little")], np.uint64)
        images = [x]
        for sample in (1, 2, 3):
            generator = np.random.Generator(
                np.random.Philox(key=key, counter=[0, 0, crc32(b"max-sensitivity"), sample])
            )
            images.append((x + generator.uniform(-0.3, 0.3, x.shape)).astype(np.float32))
        maps = explainers[row.method].explain(np.stack(images), targets=row.target).maps[:, 0].astype(np.float64)
        changes = [np.sqrt(((each - maps[0]) ** 2).sum()) / np.sqrt((maps[0] ** 2).sum()) for each in maps[1:]]
        ours = found[row.id, row.method, row.target]
        assert ours["value"] == pytest.approx(max(changes), rel=1e-3)
        np.testing.assert_allclose(sorted(ours["curve"]), sorted(changes), rtol=1e-3)
        assert (ours["steps"], ours["baseline"]) == (3, "uniform noise within 0.3")


@pytest.mark.parametrize("kind", ["cascade", "independent"])
def test_sanity_checks_are_the_literal_loop(run, place, tmp_path, kind):
    metric = f"sanity-{kind}:stages=3"
    evaluate(Evaluation(runs=(run,), metrics=(metric,)), "quiet")
    found = {(row["id"], row["method"], row["target"]): row for row in rows(run, status="ok")}
    proto = onnx.load(place / "model.onnx")
    names = [["w3", "b3"], ["w2", "b2"], ["w1", "b1"]]
    wanted: dict = {}
    for stage in range(3):
        parts = names[: stage + 1] if kind == "cascade" else [names[stage]]
        chosen = [name for part in parts for name in part]
        path = tmp_path / f"{stage}.onnx"
        onnx.save(shuffled(proto, chosen, 5), path)
        shutil.copy(place / "model.json", path.with_suffix(".json"))
        for method in METHODS:
            explainer = Explainer(path, method=method)
            for row in open_run(run).rows(method=method, status="ok"):
                again = explainer.explain(image(place, row)[None], targets=row.target).maps[0, 0]
                correlation = stats.spearmanr(row.map.ravel(), again.ravel()).statistic
                wanted.setdefault((row.id, method, row.target), []).append(correlation)
    assert len(found) == len(wanted) == 24
    for key, correlations in wanted.items():
        np.testing.assert_allclose(found[key]["curve"], correlations, atol=2e-3)
        assert found[key]["value"] == pytest.approx(np.mean(correlations), abs=2e-3)


def test_methods_with_seeds_see_only_what_was_shuffled(run, place, tmp_path):
    """Noise of radius almost 0 changes no map: random masks are the run's own."""
    job = Job(model=place / "model.onnx", inputs=(place / "photos",), out=tmp_path / "rise", methods=("rise:masks=30",),
              limit=2, seed=3)  # fmt: skip
    jobs.explain(job, "quiet")
    evaluate(Evaluation(runs=(tmp_path / "rise",), metrics=("max-sensitivity:radius=0.000001,samples=2",)), "quiet")
    assert [row["value"] < 1e-3 for row in rows(tmp_path / "rise")] == [True, True]


def test_layers_and_stages(place):
    proto = onnx.load(place / "model.onnx")
    assert layers(proto, "logits") == [("w3", "b3"), ("w2", "b2"), ("w1", "b1")]
    assert stages(layers(proto, "logits"), 2) == [("w3", "b3", "w2", "b2"), ("w1", "b1")]
    assert len(stages(layers(proto, "logits"), 99)) == 3


def test_rank_masks_are_the_reference():
    ranks = orders(np.random.default_rng(0).random((2, 5, 7)), (5, 7))
    np.testing.assert_array_equal(ranks[2:], 34 - ranks[:2])
    bank = RankBank(ranks, np.array([1, 1, 3, 0, 0, 0], np.int32), np.array([0, 3, 35, 9, 2, 2], np.int32))
    out = np.empty((6, 5, 7), np.float32)
    _rank_masks(bank, slice(0, 6), out)
    for mask, of, threshold in zip(out, bank.of, bank.thresholds, strict=True):
        np.testing.assert_array_equal(mask, reference.rank_masks(ranks[of], np.array([threshold]))[0])
