"""A run's folder: parts committed by one rename, and the reader of what they hold."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from ... import RunError
from ...kernels.finish import finish
from ..methods import parse_method, plain

Array = npt.NDArray[Any]

FORMAT = 1
SPACE_GONE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLAN = "plan/plan-00000.parquet"
UPSAMPLE = "linear / half_pixel / edge-clamped"
STATUSES = (
    "ok",
    "empty",
    "truncated",
    "not_an_image",
    "unsupported_mode",
    "too_large",
    "too_small",
    "io_error",
    "missing",
    "changed",
    "nonfinite",
    "worker_crash",
)
SETTINGS = frozenset(
    ("identity", "images", "rows_per_image", "shard_rows", "model", "spec", "methods", "targets", "grid", "plan_hash")
)
COLUMNS: list[tuple[str, pa.DataType]] = [
    ("row", pa.int64()),
    ("id", pa.string()),
    ("uri", pa.string()),
    ("method", pa.string()),
    ("target", pa.int32()),
    ("target_source", pa.string()),
    ("label_name", pa.string()),
    ("score", pa.float32()),
    ("pred", pa.int32()),
    ("pred_score", pa.float32()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("crop_box", pa.list_(pa.float32(), 4)),
    ("extras", pa.string()),
    ("map_shape", pa.list_(pa.int32(), 2)),
]


def schema(grid: tuple[int, int] | None, pixels: bool, arrays: bool = False) -> pa.Schema:
    """The columns of a part: maps on the tap's `grid` (None: no such method) and, if `pixels`, at the input's size.

    `map` holds whichever there is; where a run has both, pixel maps go to `map_pixels`. `arrays` is there only where a
    method gives some.
    """
    columns = list(COLUMNS)
    if grid is not None:
        columns.append(("map", pa.list_(pa.float32(), grid[0] * grid[1])))
    if pixels:
        columns += [(pixel_column(grid), pa.binary()), ("map_scale", pa.float32()), ("map_offset", pa.float32())]
    if arrays:
        columns.append(("arrays", pa.binary()))
    return pa.schema(columns)


def pixel_column(grid: tuple[int, int] | None) -> str:
    return "map" if grid is None else "map_pixels"


def encode_pixels(values: Array) -> tuple[bytes, float, float]:
    """A pixel map as (bytes, scale, offset): float16 of (map - offset) / scale, byte planes apart, zstd.

    Offset and scale use float16's whole range, so that the error is at most 1/2048 of the map's range and the order of
    small values survives.
    """
    offset = float(np.float32(values.min()))
    span = float(values.max()) - offset
    scale = 2.0 ** max(np.ceil(np.log2(span)) - 15, -149) if span > 0 else 1.0  # float32 holds 2^-149, nothing smaller
    halves = ((values.astype(np.float64) - offset) / scale).astype("<f2")
    planes = halves.reshape(-1).view(np.uint8).reshape(-1, 2).T
    return zstandard.ZstdCompressor(level=3).compress(planes.tobytes()), scale, offset


def decode_pixels(data: bytes, scale: float, offset: float, shape: Sequence[int]) -> Array:
    """The float32 map (h, w) of `encode_pixels`."""
    planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(data), dtype=np.uint8).reshape(2, -1)
    halves = np.ascontiguousarray(planes.T).view("<f2").reshape(tuple(shape))
    limits = np.finfo(np.float32)
    return (halves.astype(np.float64) * scale + offset).clip(limits.min, limits.max).astype(np.float32)


def encode_arrays(arrays: Mapping[str, Array]) -> bytes:
    """Named arrays as NumPy's npz, zstd."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return zstandard.ZstdCompressor(level=3).compress(file.getvalue())


def decode_arrays(data: bytes) -> dict[str, Array]:
    """The arrays of `encode_arrays`."""
    with np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data)), allow_pickle=False) as found:
        return dict(found)


