"""What a model file is, and what this machine offers: `heatmill inspect` and `heatmill doctor`."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import BackendError, HeatmillError, ModelError, __version__
from ...models.find_spec import find_spec
from ...models.graph.request import Request
from ...models.graph.tap import Reading, Tap
from ...models.load import ModelFile, open_model
from ...models.spec import ModelSpec
from ..backends import PRECISIONS, choose, cpu_flags, survey, usable_cores
from ..methods import METHODS
from ..opening import load_opened, read_graph
from ..passes import check_backward
from ..types import MethodCall
from .probe import probe

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "tensorrt", "tensorrt-rtx")
PACKAGES = ("onnx", *RUNTIMES, "numpy", "pyarrow", "pillow", "simplejpeg")


def describe(
    model: Path,
    *,
    layer: str | None = None,
    preprocess: str | None = None,
    labels: Path | None = None,
    output: str | None = None,
    scores: str | None = None,
) -> dict[str, Any]:
    """All that can be told of a model, as JSON values, a trial run in a bounded process included.

    A missing spec is part of the answer, and so is a trial that was refused; without a spec there is no trial, and the
    layers are listed at the file's own input size, if it has one.

    Raises:
        ModelError: the file or the asked layer is refused.
    """
    opened = open_model(model, scores=scores)
    spec: ModelSpec | None = None
    try:
        spec, source = find_spec(opened, preprocess=preprocess, labels=labels, output=output)
    except ModelError as err:
        if preprocess is not None or labels is not None or output is not None:
            raise
        source = str(err)
    image = opened.input
    found: dict[str, Any] = {
        "model": str(opened.path),
        "sha256": opened.sha256,
        "opset": opened.opset,
        "quantised": opened.quantised,
        "input": {
            "name": image.name,
            "layout": image.layout,
            "dtype": image.dtype,
            "batch": image.batch or "dynamic",
            "channels": image.channels,
            "height": image.height or "dynamic",
            "width": image.width or "dynamic",
        },
        "output": {"name": opened.output, "classes": opened.classes, "kind": opened.output_kind},
        "spec": None if spec is None else {k: v for k, v in spec.to_json().items() if k != "label_names"},
        "spec_source": source,
        "labels": len(spec.label_names) if spec else 0,
    }
    if spec is not None:
        reading: Reading | None = read_graph(opened, spec)
    elif image.height and image.width:
        reading = Reading(opened, (image.height, image.width))
    else:
        reading = None
    found |= _layers(reading, layer, spec) | {"methods": _methods(opened, spec, source, reading, layer)}
    if spec is None:
        return found | {"trial": None}
    arguments = {
        "preprocess": preprocess,
        "labels": str(labels) if labels else None,
        "output": output,
        "scores": scores,
    }
    return found | {"trial": _trial(str(model), arguments)}


def _trial(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        probed = probe({"model": model, "methods": (), **arguments})
    except HeatmillError as err:
        return {"runs": False, "reason": str(err)}
    return {
        "runs": True,
        "backend": probed.backend,
        "provider": probed.provider,
        "precision": probed.precision,
        "any_batch_size": probed.free_batch,
        "batch_size": probed.batch_size,
        "classes": probed.classes,
        "rows_per_second": round(probed.rows_per_second, 2),
    }


def _layers(reading: Reading | None, layer: str | None, spec: ModelSpec | None) -> dict[str, Any]:
    if reading is None:
        return {"layer": None, "layers": []}
    asked = layer or (spec.target_layer if spec else None)
    chosen = reading.choose(asked) if asked or reading.automatic() else None
    taps = reading.candidates()
    if chosen is not None and chosen.name not in {tap.name for tap in taps}:
        taps.append(chosen)
    return {"layer": chosen.name if chosen else None, "layers": [_tap(tap) for tap in taps]}


def _tap(tap: Tap) -> dict[str, Any]:
    return {
        "name": tap.name,
        "layout": tap.layout,
        "channels": tap.channels,
        "grid": list(tap.grid),
        "prefix_tokens": tap.prefix,
    }


def _methods(
    model: ModelFile, spec: ModelSpec | None, source: str, reading: Reading | None, layer: str | None
) -> dict[str, dict[str, Any]]:
    """For each method whether it runs with its defaults, what an image costs, or why not."""
    if spec is None or reading is None:
        return {name: {"runs": False, "reason": "no spec was found"} for name in METHODS}
    answers: dict[str, dict[str, Any]] = {}
    known: dict[Request, str | None] = {}
    for name, method in METHODS.items():
        call = MethodCall(method, {key: parameter.default for key, parameter in method.parameters.items()})
        if call.needs_tap and reading.automatic() is None and not (layer or spec.target_layer):
            answers[name] = {"runs": False, "reason": "the model has no feature map"}
            continue
        try:
            loaded = load_opened(model, spec, source, reading, [call], layer)
            check_backward(loaded, known)
        except HeatmillError as err:
            reason = str(err).removeprefix(f"{model.path.name}: ").removeprefix(f"method {name} can't run: ")
            answers[name] = {"runs": False, "reason": reason}
            continue
        back = method.backward(loaded.facts, call.parameters)
        through = method.through(loaded.facts, call.parameters)
        passes = method.passes(loaded.facts, call.parameters)
        ends = {"layer" if request.at else "image" for request in back + through}
        answers[name] = {
            "runs": True,
            "passes": 1 + passes,
            "backward": len(back) + (passes if through else 0),
            "head_alone": method.head(loaded.facts, call.parameters),
            "back_to": next((end for end in ("image", "layer") if end in ends), None),
        }
    return answers


def describe_text(found: dict[str, Any]) -> str:
    """The answer of `describe` for people."""
    image, output = found["input"], found["output"]
    shape = [image["batch"], image["channels"], image["height"], image["width"]]
    if image["layout"] == "NHWC":
        shape = [shape[0], *shape[2:], shape[1]]
    lines = [
        f"{found['model']}: opset {found['opset']}{', quantised' if found['quantised'] else ''}",
        f"input    {image['name']}: {image['layout']} {image['dtype']} {' x '.join(map(str, shape))}",
        f"output   {output['name']}: {output['classes'] or 'unknown number of'} classes, {output['kind']}",
        f"spec     {found['spec_source']}",
    ]
    if found["spec"]:
        told = {name: value for name, value in found["spec"].items() if value is not None}
        lines += [f"         {name}: {value}" for name, value in told.items()]
        lines.append(f"         label_names: {found['labels'] or 'none'}")
    lines.append("layers   (* is the one that is read; --layer takes any value or node name)")
    for layer in found["layers"]:
        mark = "*" if layer["name"] == found["layer"] else " "
        grid = "x".join(map(str, layer["grid"]))
        prefix = f", {layer['prefix_tokens']} tokens before the grid" if layer["prefix_tokens"] else ""
        lines.append(f"       {mark} {layer['name']}: {layer['channels']} maps of {grid} ({layer['layout']}{prefix})")
    lines.append("methods")
    verdicts: dict[str, list[str]] = {}
    for name, answer in found["methods"].items():
        verdict = _cost(answer) if answer["runs"] else f"can't run: {answer['reason']}"
        verdicts.setdefault(verdict, []).append(name)
    lines += [f"         {', '.join(names)}: {verdict}" for verdict, names in verdicts.items()]
    if found["trial"] is not None:
        lines.append(f"trial    {_trial_text(found['trial'])}")
    return "\n".join(lines) + "\n"


def _cost(answer: dict[str, Any]) -> str:
    passes = f"at most {answer['passes']} passes per image" if answer["passes"] > 1 else "1 pass per image"
    if answer["head_alone"]:
        passes += ", all but the first through the head alone"
    if not answer["backward"]:
        return passes
    back = f"back to the {answer['back_to']}"
    return f"{passes} and {back}" if answer["passes"] == 1 else f"{passes}, {answer['backward']} of them {back}"


def _trial_text(trial: dict[str, Any]) -> str:
    if not trial["runs"]:
        return f"refused: {trial['reason']}"
    batch = "any batch size" if trial["any_batch_size"] else f"batches of {trial['batch_size']} only"
    how = f"{trial['backend']} ({trial['provider']}), {trial['precision']}, {batch}"
    return f"{how}; {trial['classes']} classes, about {trial['rows_per_second']:.3g} rows/s"


def doctor() -> dict[str, Any]:
    """This machine: processor, packages, backends, and what `auto` picks at each precision."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    picks: dict[str, Any] = {}
    for precision in PRECISIONS:
        try:
            fits = choose("auto", None, precision, precision if precision in ("fp16", "int8") else "fp32")
        except BackendError as err:
            picks[precision] = {"pick": None, "why": str(err)}
        else:
            names = [f"{backend} ({provider})" for backend, provider, _ in fits]
            why = "the only one" if len(names) == 1 else "whichever is faster on the model itself"
            picks[precision] = {"pick": " or ".join(names), "why": why}
    return {
        "heatmill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": {"usable": usable_cores(), "machine": os.cpu_count()},
        "cpu_flags": [flag for flag in FLAGS if flag in cpu_flags()],
        "packages": versions,
        "backends": [
            {
                "backend": offer.backend,
                "provider": offer.provider,
                "version": offer.version,
                "precisions": list(offer.precisions),
                "note": offer.note,
            }
            for offer in survey()
        ],
        "auto": picks,
    }


def doctor_text(found: dict[str, Any]) -> str:
    """The answer of `doctor` for people."""
    cores, flags = found["cores"], " ".join(found["cpu_flags"]) or "no known CPU flag"
    lines = [
        f"heatmill {found['heatmill']}, Python {found['python']}, {found['platform']}",
        f"cores    {cores['usable']} usable of {cores['machine']}; {flags}",
        "packages " + ", ".join(f"{name} {version or '(missing)'}" for name, version in found["packages"].items()),
        "backends",
    ]
    for offer in found["backends"]:
        gives = ", ".join(offer["precisions"]) or "nothing"
        lines.append(f"         {offer['backend']} / {offer['provider']}: {gives} ({offer['note']})")
    lines.append("--precision, and what --backend auto then picks")
    for precision, answer in found["auto"].items():
        lines.append(f"         {precision}: {answer['pick'] or 'none'} ({answer['why']})")
    return "\n".join(lines) + "\n"
