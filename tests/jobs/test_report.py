"""Overlays against a slow reading of the same picture; the page as a parser sees it, with hostile names in it."""

import base64
import hashlib
import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cmap
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from heatmill import InputError
from heatmill.engine.jobs import plan as plans
from heatmill.engine.jobs import report, store
from heatmill.engine.jobs.objects import borders_png, described
from heatmill.engine.jobs.report import COLORMAPS, DIMMED, SIGNED, display, overlay, overlay_name

SIZE = 8
GRID = (2, 2)
DECODE = report.decode
RAW = np.array([[-1, 0], [1, 3]], np.float32)
NAMES = ["cat", "dog", "crane", "crane", "</script><script>alert(1)</script>", "a\u202eb & 'c' \"d\" \u2028"]
HOSTILE = [
    "../../etc/passwd",
    "/absolute.jpg",
    "a/../b.jpg",
    "a//b.jpg",
    "",
    ".",
    "..",
    "a\nb.jpg",
    "a\tb.jpg",
    "a\0b.jpg",
    "nul/con.jpg.",
    "x" * 300,
    "x" * 299 + "y",
    "\u00e9" * 200,
    "e\u0301.jpg",
    "\u00e9.jpg",
    "\u65e5\u672c\u8a9e.jpg",
    "a b.jpg",
    "a:b.jpg",
    "a*b.jpg",
    "a?b.jpg",
    "a_b.jpg",
    "a--b.jpg",
    "a-b.jpg",
    "-rf",
    "a\\b.jpg",
    "</script><img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "{{data}}{{title}}",
    "/".join("abcdefghijklmnopqrstuvwxyz"),
    "/".join("bcdefghijklmnopqrstuvwxyz"),
]