def commit(run: Path, name: str, data: bytes) -> None:
    """Bytes, fsync, one rename, directory fsync: the final name under the run's folder is the commit."""
    path, temporary = run / name, run / "_tmp" / f"{Path(name).name}.{os.getpid()}"
    temporary.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_refusal(run: Path, err: OSError) -> str:
    """What to say when nothing can be written to a run."""
    what = "no space is left" if err.errno in SPACE_GONE else f"can't be written ({err.strerror})"
    return f"{run}: {what}; everything committed is kept, the same command resumes"


def part_name(shard: int) -> str:
    return f"data/part-{shard:06d}.parquet"


def committed(run: Path) -> set[int]:
    """The shards that have a part."""
    found = (re.fullmatch(r"part-(\d{6,})\.parquet", path.name) for path in (run / "data").glob("part-*.parquet"))
    return {int(match[1]) for match in found if match}


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet: zstd, page checksums and indexes on."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        row_group_size=1024,
        use_dictionary=["status", "method", "target_source"] if "status" in table.column_names else False,
        write_page_checksum=True,
        write_page_index=True,
    )
    return bytes(sink.getvalue())


def plan_hash(identity: Mapping[str, Any], shard_rows: int, images: pa.Table) -> str:
    """What tells a run's parts from another's: the settings, the images and how they are cut into shards."""
    digest = hashlib.sha256(json.dumps([identity, shard_rows], sort_keys=True).encode())
    for name in ("id", "uri", "size", "label"):
        digest.update(json.dumps(images[name].to_pylist()).encode())
    return digest.hexdigest()


def read_plan(run: Path, settings: Mapping[str, Any]) -> pa.Table:
    """The images of a run.

    Raises:
        RunError: missing, damaged, or not the plan that `run.json` was written for.
    """
    try:
        images = pq.read_table(run / PLAN, page_checksum_verification=True)
        hashed = plan_hash(settings["identity"], int(settings["shard_rows"]), images)
    except DAMAGE as err:
        raise RunError(f"{run / PLAN}: damaged ({_first_line(err)}); start again with --overwrite") from None
    if hashed != settings["plan_hash"] or images.num_rows != settings["images"]:
        raise RunError(f"{run}: run.json and {PLAN} do not belong together; start again with --overwrite")
    return images


def write_part(run: Path, shard: int, rows: Sequence[Mapping[str, Any]], columns: pa.Schema, footer: str) -> None:
    """Commit one shard's rows, in the order given."""
    table = pa.Table.from_pylist(list(rows), schema=columns.with_metadata({b"heatmill": footer.encode()}))
    commit(run, part_name(shard), parquet_bytes(table))


