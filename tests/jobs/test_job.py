"""Whole runs: what they hold, what they survive, and what they refuse."""

import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from heatmill import BackendError, Explainer, IncompleteError, InputError, RunError, open_run
from heatmill.engine.jobs import job as jobs
from heatmill.engine.jobs import plan as plans
from heatmill.engine.jobs import store, worker
from heatmill.engine.jobs.plan import Job
from heatmill.engine.trial import Trial

PATIENCE = 60  # seconds; a safety net, nothing here waits for it unless it fails
LABELS = ["ant", "bee", "cat", "great white", "emu"]

# Spawned workers import this first. Images tell by what is appended to them how to misbehave.
SITE = """
import os, signal, time
from heatmill.engine.jobs import store
from heatmill.models import preprocess

decode, write_part = preprocess.decode, store.write_part

def hostile(data, **options):
    if b"KILLS" in data:
        os.kill(os.getpid(), signal.SIGKILL)
    if b"HANGS" in data:
        time.sleep(10000)
    if b"IS SLOW" in data:
        time.sleep(0.1)
    if b"EATS MEMORY" in data:
        raise MemoryError
    if b"FINDS A BUG" in data:
        raise RuntimeError("a bug of ours")
    return decode(data, **options)

def deadly(run, *others):
    write_part(run, *others)
    if os.path.exists(f"{run}.kills-once"):
        os.unlink(f"{run}.kills-once")
        os.kill(os.getpid(), signal.SIGKILL)

preprocess.decode, store.write_part = hostile, deadly
"""

# The command with shards of 2 images and, if asked, without the process that tries the model first.
LAUNCH = """
import sys
import onnxruntime
from heatmill.cli import main
from heatmill.engine.jobs import job, plan
from heatmill.engine.trial import Trial
plan.MAX_SHARD_ROWS = 2
if sys.argv.pop(1) == "quick":
    known = Trial("onnxruntime", "cpu", "fp32", onnxruntime.__version__, 2, True, 5, 1000.0)
    job.probe_job = lambda *others: known
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    return save_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory, save_photographs):
    """A dozen pictures; not to be changed."""
    return save_photographs(tmp_path_factory.mktemp("photos") / "photos", 12)


LOST = """
from heatmill import BackendError
from heatmill.engine import canvas

run, left = canvas.HostCanvas.run, [2]

def lost(self, *given):
    left[0] -= 1
    if not left[0]:
        raise BackendError("the GPU's driver failed: 719")
    return run(self, *given)

canvas.HostCanvas.run = lost
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Workers obey what is appended to images."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


@pytest.fixture
def objects(model, photos, tmp_path, quick):
    """A run of a method with named arrays, swept, and of one without."""
    methods = ("ablation-ca:segments=4..8..4,samples=32", "cam")
    job = Job(model=model, inputs=(photos,), out=tmp_path / "objects", methods=methods, targets=("top2",), limit=3)
    assert jobs.explain(job, "quiet").exit_code == 0
    return job


def test_named_arrays_are_kept_verified_and_made_again_the_same(objects):
    counts = store.verify(objects.out)
    assert counts["ok"] == 3 * 3 * 2
    rows = list(open_run(objects.out).rows())
    assert [row.method for row in rows[::2]] == 3 * [
        "ablation-ca:samples=32,segments=4",
        "ablation-ca:samples=32,segments=8",
        "cam",
    ]
    for row in rows:
        assert bool(row.arrays) == (row.method != "cam")
        if row.arrays:
            count = row.extras["segments"]
            assert row.arrays["segments"].shape == row.map.shape
            assert row.arrays["correlation"].shape == (count, count)
            painted = row.arrays["contribution"][row.arrays["segments"]]
            np.testing.assert_allclose(row.map, painted, atol=np.ptp(painted) / 1024)
    (part,) = (objects.out / "data").glob("*.parquet")
    before = part.read_bytes()
    part.unlink()
    assert jobs.explain(objects, "quiet").computed == 1
    assert part.read_bytes() == before


def test_damaged_arrays_are_found(objects):
    (part,) = (objects.out / "data").glob("*.parquet")
    table = pq.read_table(part)
    position = table.column_names.index("arrays")
    for broken in (b"no arrays", store.encode_arrays({"links": np.array([np.nan])})):
        column = pa.array([broken, *table["arrays"].to_pylist()[1:]], pa.binary())
        changed = table.set_column(position, "arrays", column)
        part.write_bytes(store.parquet_bytes(changed.replace_schema_metadata(table.schema.metadata)))
        with pytest.raises(RunError, match=r"damaged|not finite"):
            store.verify(objects.out)


@pytest.fixture
def quick(monkeypatch):
    """Without the process that tries the model first."""
    known = Trial("onnxruntime", "cpu", "fp32", onnxruntime.__version__, 8, True, 5, 1000.0)
    monkeypatch.setattr(jobs, "probe_job", lambda job, *others: known)
    return known


def append(path, what):
    path.write_bytes(path.read_bytes() + what.encode())


def explained(model, inputs, out, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return jobs.explain(Job(model=model, inputs=inputs, out=out, **{"methods": ("cam",), **options}), "quiet")


def content(run):
    """Every row by its key: all that is stored but the map, and the map."""
    rows = {}
    for row in open_run(run).rows():
        key = (row.id, row.method, row.target_source, row.target if row.target_source == "class" else None)
        assert key not in rows
        names = ("row", "path", "target", "label_name", "prediction", "status", "error", "width", "height", "crop_box")
        rows[key] = ({name: getattr(row, name) for name in names}, row.score, row.map)
    return rows


def assert_same(found, expected, without=(), tolerance=1e-6):
    """The same rows, their maps equal within `tolerance` of their range; `without` names fields that may differ."""
    assert list(found) == list(expected)
    for key, (fields, score, one) in expected.items():
        other_fields, other_score, other = found[key]
        for name in fields.keys() - set(without):
            assert other_fields[name] == fields[name], (key, name)
        assert (score is None) == (other_score is None)
        assert (one is None) == (other is None)
        if score is not None:
            assert abs(score - other_score) < 1e-6
        if one is not None:
            np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * max(np.ptp(one), 1e-30), err_msg=str(key))


