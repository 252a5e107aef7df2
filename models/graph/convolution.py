"""Where the windows of a convolution or a pooling lie, and the way back through a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .backward import Unsupported, Walk
from .canonize import Op

Array = npt.NDArray[Any]
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Windows:
    """One entry per spatial axis: window `o` reads the inputs at `o * stride - before + tap * dilation`.

    Attributes:
        kernel: taps of a window.
        before: padding before the first input.
        after: padding behind the last one; a window may reach further still (`ceil_mode`).
        size: inputs.
        count: windows.
    """

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    before: Sizes
    after: Sizes
    size: Sizes
    count: Sizes

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def reach(self) -> Sizes:
        """From the first tap of a window to its last."""
        return tuple((taps - 1) * step for taps, step in zip(self.kernel, self.dilations, strict=True))

    @property
    def over(self) -> Sizes:
        """How far the last window reaches behind the last input; negative where it ends before."""
        zipped = zip(self.count, self.strides, self.reach, self.before, self.size, strict=True)
        return tuple((count - 1) * stride + reach + 1 - before - size for count, stride, reach, before, size in zipped)

    @property
    def attributes(self) -> dict[str, Sequence[int]]:
        """Of an operator that has exactly these windows."""
        return {
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": [*self.before, *(max(0, over) for over in self.over)],
        }


def windows(walk: Walk, op: Op) -> Windows:
    """Those of a Conv, a pooling or, with input and output exchanged, a ConvTranspose.

    Raises:
        Unsupported: the grid has no fixed size.
    """
    fine, coarse = op.inputs[0], op.outputs[0]
    if op.kind == "ConvTranspose":
        fine, coarse = coarse, fine
    kernel = _fixed(walk.shape(op.inputs[1])[2:]) if op.kind.startswith("Conv") else tuple(op.get("kernel_shape", ()))
    ones, none = (1,) * len(kernel), (0,) * len(kernel)
    pads = tuple(op.get("pads", none + none))
    found = Windows(
        kernel,
        strides=tuple(op.get("strides", ones)),
        dilations=tuple(op.get("dilations", ones)),
        before=pads[: len(kernel)],
        after=pads[len(kernel) :],
        size=_fixed(walk.shape(fine)[2:]),
        count=_fixed(walk.shape(coarse)[2:]),
    )
    automatic = op.get("auto_pad", "NOTSET")
    if automatic == "VALID":
        return replace(found, before=none, after=none)
    if automatic == "NOTSET" and "output_shape" not in op.attributes:
        return found
    extra = tuple(op.get("output_padding", none))
    whole = [max(0, over + more) for over, more in zip(replace(found, before=none).over, extra, strict=True)]
    less, rest = tuple(pad // 2 for pad in whole), tuple(pad - pad // 2 for pad in whole)
    before, after = (less, rest) if automatic == "SAME_UPPER" else (rest, less)
    return replace(found, before=before, after=after)


def _fixed(sizes: Sequence[int | None]) -> Sizes:
    if None in sizes:
        raise Unsupported("the size of its grid follows the batch")
    return tuple(size for size in sizes if size is not None)


def convolved(walk: Walk, value: str, weight: str | Array, found: Windows, group: int = 1) -> str:
    """A convolution without bias that has exactly these windows; it is what the input of a ConvTranspose receives."""
    return walk.emit.op("Conv", value, weight, group=group, **found.attributes)


def conv_adjoint(walk: Walk, grad: str, weight: str | Array, found: Windows, group: int = 1) -> str:
    """What the input of a convolution with this weight receives: the adjoint of `convolved`.

    Args:
        weight: (outputs, inputs per group, *kernel): a value's name, or an array.
    """
    array = walk.constant(weight) if isinstance(weight, str) else weight
    strided, dilated = max(found.strides) > 1, max(found.dilations) > 1
    if array is None or (strided and not (dilated and walk.portable)):
        return _transposed(walk, grad, weight, found, group)
    length = list(found.count)
    if strided:  # TensorRT has no transposed convolution that is both strided and dilated
        sizes = [None, array.shape[0], *found.count]
        for axis, stride in enumerate(found.strides):
            grad = spread(walk, grad, sizes, axis + 2, stride)
            length[axis] *= stride
            sizes[axis + 2] = length[axis]
    if isinstance(weight, str):
        turned = walk.once(("turned", weight, group), lambda: walk.emit.const(_turned(array, group)))
    else:
        turned = walk.emit.const(_turned(array, group))
    return _flipped(walk, grad, turned, found, group, length)


def _transposed(walk: Walk, grad: str, weight: str | Array, found: Windows, group: int) -> str:
    """By ConvTranspose; what lies behind the last window is padded, as runtimes disagree on `output_padding`."""
    whole = walk.emit.op("ConvTranspose", grad, weight, group=group, **found.attributes)
    if min(found.over) >= 0:
        return whole
    return walk.emit.op("Pad", whole, [0] * (found.rank + 4) + [max(0, -over) for over in found.over])


def _flipped(walk: Walk, grad: str, turned: str, found: Windows, group: int, length: Sequence[int]) -> str:
    """By a convolution of stride 1 with the kernel turned around, which runtimes do faster than ConvTranspose."""
    begin = [reach - before for reach, before in zip(found.reach, found.before, strict=True)]
    zipped = zip(found.size, found.reach, length, begin, strict=True)
    end = [size + reach - have - first for size, reach, have, first in zipped]
    if min(*begin, *end) < 0:  # windows that see nothing but padding, or zeros behind the last
        first = [max(0, -pad) for pad in begin]
        last = [have - max(0, -pad) for have, pad in zip(length, end, strict=True)]
        grad = walk.emit.op("Slice", grad, first, last, [axis + 2 for axis in range(found.rank)])
    return walk.emit.op(
        "Conv",
        grad,
        turned,
        group=group,
        kernel_shape=found.kernel,
        dilations=found.dilations,
        pads=[max(0, pad) for pad in (*begin, *end)],
    )


def _turned(weight: Array, group: int) -> Array:
    """(outputs, inputs per group, *kernel) -> (inputs, outputs per group, *kernel reversed)."""
    outputs, inputs, *kernel = weight.shape
    grouped = weight.reshape(group, outputs // group, inputs, *kernel).swapaxes(1, 2)
    turned = np.flip(grouped, axis=tuple(range(3, grouped.ndim)))
    return np.ascontiguousarray(turned.reshape(group * inputs, outputs // group, *kernel))


def spread(walk: Walk, value: str, sizes: Sequence[int | None], axis: int, step: int) -> str:
    """`step - 1` zeros behind every entry along an axis of a value of these sizes."""
    if step == 1:
        return value
    before, size, after = sizes[:axis], sizes[axis], sizes[axis + 1 :]
    apart = reshaped(walk, value, [*before, size, 1, *after])
    pads = [0] * (2 * len(sizes) + 2)
    pads[len(sizes) + axis + 2] = step - 1
    return reshaped(walk, walk.emit.op("Pad", apart, pads), [*before, None if size is None else size * step, *after])


def reshaped(walk: Walk, value: str, sizes: Sequence[int | None]) -> str:
    """`value` in a shape in which at most one axis, the one without a size, follows the batch.

    Raises:
        Unsupported: there are two such axes.
    """
    if sum(size is None for size in sizes) > 1:
        raise Unsupported("the sizes of two axes follow the batch")
    return walk.emit.op("Reshape", value, [-1 if size is None else size for size in sizes])