def picture(path, size=(60, 40), color=(120, 130, 140), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


class Builder:
    """A run's folder made by hand: pictures, rows, one part."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "run"
        self.images, self.rows = [], []
        self.methods = ["cam"]
        self.targets = [["predicted", 0]]
        self.rows_per_image = 1
        self.shard_rows = 1000
        self.names = NAMES

    def image(self, identity, path=None):
        """One more image of the plan."""
        path = path or picture(self.folder / f"photographs/{len(self.images)}.png")
        found = path.stat() if path.exists() else None
        self.images.append(
            {
                "row": len(self.images),
                "id": identity,
                "uri": str(path),
                "size": found.st_size if found else -1,
                "mtime_ns": found.st_mtime_ns if found else -1,
                "label": None,
            }
        )
        return self

    def add(self, raw=RAW, **changes):
        """One more row of the last image; a map of None makes it a bad one."""
        image = self.images[-1]
        target = changes.get("target", 0)
        values = {
            "row": image["row"],
            "id": image["id"],
            "uri": image["uri"],
            "method": self.methods[0],
            "target": target,
            "target_source": "predicted",
            "label_name": self.names[target] if target is not None and target < len(self.names) else None,
            "score": 0.5,
            "pred": 0,
            "pred_score": 0.5,
            "status": "ok",
            "width": 60,
            "height": 40,
            "crop_box": (10.0, 0.0, 50.0, 40.0),
            "extras": "{}",
        }
        if raw is not None:
            values |= {"map": np.asarray(raw, np.float32).ravel(), "map_shape": GRID}
        self.rows.append(values | changes)
        return self

    def open(self):
        images = pa.Table.from_pylist(self.images)
        spec = {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "label_names": self.names}
        settings = {
            "format": store.FORMAT,
            "identity": {},
            "images": len(self.images),
            "rows_per_image": self.rows_per_image,
            "shard_rows": self.shard_rows,
            "model": {"path": "/srv/secret/net<1>.onnx", "sha256": "0123456789abcdef" * 4, "scores": "logits"},
            "spec": spec,
            "methods": [{"call": method, "parameters": {"masks": 7}} for method in self.methods],
            "targets": self.targets,
            "layer": "head_act",
            "grid": list(GRID),
            "backend": "onnxruntime",
            "provider": "cpu",
            "precision": "fp32",
            "seed": 11,
            "versions": {"heatmill": "9.8.7", "backend": "1.2.3"},
            "plan_hash": store.plan_hash({}, self.shard_rows, images),
        }
        plans.create(self.path, plans.Plan(settings, images))
        if self.rows:
            store.write_part(self.path, 0, self.rows, store.schema(GRID, pixels=False), "{}")
        return store.open_run(self.path)


@pytest.fixture
def builder(tmp_path):
    return Builder(tmp_path)


class Page(HTMLParser):
    """The elements of a page, its data blocks, and its inline script and style."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements, self.blocks, self.inline, self._open = [], {}, {}, None
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag in ("script", "style"):
            self._open = tag, attrs.get("id")

    def handle_data(self, data):
        if self._open:
            tag, identity = self._open
            where = self.blocks if identity else self.inline
            where[identity or tag] = where.get(identity or tag, "") + data

    def handle_endtag(self, tag):
        self._open = None

    @property
    def data(self):
        return json.loads(self.blocks["data"])

    def pictures(self, image):
        return json.loads(self.blocks[f"image-{image}"])


def written(run, **options):
    return Page(report.write_report(run, **options))


def decoded(text, mode):
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.mode == mode
        return np.asarray(image)


def slow_overlay(photograph, saliency, box):
    """Pixel by pixel, in the words of the docstring."""
    low, high = saliency.min(), saliency.max()
    signed = low < 0
    size = len(saliency)
    colors = np.asarray(cmap.Colormap(SIGNED if signed else COLORMAPS["turbo"])(np.linspace(0, 1, 5001)))[:, :3]
    result = np.zeros_like(photograph)
    for y in range(photograph.shape[0]):
        for x in range(photograph.shape[1]):
            inside = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
            if not inside:
                result[y, x] = [round(float(value) * DIMMED) for value in photograph[y, x]]
                continue
            column = min(max((x + 0.5 - box[0]) / (box[2] - box[0]) * size - 0.5, 0), size - 1)
            row = min(max((y + 0.5 - box[1]) / (box[3] - box[1]) * size - 0.5, 0), size - 1)
            value = 0.0
            for i in range(size):
                for j in range(size):
                    near = max(0, 1 - abs(i - row)) * max(0, 1 - abs(j - column))
                    value += near * float(saliency[i, j])
            level = value / max(-low, high) if signed else (value - low) / (high - low)
            alpha = report.OPACITY * abs(level) ** report.ALPHA_EXPONENT
            color = 255 * colors[round(5000 * ((level + 1) / 2 if signed else level))]
            result[y, x] = np.round(photograph[y, x] * (1 - alpha) + alpha * color)
    return result


@pytest.mark.parametrize("box", [(4, 2, 20, 14), (0.5, -3.2, 22.7, 19.1), (0, 0, 24, 16)])
@pytest.mark.parametrize("signed", [False, True])
def test_overlay_matches_the_slow_reading(box, signed):
    random = np.random.default_rng(3)
    photograph = random.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    saliency = random.random((6, 6), dtype=np.float32) - 0.6 * signed
    assert (saliency.min() < 0) == signed
    found = overlay(photograph, saliency, box)
    expected = slow_overlay(photograph, saliency, box)
    assert found.dtype == np.uint8
    # a colour table of 256 steps against the continuous one
    assert np.abs(found.astype(int) - expected).max() <= 4
    assert np.abs(found.astype(int) - expected).mean() < 0.6


def test_hot_is_red_cold_is_bare_and_outside_is_dim():
    photograph = np.full((20, 40, 3), 100, np.uint8)
    saliency = np.zeros((8, 8), np.float32)
    saliency[:, 5:] = 1
    found = overlay(photograph, saliency, (10, 0, 30, 20)).astype(int)
    assert (found[:, :10] == 45).all()
    assert (found[:, 30:] == 45).all()
    assert (found[:, 10:20] == 100).all()
    assert (found[:, 26:30, 0] > found[:, 26:30, 2] + 40).all()


def test_signed_levels_keep_zero_and_are_symmetric():
    levels, signed = display(np.array([[-2, 0], [0.5, 1]], np.float32))
    assert signed
    assert levels.tolist() == [[-1, 0], [0.25, 0.5]]
    bare = overlay(np.full((4, 4, 3), 77, np.uint8), np.array([[-1, 0, 0, 0]], np.float32), (-4, 0, 4, 4))
    assert (bare[:, 1:] == 77).all()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_map_leaves_the_photograph(value):
    photograph = np.full((4, 6, 3), 77, np.uint8)
    assert (overlay(photograph, np.full((2, 2), value, np.float32), (0, 0, 6, 4)) == 77).all()


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_every_colormap_colours(colormap):
    found = overlay(np.zeros((2, 8, 3), np.uint8), np.linspace(0, 1, 8, dtype=np.float32)[None], (0, 0, 8, 2), colormap)
    assert found[0, -1].max() > 80


def test_write_overlays_writes_what_overlay_gives(builder):
    run = builder.image("folder/a.png").add().add(target=1, score=0.1).image("b.png").add().open()
    assert report.write_overlays(run) == 3
    folder = run.path / "report" / "overlays"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert names == [
        "b.png--cam--predicted--0-cat.png",
        "folder/a.png--cam--predicted--0-cat.png",
        "folder/a.png--cam--predicted--1-dog.png",
    ]
    row = next(run.rows())
    expected = overlay(np.asarray(Image.open(row.path)), row.saliency(), row.crop_box)
    with Image.open(folder / names[1]) as image:
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]