def parts(run):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (run / "data").iterdir()}


def exit_code(failure):
    return failure.value.exit_code


def one_line(failure):
    assert "\n" not in str(failure.value)
    return str(failure.value)


# --- what a run holds ---------------------------------------------------------------------------------------

METHODS = ("cam", "score-cam", "rise:masks=40")
TARGETS = ("predicted", "top2", "2", "Great_White")


@pytest.fixture(scope="module")
def whole(model, photos, tmp_path_factory):
    """A run of three methods and five targets, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    summary = explained(model, photos, out, methods=METHODS, targets=TARGETS)
    return out, summary


def test_a_run_holds_exactly_the_planned_rows(whole, photos):
    out, summary = whole
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    sources = [("predicted", None), ("top1", None), ("top2", None), ("class", 2), ("class", 3)]
    expected = [(name, method, source, target) for name in names for method in METHODS for source, target in sources]
    assert list(content(out)) == expected
    assert (summary.exit_code, summary.images, summary.rows, summary.statuses) == (0, 12, 180, {"ok": 180})
    assert store.verify(out) == {"shards": 1, "committed": 1, "rows": 180, "ok": 180}
    told = json.loads((out / "summary.json").read_text())
    assert (told["images"], told["rows"], told["statuses"], told["deaths"]) == (12, 180, {"ok": 180}, 0)
    assert set(os.listdir(out)) == {"_tmp", "data", "events", "plan", "run.json", "summary.json"}
    assert os.listdir(out / "_tmp") == ["lock"]


def test_its_maps_are_those_of_the_python_api(whole, model, photos):
    rows = content(whole[0])
    paths = sorted(photos.rglob("*.png"), key=lambda path: str(path.relative_to(photos)))
    for method in METHODS:
        result = Explainer(model, method=method).explain(paths, targets=["predicted", "top2", 2, "great white"])
        for i, path in enumerate(paths):
            mine = [value for key, value in rows.items() if key[:2] == (str(path.relative_to(photos)), method)]
            for k, (fields, score, stored) in enumerate(mine):
                expected = result.maps[i, k]
                assert fields["target"] == result.targets[i, k]
                assert fields["label_name"] == LABELS[fields["target"]]
                assert fields["prediction"] == result.predictions[i]
                assert score == pytest.approx(result.scores[i, k], abs=1e-6)
                quantum = 1 / 2048 if method.startswith("rise") else 1e-6
                np.testing.assert_allclose(stored, expected, rtol=0, atol=quantum * np.ptp(expected))


@pytest.mark.parametrize(
    ("batch_size", "workers", "shard_images"), [(1, 1, 256), (7, 3, 1), (32, 2, 4), (None, None, 2)]
)
def test_results_do_not_depend_on_batch_workers_or_shards(
    whole, model, photos, tmp_path, monkeypatch, batch_size, workers, shard_images
):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", shard_images * len(METHODS) * 5)
    out = tmp_path / "run"
    explained(model, photos, out, methods=METHODS, targets=TARGETS, batch_size=batch_size, workers=workers)
    assert len(parts(out)) == -(-12 // shard_images)
    assert_same(content(out), content(whole[0]), tolerance=1e-5)


def happened(run, kind):
    lines = [json.loads(line) for path in (run / "events").iterdir() for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_a_worker_on_each_device_fills_one_store(whole, model, photos, tmp_path, monkeypatch, quick):
    """Two workers of the processor stand in for two of GPUs: what is tested is who does which shard."""
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 2 * len(METHODS) * 5)
    opened = []

    class Noted(jobs._Life):
        def __init__(self, context, order):
            opened.append(order)
            super().__init__(context, order)

    monkeypatch.setattr(jobs, "_Life", Noted)
    out = tmp_path / "run"
    summary = explained(model, photos, out, methods=METHODS, targets=TARGETS, devices=(0, 3))
    assert [(order.device, order.todo) for order in opened[:2]] == [(0, (0, 1)), (3, (2,))], "a part each"
    assert sorted(shard for order in opened for shard in order.todo) == list(range(6)), "each shard once"
    assert len(happened(out, "ready")) == len(happened(out, "done")) == len(opened) > 2
    assert summary.deaths == 0
    assert_same(content(out), content(whole[0]), tolerance=1e-5)
    assert store.verify(out)["rows"] == summary.rows == 12 * len(METHODS) * 5
    assert (
        jobs.explain(
            Job(model=model, inputs=(photos,), out=out, methods=METHODS, targets=TARGETS, devices=(1,)), "quiet"
        ).computed
        == 0
    ), "which devices did it is no setting of a run"


def test_devices_of_the_processor_are_refused(model, photos, tmp_path):
    with pytest.raises(BackendError, match=r"a device is asked for, and onnxruntime \(cpu\) runs on the processor"):
        explained(model, photos, tmp_path / "run", devices=(0,))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_rerun_of_a_shard_has_the_same_bytes(whole, model, photos, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    part = out / store.part_name(0)
    before = part.read_bytes()
    part.unlink()
    explained(model, photos, out, methods=METHODS, targets=TARGETS)
    assert part.read_bytes() == before


def test_another_seed_gives_other_masks(whole, model, photos, tmp_path, quick):
    explained(model, photos, tmp_path / "run", methods=("rise:masks=40",), targets=("predicted",), seed=1)
    for key, (_, _, found) in content(tmp_path / "run").items():
        assert np.abs(found - content(whole[0])[key][2]).max() > 0.01


def test_a_complete_run_is_left_as_it_is(whole, model, photos, capfd):
    out, _ = whole
    before = parts(out)
    summary = explained(model, photos, out, methods=METHODS, targets=TARGETS)
    assert (summary.exit_code, summary.rows, summary.computed, summary.deaths) == (0, 180, 0, 0)
    assert parts(out) == before
    assert capfd.readouterr() == ("", "")


def test_limit(model, photos, tmp_path, quick):
    assert explained(model, photos, tmp_path / "run", limit=5).rows == 5
    assert [row.row for row in open_run(tmp_path / "run").rows()] == [0, 1, 2, 3, 4]


def test_a_manifest_with_labels_boxes_and_more(model, photos, tmp_path, quick):
    lines = ["path,id,label,boxes,colour"]
    names = sorted(path.name for path in photos.glob("*.png"))[:4]
    for name, label in zip(names, ["2", "emu", "Great_White", "0"], strict=True):
        lines.append(f"{photos / name},{name}-id,{label},1 2 3 4;5 6 7 8,green")
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(lines))
    explained(model, manifest, tmp_path / "run", targets=("label", "predicted"))
    found = [(row.id, row.target_source, row.target, row.label_name) for row in open_run(tmp_path / "run").rows()]
    predicted = Explainer(model, method="cam").explain([photos / name for name in names]).predictions
    expected = []
    for name, target, guess in zip(names, [2, 4, 3, 0], predicted, strict=True):
        expected += [(f"{name}-id", "label", target, LABELS[target]), (f"{name}-id", "predicted", guess, LABELS[guess])]
    assert found == expected
    plan = pq.read_table(tmp_path / "run" / store.PLAN).to_pylist()
    assert [row["label"] for row in plan] == ["2", "emu", "Great_White", "0"]
    sides = [{"x0": 1, "y0": 2, "x1": 3, "y1": 4}, {"x0": 5, "y0": 6, "x1": 7, "y1": 8}]
    assert all(row["boxes"] == sides and json.loads(row["extra"]) == {"colour": "green"} for row in plan)


def test_it_runs_outside_the_main_thread(model, photos, tmp_path, quick):
    done = []
    thread = threading.Thread(target=lambda: done.append(explained(model, photos, tmp_path / "run")))
    thread.start()
    thread.join(PATIENCE)
    assert [summary.exit_code for summary in done] == [0]


# --- bad images ---------------------------------------------------------------------------------------------


def noise(height=40, width=50):
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_bad_images_are_rows_and_disturb_nobody(model, photos, whole, tmp_path, site, monkeypatch):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 4)
    folder = shutil.copytree(photos, tmp_path / "zoo")
    jpeg, png = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
    header = bytearray(png)
    header[16:24] = (30000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    bad = {
        "a-empty.jpg": (b"", "empty"),
        "a-half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "b-half.png": (png[: len(png) // 2], "truncated"),
        "page.jpg": (b"<html>no photograph</html>", "not_an_image"),
        "float.tiff": (encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "unsupported_mode"),
        "huge.png": (bytes(header), "too_large"),
        "sub/eats.png": (png + b"EATS MEMORY", "too_large"),
    }
    good = {
        "one.png": encoded(noise(1, 1), "PNG"),
        "strip.png": encoded(noise(1, 2000), "PNG"),
        "pole.png": encoded(noise(2000, 1), "PNG"),
        "grey.jpg": encoded(noise().convert("L"), "JPEG"),
        "cmyk.jpg": encoded(noise().convert("CMYK"), "JPEG"),
        "alpha.png": encoded(noise().convert("RGBA"), "PNG"),
        "palette.gif": encoded(noise().convert("P"), "GIF"),
        "no-jpeg.jpg": png,
    }
    for name, data in {**{name: data for name, (data, _) in bad.items()}, **good}.items():
        (folder / name).write_bytes(data)
    out = tmp_path / "run"
    summary = explained(model, folder, out, targets=("predicted", "top2", "2", "3"))
    assert (summary.exit_code, summary.images, summary.bad, summary.rows) == (3, 27, 7, 135)
    assert store.verify(out)["ok"] == 100
    rows = content(out)
    for name, (_, status) in bad.items():
        mine = [(key[2], *value) for key, value in rows.items() if key[0] == name]
        assert [source for source, *_ in mine] == ["predicted", "top1", "top2", "class", "class"]
        assert {fields["status"] for _, fields, _, _ in mine} == {status}
        assert all(fields["error"] and score is None and stored is None for _, fields, score, stored in mine)
        assert [fields["target"] for _, fields, _, _ in mine] == [None, None, None, 2, 3]
    assert {value[0]["status"] for key, value in rows.items() if key[0] in good} == {"ok"}
    others = {key: value for key, value in rows.items() if key[0] not in bad.keys() | good.keys()}
    expected = {key: value for key, value in content(whole[0]).items() if key[1] == "cam"}
    assert_same(others, expected, without=("row", "path"))
    assert explained(model, folder, out, targets=("predicted", "top2", "2", "3"), max_bad=0.3).exit_code == 0


def test_files_that_are_not_there(model, photos, tmp_path, quick):
    (tmp_path / "folder").mkdir()
    names = ["gone.png", "folder", str(photos / "photo0.png")]
    (tmp_path / "list.csv").write_text("\n".join(["uri", *names]))
    summary = explained(model, tmp_path / "list.csv", tmp_path / "run", max_bad=1)
    assert summary.exit_code == 0
    found = {row.id: row.status for row in open_run(tmp_path / "run").rows()}
    assert found == {"gone.png": "missing", "folder": "io_error", str(photos / "photo0.png"): "ok"}


def test_values_that_are_not_finite(save_model, photos, tmp_path, quick):
    """Scores divided by the picture's contrast: 0/0 for a black one."""
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight"], ["features"], name="conv"),
            helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("ReduceMax", ["input"], ["high"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("ReduceMin", ["input"], ["low"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Sub", ["high", "low"], ["contrast"]),
            helper.make_node("Unsqueeze", ["contrast", "one"], ["column"]),
            helper.make_node("Mul", ["flat", "column"], ["product"]),
            helper.make_node("Div", ["product", "column"], ["scores"]),
        ],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 33, 29])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 5])],
        [
            numpy_helper.from_array(np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32), "weight"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    path = save_model(tmp_path / "model.onnx", spec={"mean": [0.5] * 3, "std": [0.25] * 3})
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    folder = shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (50, 40)).save(folder / "black.png")
    for methods in (("rise:masks=8",), ("score-cam",)):
        out = tmp_path / methods[0][:4]
        summary = explained(path, folder, out, methods=methods, targets=("predicted", "top2", "3"), max_bad=1)
        assert summary.statuses == {"nonfinite": 4, "ok": 48}
        assert store.verify(out)["rows"] == 52
        black = [row for row in open_run(out).rows() if row.id == "black.png"]
        assert all(row.map is None and row.score is None and row.prediction_score is None for row in black)
        assert all(row.error == "the network gave a value that is not finite" for row in black)


