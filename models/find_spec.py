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
    "imagenet": {"mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD], "interpolation": "bilinear", "crop_pct": 0.875},
    "raw": {"mean": 0.0, "std": 1.0, "interpolation": "bilinear", "crop_pct": 1.0},
}
PRESET_SIZE = 224
METADATA_KEY = "heatmill.spec"
MAX_TEXT_BYTES = 2**24

_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_TIMM_KEYS = {"pretrained_cfg", "architecture", "first_conv", "classifier", "pool_size"}
_HF_KEYS = {"image_processor_type", "feature_extractor_type", "do_resize", "do_rescale", "do_normalize", "image_mean"}
_HF_UNDERSTOOD = _HF_KEYS | {
    *("size", "resample", "do_center_crop", "crop_size", "crop_pct", "rescale_factor", "image_std", "include_top"),
    *("do_flip_channel_order", "do_flip_channels"),
}
_HF_HARMLESS = {
    *("processor_class", "_processor_class", "_valid_processor_keys", "do_convert_rgb", "do_reduce_labels"),
    *("reduce_labels", "data_format", "input_data_format", "return_tensors", "device", "default_to_square"),
    *("disable_grouping",),
}


class _Processor(NamedTuple):
    """What a Hugging Face image processor does where its JSON is silent."""

    square: bool  # a bare integer size is (size, size), not the shorter edge
    resample: int
    crop: bool


_PROCESSORS = {
    "Beit": _Processor(square=True, resample=3, crop=True),
    "Bit": _Processor(square=False, resample=3, crop=True),
    "CLIP": _Processor(square=False, resample=3, crop=True),
    "ConvNext": _Processor(square=False, resample=3, crop=False),
    "DeiT": _Processor(square=True, resample=3, crop=True),
    "EfficientNet": _Processor(square=True, resample=0, crop=False),
    "Levit": _Processor(square=False, resample=3, crop=True),
    "MobileNetV1": _Processor(square=False, resample=2, crop=True),
    "MobileNetV2": _Processor(square=False, resample=2, crop=True),
    "MobileViT": _Processor(square=False, resample=2, crop=True),
    "PoolFormer": _Processor(square=False, resample=3, crop=True),
    "Pvt": _Processor(square=True, resample=2, crop=False),
    "Segformer": _Processor(square=True, resample=2, crop=False),
    "Siglip": _Processor(square=True, resample=3, crop=False),
    "ViT": _Processor(square=True, resample=2, crop=False),
    "ViTHybrid": _Processor(square=False, resample=3, crop=True),
}
# Files of 2021 and 2022 name no processor; transformers then goes by the model's type.
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
        spec, where = _locate(model, preprocess)
        spec = {"layout": model.input.layout, "output": model.output_kind, **spec}
        if model.input.channels == 1:
            spec.setdefault("color", "L")
        if labels is not None:
            spec["label_names"], where = _read_labels(Path(labels)), f"{where}, labels from {labels}"
        if output is not None:
            spec["output"] = output
        found = ModelSpec.from_json(spec, where)
        _reconcile(found, model, where)
    except OSError as err:
        raise ModelError(f"{err.filename or preprocess}: {err.strerror or err}; check the path") from None
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as err:
        raise ModelError(f"{model.path}: the spec can't be read ({type(err).__name__}: {err}); correct it") from None
    return found, where


def _locate(model: ModelFile, preprocess: str | None) -> tuple[dict[str, Any], str]:
    path = model.path
    if preprocess is not None and preprocess.lower() in PRESETS:
        return _preset(preprocess.lower(), model), f"preset {preprocess.lower()} (--preprocess)"
    if preprocess is not None:
        if not Path(preprocess).is_file():
            raise ModelError(
                f"--preprocess {preprocess!r} is no preset ({', '.join(PRESETS)}) and no file; give one of them"
            )
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
    if config.exists() and _TIMM_KEYS & _read_json(config).keys():
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
                f"{model.path}: preset {name} is for {len(preset[key])} channels, the model takes {channels}; "
                "give --preprocess raw or a JSON file"
            )
    size = [channels, model.input.height or PRESET_SIZE, model.input.width or PRESET_SIZE]
    return {"input_size": size, **preset}


def _read_spec(path: Path, model: ModelFile) -> tuple[dict[str, Any], str]:
    """The spec fields of a JSON file; its keys tell whose it is."""
    data = _read_json(path)
    if _TIMM_KEYS & data.keys():
        return _from_timm(data, model, str(path)), f"{path} (timm)"
    if _HF_KEYS & data.keys():
        beside = path.with_name("config.json")
        config = _read_json(beside) if beside.exists() else {}
        return _from_hugging_face(data, config, str(path)), f"{path} (Hugging Face)"
    return data, str(path)


