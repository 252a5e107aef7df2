"""Maps as NumPy arrays and as grey pictures."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .... import InputError
from ..report import marked, overlay_name, safe_name
from ..store import Row
from .base import ABOUT, Selection, about, grey_picture, in_threads, manifest

Array = npt.NDArray[Any]

SIZES = ("native", "input", "image")


def _size(selection: Selection, known: tuple[str, ...], kind: str) -> str:
    """The asked size; the first of `known` where none was."""
    size = selection.options.size or known[0]
    if size not in known:
        raise InputError(f"--size {size}: --as {kind} takes {' or '.join(known)}")
    return size


def write_npy(selection: Selection, folder: Path) -> None:
    """Write the raw maps of each method to one array (n, h, w) float32, and the manifest that says which is which.

    Raises:
        InputError: maps at the size of the photographs, which do not fit one array.
    """
    size = _size(selection, ("native", "input"), "npy")
    stacks: dict[tuple[str, tuple[int, ...]], _Stack] = {}
    with ExitStack() as open_files, manifest(folder, ["id", "uri", "array", "index", *ABOUT]) as add:
        for rows in selection.images():
            for row in rows:
                values = row.upsampled() if size == "input" else np.asarray(row.map)
                key = row.method, values.shape
                if key not in stacks:
                    stacks[key] = open_files.enter_context(_Stack(folder, *key))
                line = {"id": row.id, "uri": row.path, "array": stacks[key].name, "index": stacks[key].add(values)}
                add(line | about(row))
                selection.written += 1


class _Stack:
    """An .npy file that grows; NumPy leaves room in its header for any number of maps."""

    def __init__(self, folder: Path, method: str, shape: tuple[int, ...]) -> None:
        call = method.replace(":", ",", 1)
        self.name = f"{marked(safe_name(call), call)}--{'x'.join(map(str, shape))}.npy"
        self._shape, self._count = shape, 0
        self._file: IO[bytes] = open(folder / self.name, "wb")  # noqa: SIM115

    def __enter__(self) -> _Stack:
        self._header()
        return self

    def _header(self) -> None:
        described = {"descr": "<f4", "fortran_order": False, "shape": (self._count, *self._shape)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, described)

    def add(self, values: Array) -> int:
        """Append a map; its index."""
        self._file.write(np.ascontiguousarray(values, "<f4").tobytes())
        self._count += 1
        return self._count - 1

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._header()


def write_png(selection: Selection, folder: Path) -> None:
    """Write each finished map as an 8-bit grey PNG, and the manifest.

    Black is the least value and white the greatest; a signed map has zero at 128. At the size of the photograph, what
    the network did not see has the level of zero.

    Raises:
        InputError: maps as they are stored, which are too small for a picture.
    """
    size = _size(selection, ("image", "input"), "png")

    def make(rows: list[Row]) -> list[dict[str, Any]]:
        lines = []
        for row in rows:
            picture = grey_picture(row, (row.height or 1, row.width or 1) if size == "image" else None)
            name = f"maps/{overlay_name(row)}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / name, "PNG", compress_level=4)
            lines.append({"id": row.id, "uri": row.path, "map": name, **about(row)})
        return lines

    with manifest(folder, ["id", "uri", "map", *ABOUT]) as add:
        for lines in in_threads(make, selection.images()):
            for line in lines:
                add(line)
            selection.written += len(lines)