# --- resume -------------------------------------------------------------------------------------------------


def test_the_plan_stays_when_files_change(model, photos, tmp_path, quick, monkeypatch, capfd):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 4)
    folder = shutil.copytree(photos, tmp_path / "photos")
    out = tmp_path / "run"
    explained(model, folder, out)
    before = content(out)
    (out / store.part_name(1)).unlink()
    ids = [key[0] for key in before]
    kept = parts(out)
    (folder / ids[4]).unlink()
    append(folder / ids[5], "longer")
    os.utime(folder / ids[6], ns=(1, 1))
    (folder / ids[0]).unlink()
    (folder / "new.png").write_bytes((folder / ids[1]).read_bytes())
    summary = jobs.explain(Job(model=model, inputs=(folder,), out=out, methods=("cam",), max_bad=1))
    assert (summary.images, summary.computed) == (12, 1)
    told = capfd.readouterr().err
    assert "note: the input now has 1 new images, 2 images fewer; this run keeps its own plan\n" in told
    assert kept.items() <= parts(out).items()
    after = content(out)
    assert list(after) == list(before)
    assert [after[key][0]["status"] for key in list(after)[4:8]] == ["missing", "changed", "changed", "ok"]
    untouched = [key for key in before if key[0] not in ids[4:7]]
    assert_same({key: after[key] for key in untouched}, {key: before[key] for key in untouched})