def _from_timm(data: Mapping[str, Any], model: ModelFile, where: str) -> dict[str, Any]:
    nested = data.get("pretrained_cfg", {})
    config = {**data, **nested}
    config.update({key: data[key] for key in ("label_names", "label_descriptions") if key in data})
    if config.get("label_offset"):
        raise ModelError(
            f"{where}: label_offset {config['label_offset']} can't be represented; write a spec of your own"
        )
    fixed = [model.input.channels, model.input.height, model.input.width]
    tested = list(config.get("test_input_size") or ())
    if tested == fixed != list(config.get("input_size") or ()):
        config["input_size"] = tested
        config["crop_pct"] = config.get("test_crop_pct") or config.get("crop_pct")
    spec = {key: _need(config, key, where) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    spec |= {"crop_mode": config.get("crop_mode") or "center", "exif": "ignore"}
    names = config.get("label_names") or config.get("labels")
    if names:
        described = config.get("label_descriptions") or {}
        spec["label_names"] = [described.get(name, name) for name in _label_list(names, where)]
    return spec


def _from_hugging_face(data: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = str(data.get("image_processor_type") or data.get("feature_extractor_type") or "")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    kind = kind or _MODEL_TYPES.get(str(config.get("model_type")), "")
    kind = {"ConvNeXT": "ConvNext", "Deit": "DeiT"}.get(kind, kind)
    if kind not in _PROCESSORS:
        raise ModelError(
            f"{where}: the image processor {kind or '(none named)'!r} is not known; write a spec of your own "
            f"(known: {', '.join(_PROCESSORS)})"
        )
    strange = sorted(key for key, value in data.items() if value and key not in _HF_UNDERSTOOD | _HF_HARMLESS)
    strange += [key for key in ("do_resize",) if not data.get(key, True)]
    if strange:
        raise ModelError(
            f"{where}: {strange[0]} = {data[strange[0]]!r} can't be represented in a spec; write a spec of your own"
        )
    processor = _PROCESSORS[kind]
    resample = data.get("resample")
    resample = processor.resample if resample is None else resample
    if isinstance(resample, bool) or resample not in range(len(_RESAMPLE)):
        raise ModelError(f"{where}: resample = {resample!r} is not one of Pillow's filters 0 to {len(_RESAMPLE) - 1}")
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
        size = {"height": size, "width": size} if processor.square else {"shortest_edge": size}
    if not isinstance(size, dict) or set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise ModelError(f"{where}: size = {size!r} can't be represented in a spec; write a spec of your own")
    edge, crop_pct = size.get("shortest_edge"), data.get("crop_pct")
    if kind == "ConvNext":
        if edge is None:
            raise ModelError(f"{where}: size = {size!r} needs a shortest_edge for {kind}")
        return (edge, edge, crop_pct or 0.875, "center") if edge < 384 else (edge, edge, 1.0, "squash")
    if crop_pct is not None and (kind != "PoolFormer" or edge is None):
        raise ModelError(f"{where}: crop_pct = {crop_pct!r} can't be represented for {kind}; write a spec of your own")
    if edge is not None and kind == "Levit":
        edge = int(256 / 224 * edge)
    if edge is not None and kind == "PoolFormer":
        edge = int(edge / (crop_pct or (0.9 if "crop_pct" not in data else 1.0)))
    resized = (edge, edge) if edge else (size["height"], size["width"])
    crop = resized
    if data.get("do_center_crop", processor.crop):
        crop = _need(data, "crop_size", where)
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    elif edge:
        raise ModelError(
            f"{where}: shortest_edge without do_center_crop gives images of many shapes; write a spec of your own"
        )
    if edge and crop[0] != crop[1]:
        raise ModelError(
            f"{where}: crop_size = {crop} of a shortest_edge can't be represented; write a spec of your own"
        )
    for crop_pct in (crop[0] / resized[0], math.nextafter(crop[0] / resized[0], 0)):
        if crop_pct <= 1 and all(math.floor(c / crop_pct) == r for c, r in zip(crop, resized, strict=True)):
            return (*crop, crop_pct, "center" if edge else "squash")
    raise ModelError(f"{where}: crop_size = {crop} of {resized} can't be represented; write a spec of your own")


def _need(data: Mapping[str, Any], key: str, where: str) -> Any:
    if data.get(key) is None:
        raise ModelError(f"{where}: {key} is missing; add it, or give --preprocess")
    return data[key]


def _numbers(data: Mapping[str, Any], key: str, where: str) -> list[float]:
    values = _need(data, key, where)
    return [float(value) for value in (values if isinstance(values, list) else [values] * 3)]


def _read_labels(path: Path) -> list[str]:
    text = _read_text(path)
    if path.suffix.lower() != ".json":
        return text.splitlines()
    try:
        return _label_list(json.loads(text), str(path))
    except (ValueError, RecursionError) as err:
        raise ModelError(f"{path}: not JSON ({err})") from None


def _label_list(names: Any, where: str) -> list[str]:
    """Names in order of their class: a list, {"0": name}, or Keras' {"0": [wordnet id, name]}."""
    if isinstance(names, dict):
        order = {int(key): value for key, value in names.items()}
        if sorted(order) != list(range(len(names))):
            raise ModelError(f"{where}: label numbers are not 0 to {len(names) - 1}; give --labels")
        names = [order[index] for index in range(len(names))]
    if isinstance(names, list):
        names = [name[1] if isinstance(name, list) and len(name) == 2 else name for name in names]
        if all(isinstance(name, str) for name in names):
            return names
    raise ModelError(f'{where}: labels are a list of names or {{"0": name, ...}}')


def _read_text(path: Path) -> str:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{path}: is not a regular file")
    if info.st_size > MAX_TEXT_BYTES:
        raise ModelError(
            f"{path}: has {info.st_size} bytes, over the limit of {MAX_TEXT_BYTES} for a JSON or text file"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ModelError(f"{path}: is not UTF-8 text") from None


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(_read_text(path), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ModelError(f"{where}: not JSON ({err})") from None
    if not isinstance(data, dict):
        raise ModelError(f"{where}: is not a JSON object")
    return data


def _reconcile(spec: ModelSpec, model: ModelFile, where: str) -> None:
    """Refuse a spec that contradicts the model; both values are named."""
    image = model.input
    actual = (image.channels, image.height, image.width)
    if any(given not in (None, wanted) for given, wanted in zip(actual, spec.input_size, strict=True)):
        shown = [size or "any" for size in actual]
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
