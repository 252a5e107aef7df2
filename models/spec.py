"""The model spec: what a classifier expects of its input and what its output means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .. import ModelError

CHOICES: dict[str, tuple[str, ...]] = {
    "layout": ("NCHW", "NHWC"),
    "color": ("RGB", "BGR", "L"),
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    "crop_mode": ("center", "squash", "border"),
    "exif": ("apply", "ignore"),
    "output": ("logits", "probabilities", "sigmoid"),
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Preprocessing and output of a classifier, in timm's words where timm has them.

    `input_size` is (channels, height, width). `mean` and `std` act on pixels scaled to 0..1, in the
    order of `color`. `exif` says whether a photograph is turned upright before it is cropped.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    exif: str = "apply"
    layout: str = "NCHW"
    color: str = "RGB"
    output: str = "logits"
    label_names: tuple[str, ...] = ()
    target_layer: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ModelError(f"spec field {name!r} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        channels = self.input_size[0]
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise ModelError(f"spec field 'input_size' is {list(self.input_size)}; it is [channels, height, width]")
        if channels != (1 if self.color == "L" else 3):
            raise ModelError(f"spec has {channels} channels and color {self.color}; RGB and BGR have 3, L has 1")
        if len(self.mean) != channels or len(self.std) != channels:
            raise ModelError(f"spec fields 'mean' and 'std' need {channels} values each")
        if min(self.std) <= 0:
            raise ModelError("spec field 'std' must be positive")
        if not 0 < self.crop_pct <= 1:
            raise ModelError(f"spec field 'crop_pct' is {self.crop_pct}; it lies in (0, 1]")

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> ModelSpec:
        """The spec of a JSON object; `where` names its origin in errors.

        Raises:
            ModelError: a field is unknown, missing, of the wrong type or out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ModelError(f"{where}: unknown spec field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        missing = sorted({"input_size", "mean", "std"} - set(data))
        if missing:
            raise ModelError(f"{where}: spec field {missing[0]!r} is missing")
        _check_types(data, where)
        values: dict[str, Any] = {
            key: tuple(given) if isinstance(given, list) else given for key, given in data.items()
        }
        try:
            return cls(**values)
        except ModelError as err:
            raise ModelError(f"{where}: {err}") from None
        except TypeError as err:
            raise ModelError(f"{where}: a spec field has the wrong type ({err})") from None

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _check_types(data: Mapping[str, Any], where: str) -> None:
    for key, kind, words in (
        ("input_size", int, "integers"),
        ("mean", (int, float), "numbers"),
        ("std", (int, float), "numbers"),
        ("label_names", str, "names"),
    ):
        values = data.get(key, [])
        fits = isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
        if not fits or (kind is not str and not all(abs(value) < 1e9 for value in values)):
            shown = repr(values) if len(repr(values)) <= 80 else repr(values)[:77] + "..."
            raise ModelError(f"{where}: {key} = {shown} is not a list of {words}; correct it")
    if len(data["input_size"]) != 3:
        raise ModelError(f"{where}: input_size = {data['input_size']} is not [channels, height, width]; correct it")
    if not isinstance(data.get("target_layer"), str | None):
        raise ModelError(f"{where}: target_layer = {data['target_layer']!r} is not a name; correct it")