def test_changed_labels_and_versions_are_noted(model, photos, tmp_path, quick, capfd):
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"uri,label\n{photos / 'photo0.png'},2\n")
    job = Job(model=model, inputs=(manifest,), out=tmp_path / "run", methods=("cam",), targets=("label",))
    jobs.explain(job, "quiet")
    manifest.write_text(f"uri,label\n{photos / 'photo0.png'},3\n")
    said = json.loads((job.out / "run.json").read_text())
    said["versions"] |= {"numpy": "1.2.3", "backend": "0.0.1"}
    (job.out / "run.json").write_text(json.dumps(said))
    (job.out / store.part_name(0)).unlink()
    assert jobs.explain(job).exit_code == 0
    told = capfd.readouterr().err
    assert "note: the input now has 1 other labels; this run keeps its own plan\n" in told
    assert f"note: the run began with numpy 1.2.3, {np.__version__} goes on\n" in told
    assert f"note: the run began with onnxruntime 0.0.1, {quick.version} goes on\n" in told
    assert [row.target for row in open_run(job.out).rows()] == [2]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"seed": 3}, "--seed: 0 in the run, 3 asked"),
        ({"methods": ("score-cam",)}, "--method: [{'name': 'cam'}] in the run, [{'name': 'score-cam', "),
        ({"targets": ("top2", "cat")}, "--target: ['predicted'] in the run, ['top2', '2'] asked"),
        ({"limit": 3}, "--limit: None in the run, 3 asked"),
        ({"batch_size": 3}, "--batch-size: auto in the run, 3 asked"),
        ({"precision": "fp32"}, "--precision: auto in the run, fp32 asked"),
        ({"layer": "r1", "methods": ("score-cam",)}, "--layer: features in the run, r1 asked"),
        ({"preprocess": "imagenet"}, "spec mean: [0.5, 0.45, 0.4] in the run, [0.485, 0.456, 0.406] asked"),
    ],
)
def test_other_settings_are_refused(whole, model, photos, tmp_path, other, told):
    out = tmp_path / "run"
    if not (whole[0].parent / "cam").exists():
        explained(model, photos, whole[0].parent / "cam")
    shutil.copytree(whole[0].parent / "cam", out)
    before = parts(out)
    with pytest.raises(RunError) as refused:
        explained(model, photos, out, **other)
    assert exit_code(refused) == 5
    assert told in one_line(refused)
    assert "--overwrite" in one_line(refused)
    assert parts(out) == before


