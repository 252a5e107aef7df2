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
    from ..models.graph.attention import Attention
    from ..models.graph.head import LinearHead
    from ..models.graph.request import Request
    from ..models.graph.tap import Tap
    from ..models.superpixels import Segmentation

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


@dataclass(frozen=True, slots=True)
class PathBank:
    """Points between the baseline and the image: baseline + share * (image + noise - baseline).

    Attributes:
        shares: (n,) of the way to the image.
        draws: (n,) which noise is added to the image; rows with equal numbers share it, -1 is none.
        noise: its standard deviation, as a share of the image's range.
    """

    shares: Array
    draws: Array
    noise: float = 0.0

    def __len__(self) -> int:
        return len(self.shares)


@dataclass(frozen=True, slots=True)
class SegmentBank:
    """Superpixels: the segment of every pixel (H, W) int32, and which of them each row keeps (n, segments) uint8."""

    segments: Array
    bits: Array

    def __len__(self) -> int:
        return len(self.bits)


@dataclass(frozen=True, slots=True)
class WindowBank:
    """Rectangles that are hidden, (n, 4) int32: top, left, bottom, right, the latter two outside."""

    boxes: Array

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, slots=True)
class TapBank:
    """Factors of the layer's maps (n, c, h, w), an axis of 1 stands for all of it; rows go through the head alone."""

    masks: Array

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True, slots=True)
class RankBank:
    """Pixels shown from a rank on; a row each.

    With rank 0 for what counts most, threshold t takes the t first pixels away. In the reversed ranks,
    H * W - 1 - rank, threshold H * W - t shows the t first pixels alone.

    Attributes:
        ranks: (m, H, W) int32, orders of the pixels.
        of: (n,) int32, which order.
        thresholds: (n,) int32.
    """

    ranks: Array
    of: Array
    thresholds: Array

    def __len__(self) -> int:
        return len(self.of)


Bank = MapBank | GridBank | PathBank | SegmentBank | WindowBank | TapBank | RankBank


