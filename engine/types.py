"""Frozen data that passes between the engine's parts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from .. import InputError
from ..kernels.finish import finish

if TYPE_CHECKING:
    from ..models.graph.head import LinearHead
    from ..models.graph.tap import Tap

Array = npt.NDArray[Any]
Value = str | int | float | bool
Parameters = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class MapBank:
    """Masks as low-resolution maps (n, h, w) float32, already scaled to 0..1 at full resolution, and a resize rule."""

    maps: Array
    rule: str = "half-pixel"

    def __len__(self) -> int:
        return len(self.maps)


@dataclass(frozen=True, slots=True)
class GridBank:
    """RISE masks: grids of bits (n, s, s) uint8, offsets (n, 2) within a cell, and how often each was drawn (n,)."""

    bits: Array
    offsets: Array
    counts: Array

    def __len__(self) -> int:
        return len(self.bits)


Bank = MapBank | GridBank


BASELINE_NAMES = ("zero", "black", "mean", "blur")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a method may know of the model before any image: `head` is the reason where there is no linear head."""

    size: tuple[int, int]
    output: str
    has_logits: bool
    tap: Tap | None
    head: LinearHead | str


@dataclass(frozen=True, slots=True)
class Observation:
    """One unperturbed image after its pass: its network input, raw scores (classes,) and tapped maps (c, h, w)."""

    image: Array
    raw: Array
    features: Array | None


@dataclass(frozen=True, slots=True)
class Expansion:
    """The masked passes that one image needs.

    Attributes:
        bank: the masks; None where the observation is enough.
        baseline: what stands for absence: zero (in the network's own units), black, mean or blur.
        score: "posterior" or "logit", what each masked pass is asked for.
        carry: whatever `combine` needs besides.
        extras: counts for the row.
    """

    bank: Bank | None = None
    baseline: str = "zero"
    score: str = "posterior"
    carry: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Combined:
    """Raw maps (k, h, w) float32, and what to say of all targets or of each."""

    maps: Array
    extras: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option of a method: its default fixes the type."""

    default: Value
    doc: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A way to explain, as data: what it needs, how an image becomes masked passes, how scores become a map.

    Attributes:
        expand: (facts, observation, parameters, shared bank) -> Expansion.
        combine: (facts, observation, expansion, scores (k, n), targets (k,), parameters) -> Combined.
        share: (facts, parameters, seed) -> a mask bank that serves every image, where masks do not depend on it.
        finish: parameters -> the steps from raw map to saliency map, of FINISHES.
        refuses: (facts, parameters) -> why the method can't run on this model, or None.
        passes: (facts, parameters) -> greatest number of masked passes per image.
        pixels: maps are at the input's resolution, not the tap's.
    """

    name: str
    summary: str
    citation: str
    parameters: Mapping[str, Parameter]
    expand: Callable[[Facts, Observation, Parameters, Bank | None], Expansion]
    combine: Callable[[Facts, Observation, Expansion, Array, Array, Parameters], Combined]
    finish: Callable[[Parameters], tuple[str, ...]]
    passes: Callable[[Facts, Parameters], int]
    refuses: Callable[[Facts, Parameters], str | None]
    share: Callable[[Facts, Parameters, int], Bank] | None = None
    needs_tap: bool = True
    pixels: bool = False


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A method with every parameter resolved."""

    method: Method
    parameters: Parameters

    @property
    def text(self) -> str:
        """The call as a user would write it: name:key=value,... for what differs from the defaults."""
        defaults = self.method.parameters
        changed = [f"{key}={value}" for key, value in self.parameters.items() if value != defaults[key].default]
        return self.method.name + (":" + ",".join(changed) if changed else "")


@dataclass(frozen=True, slots=True)
class Target:
    """One asked class: `kind` is predicted, top, label or class."""

    kind: str
    value: int = 0

    @property
    def count(self) -> int:
        """How many rows it makes per image."""
        return self.value if self.kind == "top" else 1

    @property
    def text(self) -> str:
        return {"top": f"top{self.value}", "class": str(self.value)}.get(self.kind, self.kind)


def target_rows(targets: Sequence[Target], label: int | None) -> list[tuple[int | None, str]]:
    """The (class, source) of each row that an image without scores gets."""
    rows: list[tuple[int | None, str]] = []
    for target in targets:
        if target.kind == "top":
            rows += [(None, f"top{rank}") for rank in range(1, target.value + 1)]
        else:
            known = {"label": label, "class": target.value}.get(target.kind)
            rows.append((known, target.kind))
    return rows


@dataclass(frozen=True, slots=True)
class Item:
    """One image to explain: the network's input for it (no batch axis) and its label, if known."""

    key: Hashable
    image: Array
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """One image, target and method: the raw map (h, w) and how it came about.

    `map` is None where `status` is not ok. `score` is the target's posterior on the unperturbed image. `size` is the
    input's (height, width).
    """

    key: Hashable
    method: MethodCall
    target: int
    target_source: str
    score: float
    pred: int
    pred_score: float
    status: str
    error: str | None
    map: Array | None
    extras: Mapping[str, Any]
    size: tuple[int, int]

    def upsampled(self) -> Array:
        """The raw map at the input's size, (H, W): bilinear, half-pixel centres."""
        return self._finished(())

    def saliency(self) -> Array:
        """The map (H, W) finished as the method's source shows it (ReLU, min-max, in its order)."""
        return self._finished(self.method.method.finish(self.method.parameters))

    def _finished(self, steps: tuple[str, ...]) -> Array:
        if self.map is None:
            raise ValueError(f"{self.key!r} has no map: its status is {self.status}")
        result: Array = finish(self.map[None], steps, self.size)[0]
        return result


