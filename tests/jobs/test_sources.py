"""Listing folders, files and manifests, every refusal with its way out, and reading a listed file."""

import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heatmill import InputError
from heatmill.engine.jobs import sources
from heatmill.engine.jobs.sources import IMAGE_SUFFIXES, SCHEMA, list_source, read
from heatmill.models.preprocess import ImageRefused


def write(path, data=b"pixels"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows(*inputs, **options):
    return list_source(list(inputs), **options).table.to_pylist()


def ids(*inputs, **options):
    return [row["id"] for row in rows(*inputs, **options)]


def csv_file(folder, text, name="list.csv"):
    return write(folder / name, text.encode())


def parquet_file(folder, name="list.parquet", **columns):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def refusal(*inputs, **options):
    with pytest.raises(InputError) as refused:
        list_source(list(inputs), **options)
    line = str(refused.value)
    assert "\n" not in line
    assert line.isprintable()
    return line


# --- folders -----------------------------------------------------------------------------------------------


def test_a_folder(tmp_path):
    for name in ["b.jpg", "a.PNG", "sub/c.JpEg", "sub/deep/d.tiff", "sub-x/e.webp", "f.bmp", "g.gif", "h.tif", "B.jpg"]:
        write(tmp_path / name, name.encode())
    for name in ["notes.txt", "jpg", "photo.jpg.txt", ".hidden.jpg", ".cache/x.jpg", "sub/._c.jpeg"]:
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = list_source([tmp_path])
    assert source.has_labels is False
    assert source.table.schema == SCHEMA
    listed = source.table.to_pylist()
    expected = ["B.jpg", "a.PNG", "b.jpg", "f.bmp", "g.gif", "h.tif", "sub-x/e.webp", "sub/c.JpEg", "sub/deep/d.tiff"]
    assert [row["id"] for row in listed] == expected
    for row in listed:
        path = tmp_path / row["id"]
        assert row["uri"] == str(path)
        assert row["size"] == len(row["id"])
        assert row["mtime_ns"] == path.stat().st_mtime_ns
        assert (row["label"], row["boxes"], row["extra"]) == (None, None, None)
        assert read(row["uri"], row["size"], row["mtime_ns"]) == row["id"].encode()


def test_a_folder_named_as_an_image_is_a_folder(tmp_path):
    write(tmp_path / "photos.jpg" / "a.jpg")
    assert ids(tmp_path) == ["photos.jpg/a.jpg"]
    assert ids(tmp_path / "photos.jpg") == ["a.jpg"]


def test_a_relative_input_gives_relative_uris(tmp_path, monkeypatch):
    write(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    (row,) = rows(Path("photos"))
    assert row["uri"] == os.path.join("photos", "a.jpg")
    assert read(row["uri"], row["size"], row["mtime_ns"]) == b"pixels"


def test_links_to_files_are_taken_and_links_to_folders_are_not(tmp_path):
    write(tmp_path / "elsewhere" / "real.jpg")
    photos = tmp_path / "photos"
    write(photos / "a.jpg")
    (photos / "link.jpg").symlink_to(tmp_path / "elsewhere" / "real.jpg")
    (photos / "folder").symlink_to(tmp_path / "elsewhere")
    (photos / "folder.jpg").symlink_to(tmp_path / "elsewhere")
    (photos / "loop").symlink_to(photos)
    (photos / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (photos / "self.jpg").symlink_to(photos / "self.jpg")
    listed = {row["id"]: row for row in rows(photos)}
    assert list(listed) == ["a.jpg", "dangling.jpg", "link.jpg", "self.jpg"]
    link = listed["link.jpg"]
    assert read(link["uri"], link["size"], link["mtime_ns"]) == b"pixels"
    for name, status in (("dangling.jpg", "missing"), ("self.jpg", "io_error")):
        assert (listed[name]["size"], listed[name]["mtime_ns"]) == (-1, -1)
        with pytest.raises(ImageRefused, match=status):
            read(listed[name]["uri"], -1, -1)


def test_pipes_and_sockets_in_a_folder_are_no_images(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        assert ids(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize(
    "name", ["שלום.jpg", "\u202eevil.jpg", "é.jpg", "e\u0301.jpg", "two\nlines.jpg", "a b\t'\".jpg", "日本/猫.jpg"]
)
def test_any_unicode_name(tmp_path, name):
    write(tmp_path / "photos" / name)
    (row,) = rows(tmp_path / "photos")
    assert row["id"] == name
    assert read(row["uri"], row["size"], row["mtime_ns"]) == b"pixels"


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    raw = os.fsencode(tmp_path) + b"/caf\xe9 #1%41"
    try:
        os.mkdir(raw)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for name in (b"/\xff.jpg", b"/plain.jpg"):
        with open(raw + name, "wb") as file:
            file.write(name)
    write(tmp_path / "z.jpg", b"z")
    for start, root in ((tmp_path, tmp_path), (tmp_path.parent, Path(tmp_path.name))):
        monkeypatch.chdir(start)
        listed = rows(root)
        assert [row["id"] for row in listed] == ["caf\\xe9 #1%41/\\xff.jpg", "caf\\xe9 #1%41/plain.jpg", "z.jpg"]
        contents = [read(row["uri"], row["size"], row["mtime_ns"]) for row in listed]
        assert contents == [b"/\xff.jpg", b"/plain.jpg", b"z"]


def test_an_empty_folder(tmp_path):
    assert "no image (.jpg .jpeg .png .webp .bmp .gif .tif .tiff)" in refusal(tmp_path)
    assert "other" not in refusal(tmp_path)
    write(tmp_path / "a.txt")
    assert refusal(tmp_path).endswith("it holds 1 other file")
    write(tmp_path / "sub" / "b.heic")
    assert refusal(tmp_path).endswith("it holds 2 other files")


def test_an_unreadable_folder_at_any_depth(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg")
    locked = tmp_path / "locked"
    locked.mkdir()
    scandir = os.scandir

    def guarded(path):
        if os.fspath(path).rstrip("/") == str(locked):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", guarded)
    for start in (tmp_path, locked):
        line = refusal(start)
        assert str(locked) in line
        assert "Permission denied" in line
        assert "make it readable" in line


@settings(max_examples=15, deadline=None)
@given(
    st.sets(
        st.tuples(
            st.lists(
                st.text("ab._ é猫", min_size=1, max_size=4).filter(lambda part: part not in {".", ".."}), max_size=2
            ),
            st.text("xyZ. é", min_size=1, max_size=4),
            st.sampled_from([*IMAGE_SUFFIXES, ".JPG", ".txt", ""]),
        ).map(lambda parts: "/".join([*parts[0], parts[1] + parts[2]])),
        min_size=1,
        max_size=8,
    )
)
def test_every_image_is_listed_once_and_sorted(names):
    with tempfile.TemporaryDirectory() as folder:
        made = set()
        for name in names:
            try:
                made.add(str(write(Path(folder) / name).relative_to(folder)))
            except OSError:  # a name that is another one's folder, or "." and ".."
                continue
        shown = [name for name in made if not any(part.startswith(".") for part in name.split("/"))]
        expected = sorted(
            name for name in shown if re.search(r"(?i)[^./].*\.(jpe?g|png|webp|bmp|gif|tiff?)$", name.split("/")[-1])
        )
        if expected:
            assert ids(Path(folder)) == expected
        else:
            refusal(Path(folder))


# --- image files and several inputs ------------------------------------------------------------------------


def test_image_files_and_several_inputs(tmp_path):
    first, second = write(tmp_path / "x" / "b.jpg"), write(tmp_path / "y" / ".a.png")
    write(tmp_path / "z" / "c.gif")
    manifest = csv_file(tmp_path, "path,label\nx/b.jpg,3\n")
    assert ids(first, second) == [".a.png", "b.jpg"]
    assert ids(tmp_path / "z", first, manifest) == ["b.jpg", "c.gif", "x/b.jpg"]
    source = list_source([first, manifest])
    assert source.has_labels is True
    assert source.table["label"].to_pylist() == [None, "3"]


def test_limit_takes_the_first_ids(tmp_path):
    for name in "dbca":
        write(tmp_path / f"{name}.jpg")
    assert ids(tmp_path, limit=2) == ["a.jpg", "b.jpg"]
    assert ids(tmp_path, limit=9) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert "at least 1" in refusal(tmp_path, limit=0)


def test_duplicate_ids_name_both(tmp_path):
    first, second = write(tmp_path / "x" / "a.jpg"), write(tmp_path / "y" / "a.jpg")
    write(tmp_path / "y" / "0.jpg")
    for inputs in ((first, second), (first.parent, second.parent), (second.parent, first)):
        line = refusal(*inputs)
        assert str(first) in line
        assert str(second) in line
        assert "'a.jpg'" in line
        assert "id column" in line


@pytest.mark.parametrize("name", ["s3://bucket/photos", "https://host/a.jpg", "gs://bucket/list.csv"])
def test_remote_inputs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "only local files" in refusal(Path(name))


def test_inputs_that_are_none(tmp_path):
    assert "no input" in refusal()
    gone = refusal(tmp_path / "gone.jpg")
    assert "gone.jpg" in gone
    assert "does not exist" in gone
    assert "neither a folder nor an image" in refusal(write(tmp_path / "notes.txt"))
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "neither a folder nor an image" in refusal(tmp_path / "pipe.jpg")
    assert "Not a directory" in refusal(tmp_path / "notes.txt" / "a.jpg")
    assert "null byte" in refusal(Path("a\0.jpg"))
    assert "does not exist" in refusal(Path("two\nlines\udcff"))


# --- manifests ---------------------------------------------------------------------------------------------


def test_a_csv_manifest(tmp_path):
    write(tmp_path / "in" / "a.jpg")
    write(tmp_path / "b, c.jpg", b"bytes")
    path = csv_file(
        tmp_path,
        "\ufeff uri ,id,target,boxes,width,note\n"
        "in/a.jpg,2,007,1 2 3.5 4;5 6 7 8,10,\n"
        "\n"
        '"b, c.jpg",1, tabby cat ,,20,"x ""y"""\n',
    )
    source = list_source([path])
    assert source.has_labels is True
    assert source.table.schema == SCHEMA
    second, first = source.table.to_pylist()
    assert (first["id"], first["label"], first["size"]) == ("2", "007", 6)
    assert first["boxes"] == [
        {"x0": 1.0, "y0": 2.0, "x1": 3.5, "y1": 4.0},
        {"x0": 5.0, "y0": 6.0, "x1": 7.0, "y1": 8.0},
    ]
    assert json.loads(first["extra"]) == {"width": "10", "note": ""}
    assert (second["id"], second["label"], second["size"], second["boxes"]) == ("1", "tabby cat", 5, None)
    assert json.loads(second["extra"]) == {"width": "20", "note": 'x "y"'}
    assert read(second["uri"], second["size"], second["mtime_ns"]) == b"bytes"


def test_a_parquet_manifest(tmp_path):
    write(tmp_path / "a.jpg")
    box = {"x0": 1.0, "y0": 2.0, "x1": 3.0, "y1": 4.0}
    path = parquet_file(
        tmp_path / "split=train",
        path=pa.array(["../a.jpg", "gone.jpg", "c.jpg", "d.jpg"]).dictionary_encode(),
        id=[4, 3, 2, 1],
        label=[3.0, None, float("nan"), 12.0],
        boxes=[[box], None, [], [box, box]],
        area=[1.5, float("nan"), None, 2.0],
        tags=[["x"], [], None, ["y", "z"]],
    )
    source = list_source([path])
    assert source.has_labels is True
    assert source.table["id"].to_pylist() == ["1", "2", "3", "4"]
    assert source.table["label"].to_pylist() == ["12", None, None, "3"]
    assert source.table["boxes"].to_pylist() == [[box, box], None, None, [box]]
    assert source.table["size"].to_pylist() == [-1, -1, -1, 6]
    assert [json.loads(text) for text in source.table["extra"].to_pylist()] == [
        {"area": 2.0, "tags": ["y", "z"]},
        {"area": None, "tags": None},
        {"area": None, "tags": []},
        {"area": 1.5, "tags": ["x"]},
    ]


@pytest.mark.parametrize(
    "boxes", [[[[1, 2, 3, 4]], [[5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 1.0, 1.0]]], ["1 2 3 4", "5 6 7 8; 0 0 1 1;"]]
)
def test_boxes_in_parquet_as_fours_or_text(tmp_path, boxes):
    path = parquet_file(tmp_path, uri=["a.jpg", "b.jpg"], boxes=boxes)
    found = [[tuple(box.values()) for box in row["boxes"]] for row in rows(path)]
    assert found == [[(1, 2, 3, 4)], [(5, 6, 7, 8), (0, 0, 1, 1)]]


@pytest.mark.parametrize("header", ["uri", "path", "file"])
def test_the_column_of_paths(tmp_path, header):
    path = csv_file(tmp_path, f"{header}\nb.jpg\nsub/a.jpg\n")
    source = list_source([path])
    assert source.has_labels is False
    assert source.table["id"].to_pylist() == ["b.jpg", "sub/a.jpg"]
    assert source.table["uri"].to_pylist() == [str(tmp_path / "b.jpg"), str(tmp_path / "sub" / "a.jpg")]
    assert source.table["extra"].to_pylist() == [None, None]


def test_uri_goes_before_path_which_stays_as_extra(tmp_path):
    (row,) = rows(csv_file(tmp_path, "path,uri\np.jpg,u.jpg\n"))
    assert row["id"] == "u.jpg"
    assert json.loads(row["extra"]) == {"path": "p.jpg"}


def test_absolute_and_file_uris(tmp_path):
    image = write(tmp_path / "caf\u00e9 1.jpg")
    path = csv_file(tmp_path / "lists", f"uri,id\n{image},0\n{image.as_uri()},1\nno\0where.jpg,2\n")
    plain, spelled, impossible = rows(path)
    for row in (plain, spelled):
        assert read(row["uri"], row["size"], row["mtime_ns"]) == b"pixels"
    assert impossible["size"] == -1
    with pytest.raises(ImageRefused, match="missing"):
        read(impossible["uri"], -1, -1)


def test_one_image_with_several_targets_is_looked_up_once(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg")
    path = csv_file(tmp_path, "uri,id,target\na.jpg,0,3\na.jpg,1,4\n")
    asked = []
    real = os.stat
    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "stat", lambda name, **options: asked.append(name) or real(name, **options))
        sizes = [row["size"] for row in rows(path)]
    assert sizes == [6, 6]
    assert asked.count(str(tmp_path / "a.jpg")) == 1
    csv_file(tmp_path, "uri,target\na.jpg,3\na.jpg,4\n")
    assert "id column" in refusal(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column uri", "none at all"]),
        ("image,label\na.jpg,3\n", ["no column uri", "'image', 'label'"]),
        ("uri,label\n", ["lists no images"]),
        ("uri,label,target\na.jpg,1,2\n", ["target and label", "keep one"]),
        ("uri,uri\na.jpg,b.jpg\n", ["'uri' twice"]),
        ("uri,label\na.jpg,1\nb, c.jpg,2\n", ["row 2", "3 cells", "quote"]),
        ('uri\n"a.jpg\n', ["not a CSV file"]),
        ("uri,label\na.jpg,1\n,2\n", ["row 2", "uri is ''"]),
        ("uri,id\na.jpg, \n", ["row 1", "id is empty"]),
        ("uri\ns3://bucket/a.jpg\n", ["row 1", "s3://bucket/a.jpg", "only local files"]),
        ("uri\nfile://host/a.jpg\n", ["row 1", "only local files"]),
        ("uri,boxes\na.jpg,1 2 3 4\nb.jpg,1 2 3\n", ["row 2", "boxes is '1 2 3'", "x0 y0 x1 y1"]),
        ("uri,boxes\na.jpg,1 2 3 4 5\n", ["row 1", "x0 y0 x1 y1"]),
        ("uri,boxes\na.jpg,1 2 3 four\n", ["row 1", "four"]),
        ("uri,boxes\na.jpg,3 2 1 4\n", ["row 1", "x0 < x1"]),
        ("uri,boxes\na.jpg,1 4 3 2\n", ["row 1", "y0 < y1"]),
        ("uri,boxes\na.jpg,nan 2 3 4\n", ["row 1", "nan"]),
        ("uri,boxes\na.jpg,1 2 inf 4\n", ["row 1", "inf"]),
    ],
)
def test_csv_refusals(tmp_path, text, words):
    path = csv_file(tmp_path, text, "bad list.csv")
    line = refusal(path)
    for word in [*words, str(path)]:
        assert word in line


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [b"\xff\xd8"], "label": [1]}, ["no column uri", "'image', 'label'"]),
        ({"uri": pa.array([], pa.string())}, ["lists no images"]),
        ({"uri": ["a.jpg", None]}, ["row 2", "uri is None"]),
        ({"uri": [b"a.jpg"]}, ["row 1", "uri is b'a.jpg'"]),
        ({"uri": ["a.jpg"], "label": [1.5]}, ["row 1", "label is 1.5", "whole number"]),
        ({"uri": ["a.jpg"], "boxes": [3]}, ["row 1", "boxes is 3"]),
        ({"uri": ["a.jpg"], "boxes": [[{"left": 1.0}]]}, ["row 1", "boxes is"]),
        ({"uri": ["a.jpg"], "boxes": [[[1.0, 2.0, None, 4.0]]]}, ["row 1", "boxes is"]),
    ],
)
def test_parquet_refusals(tmp_path, columns, words):
    path = parquet_file(tmp_path, **columns)
    line = refusal(path)
    for word in [*words, str(path)]:
        assert word in line


def test_manifests_that_cannot_be_read(tmp_path, monkeypatch):
    assert "is not UTF-8" in refusal(write(tmp_path / "latin.csv", "uri\ncafé.jpg\n".encode("latin-1")))
    assert "not a readable Parquet file" in refusal(write(tmp_path / "short.parquet", b"PAR1"))
    assert "not a readable Parquet file" in refusal(write(tmp_path / "text.parquet", b"uri\na.jpg\n" * 9))
    twice = pa.table([pa.array(["a.jpg"])] * 2, names=["uri", "uri"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "'uri' twice" in refusal(tmp_path / "twice.parquet")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    good = csv_file(tmp_path, "uri\na.jpg\n")
    same = parquet_file(tmp_path, uri=["a.jpg"])
    for path in (good, same):
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", denied)
            patch.setattr(pq, "ParquetFile", denied)
            line = refusal(path)
        assert "Permission denied" in line
        assert str(path) in line


edges = st.lists(st.floats(-1000, 1000, width=16), min_size=2, max_size=2, unique=True).map(sorted)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(edges, edges).map(lambda box: (box[0][0], box[1][0], box[0][1], box[1][1])), max_size=4))
def test_boxes_survive_text(boxes):
    with tempfile.TemporaryDirectory() as folder:
        text = "; ".join(" ".join(map(repr, box)) for box in boxes)
        (row,) = rows(csv_file(Path(folder), f"uri,boxes\na.jpg,{text}\n"))
        found = [(box["x0"], box["y0"], box["x1"], box["y1"]) for box in row["boxes"] or []]
        assert found == boxes


# --- reading -----------------------------------------------------------------------------------------------


def test_read_says_what_happened(tmp_path):
    path = write(tmp_path / "a.jpg")
    found = path.stat()
    uri, size, mtime = str(path), found.st_size, found.st_mtime_ns
    assert read(uri, size, mtime) == b"pixels"

    def status(*arguments):
        with pytest.raises(ImageRefused) as refused:
            read(*arguments)
        assert "a.jpg" in refused.value.reason
        return refused.value.status

    assert status(uri, size + 1, mtime) == "changed"
    assert status(uri, size, mtime - 1) == "changed"
    assert status(uri, -1, -1) == "changed"
    path.write_bytes(b"PIXELS!")
    os.utime(path, ns=(mtime, mtime))
    assert status(uri, size, mtime) == "changed"
    path.unlink()
    assert status(uri, size, mtime) == "missing"
    assert status(uri + "/b.jpg", -1, -1) == "missing"
    path.mkdir()
    assert status(uri, size, mtime) == "io_error"
    path.rmdir()
    os.mkfifo(path)
    begun = time.monotonic()
    assert status(uri, size, mtime) == "io_error"
    assert time.monotonic() - begun < 5


def test_read_of_a_file_that_may_not_be_opened(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jpg")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.os, "open", denied)
    with pytest.raises(ImageRefused, match=r"io_error: .*a\.jpg.*Permission denied"):
        read(str(path), 6, 0)


def test_read_of_a_file_that_shrinks_meanwhile(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jpg")
    before = path.stat()

    def shrunk(descriptor):
        os.truncate(path, 2)
        return before

    monkeypatch.setattr(sources.os, "fstat", shrunk)
    with pytest.raises(ImageRefused, match=r"changed: .*gave 2 bytes of 6"):
        read(str(path), before.st_size, before.st_mtime_ns)


def test_a_run_among_the_images_is_passed_by(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    run = tmp_path / "runs" / "one"
    for folder in ("plan", "data", "report/overlays"):
        (run / folder).mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "report" / "overlays" / "photo.jpg--cam.png").write_bytes(b"x")
    assert list_source([tmp_path]).table["id"].to_pylist() == ["photo.jpg"]