def test_overlays_are_upright_and_at_most_800_long(builder, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = picture(tmp_path / "turned.jpg", (1000, 500), exif=exif)
    run = builder.image("turned.jpg", path).add(width=500, height=1000, crop_box=(0, 250, 500, 750)).open()
    assert report.write_overlays(run, tmp_path / "elsewhere") == 1
    with Image.open(next((tmp_path / "elsewhere").glob("*.png"))) as image:
        assert image.size == (400, 800)
        rows = np.asarray(image).astype(int)[:, 200].sum(axis=1)
    assert (rows[:200] < 200).all()
    assert rows[250:550].min() > 220


def test_overlays_stop_at_the_limit_and_pass_by_lost_photographs(builder):
    run = builder.image("gone").add().image("b").add().image("c").add().open()
    Path(builder.images[0]["uri"]).unlink()
    os.utime(builder.images[1]["uri"], ns=(1, 1))
    assert report.write_overlays(run) == 1
    assert report.write_overlays(run, run.path / "few", limit=2) == 0
    assert not (run.path / "few").exists()


def test_overlay_names_are_safe_and_never_collide(builder, tmp_path):
    same = picture(tmp_path / "same.png", (4, 4))
    for identity in HOSTILE:
        builder.image(identity, same).add(width=4, height=4, crop_box=(0, 0, 4, 4))
        builder.add(target=4, width=4, height=4, crop_box=(0, 0, 4, 4))
    run = builder.open()
    names = [overlay_name(row) for row in run.rows()]
    assert len({name.casefold() for name in names}) == len(names) == 2 * len(HOSTILE)
    for name in names:
        parts = name.split("/")
        assert all(part and part.strip(". ") == part and len(part.encode()) <= 255 for part in parts)
        assert not re.search(r'[\x00-\x1f<>:"\\|?*]', name)
    folder = tmp_path / "out"
    assert report.write_overlays(run, folder) == len(names)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == set(names)


def test_overlay_names_keep_rows_apart(builder):
    builder.methods = ["cam", "score-cam"]
    builder.image("x-score").add().image("x").add(method="score-cam").add(target=2).add(target=3)
    builder.add(target_source="top1").add(target=99)
    names = [overlay_name(row) for row in builder.open().rows()]
    assert len(set(names)) == len(names) == 6
    assert names[:2] == ["x-score--cam--predicted--0-cat.png", "x--score-cam--predicted--0-cat.png"]
    assert names[-1] == "x--cam--predicted--99.png"


def test_a_card_per_map_and_one_thumbnail_per_image(builder, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "decode", lambda data, **options: calls.append(1) or DECODE(data, **options))
    builder.methods = ["cam", "score-cam"]
    for identity in "abc":
        builder.image(identity).add(score=0.25).add(method="score-cam").add(target=1, target_source="top2")
    page = written(builder.open())
    data = page.data
    assert len(data["cards"]) == 9
    assert [image["id"] for image in data["images"]] == ["a", "b", "c"]
    assert len(calls) == 3
    assert page.text.count("UklGR") == 3
    assert [(card["image"], card["map"]) for card in data["cards"][:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert data["cards"][2] | {"extras": [], "warning": None} == data["cards"][2]
    assert (data["cards"][2]["label"], data["cards"][2]["source"], data["cards"][0]["score"]) == ("dog", "top2", 0.25)
    assert data["counts"]["worst"] is None
    assert data["images"][0]["box"] == [round(10 / 60, 5), 0, round(50 / 60, 5), 1]
    with Image.open(io.BytesIO(base64.b64decode(page.pictures(0)["photograph"]))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (60, 40))


def test_the_map_on_the_page_is_the_finished_map(builder):
    run = builder.image("a").add().open()
    row = next(run.rows())
    found = decoded(written(run).pictures(0)["maps"][0], "L")
    assert np.abs(found / 255 - row.saliency()).max() <= 0.5 / 255 + 1e-6
    assert found.max() == 255


def test_large_and_signed_maps_are_averaged_around_the_middle():
    levels = np.zeros((112, 224), np.float32)
    levels[:4, :4], levels[-4:, -4:] = 1, -1
    grey = decoded(report._map_png(levels, signed=True), "L")
    assert grey.shape == (28, 56)
    assert 127 <= grey[0, 0] - 64 <= 256
    assert (grey[3:25, 3:53] == 128).all()
    assert grey[-1, -1] < 64


def test_the_page_carries_its_colours_as_filter_tables(builder):
    data = written(builder.image("a").add().open(), colormap="inferno").data
    assert data["colormap"] == "inferno"
    assert list(data["colormaps"]) == list(COLORMAPS)
    tables = {channel: list(map(float, values.split())) for channel, values in data["colormaps"]["turbo"].items()}
    middle = len(tables["R"]) // 2
    assert np.allclose([tables[c][middle] for c in "RGB"], list(cmap.Colormap("google:turbo")(0.5))[:3], atol=2e-3)
    assert (tables["A"][0], tables["A"][-1]) == (0, 1)
    signed = list(map(float, data["signed"]["A"].split()))
    assert (signed[0], signed[len(signed) // 2], signed[-1]) == (1, 0, 1)


def test_hostile_names_stay_text(builder):
    plain = written(Builder(builder.folder / "plain").image("a").add().open())
    for identity in HOSTILE:
        builder.image(identity).add(target=4, pred=5, method="cam", extras=json.dumps({"<b>": "<i>&", "reason": "<u>"}))
    builder.image("bad<script>").add(None, status="truncated", error="</script><b>bold</b>")
    page = written(builder.open())
    data = page.data
    assert [image["id"] for image in data["images"]] == HOSTILE
    assert {card["label"] for card in data["cards"]} == {NAMES[4]}
    assert data["names"] == {"5": NAMES[5]}
    assert data["cards"][0]["extras"] == [["<b>", "<i>&"]]
    assert data["cards"][0]["warning"] == "<u>"
    assert data["bad"][0]["error"] == "</script><b>bold</b>"
    tags = [tag for tag, attrs in page.elements if not attrs.get("id", "").startswith("image-")]
    assert tags == [tag for tag, attrs in plain.elements if not attrs.get("id", "").startswith("image-")]
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert "<title>net&lt;1&gt;.onnx - heatmill</title>" in page.text
    assert page.inline == plain.inline


def test_the_page_needs_no_network_and_runs_only_its_own_script(builder):
    page = written(builder.image("a").add().open())
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.inline[tag].encode()).digest()).decode()
        assert directives[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "innerHTML" not in page.text
    assert not re.search(r"https?:|//[a-z]", page.text.replace(page.pictures(0)["photograph"], ""))
    assert not [a for _, a in page.elements if "style" in a or a.get("src") or a.get("href", "data:,") != "data:,"]
    assert "{{" not in page.text


def test_the_header_says_what_was_run_and_no_path(builder):
    builder.methods = ["rise:masks=7"]
    builder.targets = [["top", 3], ["class", 5], ["label", 0]]
    page = written(builder.image("a").add().image("b").add(None, status="empty").open())
    facts = dict(page.data["facts"])
    assert page.data["model"] == "net<1>.onnx"
    assert facts["Methods"] == ["rise masks=7"]
    assert facts["Targets"] == ["top3, class 5, label"]
    assert facts["Layer"] == ["head_act (2 x 2)"]
    assert facts["Runs on"] == ["onnxruntime, cpu, fp32"]
    assert facts["Seed"] == ["11"]
    assert facts["Versions"] == ["heatmill 9.8.7, onnxruntime 1.2.3"]
    counts = page.data["counts"]
    assert (counts["images"], counts["maps"], counts["bad"], counts["parts"]) == (2, 1, 1, [1, 1])
    assert "secret" not in page.text
    assert str(builder.folder) not in page.text


def test_bad_rows_have_their_table(builder):
    builder.methods, builder.rows_per_image = ["cam", "score-cam"], 2
    builder.image("fine").add().add(None, method="score-cam", status="nonfinite", error="not finite")
    for identity in ("one", "two"):
        for method in builder.methods:
            values = {"width": None, "height": None, "crop_box": None, "score": None}
            builder.image(identity).add(None, method=method, status="truncated", error="ends early", **values)
            builder.images.pop() if method == "cam" else None
    data = written(builder.open()).data
    assert len(data["cards"]) == 1
    assert data["counts"]["statuses"] == [["truncated", 4], ["nonfinite", 1]]
    assert data["bad"] == [
        {"id": "fine", "status": "nonfinite", "error": "not finite", "methods": ["score-cam"], "rows": 1},
        {"id": "one", "status": "truncated", "error": "ends early", "methods": ["cam", "score-cam"], "rows": 2},
        {"id": "two", "status": "truncated", "error": "ends early", "methods": ["cam", "score-cam"], "rows": 2},
    ]
    assert len(written(store.open_run(builder.path), limit=2).data["bad"]) == 2


def test_a_lost_photograph_is_a_card_without_picture(builder):
    run = builder.image("gone").add().image("changed").add().image("here").add().open()
    Path(builder.images[0]["uri"]).unlink()
    os.utime(builder.images[1]["uri"], ns=(1, 1))
    page = written(run)
    assert [image["gone"] for image in page.data["images"]] == ["missing", "changed", None]
    assert [page.pictures(i)["photograph"] is None for i in range(3)] == [True, True, False]
    assert all(len(page.pictures(i)["maps"]) == 1 for i in range(3))


def test_flat_and_blank_maps_carry_a_warning(builder):
    builder.image("flat").add(np.zeros(GRID), extras=json.dumps({"reason": "flat: all the same", "passes": 9}))
    builder.image("negative").add(-np.ones(GRID)).image("fine").add(extras=None)
    cards = written(builder.open()).data["cards"]
    assert [card["warning"] for card in cards] == [
        "flat: all the same",
        "blank: the finished map has one value everywhere",
        None,
    ]
    assert cards[0]["extras"] == [["passes", "9"]]


def test_numbers_that_json_cannot_say(builder):
    builder.image("a").add(score=math.nan, pred_score=math.inf, extras='{"error": NaN}', pred=None, target=4000)
    card = written(builder.open()).data["cards"][0]
    assert (card["score"], card["prediction_score"], card["prediction"]) == (None, None, None)
    assert card["extras"] == [["error", "NaN"]]
    assert card["label"] is None


def test_the_limit_takes_the_worst_and_a_spread(builder):
    same = picture(builder.folder / "same.png")
    for position in range(100):
        flat = json.dumps({"reason": "flat: all the same"}) if position == 70 else "{}"
        raw = np.zeros(GRID) if position == 70 else RAW
        builder.image(f"{position:03d}", same).add(raw, score=0.01 if position in (13, 14, 15) else 0.9, extras=flat)
    data = written(builder.open(), limit=8).data
    shown = [int(image["id"]) for image in data["images"]]
    assert len(shown) == 8
    assert shown == sorted(shown)
    assert {13, 14, 15, 70} <= set(shown)
    assert {0, 99} <= set(shown)
    counts = data["counts"]
    assert (counts["shown"], counts["images_shown"], counts["maps"], counts["worst"]) == (8, 8, 100, 4)


@pytest.mark.parametrize(("limit", "cards"), [(1, 1), (3, 3), (4, 4), (11, 8), (12, 12), (100, 12)])
def test_the_limit_keeps_the_rows_of_an_image_together(builder, limit, cards):
    for identity in "abc":
        builder.image(identity)
        for target in range(4):
            builder.add(target=target)
    data = written(builder.open(), limit=limit).data
    assert len(data["cards"]) == data["counts"]["shown"] == cards


def test_an_incomplete_run_and_one_without_rows(builder):
    builder.shard_rows = 2
    for identity in "abc":
        builder.image(identity)
    data = written(builder.open()).data
    assert (data["cards"], data["counts"]["parts"]) == ([], [0, 2])
    assert report.write_overlays(store.open_run(builder.path)) == 0


def test_a_page_is_replaced_whole_or_not_at_all(builder, monkeypatch):
    run = builder.image("a").add().open()
    page = report.write_report(run)
    before = page.read_bytes()

    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "_facts", fails)
    with pytest.raises(OSError, match="No space"):
        report.write_report(run)
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="No space"):
        report.write_overlays(run)
    assert list((run.path / "report" / "overlays").iterdir()) == []


def test_refusals(builder):
    run = builder.image("a").add().open()
    with pytest.raises(InputError, match="no colormap 'rainbow'; known: turbo"):
        report.write_report(run, colormap="rainbow")
    with pytest.raises(InputError, match="limit is 0"):
        report.write_report(run, limit=0)
    (run.path / "report").write_text("in the way")
    with pytest.raises(InputError, match="can't be written"):
        report.write_report(run)
    with pytest.raises(InputError, match="can't be written"):
        report.write_overlays(run)


def test_maps_of_single_pixels_are_shown_up_to_their_99th_percentile():
    smooth = np.linspace(0, 2, 400).reshape(20, 20)
    levels, signed = display(smooth)
    np.testing.assert_allclose(levels, smooth / 2)
    assert not signed
    peaked = np.full((20, 20), 0.1)
    peaked[0, 0], peaked[3, :5] = 10, 0.2
    peaked[5, 5] = 0
    levels, _ = display(peaked)
    assert levels[0, 0] == levels[3, 0] == 1
    assert levels[10, 10] == pytest.approx(0.5)
    levels, signed = display(np.where(peaked == 0.2, -0.2, peaked))
    assert signed
    assert levels[3, 0] == -1


OBJECTS = {
    "segments": np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 3]], np.int32),
    "contribution": np.array([0.1, -0.4, 0.3, 0.0], np.float32),
    "correlation": np.array([[0, 0, 0, 0], [0, 0, 0.5, 0], [0, 0.5, 0, -0.25], [0, 0, -0.25, 0]], np.float32),
    "links": np.array([[1, 2], [2, 3]], np.int32),
    "group": np.array([-1, 0, 0, 0], np.int32),
}