def nearest(word: str, known: list[str]) -> str:
    """The known words that come closest, for an error's last part."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"


def parse_targets(texts: list[str] | tuple[str, ...], classes: int, label_names: tuple[str, ...]) -> tuple[Target, ...]:
    """Targets from `predicted`, `topN`, `label`, class numbers and class names.

    Raises:
        InputError: a number outside the model's classes, an unknown or ambiguous name.
    """
    targets = []
    for text in texts:
        word = text.strip()
        if word in ("predicted", "label"):
            targets.append(Target(word))
        elif re.fullmatch("top[0-9]+", word) and word not in label_names:
            count = int(word[3:])
            if not 1 <= count <= classes:
                raise InputError(f"target {word!r}: the model has {classes} classes")
            targets.append(Target("top", count))
        else:
            targets.append(Target("class", class_index(word, classes, label_names)))
    if len(set(targets)) < len(targets):
        raise InputError("a target was given twice")
    return tuple(targets)


def class_index(word: str, classes: int, label_names: tuple[str, ...]) -> int:
    """The class that a number or a name stands for; an exact name wins, else case and `_` do not count.

    Raises:
        InputError: a number outside the model's classes, an unknown or ambiguous name.
    """
    if re.fullmatch("[+-]?[0-9]+", word):
        named = [i for i, name in enumerate(label_names) if name == word]
        if named and named != [int(word)]:
            told = f"is class {int(word)} by number and class {named[0]} by name"
            raise InputError(f"class {word!r} {told}; give other names with --labels")
        if not 0 <= int(word) < classes:
            raise InputError(f"class {word} is out of range: the model has classes 0 to {classes - 1}")
        return int(word)
    found = [i for i, name in enumerate(label_names) if name == word]
    if not found:
        loose = word.casefold().replace("_", " ")
        found = [i for i, name in enumerate(label_names) if name.casefold().replace("_", " ") == loose]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"class name {word!r} stands for classes {', '.join(map(str, found))}: give the number")
    if not label_names:
        raise InputError(f"class name {word!r}: the spec has no label names; give the number, or --labels FILE")
    raise InputError(f"no class {word!r}; {nearest(word, list(label_names))}")
