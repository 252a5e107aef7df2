"""The comparison: means, intervals and paired differences against slow readings, and the pages that show them."""

from __future__ import annotations

import csv
import html.parser
import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from heatmill import InputError
from heatmill.engine.jobs import measures, store, table, table_pages
from heatmill.engine.jobs.table import compare_metrics, interval, resampled
from heatmill.engine.metrics import parse_metrics

RNG = np.random.default_rng(11)
N = 60


class FakeRun:
    """What the table reads of a run: its settings, plan, rows and metric rows."""

    shards = 0

    def __init__(self, path, values, *, methods=("a", "b"), targets=(("predicted", 0),), ids=None, boxed=None):
        """values: {(metric text, method): (n,) numbers, NaN for a row without}, or curves (n, p)."""
        self.path, self.values = path, values
        self.ids = ids or [f"image {i:03d}" for i in range(N)]
        self.settings = {
            "methods": [{"call": method} for method in methods],
            "targets": [list(target) for target in targets],
            "spec": {"label_names": ["ant", "bee", "cat"]},
            "model": {"path": "/models/<net>.onnx"},
            "backend": "onnxruntime",
            "provider": "cpu",
            "precision": "fp32",
            "images": len(self.ids),
        }
        self.classes = [i % 3 for i in range(len(self.ids))]

    def plan(self):
        labels = ["ant" if i % 2 else "bee" for i in range(len(self.ids))]
        extra = [json.dumps({"scene": "in" if i < 20 else "out"}) for i in range(len(self.ids))]
        uris = [f"/photos/{name}.jpg" for name in self.ids]
        return pa.table({"id": self.ids, "uri": uris, "label": labels, "extra": extra})

    def table(self):
        methods = [method["call"] for method in self.settings["methods"]]
        rows = [
            {"id": name, "method": method, "target_source": "predicted", "target": found, "pred": found}
            for name, found in zip(self.ids, self.classes, strict=True)
            for method in methods
        ]
        return pa.Table.from_pylist(rows)

    def metric_rows(self):
        rows = []
        for (text, method), values in self.values.items():
            (call,) = parse_metrics([text])
            for i, value in enumerate(values):
                curve = None if np.ndim(value) == 0 else np.asarray(value, np.float32)
                single = float(value) if curve is None else float(np.max(value))
                bad = not np.isfinite(single)
                rows.append({
                    "row": i, "id": self.ids[i], "method": method, "target": self.classes[i],
                    "target_source": "predicted", "metric": call.text, "value": None if bad else single,
                    "curve": None if bad else curve, "status": "no_boxes" if bad else "ok",
                })  # fmt: skip
        return pa.Table.from_pylist(rows, schema=measures.SCHEMA)


@pytest.fixture(autouse=True)
def fake_runs(monkeypatch):
    monkeypatch.setattr(measures, "read", lambda run, metrics: run.metric_rows())
    monkeypatch.setattr(store, "read_plan", lambda path, settings: next(run for run in RUNS if run.path == path).plan())


RUNS: list[FakeRun] = []


def compared(tmp_path, *values, metrics, by=(), resamples=2000, **options):
    RUNS[:] = [FakeRun(tmp_path / f"run{i}", each, **options) for i, each in enumerate(values)]
    methods = [[method["call"] for method in run.settings["methods"]] for run in RUNS]
    return compare_metrics(RUNS, metrics, methods, by, resamples)


