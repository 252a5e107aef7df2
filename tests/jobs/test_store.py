"""A run's folder: pixel maps in 16 bits, commits in their order, rows as they were written, and every damage found."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from heatmill import RunError, open_run
from heatmill.engine.jobs import store

GRID = (2, 3)
SIZE = (8, 6)
FLOAT32 = np.finfo(np.float32)


# --- named arrays -------------------------------------------------------------------------------------------


def test_named_arrays_come_back_as_they_were_and_the_same_bytes_each_time():
    rng = np.random.default_rng(0)
    given_arrays = {
        "segments": rng.integers(0, 9, (7, 5)).astype(np.int32),
        "correlation": rng.normal(size=(9, 9)).astype(np.float32),
        "links": np.zeros((0, 2), np.int32),
    }
    data = store.encode_arrays(given_arrays)
    assert data == store.encode_arrays(given_arrays)
    again = store.decode_arrays(data)
    assert list(again) == list(given_arrays)
    for name, array in given_arrays.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


# --- pixel maps ---------------------------------------------------------------------------------------------


def round_trip(values):
    data, scale, offset = store.encode_pixels(values)
    # the row keeps both numbers as float32
    return store.decode_pixels(data, float(np.float32(scale)), float(np.float32(offset)), values.shape)


def assert_faithful(values):
    """Within 1/2048 of the range (and the rounding of float32 itself), and in the same order."""
    again = round_trip(values)
    assert again.dtype == np.float32
    assert again.shape == values.shape
    exact, decoded = values.astype(np.float64).ravel(), again.astype(np.float64).ravel()
    rounding = np.abs(values).max().astype(np.float64) * 2**-24 + 2.0**-150
    assert np.abs(decoded - exact).max() <= np.ptp(exact) / 2048 + rounding
    assert (np.diff(decoded[np.argsort(exact, kind="stable")]) >= 0).all()
    assert again.min() == values.min()


@settings(max_examples=300, deadline=None)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(width=32, **{"allow_nan": False, "allow_infinity": False}),
    )
)
@example(np.array([[0.0, 1e-45]], dtype=np.float32))
@example(np.array([[FLOAT32.min, FLOAT32.max]], dtype=np.float32))
def test_pixel_maps_of_any_finite_values(values):
    assert_faithful(values)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-9, 1e-3, 1, 1e9, 1e35])
@pytest.mark.parametrize("offset", [0, -0.5, 1000])
def test_pixel_maps_at_any_scale(scale, offset):
    noise = np.random.default_rng(3).normal(size=(29, 31))
    assert_faithful(((noise + offset) * scale).astype(np.float32))


def test_a_constant_pixel_map_is_exact():
    for constant in (0.0, -7.25, 1e-9, 1e9, 1e-45):
        values = np.full((5, 4), constant, dtype=np.float32)
        np.testing.assert_array_equal(round_trip(values), values)


def test_small_values_beside_a_large_one_keep_their_order():
    values = np.array([[1e-9, 2e-9, 3e-9], [1e-6, 1e-3, 1.0]], dtype=np.float32)
    again = round_trip(values).ravel()
    assert (np.diff(again) > 0).all()


# --- commits ------------------------------------------------------------------------------------------------


def recorded(monkeypatch):
    """What the file system is asked to do, in order, by the names of the files."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append(("fsync", path, path.read_bytes() if path.is_file() else None))
        return fsync(handle)

    def watched_replace(source, target):
        calls.append(("replace", Path(source), Path(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return calls


def test_a_commit_is_bytes_fsync_rename_directory_fsync(tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    store.commit(tmp_path, "data/part-000000.parquet", b"everything")
    temporary = calls[0][1]
    assert temporary.parent == tmp_path / "_tmp"
    assert calls == [
        ("fsync", temporary, b"everything"),
        ("replace", temporary, tmp_path / "data/part-000000.parquet"),
        ("fsync", tmp_path / "data", None),
    ]
    assert (tmp_path / "data/part-000000.parquet").read_bytes() == b"everything"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("earlier", [None, b"an earlier commit"])
def test_a_failing_step_leaves_nothing_half_written(tmp_path, monkeypatch, step, earlier):
    final = tmp_path / "data/part-000000.parquet"
    if earlier is not None:
        store.commit(tmp_path, "data/part-000000.parquet", earlier)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if step == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    else:
        monkeypatch.setattr(os, step, fail)
    try:
        with pytest.raises(OSError, match=r"File too large|No space left") as failure:
            store.commit(tmp_path, "data/part-000000.parquet", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failure.value.errno in store.SPACE_GONE
    assert list((tmp_path / "_tmp").iterdir()) == []
    assert (final.read_bytes() if final.exists() else None) == earlier


def test_only_parts_count_as_committed(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("part-000003.parquet", "part-1234567.parquet", "part-x.parquet", "part-000001.parquet.tmp", "notes"):
        (tmp_path / "data" / name).touch()
    assert store.committed(tmp_path) == {3, 1234567}
    assert store.committed(tmp_path / "nowhere") == set()


# --- a run of known rows ------------------------------------------------------------------------------------

CALLS = {"cam": False, "rise:masks=4": True}  # method -> whether its maps are pixels


def known_map(call, row, target):
    rng = np.random.default_rng([row, target, len(call)])
    return rng.normal(size=SIZE if CALLS[call] else GRID).astype(np.float32)


def known_rows(row, calls):
    """The rows of one image: it is explained for its classes 1 and 0, but the third image is bad."""
    values = []
    for call in calls:
        for source, target in (("top1", 1), ("top2", 0)):
            one = {"row": row, "id": f"photo{row}", "uri": f"/pictures/photo{row}.png", "method": call}
            if row == 2:
                one |= {"target_source": source, "status": "truncated", "error": "it ends early"}
            else:
                one |= {
                    "target": target, "target_source": source, "label_name": ["ant", "bee"][target],
                    "score": 0.25 + row, "pred": 1, "pred_score": 0.5, "status": "ok", "width": 40, "height": 30 + row,
                    "crop_box": (0.0, 1.5, 40.0, 28.5), "extras": json.dumps({"passes": 4, "reason": "näive"}),
                }  # fmt: skip
                values_map = known_map(call, row, target)
                one["map_shape"] = values_map.shape
                if CALLS[call]:
                    column = "map_pixels" if "cam" in calls else "map"
                    one |= dict(zip((column, "map_scale", "map_offset"), store.encode_pixels(values_map), strict=True))
                else:
                    one["map"] = values_map.ravel()
            values.append(one)
    return values


def write_run(folder, calls=tuple(CALLS), images=5, shard_rows=2, shards=None):
    grid = GRID if "cam" in calls else None
    uris = [f"/pictures/photo{row}.png" for row in range(images)]
    plan = pa.table(
        {
            "row": pa.array(range(images), pa.int64()), "id": [f"photo{row}" for row in range(images)], "uri": uris,
            "size": pa.array([10] * images, pa.int64()), "label": pa.nulls(images, pa.string()),
        }
    )  # fmt: skip
    identity = {"--method": list(calls), "images": images}
    said = {
        "format": 1, "identity": identity, "images": images, "rows_per_image": 2 * len(calls), "shard_rows": shard_rows,
        "model": {"path": "m.onnx", "sha256": "0" * 64, "scores": "scores"}, "spec": {"input_size": [3, *SIZE]},
        "methods": [{"call": call} for call in calls], "targets": [["top", 2]], "grid": list(grid) if grid else None,
        "plan_hash": store.plan_hash(identity, shard_rows, plan),
    }  # fmt: skip
    store.commit(folder, store.PLAN, store.parquet_bytes(plan))
    store.commit(folder, "run.json", json.dumps(said).encode())
    columns = store.schema(grid, any(CALLS[call] for call in calls))
    for shard in range(-(-images // shard_rows)) if shards is None else shards:
        rows = [
            values
            for row in range(shard * shard_rows, min(images, (shard + 1) * shard_rows))
            for values in known_rows(row, calls)
        ]
        store.write_part(folder, shard, rows, columns, json.dumps({"plan_hash": said["plan_hash"], "shard": shard}))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run of both kinds of maps: 5 images, 3 shards, 20 rows; not to be changed."""
    return write_run(tmp_path_factory.mktemp("runs") / "sound")


@pytest.fixture
def run(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "run")


def test_the_columns_are_the_contract_s():
    contract = [
        *(
            "row",
            "id",
            "uri",
            "method",
            "target",
            "target_source",
            "label_name",
            "score",
            "pred",
            "pred_score",
            "status",
        ),
        *("error", "width", "height", "crop_box", "extras", "map_shape", "map"),
    ]
    assert store.schema((7, 7), False).names == contract
    assert store.schema((7, 7), False).field("map").type == pa.list_(pa.float32(), 49)
    assert store.schema(None, True).names == [*contract, "map_scale", "map_offset"]
    assert store.schema(None, True).field("map").type == pa.binary()
    assert store.schema((7, 7), True).names == [*contract, "map_pixels", "map_scale", "map_offset"]
    assert store.schema(None, True, arrays=True).names == [*contract, "map_scale", "map_offset", "arrays"]
    decoding = {"empty", "truncated", "not_an_image", "unsupported_mode", "too_large", "too_small"}
    others = {"ok", "io_error", "missing", "changed", "nonfinite", "worker_crash"}
    assert set(store.STATUSES) == decoding | others


@pytest.mark.parametrize("calls", [("cam",), ("rise:masks=4",), ("cam", "rise:masks=4")])
def test_rows_come_back_as_they_were_written(tmp_path, calls):
    opened = open_run(write_run(tmp_path / "run", calls))
    written = [values for row in range(5) for values in known_rows(row, calls)]
    found = list(opened.rows())
    assert len(found) == len(written)
    for row, values in zip(found, written, strict=True):
        assert (row.row, row.id, row.path, row.method) == tuple(values[k] for k in ("row", "id", "uri", "method"))
        names = ("target", "target_source", "label_name", "score", "status", "error", "width", "height", "crop_box")
        assert [getattr(row, name) for name in names] == [values.get(name) for name in names]
        assert (row.prediction, row.prediction_score) == (values.get("pred"), values.get("pred_score"))
        assert row.extras == json.loads(values.get("extras", "{}"))
        if values["status"] != "ok":
            assert row.map is None
            with pytest.raises(ValueError, match=r"no map: its status is truncated"):
                row.upsampled()
            continue
        expected = known_map(row.method, row.row, row.target)
        assert (row.map.dtype, row.map.shape) == (np.float32, expected.shape)
        if CALLS[row.method]:
            np.testing.assert_allclose(row.map, expected, atol=np.ptp(expected) / 2048)
            np.testing.assert_array_equal(row.upsampled(), row.map)
        else:
            np.testing.assert_array_equal(row.map, expected)
        assert row.upsampled().shape == SIZE
        saliency = row.saliency()
        assert (saliency.shape, saliency.min(), saliency.max()) == (SIZE, 0, 1)


def test_a_tap_map_is_upsampled_with_half_pixel_centres(sound):
    row = next(open_run(sound).rows(method="cam"))
    (h, w), (rows, columns) = SIZE, GRID
    y = np.clip((np.arange(h) + 0.5) * rows / h - 0.5, 0, rows - 1)
    x = np.clip((np.arange(w) + 0.5) * columns / w - 0.5, 0, columns - 1)
    across = np.stack([np.interp(x, range(columns), line) for line in row.map.astype(np.float64)])
    expected = np.stack([np.interp(y, range(rows), line) for line in across.T]).T
    np.testing.assert_allclose(row.upsampled(), expected, atol=1e-6)


def test_filters(sound):
    opened = open_run(sound)
    every = [(row.row, row.method, row.target, row.status) for row in opened.rows()]

    def kept(**filters):
        return [(row.row, row.method, row.target, row.status) for row in opened.rows(**filters)]

    assert len(every) == 20
    assert kept(method="CAM") == [row for row in every if row[1] == "cam"]
    assert kept(method="rise") == kept(method="Rise:masks=4") == [row for row in every if row[1] != "cam"]
    assert kept(method="rise:masks=5") == []
    assert kept(target=0) == [row for row in every if row[2] == 0]
    assert kept(status="truncated") == [row for row in every if row[0] == 2]
    assert kept(method="cam", target=1, status="ok") == [(row, "cam", 1, "ok") for row in (0, 1, 3, 4)]


def test_more_rows_than_one_read_takes(tmp_path):
    opened = open_run(write_run(tmp_path / "run", ("cam",), images=700, shard_rows=1024))
    found = list(opened.rows(status="ok"))
    assert [row.row for row in found[::2]] == [row for row in range(700) if row != 2]
    for row in found:
        np.testing.assert_array_equal(row.map, known_map("cam", row.row, row.target))


def test_the_table_has_every_column_but_the_maps(sound):
    table = open_run(sound).table()
    assert table.column_names == [name for name, _ in store.COLUMNS if name != "map_shape"]
    assert table["row"].to_pylist() == [row for row in range(5) for _ in range(4)]
    assert table["error"].to_pylist()[8:12] == ["it ends early"] * 4


def test_an_unfinished_run_can_be_read(tmp_path):
    run = write_run(tmp_path / "run", shards=[])
    assert list(open_run(run).rows()) == []
    assert open_run(run).table().num_rows == 0
    assert store.verify(run) == {"shards": 3, "committed": 0, "rows": 0, "ok": 0}
    run = write_run(tmp_path / "run", shards=[2, 0])
    assert [row.row for row in open_run(run).rows(method="cam", target=1)] == [0, 1, 4]
    assert store.verify(run) == {"shards": 3, "committed": 2, "rows": 12, "ok": 12}


def test_plain_pyarrow_reads_a_part(sound):
    table = pq.read_table(sound / "data/part-000000.parquet")
    cam = table.filter(pa.compute.equal(table["method"], "cam"))
    assert table.schema.field("map").type == pa.list_(pa.float32(), 6)
    expected = [known_map("cam", row, target).ravel().tolist() for row in (0, 1) for target in (1, 0)]
    assert cam["map"].to_pylist() == expected
    assert cam["map_shape"].to_pylist() == [list(GRID)] * 4
    bad = pq.read_table(sound / "data/part-000001.parquet", filters=[("status", "!=", "ok")])
    assert bad["map"].to_pylist() == [None] * 4
    assert bad["crop_box"].null_count == 4
    assert table.schema.metadata.keys() >= {b"heatmill"}


def test_a_part_written_again_has_the_same_bytes(sound, tmp_path):
    again = write_run(tmp_path / "again")
    for path in ("plan/plan-00000.parquet", *(f"data/part-{shard:06d}.parquet" for shard in range(3))):
        assert (again / path).read_bytes() == (sound / path).read_bytes()


# --- damage -------------------------------------------------------------------------------------------------


def refusal(path, check=store.verify):
    with pytest.raises(RunError) as refused:
        check(path)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_a_sound_run(sound):
    assert store.verify(sound) == {"shards": 3, "committed": 3, "rows": 20, "ok": 16}


def part(run, shard=1):
    return run / f"data/part-{shard:06d}.parquet"


@pytest.mark.parametrize("kept", [0, 4, 1000, -100, -1])
def test_a_truncated_part(run, kept):
    data = part(run).read_bytes()
    part(run).write_bytes(data[:kept])
    assert f"{part(run)}: damaged" in refusal(run)
    assert str(part(run)) in refusal(run, lambda path: list(open_run(path).rows()))
    assert str(part(run)) in refusal(run, lambda path: open_run(path).table())


def test_flipped_bytes_are_found_wherever_they_matter(run):
    """Any byte: `verify` names the part, or what is read is still exactly what was written."""
    good = part(run).read_bytes()

    def content():
        names = [name for name in store.Row.__slots__ if name != "map"]
        rows = open_run(run).rows()
        return [
            (*(str(getattr(row, name)) for name in names), row.map is not None and row.map.tobytes()) for row in rows
        ]

    expected = content()
    rng = np.random.default_rng(11)
    found = 0
    for place in rng.choice(len(good), 400, replace=False):
        bad = bytearray(good)
        bad[place] ^= int(rng.integers(1, 256))
        part(run).write_bytes(bad)
        try:
            store.verify(run)
        except RunError as err:
            found += str(part(run)) in str(err)
        else:
            assert content() == expected, f"byte {place} of {len(good)}"
    assert found > 200


def test_a_part_of_another_run(run, tmp_path):
    other = write_run(tmp_path / "other", images=6)
    shutil.copy(part(other), part(run))
    assert f"{part(run)}: belongs to another run" in refusal(run)


def test_a_part_under_another_number(run):
    shutil.copy(part(run, 0), part(run, 1))
    assert "not the plan's 8 in order" in refusal(run)


def test_a_part_beyond_the_plan(run):
    shutil.copy(part(run, 0), part(run, 3))
    assert f"{part(run, 3)}: belongs to another run" in refusal(run)


def changed(run, change, shard=1):
    """Write a part again, its table changed."""
    table = pq.read_table(part(run, shard))
    store.commit(run, store.part_name(shard), store.parquet_bytes(change(table)))


def replaced(table, name, values):
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.take(list(range(8))[::-1]), "not the plan's 8 in order"),
        (lambda table: table.take([2, 3, 0, 1, 4, 5, 6, 7]), "not the plan's 8 in order"),
        (lambda table: table.slice(0, 7), "its 7 rows are not the plan's 8"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "its 9 rows are not the plan's 8"),
        (lambda table: replaced(table, "id", ["x", *table["id"].to_pylist()[1:]]), "not the plan's 8 in order"),
        (lambda table: replaced(table, "status", ["okay"] * 8), "unknown status 'okay'"),
        (lambda table: replaced(table, "map", [[np.nan] * 6] * 8), "is ok and has no finite map"),
        (lambda table: replaced(table, "map_shape", [None] * 8), "is ok and has no finite map"),
        (lambda table: table.drop_columns(["score"]), "its columns are not the run's"),
        (lambda table: table.replace_schema_metadata(), "damaged"),
    ],
)  # fmt: skip
def test_a_part_with_other_rows(run, change, told):
    changed(run, change)
    line = refusal(run)
    assert str(part(run)) in line
    assert told in line


def test_a_missing_shard_is_counted(run):
    part(run).unlink()
    assert store.verify(run) == {"shards": 3, "committed": 2, "rows": 12, "ok": 12}


def test_a_damaged_plan(run):
    good = (run / store.PLAN).read_bytes()
    for bad in (b"", good[: len(good) // 2], good[:-1]):
        (run / store.PLAN).write_bytes(bad)
        assert "plan-00000.parquet: damaged" in refusal(run)
    (run / store.PLAN).unlink()
    assert "plan-00000.parquet: damaged" in refusal(run)
    other = pq.read_table(pa.BufferReader(good))
    store.commit(run, store.PLAN, store.parquet_bytes(replaced(other, "id", [*"abcde"])))
    assert "do not belong together" in refusal(run)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "can't be read"),
        ("[1]", "not an object"),
        ('{"format": 1}', "it lacks 'grid'"),
        ('{"format": 2}', "run format 2; this heatmill reads format 1"),
        ("{}", "run format None"),
    ],
)
def test_a_damaged_run_json(run, text, told):
    (run / "run.json").write_text(text)
    assert told in refusal(run)


def test_a_run_json_that_was_edited(run):
    said = json.loads((run / "run.json").read_text())
    said["identity"]["images"] = 4
    (run / "run.json").write_text(json.dumps(said))
    assert "do not belong together" in refusal(run)


def test_a_folder_that_is_no_run(tmp_path):
    assert "not a run (it has no run.json)" in refusal(tmp_path)
    assert "not a run (it has no run.json)" in refusal(tmp_path / "nowhere")