def test_another_model_or_version_is_refused(save_model, photos, tmp_path, quick, monkeypatch):
    model, out = save_model(tmp_path / "model.onnx"), tmp_path / "run"
    explained(model, photos, out)
    old = json.loads((out / "run.json").read_text())["model"]["sha256"]
    moved = shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("run", "moved"))
    (out / store.part_name(0)).unlink()
    model.unlink()
    assert explained(moved / "model.onnx", photos, out).exit_code == 0
    save_model(model, seed=5)
    with pytest.raises(RunError, match=f"model: {old[:57]}... in the run, ") as refused:
        explained(model, photos, out)
    assert exit_code(refused) == 5
    monkeypatch.setattr(plans, "__version__", "9.9.9")
    with pytest.raises(RunError, match=r"heatmill: 0\.1 in the run, 9\.9 asked"):
        explained(moved / "model.onnx", photos, out)


def test_a_model_that_is_changed_while_it_runs(save_model, photos, tmp_path, quick, monkeypatch):
    model = save_model(tmp_path / "model.onnx")
    begin = jobs._begin

    def change(*arguments):
        begin(*arguments)
        save_model(model, seed=5)

    monkeypatch.setattr(jobs, "_begin", change)
    with pytest.raises(RunError, match="the file has changed since the run began"):
        explained(model, photos, tmp_path / "run")
    assert store.verify(tmp_path / "run")["rows"] == 0


def test_a_damaged_part_is_named_on_resume(whole, model, photos, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    part = out / store.part_name(0)
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError) as refused:
        explained(model, photos, out, methods=METHODS, targets=TARGETS)
    assert f"{part}: damaged" in one_line(refused)
    part.unlink()
    assert explained(model, photos, out, methods=METHODS, targets=TARGETS).exit_code == 0
    assert part.read_bytes() == data


# --- the run's folder ---------------------------------------------------------------------------------------


def test_overwrite(whole, save_model, model, photos, tmp_path, quick):
    out = shutil.copytree(whole[0], tmp_path / "run")
    (out / "report").mkdir()
    (out / "report" / "index.html").touch()
    with pytest.raises(InputError):
        explained(model, photos, out, targets=("no such class",), overwrite=True)
    assert_same(content(out), content(whole[0]))
    (out / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds 'notes.txt' besides the run"):
        explained(model, photos, out, overwrite=True)
    (out / "notes.txt").unlink()
    assert explained(model, photos, out, overwrite=True).rows == 12
    assert {key[1] for key in content(out)} == {"cam"}
    assert not (out / "report").exists()
    (out / "run.json").write_text("{")
    with pytest.raises(RunError):
        explained(model, photos, out)
    assert explained(model, photos, out, overwrite=True).rows == 12
    assert explained(model, photos, tmp_path / "fresh", overwrite=True).rows == 12


def test_parts_without_their_run_are_not_taken_for_ours(whole, model, photos, tmp_path, quick):
    out = shutil.copytree(whole[0], tmp_path / "run")
    for name in ("run.json", "summary.json"):
        (out / name).unlink()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds 'data/part-000000.parquet' and is not a run"):
            explained(model, photos, out, overwrite=overwrite)


def test_a_call_killed_before_it_wrote_run_json_leaves_no_obstacle(model, photos, tmp_path, quick):
    out = tmp_path / "run"
    (out / "data").mkdir(parents=True)
    (out / "_tmp").mkdir()
    (out / "_tmp" / "run.json.123").write_text("{")
    store.commit(out, store.PLAN, b"half a thought")
    assert explained(model, photos, out).exit_code == 0
    assert os.listdir(out / "_tmp") == ["lock"]


def test_one_process_per_run(whole, model, photos, tmp_path, quick, monkeypatch):
    out = shutil.copytree(whole[0], tmp_path / "run")
    with (out / "_tmp" / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another heatmill is at work on this run"):
            explained(model, photos, out, methods=METHODS, targets=TARGETS)
        with pytest.raises(InputError, match="another heatmill is at work on this run"):
            explained(model, photos, out, overwrite=True)
    assert_same(content(out), content(whole[0]))

    def meanwhile(*arguments):
        shutil.copytree(whole[0], tmp_path / "other")
        return quick

    monkeypatch.setattr(jobs, "probe_job", meanwhile)
    with pytest.raises(InputError, match="another heatmill has just made a run there"):
        explained(model, photos, tmp_path / "other")
    assert_same(content(tmp_path / "other"), content(whole[0]))


def test_a_file_system_without_locks(model, photos, tmp_path, quick, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert explained(model, photos, tmp_path / "run").exit_code == 0


# --- targets that only the running model shows to be wrong ---------------------------------------------------


def test_classes_that_the_file_leaves_open(save_model, photos, tmp_path):
    """As many scores as the linear layer has, which the file's shapes do not say."""
    path = save_model(tmp_path / "model.onnx", spec={"label_names": []})
    proto = onnx.load(path)
    constants = [numpy_helper.from_array(np.int64(value), name) for name, value in (("zero", 0), ("one", 1))]
    proto.graph.initializer.extend(constants)
    proto.graph.node.extend(
        [
            helper.make_node("Shape", ["logits"], ["shape"], start=1),
            helper.make_node("Squeeze", ["shape"], ["count"]),
            helper.make_node("Range", ["zero", "count", "one"], ["classes"]),
            helper.make_node("Gather", ["logits", "classes"], ["scores"], axis=1),
        ]
    )
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "classes"]))
    onnx.save(proto, path)
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"uri,label\n{photos / 'photo0.png'},7\n")
    for target, told in (
        ("top6", "target 'top6': the model has 5 classes"),
        ("5", "class 5 is out of range: the model has classes 0 to 4"),
        ("label", "class 7; the model has classes 0 to 4"),
    ):
        with pytest.raises(InputError) as refused:
            explained(path, manifest, tmp_path / "run", methods=("rise:masks=4",), targets=(target,))
        assert told in one_line(refused)
    assert not (tmp_path / "run").exists()
    assert explained(path, manifest, tmp_path / "run", methods=("rise:masks=4",), targets=("top5", "4")).rows == 6