@dataclass(frozen=True, slots=True)
class Row:
    """One image, method and target of a run, as stored."""

    row: int
    id: str
    path: str
    method: str
    target: int | None
    target_source: str
    label_name: str | None
    score: float | None
    prediction: int | None
    prediction_score: float | None
    status: str
    error: str | None
    width: int | None
    height: int | None
    crop_box: tuple[float, ...] | None
    extras: Mapping[str, Any]
    map: Array | None
    input_size: tuple[int, int]
    finish: tuple[str, ...]
    arrays: Mapping[str, Array]

    def upsampled(self) -> Array:
        """The raw map at the network's input size, (H, W) float32: bilinear, half-pixel centres."""
        return self._finished(())

    def saliency(self) -> Array:
        """The map (H, W) finished as the method's source shows it (ReLU, min-max, in its order)."""
        return self._finished(self.finish)

    def _finished(self, steps: tuple[str, ...]) -> Array:
        if self.map is None:
            raise ValueError(f"row {self.id!r} has no map: its status is {self.status}")
        result: Array = finish(self.map[None], steps, self.input_size)[0]
        return result


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder, open for reading."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        size = self.settings["spec"]["input_size"]
        return size[1], size[2]

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the tap's maps; None where no method reads the tap."""
        grid = self.settings["grid"]
        return (grid[0], grid[1]) if grid else None

    @property
    def shards(self) -> int:
        """How many parts the complete run has."""
        return -(-int(self.settings["images"]) // int(self.settings["shard_rows"]))

    def parts(self) -> list[Path]:
        """The committed parts, in plan order."""
        return [self.path / part_name(shard) for shard in sorted(committed(self.path))]

    def calls(self, method: str | None = None) -> list[str]:
        """The methods of the run as they were called; those of one name, or of one whole call."""
        calls = [str(each["call"]) for each in self.settings["methods"]]
        return calls if method is None else [call for call in calls if names_call(method, call)]

    def rows(self, method: str | None = None, target: int | None = None, status: str | None = None) -> Iterator[Row]:
        """The stored rows in plan order, filtered; one row group is in memory at a time.

        Raises:
            RunError: a part is damaged.
        """
        for path in self.parts():
            yield from self._part_rows(path, method, target, status)

    def rows_of(self, images: range) -> Iterator[Row]:
        """The rows of some images, given by their places in the plan, of one committed shard.

        Raises:
            RunError: its part is damaged.
        """
        yield from self._part_rows(
            self.path / part_name(images.start // int(self.settings["shard_rows"])), images=images
        )

    def table(self) -> pa.Table:
        """Every column but the maps.

        Raises:
            RunError: a part is damaged.
        """
        kept = [name for name, _ in COLUMNS if name != "map_shape"]
        tables = []
        for path in self.parts():
            with naming(path):
                table = pq.read_table(path, columns=kept, page_checksum_verification=True)
                tables.append(table.replace_schema_metadata())
        return pa.concat_tables(tables) if tables else pa.schema(COLUMNS).empty_table().select(kept)

    def _part_rows(
        self,
        path: Path,
        method: str | None = None,
        target: int | None = None,
        status: str | None = None,
        images: range | None = None,
    ) -> Iterator[Row]:
        finishes: dict[str, tuple[str, ...]] = {}
        for values, raw in self._values(path, images):
            call = values["method"]
            if method is not None and not names_call(method, call):
                continue
            if target not in (None, values["target"]) or status not in (None, values["status"]):
                continue
            if call not in finishes:
                parsed = parse_method(call)
                finishes[call] = parsed.method.finish(parsed.parameters)
            yield self._row(values, raw, finishes[call])

    def _values(self, path: Path, images: range | None = None) -> Iterator[tuple[dict[str, Any], Array | None]]:
        """The columns of each row of a part, or of some images, and its map."""
        with naming(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=256):
                maps = None
                if self.grid is not None:
                    column = batch.column("map")
                    maps = column.values.to_numpy(zero_copy_only=False).reshape(-1, *self.grid)[column.offset :]
                    batch = batch.drop_columns(["map"])
                for i, values in enumerate(batch.to_pylist()):
                    if images is not None and values["row"] not in images:
                        continue
                    shape, packed_arrays = values.pop("map_shape"), values.get("arrays")
                    values["arrays"] = decode_arrays(packed_arrays) if packed_arrays else {}
                    if values.get("map_scale") is not None:
                        packed = values[pixel_column(self.grid)]
                        yield values, decode_pixels(packed, values["map_scale"], values["map_offset"], shape)
                    elif shape is not None and maps is not None:
                        yield values, maps[i].copy()
                    else:
                        yield values, None

    def _row(self, values: dict[str, Any], raw: Array | None, steps: tuple[str, ...]) -> Row:
        return Row(
            row=values["row"],
            id=values["id"],
            path=values["uri"],
            method=values["method"],
            target=values["target"],
            target_source=values["target_source"],
            label_name=values["label_name"],
            score=values["score"],
            prediction=values["pred"],
            prediction_score=values["pred_score"],
            status=values["status"],
            error=values["error"],
            width=values["width"],
            height=values["height"],
            crop_box=tuple(values["crop_box"]) if values["crop_box"] else None,
            extras=json.loads(values["extras"]) if values["extras"] else {},
            map=raw,
            input_size=self.input_size,
            finish=steps,
            arrays=values["arrays"],
        )


def names_call(asked: str, call: str) -> bool:
    """Whether a user's word for a method means a stored call: all of it, or its name."""
    return plain(asked) in (plain(call), plain(call.partition(":")[0]))


DAMAGE = (OSError, pa.ArrowException, zstandard.ZstdError, zipfile.BadZipFile, ValueError, LookupError)


class naming:
    """Damage found while a part is read becomes one line that names it, and what makes it again."""

    def __init__(self, path: Path, again: str = "heatmill explain with the same settings") -> None:
        self._path, self._again = path, again

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, err: BaseException | None, trace: object) -> None:
        if isinstance(err, DAMAGE):
            raise RunError(
                f"{self._path}: damaged ({_first_line(err)}); delete it, and {self._again} makes it again"
            ) from err


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]


