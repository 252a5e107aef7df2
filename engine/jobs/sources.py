"""Folders, image files and manifests to one ordered table of the images to explain, and the reading of one."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc

from ... import InputError
from ...models.preprocess import ImageRefused

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MANIFEST_SUFFIXES = (".csv", ".parquet")

_SIDES = ("x0", "y0", "x1", "y1")
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime_ns", pa.int64(), nullable=False),
        ("label", pa.string()),
        ("boxes", pa.list_(pa.struct([(side, pa.float32()) for side in _SIDES]))),
        ("extra", pa.string()),
    ]
)

_URI_COLUMNS = ("uri", "path", "file")
_LABEL_COLUMNS = ("target", "label")
_FILE_SCHEME = "file:///"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SCHEME_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes s3:/bucket of s3://bucket
_ABSENT = (-1, -1)
_RUN_FILES = {"run.json", "plan", "data"}


@dataclass(frozen=True, slots=True)
class Source:
    """The images to explain, in order.

    `table` has the columns of `SCHEMA`, one row per image, sorted by its unique `id`. `uri` is a local path or,
    where the name is not UTF-8, a file:/// URI; `read` opens both. A file that is not there has size and
    mtime_ns -1. `label` is text (a class index or name), `boxes` are in pixels of the upright image, `extra`
    is a JSON object of the manifest's other columns. `has_labels` says whether any manifest had a label column.
    """

    table: pa.Table
    has_labels: bool


def list_source(inputs: Sequence[Path], *, limit: int | None = None) -> Source:
    """The images of folders, image files and manifests together.

    A folder is walked to the bottom; its images are told by their suffix (`IMAGE_SUFFIXES`, in any case) and
    their ids are paths relative to it, with forward slashes. Names that begin with a dot, links to folders
    and folders of runs are passed by; links to files are taken. An image file's id is its name. A manifest (.csv in
    UTF-8 with a header, .parquet) has a column `uri`, `path` or `file` (the first of these), relative to the manifest's
    folder, and may have `id` (else the uri's text), `target` or `label`, and `boxes`: "x0 y0 x1 y1;..." or,
    in Parquet, a list of such structs or fours.

    Args:
        limit: keep only the first so many rows, in the order of their ids.

    Raises:
        InputError: an input is missing, unreadable, empty or of an unknown kind; a manifest lacks a column
            or has a bad row; two images have the same id. A listed file that is missing is a row, not an error.
    """
    if not inputs:
        raise InputError("no input: give a folder, image files or a manifest (.csv, .parquet)")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    tables, labelled = [], False
    for path in map(Path, inputs):
        kind = _kind(path)
        if kind == "manifest":
            table, has_labels = _manifest(path)
            labelled |= has_labels
        else:
            table = _folder(os.fspath(path)) if kind == "folder" else _image(path)
        tables.append(table)
    table = pa.concat_tables(tables).sort_by([("id", "ascending"), ("uri", "ascending")]).combine_chunks()
    _refuse_duplicates(table)
    return Source(table if limit is None else table.slice(0, limit), labelled)


def read(uri: str, size: int, mtime_ns: int) -> bytes:
    """The bytes of a listed image.

    Args:
        uri, size, mtime_ns: as `list_source` gave them.

    Raises:
        ImageRefused: `missing`, `changed` (size or time differ from the listing) or `io_error`.
    """
    try:
        # a named pipe would block open() for ever
        with open(_path(uri), "rb", buffering=0, opener=_open_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ImageRefused("io_error", f"{uri!r} is not a regular file")
            if (found.st_size, found.st_mtime_ns) != (size, mtime_ns):
                was = "was missing" if size < 0 else f"had {size} bytes, time {mtime_ns} ns"
                now = f"has {found.st_size} bytes, time {found.st_mtime_ns} ns"
                raise ImageRefused("changed", f"{uri!r} {was} when listed and {now} now")
            data = file.readall()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise ImageRefused("missing", f"{uri!r} is not there") from None
    except OSError as err:
        raise ImageRefused("io_error", f"{uri!r}: {err.strerror or err}") from None
    if len(data) != size:
        raise ImageRefused("changed", f"{uri!r} gave {len(data)} bytes of {size}")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _path(uri: str) -> str | bytes:
    return unquote_to_bytes(uri[len(_FILE_SCHEME) - 1 :]) if uri.startswith(_FILE_SCHEME) else uri


def _name(path: str | os.PathLike[str]) -> str:
    """A path for an error line: quoted, on one line, whatever its bytes."""
    return repr(os.fspath(path))


def _kind(path: Path) -> str:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if _SCHEME_PATH.match(os.fspath(path)):
            raise InputError(f"{_name(path)}: only local files can be read so far; copy the images here") from None
        raise InputError(f"{_name(path)} does not exist; check the spelling") from None
    except OSError as err:
        raise InputError(f"{_name(path)} cannot be read ({err.strerror})") from None
    except ValueError as err:
        raise InputError(f"{_name(path)} is not a path ({err})") from None
    suffix = path.suffix.lower()
    if stat.S_ISDIR(mode):
        return "folder"
    if suffix in MANIFEST_SUFFIXES:
        return "manifest"
    if suffix in IMAGE_SUFFIXES and stat.S_ISREG(mode):
        return "image"
    known = " ".join(IMAGE_SUFFIXES)
    raise InputError(f"{_name(path)} is neither a folder nor an image ({known}) nor a manifest (.csv .parquet)")


def _stat(path: str | bytes | os.DirEntry[str]) -> tuple[int, int] | None:
    """Size and mtime_ns; `_ABSENT` where there is no file to see, None where it is no regular file."""
    try:
        found = path.stat() if isinstance(path, os.DirEntry) else os.stat(path)
    except (OSError, ValueError):
        return _ABSENT
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _image(path: Path) -> pa.Table:
    return _table([path.name], [os.fspath(path)], [_stat(os.fspath(path)) or _ABSENT])


def _folder(root: str) -> pa.Table:
    ids: list[str] = []
    uris: list[str] = []
    stats: list[tuple[int, int]] = []
    others = 0
    pending = [""]
    while pending:
        below = pending.pop()
        folder = os.path.join(root, below)
        try:
            with os.scandir(folder) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
            if below and _RUN_FILES.issubset(entry.name for entry in entries):
                continue  # a run among the images: its report's pictures are not photographs
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{below}{entry.name}/")
                elif os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
                    others += 1
                elif (found := _stat(entry)) is not None:
                    ids.append(below + entry.name)
                    uris.append(entry.path)
                    stats.append(found)
        except OSError as err:
            raise InputError(
                f"cannot list the folder {_name(folder)} ({err.strerror}); make it readable or give a manifest"
            ) from None
    if not ids:
        held = f"; it holds {others} other file{'s' * (others != 1)}" if others else ""
        raise InputError(f"no image ({' '.join(IMAGE_SUFFIXES)}) in the folder {_name(root)} or below{held}")
    return _table(ids, uris, stats)


def _table(
    ids: list[str],
    uris: list[str],
    stats: list[tuple[int, int]],
    labels: list[str | None] | None = None,
    boxes: list[list[dict[str, float]] | None] | None = None,
    extras: list[str] | None = None,
) -> pa.Table:
    count = len(ids)
    columns = [
        _strings(ids, lambda text: os.fsencode(text).decode("utf-8", "backslashreplace")),
        _strings(uris, lambda text: Path(text).absolute().as_uri()),
        pa.array([size for size, _ in stats], pa.int64()),
        pa.array([mtime for _, mtime in stats], pa.int64()),
        *(
            pa.nulls(count, field.type) if values is None else pa.array(values, field.type)
            for field, values in zip(list(SCHEMA)[4:], (labels, boxes, extras), strict=True)
        ),
    ]
    return pa.table(columns, schema=SCHEMA)


def _strings(texts: list[str], spell: Callable[[str], str]) -> pa.Array:
    """Texts as an Arrow column; `spell` rewrites those that hold bytes which are not UTF-8."""
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([text if _is_utf8(text) else spell(text) for text in texts], pa.string())


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_duplicates(table: pa.Table) -> None:
    ids, uris = table["id"], table["uri"]
    first = pc.index(pc.equal(ids[:-1], ids[1:]), True).as_py()
    if first >= 0:
        raise InputError(
            f"{uris[first].as_py()!r} and {uris[first + 1].as_py()!r} have the same id {ids[first].as_py()!r}; "
            "give the folder above both, or a manifest with an id column"
        )


def _manifest(path: Path) -> tuple[pa.Table, bool]:
    """A manifest's rows, and whether it has a label column."""
    columns, count = _csv_columns(path) if path.suffix.lower() == ".csv" else _parquet_columns(path)
    name, folder = _name(path), os.fspath(path.parent)
    uri_key = next((key for key in _URI_COLUMNS if key in columns), None)
    if uri_key is None:
        held = ", ".join(map(repr, columns)) or "none at all"
        raise InputError(f"{name} has no column uri (nor path, nor file) among its columns: {held}; rename one")
    if not count:
        raise InputError(f"{name} lists no images; add a row per image")
    label_keys = [key for key in _LABEL_COLUMNS if key in columns]
    if len(label_keys) > 1:
        raise InputError(f"{name} has both columns target and label; keep one")

    def cells(key: str, convert: Callable[[Any, str], Any]) -> list[Any] | None:
        if key not in columns:
            return None
        return [convert(cell, f"{name} row {row}: {key}") for row, cell in enumerate(columns.pop(key), start=1)]

    texts = cells(uri_key, _uri_text) or []
    ids = cells("id", _id) or [text.replace(os.sep, "/") for text in texts]
    labels = cells(label_keys[0], _word) if label_keys else None
    boxes = cells("boxes", _boxes)
    extras = [
        json.dumps({key: None if cell != cell else cell for key, cell in zip(columns, row, strict=True)}, default=str)
        for row in zip(*columns.values(), strict=True)
    ]
    uris = [text if text.startswith(_FILE_SCHEME) else os.path.join(folder, text) for text in texts]
    stats = {uri: _stat(_path(uri)) or _ABSENT for uri in dict.fromkeys(uris)}
    return _table(ids, uris, [stats[uri] for uri in uris], labels, boxes, extras or None), bool(label_keys)


def _csv_columns(path: Path) -> tuple[dict[str, Sequence[Any]], int]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except OSError as err:
        raise InputError(f"{_name(path)} cannot be read ({err.strerror})") from None
    except UnicodeDecodeError as err:
        raise InputError(f"{_name(path)} is not UTF-8 (byte {err.start}); save it as UTF-8") from None
    except csv.Error as err:
        raise InputError(f"{_name(path)} is not a CSV file ({err})") from None
    header = [name.strip() for name in lines.pop(0)] if lines else []
    for row, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise InputError(f"{_name(path)} row {row} has {len(line)} cells, the header {len(header)}; quote commas")
    _refuse_twice(header, path)
    cells: Iterable[Sequence[Any]] = zip(*lines, strict=True) if lines else [()] * len(header)
    return dict(zip(header, cells, strict=True)), len(lines)


def _parquet_columns(path: Path) -> tuple[dict[str, Sequence[Any]], int]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
        _refuse_twice(table.column_names, path)
        return {name: table[name].to_pylist() for name in table.column_names}, table.num_rows
    except OSError as err:
        raise InputError(f"{_name(path)} cannot be read ({err.strerror or err})") from None
    except (pa.ArrowException, ValueError) as err:
        raise InputError(f"{_name(path)} is not a readable Parquet file ({' '.join(str(err).split())})") from None


def _refuse_twice(names: Sequence[str], path: Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{_name(path)} has the column {twice!r} twice; rename one")


def _uri_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} is {value!r}; give a path")
    if _SCHEME.match(value) and not value.startswith(_FILE_SCHEME):
        raise InputError(f"{where} is {value!r}; only local files can be read so far, copy the images here")
    return value


def _id(value: Any, where: str) -> str:
    text = _word(value, where)
    if text is None:
        raise InputError(f"{where} is empty; give every row one, or drop the column")
    return text


def _word(value: Any, where: str) -> str | None:
    """A cell as text; None for an empty one. 3.0 is "3": columns with gaps come as floats."""
    if isinstance(value, str):
        return value.strip() or None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise InputError(f"{where} is {value!r}; give text or a whole number")


def _boxes(value: Any, where: str) -> list[dict[str, float]] | None:
    """Boxes from "x0 y0 x1 y1;..." or a list of mappings or fours; None for an empty cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        items = [box.split() for box in value.split(";") if box.strip()] if isinstance(value, str) else list(value)
        return [_box(item) for item in items] or None
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{where} is {value!r}; give x0 y0 x1 y1;... in pixels, x0 < x1 and y0 < y1") from None


def _box(item: Any) -> dict[str, float]:
    sides = [item[side] for side in _SIDES] if isinstance(item, Mapping) else item
    box = dict(zip(_SIDES, map(float, sides), strict=True))
    if not all(map(math.isfinite, box.values())) or box["x0"] >= box["x1"] or box["y0"] >= box["y1"]:
        raise ValueError(item)
    return box
