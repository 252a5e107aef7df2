"""Exports of runs made by hand: crops and erasures against slow readings, and every format as its readers have it."""

import csv
import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatmill import IncompleteError, InputError
from heatmill.engine.jobs import exports
from heatmill.engine.jobs.exports import EXPORTS, Export, export, virelay
from heatmill.engine.jobs.exports.augment import erase, salient_box, strength
from heatmill.engine.jobs.exports.base import Options, in_threads
from heatmill.engine.jobs.sources import list_source
from heatmill.models.preprocess import view
from heatmill.models.spec import ModelSpec
from tests.jobs.test_report import HOSTILE, RAW, Builder, picture

VIEW = (10.0, 0.0, 50.0, 40.0)


@pytest.fixture
def builder(tmp_path):
    return Builder(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def textured(builder, size=(60, 40)):
    """A photograph of noise, as the next image's."""
    path = builder.folder / f"photographs/{len(builder.images)}.png"
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(len(builder.images)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def lines_of(folder):
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def left_behind(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


# --- the salient region -------------------------------------------------------------------------------------------


def test_strength_is_a_share_of_the_greatest_value():
    np.testing.assert_allclose(strength(np.array([[2.0, 4.0], [3.0, 6.0]])), [[0, 0.5], [0.25, 1]])
    np.testing.assert_allclose(strength(np.array([[-8.0, 4.0], [0.0, 2.0]])), [[0, 1], [0, 0.5]])
    assert strength(np.full((2, 2), 0.7)) is None
    assert strength(np.zeros((2, 2))) is None
    assert strength(np.array([[-1.0, 0.0]])) is None


@pytest.mark.parametrize("padding", [0, 0.1, 5])
@pytest.mark.parametrize("view", [(10.0, 0.0, 50.0, 40.0), (-3.3, -10.0, 63.1, 50.0), (0.2, 0.3, 59.9, 39.4)])
def test_the_box_goes_around_every_place_above_the_threshold(view, padding):
    rng = np.random.default_rng(1)
    for threshold in (0.5, 0.9, 1.0):
        levels = rng.random((7, 9)) ** 3
        levels /= levels.max()
        x0, y0, x1, y1 = 1e9, 1e9, -1e9, -1e9
        for i in range(7):
            for j in range(9):
                if levels[i, j] >= threshold:
                    x0 = min(x0, view[0] + j * (view[2] - view[0]) / 9)
                    x1 = max(x1, view[0] + (j + 1) * (view[2] - view[0]) / 9)
                    y0 = min(y0, view[1] + i * (view[3] - view[1]) / 7)
                    y1 = max(y1, view[1] + (i + 1) * (view[3] - view[1]) / 7)
        more_x, more_y = padding * (x1 - x0), padding * (y1 - y0)
        found = salient_box(levels, threshold, padding, view, (60, 40))
        exact = (x0 - more_x, y0 - more_y, x1 + more_x, y1 + more_y)
        assert 0 <= found[0] <= found[2] <= 60
        assert 0 <= found[1] <= found[3] <= 40
        for side, edge, most, outward in zip(found, exact, (60, 40, 60, 40), (-1, -1, 1, 1), strict=True):
            assert side == min(max(edge, 0), most) or 0 <= outward * (side - min(max(edge, 0), most)) < 1


def slow_erase(photograph, levels, threshold, view, color):
    """Pixel by pixel: bilinear with half-pixel centres, edges clamped, and only where the map lies."""
    erased = photograph.copy()
    h, w = levels.shape
    for i in range(photograph.shape[0]):
        for j in range(photograph.shape[1]):
            y = (i + 0.5 - view[1]) / (view[3] - view[1]) * h - 0.5
            x = (j + 0.5 - view[0]) / (view[2] - view[0]) * w - 0.5
            if not (-0.5 <= y < h - 0.5 and -0.5 <= x < w - 0.5):
                continue
            y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
            i0, j0 = int(y), int(x)
            i1, j1 = min(i0 + 1, h - 1), min(j0 + 1, w - 1)
            dy, dx = y - i0, x - j0
            top = levels[i0, j0] * (1 - dx) + levels[i0, j1] * dx
            bottom = levels[i1, j0] * (1 - dx) + levels[i1, j1] * dx
            if top * (1 - dy) + bottom * dy >= threshold:
                erased[i, j] = color
    return erased


@pytest.mark.parametrize("strip", [1, 7, 256])
def test_erasing_pixel_by_pixel(monkeypatch, strip):
    monkeypatch.setattr(exports.augment, "STRIP", strip)
    rng = np.random.default_rng(2)
    photograph = rng.integers(0, 200, (23, 31, 3), np.uint8)
    levels = rng.random((5, 4))
    for box in ((4.2, -3.0, 27.9, 20.7), (-5.0, -5.0, 36.0, 28.0)):
        found, share = erase(photograph, levels, 0.5, box, np.array([255, 250, 251], np.uint8))
        expected = slow_erase(photograph, levels, 0.5, box, (255, 250, 251))
        different = (found != expected).any(axis=2)
        assert different.sum() <= 1  # a pixel that lies on the threshold to rounding
        assert share == pytest.approx((expected[..., 0] == 255).mean(), abs=2 / found[..., 0].size)
        assert 0.05 < share < 0.95


# --- crops and erasures -------------------------------------------------------------------------------------------


def test_crops_are_cut_from_the_whole_photograph(builder, out):
    """The map is 3 at the lower right of the view: half of it is reached 3/8 of a cell before its centre."""
    run = builder.image("a/b.jpg", textured(builder)).add(RAW).open()
    assert export(run, "crops", out, Options(format="png", padding=0.0)) == {
        "out": str(out), "kind": "crops", "written": 1, "skipped": {}
    }  # fmt: skip
    (line,) = lines_of(out)
    row = next(run.rows())
    levels = strength(row.saliency())
    rows, columns = np.nonzero(levels >= 0.5)
    assert levels.shape == (8, 8)
    box = [10 + 5 * columns.min(), 5 * rows.min(), 10 + 5 * (columns.max() + 1), 5 * (rows.max() + 1)]
    assert line["region"] == " ".join(map(str, box))
    x0, y0, x1, y1 = box
    np.testing.assert_array_equal(pixels(out / line["uri"]), pixels(row.path)[y0:y1, x0:x1])
    assert (line["source_id"], line["source_uri"], line["method"]) == ("a/b.jpg", row.path, "cam")
    assert (line["explained"], line["explained_name"], line["asked"], line["view"]) == (
        "0", "cat", "predicted", "10 0 50 40"
    )  # fmt: skip
    facts = json.loads((out / "export.json").read_text())
    assert (facts["kind"], facts["options"]["padding"], facts["run"]) == ("crops", 0.0, str(builder.path))


@pytest.mark.parametrize("fill", ["mean", "black", "blur", None])
def test_erasures_keep_what_the_map_did_not_mark(builder, out, fill):
    run = builder.image("a", textured(builder)).add(RAW).open()
    export(run, "erased", out, Options(format="png", fill=fill, threshold=0.25))
    (line,) = lines_of(out)
    row = next(run.rows())
    before, after = pixels(row.path), pixels(out / line["uri"])
    marked = (slow_erase(np.zeros((40, 60, 1)), strength(row.saliency()), 0.25, VIEW, 1) == 1)[..., 0]
    assert float(line["erased"]) == pytest.approx(marked.mean(), abs=1e-3)
    np.testing.assert_array_equal(after[~marked], before[~marked])
    if fill == "blur":
        assert 0 < np.ptp(after[marked].astype(int)) < 120 < np.ptp(before[marked].astype(int))
    else:
        assert (after[marked] == (0 if fill == "black" else 128)).all()


def test_the_manifest_is_a_source_with_labels_and_boxes_of_the_new_pictures(builder, out):
    for identity in ("a", "b", "c"):
        builder.image(identity, textured(builder)).add(np.array([[0, 0], [0, 1]]))
    boxes = [(0, 0, 5, 5), (20, 10, 60, 40), (30.5, 20, 45, 39)]
    builder.images[0] |= {"label": "dog", "boxes": [dict(zip(("x0", "y0", "x1", "y1"), b, strict=True)) for b in boxes]}
    builder.images[1] |= {"label": "crane 3", "boxes": None}
    builder.images[2] |= {"label": None, "boxes": None}
    run = builder.open()
    export(run, "crops", out, Options(padding=0.0, threshold=0.6))
    table = list_source([out / "manifest.csv"]).table
    x0, y0, x1, y1 = map(int, lines_of(out)[0]["region"].split())
    assert 25 < x0 < 45
    assert (x1, y1) == (50, 40)
    assert table["label"].to_pylist() == ["dog", "crane 3", None]
    expected = [(0, 0, 50 - x0, 40 - y0), (max(30.5 - x0, 0), max(20 - y0, 0), 45 - x0, 39 - y0)]
    np.testing.assert_allclose([tuple(box.values()) for box in table["boxes"][0].as_py()], expected)
    assert table["boxes"].to_pylist()[1:] == [None, None]
    for uri, size in zip(table["uri"].to_pylist(), table["size"].to_pylist(), strict=True):
        assert Path(uri).stat().st_size == size
        assert Image.open(uri).format == "JPEG"
    export(run, "erased", out.with_name("erased"), Options())
    again = list_source([out.with_name("erased") / "manifest.csv"]).table
    assert [tuple(box.values()) for box in again["boxes"][0].as_py()] == boxes


def test_an_upright_photograph_is_cropped(builder, out, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    stored = np.zeros((20, 40, 3), np.uint8)
    stored[:, 30:] = 255
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    builder.image("a", tmp_path / "turned.png")
    run = builder.add(np.array([[0, 0], [1, 1]]), width=20, height=40, crop_box=(0, 0, 20, 40)).open()
    export(run, "crops", out, Options(format="png", padding=0.0, threshold=0.99))
    (line,) = lines_of(out)
    assert line["region"] == "0 30 20 40"
    assert pixels(out / line["uri"]).shape == (10, 20, 3)
    assert (pixels(out / line["uri"]) == 255).all()


@pytest.mark.parametrize("kind", ["crops", "erased"])
def test_what_can_not_be_cut_is_counted_by_its_reason(builder, out, kind):
    builder.image("flat", textured(builder)).add(np.full((2, 2), 0.5))
    builder.image("bad", textured(builder)).add(None, status="truncated")
    builder.image("gone", textured(builder)).add(RAW)
    builder.image("changed", textured(builder)).add(RAW).add(RAW, target=1)
    corner = np.zeros((2, 2))
    corner[0] = 1
    builder.image("padded", textured(builder)).add(corner, crop_box=(0, -40, 60, 40))
    builder.image("good", textured(builder)).add(RAW)
    run = builder.open()
    Path(builder.images[2]["uri"]).unlink()
    os.utime(builder.images[3]["uri"], ns=(1, 1))
    found = export(run, kind, out, Options(threshold=0.99, padding=0.0 if kind == "crops" else None))
    assert found["written"] == 1
    assert found["skipped"] == {
        "flat map": 1, "truncated": 1, "photograph missing": 1, "photograph changed": 2, "beside the photograph": 1
    }  # fmt: skip
    assert [line["source_id"] for line in lines_of(out)] == ["good"]
    assert "  not written: 2 photograph changed\n" in exports.export_text(found)


def test_a_picture_that_jpeg_can_not_hold(builder, out):
    run = builder.image("a", picture(builder.folder / "long.png", (66000, 2)))
    builder.add(np.array([[0, 0], [1, 1]]), width=66000, height=2, crop_box=(0, 0, 66000, 2))
    with pytest.raises(InputError, match="1 longer than the 65500 pixels of a JPEG"):
        export(run.open(), "crops", out, Options())
    assert export(run.open(), "crops", out, Options(format="png"))["written"] == 1


def test_hostile_names_stay_in_the_folder_and_come_back(builder, out):
    for identity in HOSTILE:
        builder.image(identity, textured(builder)).add(RAW)
    run = builder.open()
    export(run, "crops", out, Options())
    assert [line["source_id"] for line in lines_of(out)] == HOSTILE
    assert len({line["uri"] for line in lines_of(out)}) == len(HOSTILE)
    assert all((out / line["uri"]).resolve().is_relative_to(out / "images") for line in lines_of(out))
    assert len(list_source([out / "manifest.csv"]).table) == len(HOSTILE)


# --- arrays and pictures ------------------------------------------------------------------------------------------


def test_npy_holds_the_raw_maps_by_method(builder, out):
    rng = np.random.default_rng(3)
    builder.methods, builder.rows_per_image = ["cam", "score-cam:variant=paper"], 2
    maps = rng.normal(size=(5, 2, 2, 2)).astype(np.float32)
    for i in range(5):
        builder.image(f"{i}").add(maps[i, 0], method="cam").add(maps[i, 1], method="score-cam:variant=paper")
    run = builder.open()
    assert export(run, "npy", out, Options())["written"] == 10
    lines = lines_of(out)
    assert sorted({line["array"] for line in lines}) == ["cam--2x2.npy", "score-cam,variant=paper--2x2.npy"]
    for line in lines:
        stack = np.load(out / line["array"], mmap_mode="r")
        assert (stack.shape, stack.dtype) == ((5, 2, 2), np.float32)
        expected = maps[int(line["id"]), int(line["method"] != "cam")]
        np.testing.assert_array_equal(stack[int(line["index"])], expected)
    export(run, "npy", out.with_name("input"), Options(size="input", method="cam", limit=3))
    stack = np.load(out.with_name("input") / "cam--8x8.npy")
    np.testing.assert_array_equal(stack, np.stack([row.upsampled() for row in list(run.rows(method="cam"))[:3]]))


def test_an_array_may_grow_as_it_likes(tmp_path):
    with exports.maps._Stack(tmp_path, "cam", (1, 2)) as stack:
        for i in range(12345):
            assert stack.add(np.array([[i, -i]])) == i
    found = np.load(tmp_path / stack.name)
    assert found.shape == (12345, 1, 2)
    assert (found[:, 0, 0] == np.arange(12345)).all()


def test_png_is_the_finished_map_on_the_photograph(builder, out):
    run = builder.image("a").add(RAW).image("b").add(np.array([[0, 2], [1, 4]]), crop_box=(0, 0, 60, 40)).open()
    export(run, "png", out, Options())
    export(run, "png", out.with_name("input"), Options(size="input"))
    for line, line_input, row in zip(lines_of(out), lines_of(out.with_name("input")), run.rows(), strict=True):
        saliency = row.saliency()
        assert saliency.min() == 0
        levels = pixels(out.with_name("input") / line_input["map"])
        np.testing.assert_allclose(levels, 255 * saliency / saliency.max(), atol=0.51)
        placed = pixels(out / line["map"])
        assert (placed.shape, placed.dtype) == ((40, 60), np.uint8)
        left = int(row.crop_box[0])
        assert (placed[:, :left] == 0).all()
        assert placed[39, int(row.crop_box[2]) - 1] == 255
        marked = placed >= 128
        expected = slow_erase(np.zeros((40, 60, 1)), saliency / saliency.max(), 127.5 / 255, row.crop_box, 1)[..., 0]
        assert (marked != expected.astype(bool)).sum() <= 4


def test_a_signed_map_has_zero_in_the_middle(builder, out):
    builder.methods = ["ablation-ca"]
    builder.image("a").add(np.array([[-2, 0], [0, 1]]), crop_box=(0, 0, 40, 40))
    export(builder.open(), "png", out, Options())
    (line,) = lines_of(out)
    found = pixels(out / line["map"])
    assert (found[0, 0], found[39, 39]) == (0, 191)
    assert (found[:, 40:] == 128).all()


# --- ViRelAy and FiftyOne -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 64])
def test_virelay_gets_the_datasets_of_its_specification(builder, out, monkeypatch, block):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(virelay._Columns, "BLOCK", block)
    builder.methods, builder.targets, builder.rows_per_image = ["cam", "rise"], [["predicted", 0], ["label", 0]], 4
    rng = np.random.default_rng(4)
    for i in range(5):
        builder.image(f"{i}", textured(builder))
        builder.images[-1]["label"] = ["dog", "2", None, "zebra", "cat"][i]
        for method in builder.methods:
            for source, target in (("predicted", 5), ("label", i)):
                builder.add(
                    None if i == 1 else rng.normal(size=(2, 2)),
                    method=method, target_source=source, target=target, score=0.1 + i / 10, pred=5, pred_score=0.75,
                    **({"status": "truncated"} if i == 1 else {}),
                )  # fmt: skip
    run = builder.open()
    found = export(run, "hdf5-virelay", out, Options())
    assert (found["written"], found["skipped"]) == (16, {"truncated": 4})
    with h5py.File(out / "input.h5") as file:
        assert (file["data"].shape, file["data"].dtype) == ((4, 3, 8, 8), np.uint8)
        assert file["label"][:].tolist() == [1, 5, 5, 0]
        assert file["label"].dtype == np.uint16
        spec = ModelSpec.from_json(run.settings["spec"], "run.json")
        for seen, i in zip(file["data"], (0, 2, 3, 4), strict=True):
            expected, _ = view(pixels(builder.images[i]["uri"]), spec)
            np.testing.assert_array_equal(seen.transpose(1, 2, 0), expected)
    assert sorted(path.name for path in out.glob("*.h5")) == [
        "cam--label.attribution.h5", "cam--predicted.attribution.h5", "input.h5", "rise--label.attribution.h5",
        "rise--predicted.attribution.h5",
    ]  # fmt: skip
    for method in ("cam", "rise"):
        for source, strategy in (("predicted", "predicted_label"), ("label", "true_label")):
            rows = [row for row in run.rows(method=method, status="ok") if row.target_source == source]
            name = f"{method}--{source}"
            with h5py.File(out / f"{name}.attribution.h5") as file:
                assert sorted(file) == ["attribution", "index", "label", "prediction"]
                assert file["index"][:].tolist() == [0, 1, 2, 3]
                assert file["attribution"].dtype == np.float32
                assert file["attribution"].shape == (4, 3, 8, 8)
                sums = file["attribution"][:].sum(axis=1)
                np.testing.assert_allclose(sums, np.stack([row.upsampled() for row in rows]), rtol=1e-6, atol=1e-6)
                assert file["label"][:].tolist() == [row.target for row in rows]
                expected = np.zeros((4, 6), np.float32)
                for line, row in zip(expected, rows, strict=True):
                    line[row.target] = row.score
                    line[5] = 0.75
                np.testing.assert_array_equal(file["prediction"][:], expected)
            project = json.loads((out / f"{name}.yaml").read_text())["project"]
            assert project["attributions"] == {
                "attribution_method": method, "attribution_strategy": strategy, "sources": [f"{name}.attribution.h5"]
            }  # fmt: skip
            assert (project["dataset"]["path"], project["dataset"]["type"]) == ("input.h5", "hdf5")
            assert (project["dataset"]["input_width"], project["label_map"]) == (8, "label-map.json")
    names = json.loads((out / "label-map.json").read_text())
    assert [(name["index"], name["name"]) for name in names] == list(enumerate(builder.names))
    assert all(name.keys() == {"index", "word_net_id", "name"} for name in names)


def test_virelay_without_h5py_is_refused(builder, out, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install 'heatmill\[hdf5\]'"):
        export(builder.image("a").add().open(), "hdf5-virelay", out, Options())
    assert not out.exists()
    assert not left_behind(tmp_path)


def test_fiftyone_gets_serialised_samples_with_heatmaps(builder, out):
    builder.methods, builder.rows_per_image = ["grad-cam++", "rise:masks=8"], 2
    builder.image("a")
    builder.images[-1]["label"] = "dog"
    builder.add(RAW, method="grad-cam++", score=0.25).add(RAW, method="rise:masks=8", target=9, target_source="class")
    builder.image("b").add(None, status="truncated").image("c").add(RAW, method="grad-cam++", pred=None)
    run = builder.open()
    found = export(run, "fiftyone", out, Options())
    assert (found["written"], found["skipped"]) == (3, {"truncated": 1})
    metadata = json.loads((out / "metadata.json").read_text())
    assert "version" not in metadata  # with one, FiftyOne expects its database's own documents
    assert metadata["media_type"] == "image"
    first, second = json.loads((out / "samples.json").read_text())["samples"]
    assert first["filepath"] == builder.images[0]["uri"]
    assert (first["heatmill_id"], second["heatmill_id"]) == ("a", "c")
    assert first["ground_truth"] == {"_cls": "Classification", "label": "dog", "confidence": None}
    assert first["prediction"] == {"_cls": "Classification", "label": "cat", "confidence": 0.5}
    assert "prediction" not in second
    assert "ground_truth" not in second
    assert first["grad_campp_predicted_class"] == {"_cls": "Classification", "label": "cat", "confidence": 0.25}
    assert first["rise_masks_8_class_9_class"]["label"] == "class 9"
    assert metadata["info"]["heatmaps"] == {
        "grad_campp_predicted": ["grad-cam++", "predicted"], "rise_masks_8_class_9": ["rise:masks=8", "class 9"]
    }  # fmt: skip
    fields = {path.name for path in (out / "fields").iterdir()}
    assert fields == {"grad_campp_predicted", "rise_masks_8_class_9"}
    for sample in (first, second):
        heatmap = sample["grad_campp_predicted"]
        assert heatmap["_cls"] == "Heatmap"
        assert heatmap["map_path"].startswith("fields/grad_campp_predicted/")
        drawn = pixels(out / heatmap["map_path"])
        assert (drawn.shape, drawn.dtype) == ((171, 256), np.uint8)
        assert (drawn[:, :42] == 0).all()
        assert drawn[-1, 212] == 255
        assert (drawn[:, 214:] == 0).all()


def test_fields_that_would_be_one_are_numbered():
    from heatmill.engine.jobs.exports.fiftyone import _Fields

    class Fake:
        target_source = "predicted"

        def __init__(self, method):
            self.method = method

    fields = _Fields()
    rows = [Fake(method) for method in ("a-b", "a_b", "a+b", "a-b", "apb")]
    for row in rows:
        fields.add(row)
    assert [fields.name(row) for row in rows] == [
        "a_b_predicted", "a_b_predicted_2", "apb_predicted", "a_b_predicted", "apb_predicted_2"
    ]  # fmt: skip


# --- refusals and endings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("npz", {}, "no export 'npz'; known: crops, erased, npy"),
        ("npy", {"fill": "blur"}, "--fill is for --as erased, not for npy"),
        ("erased", {"padding": 0.2}, "--padding is for --as crops, not for erased"),
        ("fiftyone", {"threshold": 0.2}, "--threshold is for --as crops or erased, not for fiftyone"),
        ("png", {"size": "native"}, "--size native: --as png takes image or input"),
        ("npy", {"size": "image"}, "--size image: --as npy takes native or input"),
        ("crops", {"method": "rise"}, "--method 'rise': .* has cam"),
    ],
)
def test_what_does_not_go_together_is_refused(builder, out, tmp_path, kind, options, told):
    run = builder.image("a").add().open()
    with pytest.raises(InputError, match=told):
        export(run, kind, out, Options(**options))
    assert not out.exists()
    assert not left_behind(tmp_path)


def test_an_export_is_whole_or_not_there(builder, out, tmp_path, monkeypatch):
    run = builder.image("a").add().image("b").add(None, status="missing").open()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match="is there already"):
        export(run, "npy", out, Options())
    (out / "mine").rmdir()
    assert export(run, "npy", out, Options())["skipped"] == {"missing": 1}
    with pytest.raises(InputError, match="is there already"):
        export(run, "npy", out, Options())

    def failing(error):
        def write(selection, folder):
            (folder / "half").write_text("half")
            raise error

        monkeypatch.setitem(EXPORTS, "npy", Export("", write))

    other = tmp_path / "other"
    for error, expected, told in (
        (OSError(errno.ENOSPC, "No space"), IncompleteError, "no space is left; nothing is kept"),
        (OSError(errno.EACCES, "Permission denied"), InputError, r"can't be written \(Permission denied\)"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ):
        failing(error)
        with pytest.raises(expected, match=told):
            export(run, "npy", other, Options())
        assert not other.exists()
        assert not left_behind(tmp_path)


def test_nothing_to_export_says_why(builder, out, tmp_path):
    run = builder.image("a").add(None, status="missing").image("b").add(np.zeros((2, 2))).open()
    with pytest.raises(InputError, match=r"nothing to export as crops \(1 missing, 1 flat map\)"):
        export(run, "crops", out, Options())
    assert not out.exists()
    assert not left_behind(tmp_path)


def test_threads_keep_the_order_and_hand_on_what_goes_wrong():
    taken = []

    def numbers():
        for i in range(100):
            taken.append(i)
            yield i

    found = in_threads(lambda i: i * i, numbers())
    assert next(found) == 0
    assert len(taken) < 100
    assert list(found) == [i * i for i in range(1, 100)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // (3 - i), range(10)))
