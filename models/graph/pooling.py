"""The way back through poolings: to the winner of each window, or evenly to all of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product as every
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from .backward import Unsupported, Walk
from .canonize import Op, product
from .convolution import Sizes, Windows, conv_adjoint, reshaped, windows

Array = npt.NDArray[Any]

SCATTER_OPSET = 16  # the first whose ScatterElements adds


# ----- to the winner -----


def max_adjoint(walk: Walk, op: Op, grad: str) -> str:
    """What the input of a MaxPool receives: each window's share goes to the first of its greatest inputs."""
    if walk.portable or walk.graph.opset < SCATTER_OPSET:
        return _to_taps(walk, op, grad, windows(walk, op))
    return _scattered(walk, op, grad)


def _scattered(walk: Walk, op: Op, grad: str) -> str:
    """By the winners' places in the flat input, which MaxPool itself tells."""
    emit, image = walk.emit, op.inputs[0]
    attributes = {**op.attributes, "storage_order": 0}
    places = walk.once(
        ("places", op.outputs[0]),
        lambda: emit.op("Reshape", emit.ops("MaxPool", 2, image, **attributes)[1], [-1]),
    )
    zero = numpy_helper.from_array(np.zeros(1, emit.dtype))
    empty = walk.once(
        ("empty", op.outputs[0]),
        lambda: emit.op("Reshape", emit.op("ConstantOfShape", emit.op("Shape", image), value=zero), [-1]),
    )
    flat = emit.op("ScatterElements", empty, places, emit.op("Reshape", grad, [-1]), axis=0, reduction="add")
    return reshaped(walk, flat, walk.shape(image))


def _to_taps(walk: Walk, op: Op, grad: str, found: Windows) -> str:
    """By a running maximum over the taps of all windows at once: the winner is never looked for by its value, which
    a runtime may hold in another precision than the pooling's output.

    Everything is done at the resolution of the windows. The padded input is taken apart into phases, one for each
    residue of a position modulo the stride; a tap of all windows is then a plain slice of one phase.
    """
    emit = walk.emit
    taps = list(every(*(range(count) for count in found.kernel)))
    grid = tuple(
        count + reach // stride for count, reach, stride in zip(found.count, found.reach, found.strides, strict=True)
    )
    places = [_place(found, tap) for tap in taps]

    def winner() -> str:
        phases = _phases(walk, op.inputs[0], found, grid, dict.fromkeys(phase for phase, _ in places))
        best, number = "", ""
        for n, (phase, offset) in enumerate(places):
            value = _window_slice(walk, phases[phase], offset, found.count, grid)
            if not n:
                best = value
                continue
            number = emit.op("Where", emit.op("Greater", value, best), float(n), number or 0.0)
            best = emit.op("Max", best, value) if n < len(taps) - 1 else best
        return number

    totals: dict[Sizes, str] = {}
    number = walk.once(("winner", op.outputs[0]), winner) if len(taps) > 1 else ""
    for n, (phase, offset) in enumerate(places):
        share = grad
        if number:
            won = walk.once(("won", op.outputs[0], n), partial(emit.op, "Equal", number, float(n)))
            share = emit.op("Where", won, grad, 0.0)
        if grid != found.count:
            behind = [total - count - first for total, count, first in zip(grid, found.count, offset, strict=True)]
            share = emit.op("Pad", share, [0, 0, *offset, 0, 0, *behind])
        totals[phase] = emit.op("Add", totals[phase], share) if phase in totals else share
    channels = walk.shape(op.inputs[0])[1]
    return _joined(walk, totals, found, grid, channels)