# --- workers that die ---------------------------------------------------------------------------------------


@pytest.fixture
def slow(model, photos, tmp_path):
    """Pictures of which each takes a while to decode."""
    folder = shutil.copytree(photos, tmp_path / "slow")
    for path in folder.rglob("*.png"):
        append(path, "IS SLOW")
    return folder


def without_paths(rows):
    return {key: ({**fields, "path": None}, score, stored) for key, (fields, score, stored) in rows.items()}


@pytest.fixture(scope="module")
def calm(model, photos, tmp_path_factory):
    """The rows of an undisturbed run, to compare with."""
    out = tmp_path_factory.mktemp("calm") / "run"
    explained(model, photos, out)
    return without_paths(content(out))


def deaths(run):
    lines = [json.loads(line) for path in (run / "events").iterdir() for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == "death"]


@pytest.mark.parametrize("devices", [(), (0, 1)])
def test_an_image_that_kills_the_worker(model, photos, tmp_path, site, quick, monkeypatch, calm, devices):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 2)
    folder = shutil.copytree(photos, tmp_path / "photos")
    append(folder / "photo4.png", "KILLS")
    out = tmp_path / "run"
    summary = explained(model, folder, out, max_bad=1, devices=devices)
    assert (summary.deaths, summary.statuses) == (3, {"ok": 11, "worker_crash": 1})
    assert [len(death["rows"]) for death in deaths(out)][1:] == [1, 1]
    assert store.verify(out)["rows"] == 12
    rows = without_paths(content(out))
    (poisoned,) = [key for key in rows if key[0] == "photo4.png"]
    fields, score, stored = rows.pop(poisoned)
    assert (fields["status"], score, stored) == ("worker_crash", None, None)
    assert fields["error"] == "the image killed the worker twice"
    assert_same(rows, {key: value for key, value in calm.items() if key != poisoned})


def test_an_image_that_hangs(model, photos, tmp_path, site, quick, monkeypatch, capfd):
    idle = worker.Marks.idle_seconds.fget
    monkeypatch.setattr(worker.Marks, "idle_seconds", property(lambda marks: idle(marks) if marks.rows() else 0))
    monkeypatch.setattr(jobs, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 4)
    folder = shutil.copytree(photos, tmp_path / "photos")
    append(folder / "sub" / "photo5.png", "HANGS")
    summary = jobs.explain(Job(model=model, inputs=(folder,), out=tmp_path / "run", methods=("cam",), max_bad=1))
    assert summary.statuses == {"ok": 11, "worker_crash": 1}
    assert 3 <= summary.deaths <= 5  # a busy machine may stall an innocent image as long, once
    assert capfd.readouterr().err.count("the worker got nothing done for 1 s; ending it\n") == summary.deaths


def test_the_death_budget_ends_a_call_and_the_next_goes_on(model, photos, tmp_path, site, quick, monkeypatch):
    monkeypatch.setattr(jobs, "DEATH_BUDGET", 3)
    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("photo4.png", "sub/photo7.png"):
        append(folder / name, "KILLS")
    out = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(IncompleteError, match="the worker died 3 times, last killed by SIGKILL") as stopped:
            explained(model, folder, out, max_bad=1)
        assert exit_code(stopped) == 4
        assert store.verify(out)["committed"] == 0
    summary = explained(model, folder, out, max_bad=1)
    assert summary.deaths == 0
    assert summary.statuses == {"ok": 10, "worker_crash": 2}


def test_a_worker_that_cannot_start_is_not_tried_for_ever(model, photos, tmp_path, quick, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys, os\nfrom heatmill.engine import opening\nopening.open_best = lambda *a, **k: os._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(IncompleteError, match="the worker died 3 times, last exit code 9"):
        explained(model, photos, tmp_path / "run")


def test_a_worker_killed_between_a_commit_and_its_message(model, photos, tmp_path, site, quick, monkeypatch, calm):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 4)
    out = tmp_path / "run"
    (tmp_path / "run.kills-once").touch()
    seen = {}
    died = jobs.Supervisor._died

    def watch(self, *arguments):
        seen.update(parts(out))
        return died(self, *arguments)

    monkeypatch.setattr(jobs.Supervisor, "_died", watch)
    summary = explained(model, photos, out)
    assert (summary.deaths, summary.exit_code) == (1, 0)
    assert len(seen) == 1
    assert seen.items() <= parts(out).items()
    assert_same(without_paths(content(out)), calm)


@pytest.mark.parametrize(("devices", "runs"), [((), 2), ((0, 1), 1)])
def test_a_device_lost_in_the_middle_leaves_a_run_that_resumes(
    model, photos, tmp_path, quick, monkeypatch, calm, devices, runs
):
    monkeypatch.setattr(plans, "MAX_SHARD_ROWS", 2)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LOST.replace("[2]", f"[{runs}]"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "site"))
        with pytest.raises(IncompleteError, match="the GPU's driver failed: 719; the same command resumes") as lost:
            explained(model, photos, tmp_path / "run", devices=devices)
    assert exit_code(lost) == 4
    done = store.verify(tmp_path / "run")["committed"]
    assert done == (4 if runs == 2 else 0)
    summary = explained(model, photos, tmp_path / "run")
    assert (summary.exit_code, summary.computed) == (0, 6 - done)
    assert_same(without_paths(content(tmp_path / "run")), calm)


