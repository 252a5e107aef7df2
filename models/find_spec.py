"""Find a model's spec: a preset, our JSON, Hugging Face's or timm's, checked against the file. Never guessed."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import ModelError
from .load import ModelFile
from .spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    },
    "raw": {"mean": 0.0, "std": 1.0, "interpolation": "bilinear", "crop_pct": 1.0},
}
PRESET_SIZE = 224
METADATA_KEY = "heatmill.spec"
MAX_TEXT_BYTES = 2**24

_OURS = {"layout", "color", "exif", "output", "target_layer"}
_TIMM = {"pretrained_cfg", "architecture", "first_conv", "classifier", "pool_size"}
_HUGGING_FACE = {"image_processor_type", "feature_extractor_type", "do_resize", "do_rescale", "do_normalize"}
_READ = _HUGGING_FACE | {
    *("size", "default_to_square", "resample", "do_center_crop", "crop_size", "crop_pct", "include_top"),
    *("rescale_factor", "image_mean", "image_std", "do_flip_channel_order", "do_flip_channels"),
}
_HARMLESS = {
    *("processor_class", "_processor_class", "_valid_processor_keys", "do_convert_rgb", "do_reduce_labels"),
    *("reduce_labels", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_WRITE = "write a spec of your own"


class _Processor(NamedTuple):
    """What a Hugging Face image processor does where its JSON is silent."""

    square: bool  # an integer size means (size, size), not the shorter edge
    resample: int
    crop: bool | None = None  # None: it never crops


_PROCESSORS = {
    "Beit": _Processor(square=True, resample=3, crop=True),
    "Bit": _Processor(square=False, resample=3, crop=True),
    "CLIP": _Processor(square=False, resample=3, crop=True),
    "ConvNext": _Processor(square=False, resample=3),
    "DeiT": _Processor(square=True, resample=3, crop=True),
    "EfficientNet": _Processor(square=True, resample=0, crop=False),
    "Levit": _Processor(square=False, resample=3, crop=True),
    "MobileNetV1": _Processor(square=False, resample=2, crop=True),
    "MobileNetV2": _Processor(square=False, resample=2, crop=True),
    "MobileViT": _Processor(square=False, resample=2, crop=True),
    "PoolFormer": _Processor(square=False, resample=3, crop=True),
    "Pvt": _Processor(square=True, resample=2),
    "Segformer": _Processor(square=True, resample=2),
    "Siglip": _Processor(square=True, resample=3),
    "ViT": _Processor(square=True, resample=2),
    "ViTHybrid": _Processor(square=False, resample=3, crop=True),
}
# The oldest files name no processor; transformers then goes by the type of the model.
_MODEL_TYPES = {
    **dict.fromkeys(("vit", "vit_msn", "swin", "swinv2"), "ViT"),
    **dict.fromkeys(("convnext", "convnextv2", "cvt", "regnet", "resnet", "van"), "ConvNext"),
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("mobilevit", "mobilevitv2"), "MobileViT"),
    **dict.fromkeys(("bit", "dinov2", "focalnet"), "Bit"),
    **{"deit": "DeiT", "levit": "Levit", "poolformer": "PoolFormer", "segformer": "Segformer"},
    **{"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2", "efficientnet": "EfficientNet"},
}


def find_spec(
    model: ModelFile, *, preprocess: str | None = None, labels: Path | None = None, output: str | None = None
) -> tuple[ModelSpec, str]:
    """The spec of a model and, in words, where it was found.

    `preprocess` is a preset or a JSON file of ours, of Hugging Face or of timm. Without it the spec comes from
    MODEL.json beside the file, the file's metadata, preprocessor_config.json or timm's config.json beside it.
    `labels` and `output` replace what the spec says of them; what it leaves open is read off the model.

    Raises:
        ModelError: no spec was found, a field of it can't be represented, or it contradicts the model.
    """
    try:
        data, where = _locate(model, preprocess)
        data = {"layout": model.input.layout, "output": model.output_kind, **data}
        if model.input.channels == 1:
            data.setdefault("color", "L")
        if labels is not None:
            data["label_names"], where = _read_labels(Path(labels)), f"{where}, labels from {labels}"
        if output is not None:
            data["output"] = output
        spec = ModelSpec.from_json(data, where)
        _reconcile(spec, model, where)
    except ModelError as err:
        raise ModelError(_short(str(err), 600)) from None
    except OSError as err:
        raise ModelError(f"{err.filename}: {err.strerror or err}; check the path") from None
    return spec, where


def _locate(model: ModelFile, preprocess: str | None) -> tuple[dict[str, Any], str]:
    path = model.path
    if preprocess is not None and preprocess.lower() in PRESETS:
        return _preset(preprocess.lower(), model), f"preset {preprocess.lower()} (--preprocess)"
    if preprocess is not None:
        if not Path(preprocess).is_file():
            raise ModelError(f"--preprocess {preprocess!r} is no file and no preset; presets: {', '.join(PRESETS)}")
        return _read_spec(Path(preprocess), model)
    sidecar = path.with_suffix(".json")
    if sidecar.exists():
        return _read_spec(sidecar, model)
    for entry in model.proto.metadata_props:
        if entry.key == METADATA_KEY:
            where = f"{path}, metadata {METADATA_KEY}"
            return _parse(entry.value, where), where
    processor, config = path.with_name("preprocessor_config.json"), path.with_name("config.json")
    if processor.exists():
        return _read_spec(processor, model)
    if config.exists() and _TIMM & _read_json(config).keys():
        return _read_spec(config, model)
    raise ModelError(
        f"{path}: nothing says how its images are prepared; give --preprocess imagenet, another preset "
        f"({', '.join(PRESETS)}) or a JSON file, or write {sidecar.name} beside it"
    )


def _preset(name: str, model: ModelFile) -> dict[str, Any]:
    preset, channels = dict(PRESETS[name]), model.input.channels
    for key in ("mean", "std"):
        if not isinstance(preset[key], list):
            preset[key] = [preset[key]] * channels
        elif len(preset[key]) != channels:
            raise ModelError(
                f"{model.path}: preset {name} has {len(preset[key])} channels, the model takes {channels}; "
                "give --preprocess raw or a JSON file"
            )
    size = [channels, model.input.height or PRESET_SIZE, model.input.width or PRESET_SIZE]
    return {"input_size": size, **preset}


def _read_spec(path: Path, model: ModelFile) -> tuple[dict[str, Any], str]:
    """The spec fields of a JSON file; its keys tell whose it is."""
    data = _read_json(path)
    try:
        if _TIMM & data.keys():
            return _from_timm(data, model, str(path)), f"{path} (timm)"
        if _HUGGING_FACE & data.keys():
            beside = path.with_name("config.json")
            config = _read_json(beside) if beside.exists() else {}
            return _from_hugging_face(data, config, str(path)), f"{path} (Hugging Face)"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        raise ModelError(f"{path}: a field has a wrong type or value ({type(err).__name__}: {err}); {_WRITE}") from None
    return data, str(path)


def _from_timm(data: Mapping[str, Any], model: ModelFile, where: str) -> dict[str, Any]:
    mixed = sorted(_OURS & data.keys())
    if mixed:
        raise ModelError(f"{where}: a timm file has no field {mixed[0]!r}; leave it out, or {_WRITE}")
    config = {**data, **data.get("pretrained_cfg", {})}
    config |= {key: data[key] for key in ("label_names", "label_descriptions") if key in data}
    if config.get("label_offset"):
        raise ModelError(f"{where}: label_offset = {config['label_offset']!r} can't be represented; {_WRITE}")
    tested = config.get("test_input_size")
    if tested and tested == [model.input.channels, model.input.height, model.input.width] != config.get("input_size"):
        config |= {"input_size": tested, "crop_pct": config.get("test_crop_pct") or config.get("crop_pct")}
    spec = {key: _need(config, key, where) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    spec |= {"crop_mode": config.get("crop_mode") or "center", "exif": "ignore"}
    names = config.get("label_names") or config.get("labels")
    if names:
        described = config.get("label_descriptions") or {}
        spec["label_names"] = [described.get(name, name) for name in _label_list(names, where)]
    return spec


def _from_hugging_face(given: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    data = {key: value for key, value in given.items() if value is not None}
    kind = str(data.get("image_processor_type") or data.get("feature_extractor_type") or "")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    kind = kind or _MODEL_TYPES.get(str(config.get("model_type")), "(none named)")
    if kind not in _PROCESSORS:
        raise ModelError(f"{where}: image processor {kind!r} is not known; {_WRITE} (known: {', '.join(_PROCESSORS)})")
    processor = _PROCESSORS[kind]
    strange = [key for key, value in data.items() if value and key not in _READ | _HARMLESS]
    strange += ["do_resize"] * (not data.get("do_resize", True))
    strange += ["do_center_crop"] * (processor.crop is None and data.get("do_center_crop", False))
    strange += ["crop_pct"] * (kind not in ("ConvNext", "PoolFormer") and "crop_pct" in data)
    if strange:
        raise ModelError(
            f"{where}: {strange[0]} = {_short(repr(data[strange[0]]), 80)} of a {kind} image processor can't be "
            f"represented; {_WRITE}"
        )
    resample = data.get("resample", processor.resample)
    if resample not in range(len(_RESAMPLE)):
        raise ModelError(f"{where}: resample = {_short(repr(resample), 80)} is not one of Pillow's filters, 0 to 5")
    mean, std = _levels(kind, data, where)
    height, width, crop_pct, crop_mode = _geometry(kind, processor, data, where)
    spec = {
        "input_size": [len(mean), height, width],
        "mean": mean,
        "std": std,
        "interpolation": _RESAMPLE[resample],
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "exif": "apply",
    }
    if data.get("do_flip_channel_order", data.get("do_flip_channels", kind == "MobileViT")):
        spec["color"] = "BGR"
    if config.get("id2label"):
        spec["label_names"] = _label_list(config["id2label"], f"{where}, id2label of config.json")
    return spec


def _levels(kind: str, data: Mapping[str, Any], where: str) -> tuple[list[float], list[float]]:
    """Mean and std for pixels scaled to 0..1, from (pixel * rescale_factor - image_mean) / image_std."""
    mean, std = [0.0] * 3, [1.0] * 3
    if data.get("do_normalize", kind != "MobileViT"):
        mean, std = (_numbers(data, key, where) for key in ("image_mean", "image_std"))
    if kind == "EfficientNet" and data.get("include_top", True):
        std = [value * value for value in std]  # its include_top divides by std once more
    factor = 255 * float(data.get("rescale_factor", 1 / 255)) if data.get("do_rescale", True) else 255.0
    if math.isclose(factor, 1, rel_tol=1e-6):
        return mean, std
    return [value / factor for value in mean], [value / factor for value in std]


def _geometry(kind: str, processor: _Processor, data: Mapping[str, Any], where: str) -> tuple[int, int, float, str]:
    """Height, width, crop_pct and crop_mode of a resize and a centre crop."""
    size = _need(data, "size", where)
    if isinstance(size, int):
        square = data.get("default_to_square", processor.square)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise ModelError(f"{where}: size = {_short(repr(size), 80)} can't be represented; {_WRITE}")
    edge = size.get("shortest_edge")
    if kind == "ConvNext":
        edge = size["shortest_edge"]
        return (edge, edge, data.get("crop_pct", 0.875), "center") if edge < 384 else (edge, edge, 1.0, "squash")
    if kind == "PoolFormer":
        edge = int(size["shortest_edge"] / _need(data, "crop_pct", where))
    if kind == "Levit" and edge is not None:
        edge = int(256 / 224 * edge)
    resized = crop = (size["height"], size["width"]) if edge is None else (edge, edge)
    if data.get("do_center_crop", processor.crop):
        crop = _need(data, "crop_size", where)
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    elif edge is not None:
        raise ModelError(f"{where}: size = {size} without do_center_crop leaves the shape open; {_WRITE}")
    ratio = crop[0] / resized[0]
    for crop_pct in (ratio, math.nextafter(ratio, 0)):  # the resize is floor(crop / crop_pct)
        if crop_pct <= 1 and resized == (math.floor(crop[0] / crop_pct), math.floor(crop[1] / crop_pct)):
            return (*crop, crop_pct, "center" if edge is not None else "squash")
    raise ModelError(f"{where}: crop_size = {crop} of size = {size} can't be represented; {_WRITE}")


def _need(data: Mapping[str, Any], key: str, where: str) -> Any:
    if data.get(key) is None:
        raise ModelError(f"{where}: {key} is missing; add it, or give --preprocess")
    return data[key]


def _numbers(data: Mapping[str, Any], key: str, where: str) -> list[float]:
    values = _need(data, key, where)
    return [float(value) for value in (values if isinstance(values, list) else [values] * 3)]


def _read_labels(path: Path) -> list[str]:
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        return _label_list(_load_json(text, str(path)), str(path))
    return [line.strip() for line in text.rstrip().split("\n")]


def _label_list(names: Any, where: str) -> list[str]:
    """Names in the order of their classes, from a list, {"0": name}, or Keras' {"0": [wordnet id, name]}."""
    if isinstance(names, dict):
        order = {int(key): name for key, name in names.items() if key.isdecimal()}
        if sorted(order) != list(range(len(names))):
            raise ModelError(f"{where}: the classes of the labels are not 0 to {len(names) - 1}; give --labels")
        names = [order[index] for index in range(len(names))]
    if isinstance(names, list):
        found = [name[1] if isinstance(name, list) and len(name) == 2 else name for name in names]
        if found and all(isinstance(name, str) for name in found):
            return found
    raise ModelError(f'{where}: labels are a list of names or {{"0": name, ...}}; correct them')