BASELINE_NAMES = ("zero", "black", "mean", "blur")
SEGMENT_MEAN = "segment-mean"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a method may know of the model before any image.

    Attributes:
        size: (height, width) of the network's input.
        output: logits, probabilities or sigmoid.
        has_logits: whether raw scores are known.
        tap: the layer that is read.
        head: the linear layer on the pooled tap, or the reason why there is none.
        attention: the trained attention on the tap, or the reason why there is none.
        layers: every feature map, in the graph's order.
        waists: the names of values that every path from the image to the scores passes.
        operators: the kinds of operators of the graph.
    """

    size: tuple[int, int]
    output: str
    has_logits: bool
    tap: Tap | None
    head: LinearHead | str
    attention: Attention | str = "the file has no attention"
    layers: tuple[Tap, ...] = ()
    waists: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()

    @property
    def posterior(self) -> str:
        """How raw scores become posteriors: softmax, sigmoid, or none where they are posteriors already."""
        if not self.has_logits:
            return "none"
        return "sigmoid" if self.output == "sigmoid" else "softmax"


@dataclass(frozen=True, slots=True)
class Returned:
    """What a backward graph gave for one of a method's requests.

    Attributes:
        values: (k, ...) float32, one per target: (c, h, w) each at a tap or at the image, channels first.
        kept: (k,) the share of the relevance that arrived; empty for gradients.
    """

    values: Array
    kept: Array


@dataclass(frozen=True, slots=True)
class Observation:
    """One unperturbed image after its pass.

    Attributes:
        image: the network's input for it, (c, h, w) float32.
        raw: raw scores (classes,).
        targets: the asked classes (k,).
        features: the tapped maps (c, h, w), where a tap is read.
        returned: for each of the method's requests, what came back.
        layers: for each of the method's other layers, its maps (c, h, w).
        segments: for each of the method's segmentations, the segment of every pixel (H, W) int32.
        key: (2,) uint64, Philox's, for random numbers of this image.
        given: what came with the image, `Item.given`.
    """

    image: Array
    raw: Array
    targets: Array
    features: Array | None
    returned: tuple[Returned, ...] = ()
    layers: tuple[Array, ...] = ()
    segments: tuple[Array, ...] = ()
    key: Array | None = None
    given: Any = None


@dataclass(frozen=True, slots=True)
class Expansion:
    """The passes that one image needs besides its observation.

    Attributes:
        bank: the perturbed inputs, a row each; None where no further pass is needed.
        baseline: what stands for absence: zero (in the network's own units), black, mean, blur or blur:SIZE:SIGMA,
            rise-blur (the blur of RISE's evaluation), least or greatest (the image's least or greatest number
            everywhere); with superpixels also segment-mean; with 0/1 masks also road (interpolated from what is left).
        score: "posterior" or "logit", what each pass through the network is asked for.
        every_class: whether the results are of all classes in order, not of the targets.
        through: the backward pass that the rows go through instead; None is the network alone.
        of: (n,) for rows through a backward pass, which target each belongs to.
        weights: (n,) for rows through a backward pass, with which what comes back is summed up by target.
        starts: (n, c, h, w) maps at the tap, fed where `through` starts at a map.
        carry: whatever `combine` needs besides.
        extras: counts for the row.
    """

    bank: Bank | None = None
    baseline: str = "zero"
    score: str = "posterior"
    every_class: bool = False
    through: Request | None = None
    of: Array | None = None
    weights: Array | None = None
    starts: Array | None = None
    carry: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Combined:
    """Raw maps (k, h, w) float32, and for each target what to say and, of methods with `arrays`, its named arrays.

    What makes no maps, as metrics, gives empty ones (k, 0, 0).
    """

    maps: Array
    extras: tuple[Mapping[str, Any], ...]
    arrays: tuple[Mapping[str, Array], ...] = ()


@dataclass(frozen=True, slots=True)
class Summed:
    """Maps (k, H, W) that are sums of a bank's masks at the network's size under weights (k, n), left to the engine."""

    bank: GridBank
    weights: Array


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option of a method: its default fixes the type."""

    default: Value
    doc: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None


def always(parameters: Parameters) -> bool:
    return True


def never(parameters: Parameters) -> bool:
    return False


def nothing_back(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
    """For methods that need no backward pass."""
    return ()


def no_layers(facts: Facts, parameters: Parameters) -> tuple[str, ...]:
    """For methods that read one layer at most."""
    return ()


def not_cut_at_tap(facts: Facts, parameters: Parameters) -> bool:
    return False


def not_cut(parameters: Parameters) -> tuple[Segmentation, ...]:
    """For methods that need no superpixels."""
    return ()


@dataclass(frozen=True, slots=True)
class Method:
    """A way to explain, as data: what it needs, how an image becomes passes, how what they give becomes a map.

    Attributes:
        expand: (facts, observation, parameters, shared bank) -> Expansion.
        combine: (facts, observation, expansion, results, parameters) -> Combined, Summed, or an Expansion: more passes.
            `results` is (k, n), a score for every target (or class) and row; after passes through a backward graph it
            is (k, ...), the weighted sums of what came back.
        finish: parameters -> the steps from raw map to saliency map, of FINISHES.
        passes: (facts, parameters) -> greatest number of further passes per image, and for each of its targets where
            they depend on the class.
        refuses: (facts, parameters) -> why the method can't run on this model, or None.
        share: (facts, parameters, seed) -> a mask bank that serves every image, where masks do not depend on it.
        backward: (facts, parameters) -> what the observation computes besides, for every target.
        through: (facts, parameters) -> the backward passes that rows may go through.
        read: (facts, what a row's pass showed, the row, expansion, parameters) -> what is summed up; the returned
            values themselves where it is None. The row's observation has one target.
        layers: (facts, parameters) -> the layers that the observation gives besides, for methods with `backward`.
        head: (facts, parameters) -> whether rows go through the graph behind the layer alone, a `TapBank`'s.
        superpixels: parameters -> how the picture is cut into segments.
        arrays: whether it gives named arrays besides maps.
        needs_tap: parameters -> whether a layer is read.
        pixels: parameters -> whether maps are on another grid than the tap's, as a rule the input's.
    """

    name: str
    summary: str
    citation: str
    parameters: Mapping[str, Parameter]
    expand: Callable[[Facts, Observation, Parameters, Bank | None], Expansion]
    combine: Callable[[Facts, Observation, Expansion, Array, Parameters], Combined | Summed | Expansion]
    finish: Callable[[Parameters], tuple[str, ...]]
    passes: Callable[[Facts, Parameters], int]
    refuses: Callable[[Facts, Parameters], str | None]
    share: Callable[[Facts, Parameters, int], Bank] | None = None
    backward: Callable[[Facts, Parameters], tuple[Request, ...]] = nothing_back
    through: Callable[[Facts, Parameters], tuple[Request, ...]] = nothing_back
    read: Callable[[Facts, Observation, int, Expansion, Parameters], Array] | None = None
    layers: Callable[[Facts, Parameters], tuple[str, ...]] = no_layers
    head: Callable[[Facts, Parameters], bool] = not_cut_at_tap
    superpixels: Callable[[Parameters], tuple[Segmentation, ...]] = not_cut
    arrays: bool = False
    needs_tap: Callable[[Parameters], bool] = always
    pixels: Callable[[Parameters], bool] = never


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A method with every parameter resolved."""

    method: Method
    parameters: Parameters

    @property
    def needs_tap(self) -> bool:
        """Whether a layer is read."""
        return self.method.needs_tap(self.parameters)

    @property
    def pixels(self) -> bool:
        """Whether its maps are on another grid than the tap's."""
        return self.method.pixels(self.parameters)

    @property
    def text(self) -> str:
        """The call as a user would write it: name:key=value,... for what differs from the defaults."""
        return call_text(self.method.name, self.method.parameters, self.parameters)


def call_text(name: str, known: Mapping[str, Parameter], parameters: Parameters) -> str:
    """A name with those parameters that differ from their defaults."""
    changed = [f"{key}={value}" for key, value in parameters.items() if value != known[key].default]
    return name + (":" + ",".join(changed) if changed else "")


@dataclass(frozen=True, slots=True)
class Subject:
    """One map as metrics see it, with what is known of its image.

    Attributes:
        saliency: (H, W) float32, finished, at the size of the network's input.
        ranks: (2 m, H, W) int32, of all m maps of the image the rank of every pixel, 0 for what counts most, then those
            reversed, as in `RankBank`.
        place: which of them is this map's.
        boxes: (b, 4) float64, x0 y0 x1 y1 in pixels of the input, cut to what the model saw.
        boxes_status: ok, or why there are none: no_boxes, box_outside.
        extras: what the run says of the map.
    """

    saliency: Array
    ranks: Array
    place: int
    boxes: Array
    boxes_status: str
    extras: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a metric says of one map; without a value, `status` and `reason` say why."""

    value: float | None
    curve: Array | None = None
    status: str = "ok"
    reason: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def no_bank(subject: Subject, parameters: Parameters) -> Bank | None:
    """For metrics that look at the map alone."""
    return None


def no_passes(parameters: Parameters) -> int:
    return 0


def no_conventions(parameters: Parameters) -> Mapping[str, Any]:
    return {}


def own_values(values: Array, curves: Array | None, parameters: Parameters) -> Array:
    """The rows' values, for metrics whose table holds their mean."""
    return values[:, None]


@dataclass(frozen=True, slots=True)
class Metric:
    """A way to judge a map, as data: how it becomes masked passes, how their scores become a value.

    Attributes:
        better: higher or lower, which of two values speaks for a map.
        measure: (subject, posterior of the target on the image, posteriors (n,) of the bank's rows, parameters) ->
            Measured.
        bank: (subject, parameters) -> the masked images, of one kind of bank for every map; None where there are none.
        baseline: parameters -> what stands for absence behind the masks, as in `Expansion`.
        passes: parameters -> greatest number of rows for one map.
        conventions: parameters -> what a row says of how it was made: baseline, mask_space, score, steps.
        terms: (values (n,), curves (n, p) or None, parameters) -> (n, q) of rows with a value; the table's figure is
            the greatest of the q means over them.
        again: with what the map is made again, noise on the image, or weights of the network shuffled (cascade,
            independent); None where it is judged as it is. Then `measure` gets, in the place of posteriors, what
            `compare` said of each.
        compare: (raw map, raw map made again, parameters) -> number.
    """

    name: str
    summary: str
    citation: str
    parameters: Mapping[str, Parameter]
    better: str
    measure: Callable[[Subject, float, Array, Parameters], Measured]
    bank: Callable[[Subject, Parameters], Bank | None] = no_bank
    baseline: Callable[[Parameters], str] = lambda parameters: "zero"
    passes: Callable[[Parameters], int] = no_passes
    conventions: Callable[[Parameters], Mapping[str, Any]] = no_conventions
    terms: Callable[[Array, Array | None, Parameters], Array] = own_values
    again: str | None = None
    compare: Callable[[Array, Array, Parameters], float] | None = None


@dataclass(frozen=True, slots=True)
class MetricCall:
    """A metric with every parameter resolved."""

    metric: Metric
    parameters: Parameters

    @property
    def text(self) -> str:
        """The call as a user would write it: name:key=value,... for what differs from the defaults."""
        return call_text(self.metric.name, self.metric.parameters, self.parameters)


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
    """One image to explain: the network's input for it (no batch axis), its label if known, and how it is cut.

    `segments` may hold what methods need of its picture (`Method.superpixels`); what it lacks is made when needed.
    `name` is what its random numbers depend on, wherever it stands among the others; without one it is the key.
    `targets` fixes the classes, in the order of the engine's targets; `given` goes to the methods as it is.
    """

    key: Hashable
    image: Array
    label: int | None = None
    segments: Mapping[Segmentation, Array] = field(default_factory=dict)
    name: str | None = None
    targets: tuple[int, ...] | None = None
    given: Any = None

    @property
    def identity(self) -> str:
        """What random numbers of the image are keyed by."""
        return str(self.key) if self.name is None else self.name


@dataclass(frozen=True, slots=True)
class Explanation:
    """One image, target and method: the raw map (h, w) and how it came about.

    `map` is None where `status` is not ok, and for what makes no map. `score` is the target's posterior on the
    unperturbed image. `size` is the input's (height, width). `arrays` is what the method gives besides.
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
    arrays: Mapping[str, Array] = field(default_factory=dict)

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


MOST_CLASSES = 10**5


def parse_targets(texts: list[str] | tuple[str, ...], classes: int, label_names: tuple[str, ...]) -> tuple[Target, ...]:
    """Targets from `predicted`, `topN`, `label`, `all` (a target for each class), class numbers and class names.

    Raises:
        InputError: a number outside the model's classes, an unknown or ambiguous name.
    """
    targets: list[Target] = []
    for text in texts:
        word = text.strip()
        if word in ("predicted", "label"):
            targets.append(Target(word))
        elif re.fullmatch("top[0-9]+", word) and word not in label_names:
            count = int(word[3:])
            if not 1 <= count <= classes:
                raise InputError(f"target {word!r}: the model has {classes} classes")
            targets.append(Target("top", count))
        elif word == "all" and word not in label_names:
            if classes > MOST_CLASSES:
                raise InputError("target 'all': the model does not say how many classes it has; name them")
            targets += [Target("class", number) for number in range(classes)]
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