def _place(found: Windows, tap: Sizes) -> tuple[Sizes, Sizes]:
    """In which phase a tap lies, and at which entry of it for the first window."""
    positions = [index * step for index, step in zip(tap, found.dilations, strict=True)]
    phase = tuple(position % stride for position, stride in zip(positions, found.strides, strict=True))
    return phase, tuple(position // stride for position, stride in zip(positions, found.strides, strict=True))


def _phases(walk: Walk, image: str, found: Windows, grid: Sizes, wanted: Iterable[Sizes]) -> dict[Sizes, str]:
    """The padded input at the wanted residues modulo the strides, each of the size `grid`."""
    emit, axes = walk.emit, [axis + 2 for axis in range(found.rank)]
    whole = [count * stride for count, stride in zip(grid, found.strides, strict=True)]
    behind = [total - size - pad for total, size, pad in zip(whole, found.size, found.before, strict=True)]
    if min(behind) < 0:
        last = [size + min(0, pad) for size, pad in zip(found.size, behind, strict=True)]
        image = emit.op("Slice", image, [0] * found.rank, last, axes)
    if any(found.before) or max(behind) > 0:
        pads = [0, 0, *found.before, 0, 0, *(max(0, pad) for pad in behind)]
        image = emit.op("Pad", image, pads, float(np.finfo(emit.dtype).min))
    if max(found.strides) == 1:
        return {(0,) * found.rank: image}
    return {phase: emit.op("Slice", image, list(phase), whole, axes, list(found.strides)) for phase in wanted}


def _window_slice(walk: Walk, phase: str, offset: Sizes, count: Sizes, grid: Sizes) -> str:
    if grid == count:
        return phase
    last = [first + windows for first, windows in zip(offset, count, strict=True)]
    return walk.emit.op("Slice", phase, list(offset), last, [axis + 2 for axis in range(len(count))])


def _joined(walk: Walk, totals: dict[Sizes, str], found: Windows, grid: Sizes, channels: int | None) -> str:
    """The phases put back in their places, and the padding cut off."""
    emit, rank = walk.emit, found.rank
    value = next(iter(totals.values()))
    if max(found.strides) > 1:
        nothing = "" if len(totals) == np.prod(found.strides) else emit.op("Mul", value, 0.0)
        parts = [totals.get(phase, nothing) for phase in every(*(range(stride) for stride in found.strides))]
        value = emit.op("Concat", *parts, axis=1)
        value = reshaped(walk, value, [None, *found.strides, channels, *grid])
        order = [0, rank + 1, *(axis for i in range(rank) for axis in (rank + 2 + i, 1 + i))]
        whole = [count * stride for count, stride in zip(grid, found.strides, strict=True)]
        value = reshaped(walk, emit.op("Transpose", value, perm=order), [None, channels, *whole])
    whole = [count * stride for count, stride in zip(grid, found.strides, strict=True)]
    last = [min(total, pad + size) for total, pad, size in zip(whole, found.before, found.size, strict=True)]
    if any(found.before) or last != whole:
        value = emit.op("Slice", value, list(found.before), last, [axis + 2 for axis in range(rank)])
    unseen = [pad + size - end for pad, size, end in zip(found.before, found.size, last, strict=True)]
    return emit.op("Pad", value, [0] * (rank + 4) + unseen) if any(unseen) else value


def to_first_extreme(walk: Walk, op: Op, grad: str, axes: Sequence[int], least: bool = False) -> str:
    """What the input of a maximum (or minimum) over whole axes receives: the first of the greatest takes it all."""
    emit, sizes = walk.emit, walk.shape(op.inputs[0])
    rest = [axis for axis in range(len(sizes)) if axis not in axes]
    order = [*rest, *sorted(axes)]
    moved = order != sorted(order)
    lines = [sizes[axis] for axis in rest]
    count = product(sizes[axis] for axis in axes)

    def won() -> str:
        value = emit.op("Transpose", op.inputs[0], perm=order) if moved else op.inputs[0]
        winner = emit.op("ArgMin" if least else "ArgMax", reshaped(walk, value, [*lines, count]), axis=-1, keepdims=1)
        return emit.op("Equal", winner, np.arange(count, dtype=np.int64))

    share = emit.op("Where", walk.once(("won", op.outputs[0]), won), reshaped(walk, grad, [*lines, 1]), 0.0)
    share = reshaped(walk, share, [sizes[axis] for axis in order])
    return emit.op("Transpose", share, perm=[order.index(axis) for axis in range(len(order))]) if moved else share


# ----- evenly -----


def average_adjoint(walk: Walk, op: Op, grad: str) -> str:
    """What the input of an AveragePool receives."""
    found = windows(walk, op)
    share = 1 / tap_counts(found, bool(op.get("count_include_pad", 0)))
    even = share.min() == share.max()
    whole = not any(found.before)
    if whole and max(*found.kernel, *found.strides) == 1 and found.count == found.size:
        return grad
    channels = walk.shape(op.inputs[0])[1]
    if whole and found.kernel == found.strides and max(found.dilations) == 1:
        return _repeated(walk, grad, share, found, channels)
    scaled = walk.emit.op("Mul", grad, float(share.flat[0]) if even else share[None, None])
    return sum_adjoint(walk, scaled, found, channels)


def tap_counts(found: Windows, with_padding: bool = False) -> Array:
    """How many inputs each window averages over: an array of the shape `found.count`."""
    counts: Array = np.ones(found.count)
    for axis in range(found.rank):
        first = np.arange(found.count[axis]) * found.strides[axis] - found.before[axis]
        taps = first[:, None] + np.arange(found.kernel[axis]) * found.dilations[axis]
        least, most = (-found.before[axis], found.after[axis]) if with_padding else (0, 0)
        inside = ((taps >= least) & (taps < found.size[axis] + most)).sum(1)
        counts = counts * np.maximum(inside, 1).reshape([-1 if i == axis else 1 for i in range(found.rank)])
    return counts


def sum_adjoint(walk: Walk, grad: str, found: Windows, channels: int | None) -> str:
    """What the inputs of sums over these windows receive."""
    begin = [reach - before for reach, before in zip(found.reach, found.before, strict=True)]
    end = [reach - over for reach, over in zip(found.reach, found.over, strict=True)]
    if max(*found.strides, *found.dilations) == 1 and min(*begin, *end) >= 0:
        mean = walk.emit.op("AveragePool", grad, kernel_shape=found.kernel, pads=[*begin, *end], count_include_pad=1)
        return walk.emit.op("Mul", mean, float(product(found.kernel)))
    if channels is None:
        raise Unsupported("its channels follow the batch")
    return conv_adjoint(walk, grad, np.ones((channels, 1, *found.kernel)), found, channels)


def _repeated(walk: Walk, grad: str, share: Array, found: Windows, channels: int | None) -> str:
    """Windows that neither overlap nor leave gaps: every entry is repeated over its window."""
    emit, rank = walk.emit, found.rank
    apart = [size for count in found.count for size in (count, 1)]
    even = share.min() == share.max()
    shares = (share.flat[0] if even else share.reshape(apart)) * np.ones([n for k in found.kernel for n in (1, k)])
    value = emit.op("Mul", reshaped(walk, grad, [None, channels, *apart]), shares[None, None])
    whole = [count * taps for count, taps in zip(found.count, found.kernel, strict=True)]
    value = reshaped(walk, value, [None, channels, *whole])
    if any(total > size for total, size in zip(whole, found.size, strict=True)):
        value = emit.op("Slice", value, [0] * rank, list(found.size), [axis + 2 for axis in range(rank)])
    unseen = [max(0, size - total) for size, total in zip(found.size, whole, strict=True)]
    return emit.op("Pad", value, [0] * (rank + 4) + unseen) if any(unseen) else value