def _read_text(path: Path) -> str:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{path}: not a regular file; give a JSON or text file")
    if info.st_size > MAX_TEXT_BYTES:
        raise ModelError(f"{path}: {info.st_size} bytes are too many for a JSON or text file; give the right one")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text; give a JSON or text file") from None


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(_read_text(path), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    data = _load_json(text, where)
    if not isinstance(data, dict):
        raise ModelError(f"{where}: not a JSON object; write one")
    return data


def _load_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ModelError(f"{where}: not JSON ({err}); correct it") from None


def _reconcile(spec: ModelSpec, model: ModelFile, where: str) -> None:
    """Refuse a spec that contradicts the model; both values are named."""
    image = model.input
    actual = (image.channels, image.height, image.width)
    if any(given not in (None, wanted) for given, wanted in zip(actual, spec.input_size, strict=True)):
        shown = f"[{', '.join(str(size or 'any') for size in actual)}]"
        raise ModelError(f"{where}: input_size {list(spec.input_size)}, but the model takes {shown}; correct the spec")
    if spec.layout != image.layout:
        raise ModelError(f"{where}: layout {spec.layout}, but the model takes {image.layout}; correct the spec")
    if image.dtype == "uint8" and (any(spec.mean) or any(std != 1 for std in spec.std)):
        raise ModelError(
            f"{where}: mean {list(spec.mean)} and std {list(spec.std)}, but the model takes uint8 pixels as they are; "
            "give mean 0 and std 1 (--preprocess raw)"
        )
    if spec.label_names and model.classes not in (None, len(spec.label_names)):
        raise ModelError(
            f"{where}: {len(spec.label_names)} label names, but the model has {model.classes} classes; "
            "give the right names with --labels"
        )
    if model.output_kind not in ("logits", spec.output):
        raise ModelError(
            f"{where}: output {spec.output}, but the graph's last operator gives {model.output_kind}; "
            f'set "output" to "{model.output_kind}"'
        )


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