def open_run(path: str | Path) -> Run:
    """Open a run's folder for reading.

    Raises:
        RunError: not a run, or of a newer format.
    """
    path = Path(path)
    try:
        settings = json.loads((path / "run.json").read_text())
        if not isinstance(settings, dict):
            raise ValueError("not an object")
        if settings.get("format") == FORMAT and (missing := sorted(SETTINGS - settings.keys())):
            raise ValueError(f"it lacks {missing[0]!r}")
    except FileNotFoundError:
        raise RunError(f"{path}: not a run (it has no run.json)") from None
    except (OSError, ValueError) as err:
        raise RunError(f"{path}/run.json: can't be read ({err})") from None
    if settings.get("format") != FORMAT:
        raise RunError(f"{path}: run format {settings.get('format')}; this heatmill reads format {FORMAT}")
    return Run(path, settings)


def verify(path: str | Path) -> dict[str, int]:
    """Read every byte of a run: checksums, row counts, plan hash, order and maps.

    Returns:
        Counts: `shards` expected, `committed`, `rows`, `ok`.

    Raises:
        RunError: the first damage found, with the part's name.
    """
    run = open_run(path)
    settings = run.settings
    counts = {"shards": run.shards, "committed": 0, "rows": 0, "ok": 0}
    size, images, each = int(settings["shard_rows"]), int(settings["images"]), int(settings["rows_per_image"])
    calls = [method["call"] for method in settings["methods"]]
    per_image = [call for call in calls for _ in range(each // len(calls))]
    parsed = [parse_method(call) for call in calls]
    columns = schema(run.grid, any(call.pixels for call in parsed), any(call.method.arrays for call in parsed))
    ids = read_plan(run.path, settings)["id"]
    for shard in sorted(committed(run.path)):
        part = run.path / part_name(shard)
        with naming(part):
            found_schema = pq.read_schema(part)
            footer = json.loads((found_schema.metadata or {})[b"heatmill"])
            belongs = footer["plan_hash"] == settings["plan_hash"] and shard < run.shards
        if not belongs:
            raise RunError(f"{part}: belongs to another run; delete it, and the same heatmill explain makes its own")
        if found_schema.remove_metadata() != columns:
            raise RunError(f"{part}: damaged (its columns are not the run's); delete it and resume")
        first, last = shard * size, min((shard + 1) * size, images)
        expected = [
            (row, identity, call)
            for row, identity in zip(range(first, last), ids[first:last].to_pylist(), strict=True)
            for call in per_image
        ]
        found: list[tuple[int, str, str]] = []
        for values, raw in run._values(part):
            found.append((values["row"], values["id"], values["method"]))
            if values["status"] not in STATUSES:
                raise RunError(
                    f"{part}: row {values['id']!r} has the unknown status {values['status']!r}; delete it and resume"
                )
            if values["status"] == "ok" and (raw is None or not np.isfinite(raw).all()):
                raise RunError(f"{part}: row {values['id']!r} is ok and has no finite map; delete it and resume")
            if not all(np.isfinite(array).all() for array in values["arrays"].values()):
                raise RunError(f"{part}: row {values['id']!r} has arrays that are not finite; delete it and resume")
            counts["ok"] += values["status"] == "ok"
        if found != expected:
            raise RunError(
                f"{part}: its {len(found)} rows are not the plan's {len(expected)} in order; delete it and resume"
            )
        counts["committed"] += 1
        counts["rows"] += len(found)
    return counts