def test_means_and_intervals_are_the_bootstraps(tmp_path):
    a, b = RNG.beta(2, 5, N), RNG.beta(5, 2, N)
    found = compared(tmp_path, {("deletion", "a"): a, ("deletion", "b"): b}, metrics=["deletion"])
    for i, values in enumerate((a, b)):
        cell = found.slices[0].cells["deletion", i]
        wanted = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
        assert (cell.n, cell.mean) == (N, pytest.approx(values.mean()))
        assert (cell.low, cell.high) == (pytest.approx(wanted.low, abs=0.008), pytest.approx(wanted.high, abs=0.008))
    (d,) = found.differences
    paired = stats.bootstrap((a - b,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert (d.low, d.high) == (pytest.approx(paired.low, abs=0.01), pytest.approx(paired.high, abs=0.01))
    assert (d.mean, d.n, d.distinguishable) == (pytest.approx((a - b).mean()), N, True)
    assert d.wins == pytest.approx(
        np.mean([1.0 if x < y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)])
    )


def test_resamples_are_means_of_drawn_images():
    """One draw for all: what is equal stays equal, in pieces as in one."""
    values = RNG.random((9, 2))
    drawn = resampled([values, values[:, :1] + 1], 500, "key")
    np.testing.assert_allclose(np.maximum(drawn[:, 0], drawn[:, 1] - 1), drawn[:, 0])
    whole = resampled([values], 500, "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", 30)
        pieces = resampled([values], 500, "key")
    assert pieces.shape == whole.shape == (500, 1)
    ones = resampled([np.ones((7, 1))], 50, "key")
    np.testing.assert_allclose(ones, 1)
    spread = resampled([np.eye(4)[:, :1]], 8000, "key")  # the share of draws of one image among 4
    assert spread.mean() == pytest.approx(1 / 4, abs=0.01)
    assert spread.var() == pytest.approx(1 / 4 * 3 / 4 / 4, rel=0.1)
    assert interval(np.arange(1001)) == (25, 975)


def test_a_constant_difference_is_told_and_noise_is_not(tmp_path):
    base = RNG.random(N)
    values = {
        ("insertion", "a"): base,
        ("insertion", "b"): base + 0.01,
        ("insertion", "c"): base + RNG.normal(scale=0.1, size=N),
    }
    found = compared(tmp_path, values, metrics=["insertion"], methods=("a", "b", "c"))
    by_pair = {(d.a, d.b): d for d in found.differences}
    certain = by_pair[0, 1]
    np.testing.assert_allclose([certain.mean, certain.low, certain.high], -0.01)
    assert (certain.distinguishable, certain.wins) == (True, 0)
    assert not by_pair[0, 2].distinguishable
    leader = found.leader("insertion", 0)
    assert leader == max(range(3), key=lambda i: found.slices[0].cells["insertion", i].mean)
    assert found.level("insertion", leader)


def test_who_leaves_images_out_is_not_the_best(tmp_path):
    """b beats nobody: it was judged on the easier half alone."""
    a = np.where(np.arange(N) % 2, 0.9, 0.1)
    b, c = np.where(np.arange(N) % 2, 0.8, np.nan), a - 0.05
    values = {("insertion", name): column for name, column in (("a", a), ("b", b), ("c", c))}
    found = compared(tmp_path, values, metrics=["insertion"], methods=("a", "b", "c"))
    assert found.leader("insertion", 1) == 0
    assert [found.level("insertion", i) for i in range(3)] == [True, False, False]
    alone = compared(tmp_path / "two", {**values}, metrics=["insertion"], methods=("a", "b"))
    assert alone.leader("insertion", 0) is None, "two that were judged on other images"
    assert not alone.level("insertion", 0)


def test_rows_without_a_value_are_counted_and_left_out(tmp_path):
    a, b = RNG.random(N), RNG.random(N)
    a[:7], b[3:12] = np.nan, np.nan
    found = compared(tmp_path, {("pointing-game", "a"): a, ("pointing-game", "b"): b}, metrics=["pointing-game"])
    cells = found.slices[0].cells
    assert [dict(cells["pointing-game", i].excluded) for i in (0, 1)] == [{"no_boxes": 7}, {"no_boxes": 9}]
    assert cells["pointing-game", 0].mean == pytest.approx(a[7:].mean())
    (d,) = found.differences
    assert (d.n, d.mean) == (N - 12, pytest.approx((a[12:] - b[12:]).mean()))
    for text in (table_pages.table_text(found), table_pages.table_markdown(found), table_pages.table_html(found, RUNS)):
        assert "7 no_boxes" in text
    nothing = compared(
        tmp_path, {("pointing-game", "a"): a * np.nan, ("pointing-game", "b"): b}, metrics=["pointing-game"]
    )
    assert (nothing.slices[0].cells["pointing-game", 0].n, nothing.differences) == (0, ())
    assert "-  n=0; left out: 60 no_boxes" in table_pages.table_text(nothing)


def test_max_box_accuracy_takes_one_threshold_for_all(tmp_path):
    curves = RNG.random((N, 20))
    found = compared(tmp_path, {("max-box-acc", "a"): curves}, metrics=["max-box-acc"], methods=("a",))
    hits = [np.mean([curve[t] >= 0.5 for curve in curves]) for t in range(20)]
    cell = found.slices[0].cells["max-box-acc", 0]
    assert cell.mean == pytest.approx(max(hits))
    assert cell.mean < np.mean([curve.max() >= 0.5 for curve in curves]), "the best for each would be more"
    assert cell.low <= cell.high
    np.testing.assert_allclose(found.curves["max-box-acc", 0], curves.mean(axis=0), atol=1e-6)


def test_runs_are_paired_by_image(tmp_path):
    values = RNG.random(N)
    other = list(reversed([f"image {i:03d}" for i in range(20, N + 20)]))
    RUNS[:] = [
        FakeRun(tmp_path / "x" / "run", {("deletion", "a"): values}, methods=("a",)),
        FakeRun(tmp_path / "y" / "run", {("deletion", "a"): np.arange(N) / N}, methods=("a",), ids=other),
    ]
    found = compare_metrics(RUNS, ["deletion"], [["a"], ["a"]])
    assert [entry.label for entry in found.entries] == ["x/run: a", "y/run: a"]
    (d,) = found.differences
    second = {name: i / N for i, name in enumerate(other)}
    wanted = [values[i] - second[f"image {i:03d}"] for i in range(20, N)]
    assert (d.n, d.mean) == (N - 20, pytest.approx(np.mean(wanted)))


def test_only_like_targets_are_compared(tmp_path):
    found = compared(
        tmp_path,
        {("deletion", "a"): RNG.random(N), ("deletion", "b"): RNG.random(N)},
        metrics=["deletion"],
        targets=(("predicted", 0), ("class", 1), ("class", 2)),
    )
    assert [entry.label for entry in found.entries][:3] == ["a (predicted)", "a (class 1)", "a (class 2)"]
    pairs = {(found.entries[d.a].label, found.entries[d.b].label) for d in found.differences}
    assert pairs == {("a (predicted)", "b (predicted)")}


# --- slices ---------------------------------------------------------------------------------------------------


def test_slices_hold_their_images(tmp_path):
    a = RNG.random(N)
    values = {("increase", "a"): a, ("increase", "b"): a / 2}
    found = compared(tmp_path, values, metrics=["increase"], by=("class", "correct", "scene", "label"))
    shown = {(part.column, part.value): part for part in found.slices}
    assert next(iter(shown)) == ("", "")
    at = {
        ("class", "bee"): [i for i in range(N) if i % 3 == 1],
        ("correct", "correct"): [i for i in range(N) if (i % 2 and i % 3 == 0) or (not i % 2 and i % 3 == 1)],
        ("scene", "in"): list(range(20)),
        ("label", "ant"): [i for i in range(N) if i % 2],
    }
    for key, images in at.items():
        cell = shown[key].cells["increase", 0]
        assert (shown[key].images, cell.n, cell.mean) == (len(images), len(images), pytest.approx(a[images].mean()))
    assert {value for column, value in shown if column == "correct"} == {"correct", "incorrect"}
    with pytest.raises(InputError, match=r"no such column .* nearest: scene"):
        compared(tmp_path, values, metrics=["increase"], by=("scenes",))


def test_many_slices_are_cut_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MOST_SLICES", 2)
    found = compared(tmp_path, {("increase", "a"): RNG.random(N)}, metrics=["increase"], methods=("a",), by=("class",))
    assert len(found.slices) == 3
    assert found.notes == ("class: the 2 largest of 3 slices are shown",)
    assert found.notes[0] in table_pages.table_text(found)


def test_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run has rows"):
        compared(tmp_path, {}, metrics=["increase"])


# --- pages ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path):
    curve = np.linspace(0.9, 0.1, 29)
    values = {
        ("deletion", "a"): [curve + 0.1 * RNG.random() for _ in range(N)],
        ("deletion", "b"): [curve / 2 for _ in range(N)],
        ("increase", "a"): RNG.integers(0, 2, N),
        ("increase", "b"): RNG.integers(0, 2, N),
    }
    ids = [f"<img src=x> {i}" for i in range(N)]
    return compared(tmp_path, values, metrics=["deletion", "increase"], by=("scene",), ids=ids)


def test_best_and_worst_images(shown):
    best, worst = shown.extremes["deletion", 0]
    values = [max(row) for row in [RUNS[0].values["deletion", "a"][i] for i in range(N)]]
    assert best[0][:2] == (f"<img src=x> {int(np.argmin(values))}", f"/photos/<img src=x> {int(np.argmin(values))}.jpg")
    assert worst[0][2] == pytest.approx(max(values), abs=1e-6)
    assert [len(best), len(worst)] == [5, 5]
    assert ("deletion", 1) not in shown.extremes, "its values are all alike"


def test_text_and_markdown(shown):
    text = table_pages.table_text(shown)
    assert "deletion ↓" in text
    assert "  * b  0.450 [0.450, 0.450]  n=60" in text
    assert "--- scene: in (20 images)" in text
    lines = table_pages.table_markdown(shown).splitlines()
    assert lines[0] == "| | deletion ↓ | increase ↑ |"
    assert lines[3].startswith("| b | **0.450 [0.450, 0.450]** | ")
    assert any("≈" in line for line in lines[2:4])
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_csv_files_hold_every_number(shown):
    rows = list(csv.DictReader(io.StringIO(table_pages.table_csv(shown))))
    assert len(rows) == 3 * 2 * 2
    cell = shown.slices[0].cells["deletion", 1]
    row = next(row for row in rows if (row["slice"], row["metric"], row["entry"]) == ("", "deletion", "b"))
    assert [float(row[key]) for key in ("mean", "low", "high")] == [cell.mean, cell.low, cell.high]
    pairs = list(csv.DictReader(io.StringIO(table_pages.differences_csv(shown))))
    assert [(row["metric"], row["a"], row["b"]) for row in pairs] == [("deletion", "a", "b"), ("increase", "a", "b")]
    assert [row["distinguishable"] for row in pairs] == ["yes", "yes" if shown.differences[1].distinguishable else "no"]
    told = json.loads(json.dumps(table_pages.table_json(shown), allow_nan=False))
    assert len(told["table"]) == len(rows)
    assert told["differences"][0]["distinguishable"] is True


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key == "href"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


def test_the_page_is_whole_and_runs_nothing(shown, tmp_path):
    page = Page(table_pages.table_html(shown, RUNS))
    assert page.open == []
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("figure") == 1
    assert all(link.startswith("file:///photos/%3Cimg") for link in page.links)
    written = table_pages.write_pages(shown, RUNS, tmp_path / "out" / "deep")
    assert written.read_text() == table_pages.table_html(shown, RUNS)
    assert {path.name for path in written.parent.iterdir()} == {
        "index.html",
        "table.md",
        "table.csv",
        "differences.csv",
    }
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        table_pages.write_pages(shown, RUNS, tmp_path / "file")


def test_numbers_are_short():
    cells = [0.0, 0.12345, 0.0004, -2.0, float("nan")]
    assert [table_pages.number(value) for value in cells] == ["0.000", "0.123", "4.0e-04", "-2.000", "-"]
    assert table_pages.left_out(SimpleNamespace(excluded={"flat": 2, "no_boxes": 1})) == "2 flat, 1 no_boxes"