def test_objects_are_named_by_rank_with_their_links_and_groups():
    found = described(OBJECTS)
    assert found["links"] == [[0, 1, 0.5], [1, 3, -0.25]]  # ranks: 1, 2, 0, 3
    assert found["groups"] == [[0, 1, 3]]
    for (x, y), part in zip(found["parts"], (1, 2, 0, 3), strict=True):
        assert OBJECTS["segments"][int(4 * y), int(4 * x)] == part
    assert described({}) is None
    with Image.open(io.BytesIO(base64.b64decode(borders_png(OBJECTS["segments"])))) as picture:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3] > 0
    expected = np.array([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(alpha, expected)


def test_a_card_draws_its_objects_and_a_sweep_is_a_curve(builder, monkeypatch):
    builder.methods = [f"ablation-ca:segments={number}" for number in (10, 20)] + ["cam"]
    builder.rows_per_image = 3
    for identity, greatest in (("a", 0.2), ("b", 0.4)):
        builder.image(identity)
        for method in builder.methods:
            told = {
                "max_correlation": greatest * (1 + (method[-2:] == "20")),
                "correlation_error": 0.025,
                "groups": [[1]],
            }
            builder.add(method=method, extras=json.dumps(told) if method != "cam" else "{}")
    run = builder.open()
    for method in run.settings["methods"]:
        method["parameters"] = {"segments": int(method["call"][-2:]), "samples": 9} if method["call"] != "cam" else {}
    rows = store.Run.rows
    monkeypatch.setattr(
        store.Run,
        "rows",
        lambda self, **kind: (
            replace(row, arrays=OBJECTS) if row.method != "cam" else row for row in rows(self, **kind)
        ),
    )
    page = written(run)
    cards = page.data["cards"]
    assert [card["objects"] is None for card in cards] == [False, False, True] * 2
    assert "groups" not in dict(cards[0]["extras"])
    assert list(page.pictures(0)["borders"]) == ["0", "1"]
    assert page.data["sweeps"] == [
        {"call": "ablation-ca samples=9", "points": [[10, 0.3, 0.1, 2], [20, 0.6, 0.1, 2]]},
    ]
