"""Maps and pictures of a run for other tools and for training jobs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .... import IncompleteError, InputError, __version__
from ..store import SPACE_GONE, Run
from .augment import write_crops, write_erased
from .base import Options, Selection
from .fiftyone import write_fiftyone
from .maps import write_npy, write_png
from .virelay import write_virelay

SHARED = frozenset(("method", "limit"))


@dataclass(frozen=True, slots=True)
class Export:
    """A kind of export: what it writes, the function that does, and the options it takes besides SHARED."""

    summary: str
    write: Callable[[Selection, Path], None]
    takes: frozenset[str] = frozenset()


EXPORTS: dict[str, Export] = {
    "crops": Export(
        "the photographs cut to their salient region", write_crops, frozenset(("threshold", "padding", "format"))
    ),
    "erased": Export(
        "the photographs without their salient region", write_erased, frozenset(("threshold", "fill", "format"))
    ),
    "npy": Export("the raw maps, an array per method", write_npy, frozenset(("size",))),
    "png": Export("the finished maps as grey pictures", write_png, frozenset(("size",))),
    "hdf5-virelay": Export("a project for ViRelAy and CoRelAy per method and target", write_virelay),
    "fiftyone": Export("a data set for FiftyOne", write_fiftyone),
}


def export(run: Run, kind: str, out: Path, options: Options) -> dict[str, Any]:
    """Write an export of a run to a new folder, which appears when it is complete.

    Args:
        kind: of EXPORTS.

    Returns:
        what `heatmill export --json` prints: `out`, `kind`, `written`, `skipped` by reason.

    Raises:
        InputError: unknown kind, an option that it does not take, a folder that is not empty or can't be written, a
            method that the run has not, or nothing to write.
        IncompleteError: no space is left; nothing is kept.
        RunError: a part or the plan is damaged.
    """
    if kind not in EXPORTS:
        raise InputError(f"no export {kind!r}; known: {', '.join(EXPORTS)}")
    for name, value in asdict(options).items():
        if value is not None and name not in SHARED | EXPORTS[kind].takes:
            known = [each for each, found in EXPORTS.items() if name in found.takes]
            raise InputError(f"--{name} is for --as {' or '.join(known)}, not for {kind}")
    if options.method is not None and not run.calls(options.method):
        raise InputError(f"--method {options.method!r}: {run.path} has {', '.join(run.calls())}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is there already; give a new folder with -o")
    out = out.absolute()
    selection = Selection(run, options)
    folder = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True)
        EXPORTS[kind].write(selection, folder)
        if not selection.written:
            raise InputError(f"{run.path}: nothing to export as {kind} ({_reasons(selection)})")
        told = {"kind": kind, "written": selection.written, "skipped": dict(selection.skipped.most_common())}
        facts = {"heatmill": __version__, "run": str(run.path.absolute()), "options": asdict(options), **told}
        (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(folder, out)
    except OSError as err:
        if err.errno in SPACE_GONE:
            raise IncompleteError(f"{out}: no space is left; nothing is kept, make room and export again") from None
        if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
            raise InputError(f"{out}: can't be written ({err.strerror})") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"out": str(out), **told}


def _reasons(selection: Selection) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in selection.skipped.most_common()) or "it has no rows"


def export_text(found: dict[str, Any]) -> str:
    """An export for people."""
    skipped = "".join(f"  not written: {number} {reason}\n" for reason, number in found["skipped"].items())
    return f"{found['out']}: {found['written']} {found['kind']}\n{skipped}"
