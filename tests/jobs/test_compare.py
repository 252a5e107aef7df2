"""Two runs made by hand: which rows are paired, what is counted and what is not, and the page that shows it."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from heatmill import InputError, RunError
from heatmill.engine.jobs import compare as comparing
from heatmill.engine.jobs import store
from heatmill.engine.jobs.compare import MEASURES, common_maps, compare, compare_text
from heatmill.engine.jobs.compare_page import write_page
from heatmill.engine.jobs.report import overlay
from tests.jobs.test_report import HOSTILE, Builder, Page, decoded
from tests.kernels.test_similarity import angle, correlation, rank, shared

MAPS = np.random.default_rng(5).normal(size=(40, 2, 2)).astype(np.float32)


@pytest.fixture
def runs(tmp_path):
    """Builders of two runs."""
    return Builder(tmp_path / "first"), Builder(tmp_path / "second")


def compared(runs, out=None, **options):
    a, b = (each.open() for each in runs)
    return compare(a, b, out, **options)


def pairs_of(found):
    return pq.read_table(f"{found.told['out']}/pairs.parquet").to_pylist()


def test_every_measure_is_its_formula(runs):
    for i, identity in enumerate("abcdef"):
        runs[0].image(identity).add(MAPS[i], score=0.5)
        runs[1].image(identity).add(MAPS[i + 10], score=0.5 + i / 100)
    found = compared(runs, top=0.5)
    values = []
    for i, pair in enumerate(pairs_of(found)):
        a, b = MAPS[i].ravel().tolist(), MAPS[i + 10].ravel().tolist()
        expected = [correlation(rank(a), rank(b)), angle(a, b), shared(a, b, 0.5)]
        assert [pair[name] for name in MEASURES] == pytest.approx(expected, abs=1e-9)
        assert (pair["id"], pair["reason"]) == ("abcdef"[i], None)
        values.append(expected)
    (group,) = found.told["groups"]
    assert (group["pairs"], group["compared"], group["excluded"]) == (6, 6, {})
    for name, column in zip(MEASURES, np.array(values).T, strict=True):
        ordered = sorted(column)
        assert group[name]["mean"] == pytest.approx(math.fsum(column) / 6, abs=1e-9)
        assert group[name]["median"] == pytest.approx((ordered[2] + ordered[3]) / 2, abs=1e-9)
        assert group[name]["p05"] == pytest.approx(ordered[0] + 0.25 * (ordered[1] - ordered[0]), abs=1e-9)
        assert group[name]["least"] == pytest.approx(ordered[0], abs=1e-9)
    assert group["score_difference"] == pytest.approx({"mean": 0.025, "greatest": 0.05}, abs=1e-6)
    assert json.loads((runs[0].path / "report/compare/run/summary.json").read_text()) == json.loads(
        json.dumps(found.told)
    )


@pytest.mark.parametrize(("held", "values"), [(1, 1 << 19), (2, 5), (1024, 1 << 19)])
def test_the_figures_do_not_depend_on_how_many_pairs_are_measured_together(runs, monkeypatch, held, values):
    monkeypatch.setattr(comparing, "PAIRS_HELD", held)
    monkeypatch.setattr(comparing, "VALUES_HELD", values)
    for i in range(7):
        runs[0].image(f"{i}").add(MAPS[i])
        runs[1].image(f"{i}").add(MAPS[i + 10])
    found = compared(runs)
    expected = [correlation(rank(MAPS[i].ravel().tolist()), rank(MAPS[i + 10].ravel().tolist())) for i in range(7)]
    assert [pair["spearman"] for pair in pairs_of(found)] == pytest.approx(expected)
    assert found.told["groups"][0]["spearman"]["mean"] == pytest.approx(np.mean(expected))


def test_images_are_matched_by_id_and_the_others_are_counted(runs):
    for identity in ("a", "b/1", "b/2", "\u00e9"):
        runs[0].image(identity).add()
    for identity in ("0", "b/1", "c", "d", "\u00e9", "\U0001f600"):
        runs[1].image(identity).add()
    found = compared(runs)
    assert found.told["images"] == {"common": 2, "only_a": 2, "only_b": 4}
    assert [pair["id"] for pair in pairs_of(found)] == ["b/1", "\u00e9"]


def test_rows_are_matched_by_method_and_by_what_was_asked(runs):
    for builder, methods in zip(runs, (["cam", "rise"], ["layer-cam", "rise"]), strict=True):
        builder.methods, builder.targets, builder.rows_per_image = methods, [["top", 2], ["class", 1]], 6
        builder.image("a")
        for method in methods:
            builder.add(MAPS[0], method=method, target_source="top1", target=0)
            builder.add(MAPS[1], method=method, target_source="top2", target=1)
            builder.add(MAPS[2], method=method, target_source="class", target=1 if builder is runs[0] else 2)
    found = compared(runs)
    told = [(group["method_a"], group["target_a"], group["pairs"]) for group in found.told["groups"]]
    assert told == [("rise", "top1", 1), ("rise", "top2", 1)]
    alone = ["cam, top1", "cam, top2", "cam, class 1", "rise, class 1"]
    assert found.told["unmatched"]["a"] == dict.fromkeys(alone, 1)
    assert list(found.told["unmatched"]["b"]) == [
        "layer-cam, top1", "layer-cam, top2", "layer-cam, class 2", "rise, class 2"
    ]  # fmt: skip
    assert all(group["spearman"]["least"] == pytest.approx(1) for group in found.told["groups"])


def test_methods_that_only_one_run_has_are_named(runs):
    runs[0].methods = runs[1].methods = ["cam", "rise"]
    runs[0].image("a").add(method="cam").add(method="rise")
    runs[1].image("a").add(method="cam")
    assert compared(runs).told["unmatched"] == {"a": {"rise, predicted": 1}, "b": {}}


def test_runs_of_one_method_and_one_target_are_matched_whatever_these_are(runs):
    runs[1].methods, runs[1].targets = ["rise"], [["label", 0]]
    runs[0].image("a").add(MAPS[0]).image("b").add(MAPS[1])
    runs[1].image("a").add(MAPS[0], target_source="label")
    runs[1].image("b").add(MAPS[1], target_source="label", target=3)
    (group,) = compared(runs).told["groups"]
    assert [group[f"{name}_{side}"] for name in ("method", "target") for side in "ab"] == [
        "cam", "rise", "predicted", "label"
    ]  # fmt: skip
    assert (group["compared"], group["excluded"]) == (1, {"other class": 1})
    assert (
        "cam with rise, predicted with label: 1 of 2 pairs compared\n  not counted: other class (1)\n"
        in compare_text(compared(runs).told)
    )


def test_one_method_of_each_may_be_chosen_also_in_one_run(runs):
    builder = runs[0]
    builder.methods = ["cam", "rise:masks=8", "rise:masks=9"]
    builder.rows_per_image = 3
    builder.image("a").add(MAPS[0])
    for call in builder.methods[1:]:
        builder.add(MAPS[1], method=call)
    run = builder.open()
    (group,) = compare(run, run, method_a="CAM", method_b="rise:masks=9").told["groups"]
    assert (group["method_a"], group["method_b"], group["compared"]) == ("cam", "rise:masks=9", 1)
    assert [group["method_a"] for group in compare(run, run, method_a="rise", method_b="rise").told["groups"]] == [
        "rise:masks=8", "rise:masks=9"
    ]  # fmt: skip


def test_pairs_that_say_nothing_are_left_out_with_their_reasons(runs):
    level = np.full((2, 2), 0.3, np.float32)
    cases = [
        (dict(raw=None, status="truncated"), dict(raw=None, status="truncated"), "truncated in both"),
        (dict(raw=None, status="truncated"), dict(raw=None, status="missing"), "truncated in A, missing in B"),
        (dict(), dict(raw=None, status="nonfinite"), "nonfinite in B"),
        (dict(raw=level), dict(), "flat in A"),
        (dict(raw=np.zeros((2, 2))), dict(raw=level), "flat in both"),
        (dict(), dict(raw=np.array([[np.nan, 0], [1, 2]])), "not finite in B"),
        (dict(raw=np.array([[np.inf, 0], [1, 2]])), dict(raw=level), "not finite in A, flat in B"),
        (dict(), dict(target=1), "other class"),
        (dict(crop_box=(0, 0, 20, 40)), dict(crop_box=(30, 0, 50, 40)), "no common part"),
        (dict(), dict(), None),
    ]
    for i, (a, b, _) in enumerate(cases):
        runs[0].image(f"{i}").add(**a)
        runs[1].image(f"{i}").add(**b)
    found = compared(runs)
    assert [pair["reason"] for pair in pairs_of(found)] == [reason for *_, reason in cases]
    (group,) = found.told["groups"]
    assert (group["pairs"], group["compared"]) == (10, 1)
    assert group["excluded"] == {reason: 1 for *_, reason in cases[:-1]}
    assert group["spearman"] == pytest.approx({"mean": 1, "median": 1, "p05": 1, "least": 1})
    other = next(pair for pair in pairs_of(found) if pair["reason"] == "other class")
    assert other["spearman"] == pytest.approx(1)
    page = Page(write_page(runs[0].open(), runs[1].open(), found))
    assert all(f"Not counted: {reason} (1)" in page.text for *_, reason in cases[:-1])


def test_runs_where_nothing_can_be_counted(runs):
    runs[0].image("a").add(None, status="empty", pred=None)
    runs[1].image("a").add()
    found = compared(runs)
    (group,) = found.told["groups"]
    assert (group["compared"], group["spearman"], group["score_difference"]) == (0, None, None)
    assert found.told["predictions"] == {"compared": 0, "flipped": 0, "share": None}
    assert "0 of 1 pairs compared" in compare_text(found.told)
    assert "0 of 1 pairs" in write_page(runs[0].open(), runs[1].open(), found).read_text()


def test_flipped_predictions_are_counted_by_image(runs):
    for i, (a, b) in enumerate([(0, 0), (1, 2), (3, 3), (4, 0)]):
        for builder, prediction in zip(runs, (a, b), strict=True):
            builder.methods, builder.rows_per_image = ["cam", "rise"], 2
            builder.image(f"{i}")
            for method in builder.methods:
                builder.add(method=method, pred=prediction, pred_score=0.2 + i / 10)
    found = compared(runs)
    assert found.told["predictions"] == {"compared": 4, "flipped": 2, "share": 0.5}
    assert [a.id for a, _ in found.flips] == ["3", "1"]
    text = write_page(runs[0].open(), runs[1].open(), found).read_text()
    assert "<td>1 dog (0.3)</td><td>2 crane (0.3)</td>" in text


def test_classes_are_one_by_name_where_the_runs_number_them_otherwise(runs):
    runs[1].names = ["background", *runs[0].names]
    runs[0].image("a").add(MAPS[0], target=1, pred=1).image("b").add(MAPS[0], target=1, pred=1)
    runs[1].image("a").add(MAPS[0], target=2, pred=2).image("b").add(MAPS[0], target=1, pred=1)
    found = compared(runs)
    assert found.told["predictions"]["flipped"] == 1
    (group,) = found.told["groups"]
    assert (group["compared"], group["excluded"]) == (1, {"other class": 1})


def test_the_worst_pairs_are_kept_from_the_worst_on(runs):
    for i in range(8):
        runs[0].image(f"{i}").add(MAPS[i])
        runs[1].image(f"{i}").add(MAPS[i + 10])
    for by in MEASURES:
        found = compared(runs, by=by, worst=3)
        values = {pair["id"]: pair[by] for pair in pairs_of(found)}
        assert [pair.first.id for pair in found.worst] == sorted(values, key=lambda name: (values[name], name))[:3]
        assert [pair["id"] for pair in found.told["worst"]] == [pair.first.id for pair in found.worst]
    text = compare_text(compared(runs, worst=7).told)
    lowest = sorted((pair["spearman"], pair["id"]) for pair in pairs_of(found))[0]
    assert f"lowest rank correlation:\n  {lowest[0]:.4f} {lowest[1]} (cam, predicted)\n" in text
    assert text.count("(cam, predicted)") == 5
    assert compared(runs, worst=0).worst == []


# --- views and grids ----------------------------------------------------------------------------------------------


def row_with(builder, values, box):
    """A row whose map and view are these."""
    row = next(builder.open().rows())
    changed = {name: getattr(row, name) for name in store.Row.__dataclass_fields__}
    return store.Row(**{**changed, "map": np.asarray(values, np.float32), "crop_box": box})


@pytest.fixture
def row(runs):
    return lambda values, box=(10.0, 0.0, 50.0, 40.0): row_with(runs[0], values, box)


@pytest.fixture(autouse=True)
def _one_image(request):
    if "row" in request.fixturenames:
        request.getfixturevalue("runs")[0].image("a").add()


def test_maps_of_one_grid_and_one_view_are_taken_as_they_are(row):
    a, b = row(MAPS[0]), row(MAPS[1], (10.1, 0.0, 50.1, 40.0))
    for found, given in zip(common_maps(a, b), (MAPS[0], MAPS[1]), strict=True):
        np.testing.assert_array_equal(found, given)


def linear(x, y):
    return 2 * x - 3 * y + 1


def sampled(box, shape):
    """A linear field on the centres of a grid over `box` of a photograph of 60 x 40."""
    x0, y0, x1, y1 = box
    xs = x0 + (np.arange(shape[1]) + 0.5) * (x1 - x0) / shape[1]
    ys = y0 + (np.arange(shape[0]) + 0.5) * (y1 - y0) / shape[0]
    return linear(xs[None, :], ys[:, None]) + np.zeros(shape)


@pytest.mark.parametrize(
    ("box_a", "shape_a", "box_b", "shape_b", "shape"),
    [
        ((10, 0, 50, 40), (4, 4), (10, 0, 50, 40), (8, 8), (8, 8)),
        ((10, 0, 50, 40), (8, 8), (0, 0, 60, 40), (8, 12), (8, 8)),
        ((10, 0, 50, 40), (10, 10), (18, 8, 58, 48), (10, 10), (8, 8)),
        ((0, 0, 60, 40), (20, 30), (-10, -10, 70, 50), (30, 40), (20, 30)),
    ],
)
def test_other_grids_and_views_are_compared_where_both_networks_looked(row, box_a, shape_a, box_b, shape_b, shape):
    """A field that is linear in the photograph comes back as itself but for the clamped edges."""
    a, b = common_maps(row(sampled(box_a, shape_a), box_a), row(sampled(box_b, shape_b), box_b))
    assert a.shape == b.shape == shape
    common = [max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3])]
    expected = sampled(common, shape)
    for found, box, its in ((a, box_a, shape_a), (b, box_b, shape_b)):
        xs = common[0] + (np.arange(shape[1]) + 0.5) * (common[2] - common[0]) / shape[1]
        ys = common[1] + (np.arange(shape[0]) + 0.5) * (common[3] - common[1]) / shape[0]
        half_x, half_y = (box[2] - box[0]) / its[1] / 2, (box[3] - box[1]) / its[0] / 2
        inside_x = (xs >= box[0] + half_x - 1e-6) & (xs <= box[2] - half_x + 1e-6)
        inside_y = (ys >= box[1] + half_y - 1e-6) & (ys <= box[3] - half_y + 1e-6)
        inner = np.ix_(inside_y, inside_x)
        assert inside_x.sum() * inside_y.sum() >= 16
        np.testing.assert_allclose(found[inner], expected[inner], atol=1e-4)


# --- settings, refusals, page -------------------------------------------------------------------------------------


def test_what_differs_between_the_runs_is_told(runs):
    runs[1].names = ["background", *runs[0].names]
    for builder in runs:
        builder.image("a").add()
    b = runs[1].open()
    b.settings["precision"], b.settings["spec"]["crop_pct"] = "fp16", 0.9
    told = compare(runs[0].open(), b).told["differences"]
    assert [line for line in told if line[0] != "spec: label_names"] == [
        ("precision", "fp32", "fp16"), ("spec: crop_pct", "none", "0.9")
    ]  # fmt: skip
    assert len(told) == 3
    again = compare(runs[0].open(), runs[0].open())
    assert again.told["differences"] == []
    assert "The runs have the same settings." in write_page(runs[0].open(), runs[0].open(), again).read_text()


def test_incomplete_runs_are_named(runs):
    runs[0].image("a").add()
    runs[1].image("a").add().image("b")
    runs[1].shard_rows = 1
    found = compared(runs)
    assert found.told["complete"] == {"a": True, "b": False}
    assert "B is not complete\n" in compare_text(found.told)
    assert "The run B is not complete." in write_page(runs[0].open(), runs[1].open(), found).read_text()


def test_refusals_write_nothing(runs, tmp_path):
    def refused(match, error=InputError, **options):
        with pytest.raises(error, match=match):
            compared(runs, **options)
        assert not (runs[0].path / "report").exists()

    runs[1].methods = ["rise", "lrp"]
    runs[0].image("a").add()
    runs[1].image("b").add()
    refused("no method in both runs: .* has cam; .* has rise, lrp; choose one of each with --method-a and --method-b")
    refused("--method-a 'grad-cam': .* has cam", method_a="grad-cam")
    refused("--top 0", method_b="rise", top=0)
    refused("no image in both runs: 1 only in .*, 1 only in .*; images are matched by id", method_b="rise")
    runs[1].methods, runs[1].targets, runs[1].rows_per_image = ["cam"], [["top", 2]], 2
    runs[1].rows.clear()
    runs[1].images.clear()
    runs[1].image("a").add(target_source="top1").add(target_source="top2", target=1)
    refused("no target in both runs: .* has predicted 0; .* has top 2")
    runs[0].image("Z").add()
    runs[1].image("c").add(target_source="top1")
    refused("'Z' comes after 'a'", RunError)


def test_a_folder_that_can_not_be_written(runs, tmp_path):
    for builder in runs:
        builder.image("a").add()
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        compared(runs, tmp_path / "taken")


def test_the_page_shows_both_maps_over_the_photograph_and_nothing_escapes(runs):
    names = sorted(HOSTILE)
    for identity in names:
        for builder in runs:
            builder.image(identity).add(MAPS[len(builder.images)], target=4, pred=5 if builder is runs[0] else 4)
    found = compared(runs, worst=100)
    page = Page(write_page(runs[0].open(), runs[1].open(), found))
    pictures = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    assert len(pictures) == 2 * len(names)
    assert all(source.startswith("data:image/webp;base64,") for source in pictures)
    assert {tag for tag, _ in page.elements} == set(
        [
            "html",
            "head",
            "meta",
            "link",
            "title",
            "style",
            "body",
            "p",
            "h1",
            "h2",
            "br",
            "ul",
            "li",
            "b",
            "div",
            "section",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "figure",
            "img",
            "figcaption",
        ]
    )
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.text)
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_picture_is_the_run_s_own_overlay(runs):
    for builder in runs:
        builder.image("a").add(MAPS[0] if builder is runs[0] else MAPS[1])
    a, b = (builder.open() for builder in runs)
    page = Page(write_page(a, b, compare(a, b)))
    shown = [decoded(attrs["src"].partition(",")[2], "RGB") for tag, attrs in page.elements if tag == "img"]
    for run, picture in zip((a, b), shown, strict=True):
        row = next(run.rows())
        with Image.open(row.path) as photograph:
            expected = overlay(np.asarray(photograph), row.saliency(), row.crop_box)
        assert np.abs(picture.astype(int) - expected).mean() < 6


def test_a_photograph_that_is_gone_leaves_the_map_on_grey(runs):
    for builder in runs:
        builder.image("a").add()
    a, b = (builder.open() for builder in runs)
    (runs[0].folder / "photographs/0.png").unlink()
    page = Page(write_page(a, b, compare(a, b)))
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 2


def test_memory_holds_some_pairs_not_the_run(runs, monkeypatch):
    """No more than PAIRS_HELD pairs are measured at once, and the file's groups are as small."""
    monkeypatch.setattr(comparing, "PAIRS_HELD", 4)
    sizes = []
    measure = comparing.measure
    monkeypatch.setattr(comparing, "measure", lambda held, *rest: sizes.append(len(held)) or measure(held, *rest))
    for i in range(10):
        for builder in runs:
            builder.image(f"{i}").add(MAPS[i])
    found = compared(runs)
    assert sizes == [4, 4, 2]
    with pq.ParquetFile(f"{found.told['out']}/pairs.parquet") as file:
        assert file.num_row_groups == 3
        assert file.schema_arrow.equals(pa.schema(comparing.PAIRS))
