"""A MaxPool's relevance divided among equal inputs."""

from __future__ import annotations

from itertools import product as every

import numpy as np

from .backward import Unsupported, Walk
from .canonize import Op
from .convolution import conv_adjoint, reshaped, windows


def tied(walk: Walk, op: Op, relevance: str) -> str:
    """What the input of a MaxPool receives when each window's relevance is divided equally among its greatest inputs.

    They are told by comparing the taps of a window with the greatest of them, not with the pooling's output, which a
    runtime may hold in another precision.
    """
    emit, found = walk.emit, windows(walk, op)
    channels = walk.shape(op.inputs[0])[1]
    if channels is None:
        raise Unsupported("its channels follow the batch")
    taps = list(every(*(range(count) for count in found.kernel)))

    def shares() -> str:  # (rows, channels, taps, *windows)
        image = op.inputs[0]
        pads = [0, 0, *found.before, 0, 0, *(max(0, over) for over in found.over)]
        if any(pads):
            image = emit.op("Pad", image, pads, float(np.finfo(emit.dtype).min))
        axes = [axis + 2 for axis in range(found.rank)]
        values = []
        for tap in taps:
            first = [index * step for index, step in zip(tap, found.dilations, strict=True)]
            zipped = zip(first, found.count, found.strides, strict=True)
            last = [start + (count - 1) * stride + 1 for start, count, stride in zipped]
            values.append(emit.op("Slice", image, first, last, axes, list(found.strides)))
        stacked = emit.op("Concat", *(emit.op("Unsqueeze", value, [2]) for value in values), axis=2)
        greatest = emit.op("Unsqueeze", emit.op("Max", *values), [2])
        equal = emit.mask(emit.op("Equal", stacked, greatest))
        return emit.op("Div", equal, emit.op("ReduceSum", equal, [2], keepdims=1))

    share = walk.once(("relevance ties", op.outputs[0]), shares)
    sent = emit.op("Mul", share, emit.op("Unsqueeze", relevance, [2]))
    sent = reshaped(walk, sent, [None, channels * len(taps), *found.count])
    own = np.tile(np.eye(len(taps)).reshape(len(taps), 1, *found.kernel), (channels, 1, *(1 for _ in found.kernel)))
    return conv_adjoint(walk, sent, own, found, channels)