def test_a_bug_in_the_worker_is_told_with_its_traceback(model, photos, tmp_path, site, quick):
    folder = shutil.copytree(photos, tmp_path / "photos")
    append(folder / "photo4.png", "FINDS A BUG")
    with pytest.raises(jobs.Failed) as failed:
        explained(model, folder, tmp_path / "run")
    assert str(failed.value) == "RuntimeError: a bug of ours"
    assert "in hostile" in failed.value.__notes__[0]


# --- the command in a process of its own ----------------------------------------------------------------------


class Command:
    """`heatmill explain` in a session of its own, with batches and shards of 2 images."""

    def __init__(self, model, folder, out, *flags, probe="quick"):
        self.out = out
        fixed = ["-m", "cam", "--batch-size", "2", "--workers", "1"]
        arguments = ["explain", model, folder, "-o", out, *fixed, *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, probe, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def until(self, check):
        """Waits for `check`; tells whether the command still ran then."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if check():
                return True
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return False

    def committed(self):
        return len(store.committed(self.out))

    def others(self):
        """What else lives in its session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return [process for process in found if process.pid != self.process.pid]

    def worker(self):
        """Its newest spawned child."""
        spawned = [child for child in self.others() if "spawn_main" in " ".join(child.cmdline())]
        return max(spawned, key=lambda child: child.create_time())

    def end(self):
        """Exit code, stdout and stderr, when nothing of it is left."""
        out, err = self.process.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.others():
            assert time.monotonic() < deadline, self.others()
            time.sleep(0.02)
        return self.process.returncode, out.decode(), err.decode()

    def kill(self):
        self.process.kill()
        return self.end()


@pytest.fixture
def start():
    """start(...) -> `Command`; what a failed test leaves is killed."""
    commands = []

    def make(*arguments, **options):
        commands.append(Command(*arguments, **options))
        return commands[-1]

    yield make
    for command in commands:
        with command.process:
            for process in [command.process, *command.others()]:
                process.kill()


def assert_unharmed(run, before):
    """What was committed is as it was, and what is committed now is sound."""
    if not (run / "run.json").exists():
        assert not (run / "data").exists() or not os.listdir(run / "data")
        return {}
    store.verify(run)
    now = parts(run)
    assert before.items() <= now.items()
    return now


def killed_and_resumed(start, model, folder, out, kills, span, expected, images):
    rng = random.Random(4)
    before = {}
    for _ in range(kills):
        command = start(model, folder, out, "--workers", "2", "--quiet", probe="real")
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(rng.uniform(0.1, span))
        command.kill()
        before = assert_unharmed(out, before)
    command = start(model, folder, out, "--workers", "2", "--json")
    code, told, _ = command.end()
    assert code == 0
    assert json.loads(told)["statuses"] == {"ok": images}
    assert_unharmed(out, before)
    assert store.verify(out)["committed"] == images // 2
    assert os.listdir(out / "_tmp") == ["lock"]
    assert_same(without_paths(content(out)), expected)


def test_kill_at_random_moments_and_resume(start, model, slow, tmp_path, site, calm):
    killed_and_resumed(start, model, slow, tmp_path / "run", 3, 2.0, calm, 12)


@pytest.mark.slow
def test_twenty_kills_over_sixty_images(start, model, save_photographs, tmp_path, site):
    folder = save_photographs(tmp_path / "photos", 60)
    explained(model, folder, tmp_path / "calm")
    expected = content(tmp_path / "calm")
    for path in folder.rglob("*.png"):
        time_ns = path.stat().st_mtime_ns
        append(path, "IS SLOW")
        os.utime(path, ns=(time_ns, time_ns))
    killed_and_resumed(start, model, folder, tmp_path / "run", 20, 3.5, without_paths(expected), 60)


def test_kill_of_the_worker_only(start, model, slow, tmp_path, site, calm):
    command = start(model, slow, tmp_path / "run")
    assert command.until(lambda: command.committed() >= 2)
    before = parts(tmp_path / "run")
    command.worker().kill()
    code, told, noted = command.end()
    assert (code, "12 of 12 maps" in told) == (0, True)
    assert "the worker died (killed by SIGKILL, " in noted
    assert before.items() <= parts(tmp_path / "run").items()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["deaths"] == 1
    assert_same(without_paths(content(tmp_path / "run")), calm)


@pytest.mark.parametrize(
    ("send", "number", "code", "told"),
    [
        (os.kill, signal.SIGTERM, 4, "stopped by SIGTERM; the same command resumes"),
        (os.kill, signal.SIGUSR1, 4, "stopped by SIGUSR1; the same command resumes"),
        (os.killpg, signal.SIGTERM, 4, "stopped by SIGTERM; the same command resumes"),
        (os.killpg, signal.SIGINT, 130, "interrupted; the same command resumes"),
    ],
)
def test_a_signal_ends_a_run_after_the_batch(start, model, slow, tmp_path, site, send, number, code, told):
    out = tmp_path / "run"
    command = start(model, slow, out)
    assert command.until(lambda: command.committed() >= 1)
    send(command.process.pid, number)
    assert command.end() == (code, "", f"heatmill: {out}: {told}\n")
    assert os.listdir(out / "_tmp") == ["lock"]
    counts = store.verify(out)
    assert 0 < counts["committed"] < counts["shards"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start, model, photos, tmp_path, site, number):
    folder = shutil.copytree(photos, tmp_path / "photos")
    append(folder / "photo8.png", "HANGS")
    command = start(model, folder, tmp_path / "run")
    assert command.until(lambda: command.committed() >= 1)
    command.process.send_signal(number)
    time.sleep(0.5)
    command.process.send_signal(number)
    code, told, noted = command.end()
    assert (code, told, noted.count("\n")) == (4 if number == signal.SIGTERM else 130, "", 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_tried(start, model, photos, tmp_path, monkeypatch, number):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import time, sys\n"
        "if '--multiprocessing-fork' in sys.argv:\n"
        "    from heatmill.engine import opening\n"
        "    opening.load = lambda **arguments: time.sleep(1000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    command = start(model, photos, tmp_path / "run", probe="real")
    assert command.until(lambda: any("spawn_main" in " ".join(child.cmdline()) for child in command.others()))
    time.sleep(0.3)
    os.killpg(command.process.pid, number)
    code, told, noted = command.end()
    assert (code, told) == (4 if number == signal.SIGTERM else 130, "")
    assert noted.startswith(f"heatmill: {tmp_path / 'run'}: ")
    assert noted.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- no space -----------------------------------------------------------------------------------------------


def test_no_space_by_a_limit_of_file_sizes(start, model, photos, tmp_path, monkeypatch, calm):
    """Parts of RISE maps are too large for the worker."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "if '--multiprocessing-fork' in sys.argv:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    out = tmp_path / "run"
    flags = ("-m", "rise:masks=8", "-t", "top5", "-t", "0", "-t", "1")
    command = start(model, photos, out, *flags)
    code, told, noted = command.end()
    assert (code, told) == (4, "")
    assert noted == f"heatmill: {out}: no space is left; everything committed is kept, the same command resumes\n"
    assert os.listdir(out / "data") == []
    assert os.listdir(out / "_tmp") == ["lock"]
    monkeypatch.delenv("PYTHONPATH")
    code, *_ = start(model, photos, out, *flags).end()
    assert code == 0
    assert store.verify(out)["ok"] == 12 * 2 * 7
    assert_same(
        {key: value for key, value in without_paths(content(out)).items() if key[1:3] == ("cam", "top1")},
        {(key[0], "cam", "top1", None): value for key, value in calm.items()},
    )


@pytest.fixture
def disk(tmp_path):
    """A file system of 400 kB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk, leave):
    space = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - leave))


def test_a_full_disk(start, model, slow, tmp_path, site, disk, calm):
    out = disk / "run"
    fill(disk, 0)
    command = start(model, slow, out)
    code, told, noted = command.end()
    assert (code, told, noted.count("\n")) == (4, "", 1)
    (disk / "ballast").unlink()
    shutil.rmtree(out, ignore_errors=True)
    fill(disk, 80_000)
    code, told, noted = start(model, slow, out).end()
    assert (code, told) == (4, "")
    assert noted == f"heatmill: {out}: no space is left; everything committed is kept, the same command resumes\n"
    counts = store.verify(out)
    assert 0 < counts["committed"] < counts["shards"]
    assert os.listdir(out / "_tmp") == ["lock"]
    before = parts(out)
    (disk / "ballast").unlink()
    code, *_ = start(model, slow, out).end()
    assert code == 0
    assert before.items() <= parts(out).items()
    assert_same(without_paths(content(out)), calm)


def test_a_read_only_disk(whole, model, photos, disk, quick):
    out = shutil.copytree(whole[0], disk / "run")
    (out / store.part_name(0)).unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(InputError, match="can't be written") as refused:
        explained(model, photos, disk / "new")
    assert exit_code(refused) == 2
    with pytest.raises(IncompleteError, match="make it writable, then the same command resumes") as stopped:
        explained(model, photos, out, methods=METHODS, targets=TARGETS)
    assert exit_code(stopped) == 4


# --- small parts --------------------------------------------------------------------------------------------


def test_shards_are_about_a_minute(whole, model, photos):
    loaded, source, targets = plans.open_job(Job(model=model, inputs=(photos,), out=Path("run"), methods=("cam",)))
    several = plans.open_job(Job(model=model, inputs=(photos,), out=Path("run"), targets=("top3",), methods=("cam",)))
    for speed, images, of_several in ((0.001, 1, 1), (1, 32, 32), (2.2, 128, 128), (1e6, 4096, 1024)):
        known = Trial("onnxruntime", "cpu", "fp32", "1", 8, True, 5, speed)
        job = Job(model=model, inputs=(photos,), out=Path("run"))
        plan = plans.freeze(job, loaded, source, targets, known)
        assert plan.shard_rows == images
        assert plans.freeze(job, *several, known).shard_rows == of_several
        covered = [row for shard in plan.shards for row in plan.rows(shard)]
        assert covered == list(range(12))


def test_marks_outlive_a_worker():
    marks = worker.Marks(multiprocessing.get_context("spawn"))
    for row in range(10_000):
        marks.add(row)
    for row in range(9_998):
        marks.remove(row)
    assert marks.rows() == [9_998, 9_999]
    assert not marks.stopping
    marks.stop()
    assert marks.stopping


def test_the_footer_explains_a_part(whole):
    footer = json.loads(pq.read_schema(whole[0] / store.part_name(0)).metadata[b"heatmill"])
    said = json.loads((whole[0] / "run.json").read_text())
    assert footer["model"] == said["model"]["sha256"]
    assert footer["upsample"] == "linear / half_pixel / edge-clamped"
    assert [method["call"] for method in footer["methods"]] == list(METHODS)
    same = ("plan_hash", "backend", "provider", "precision", "seed", "versions", "layer")
    assert {name: footer[name] for name in same} == {name: said[name] for name in same}
    table = pq.read_table(whole[0] / store.part_name(0))
    assert table.schema.field("map").type == pa.list_(pa.float32(), int(np.prod(said["grid"])))
