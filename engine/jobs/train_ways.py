"""The ways from an attention's maps to the cross-entropy of the classes, and back to the maps.

A way takes (rows of the plan, the layer's values, maps (n, places) after the sigmoid, classes) and gives each image's
cross-entropy (n,) and its gradient at the maps (n, places).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...kernels import host
from ...kernels.attention import cross_entropy, upsample_back
from ...models.graph.head import LinearHead
from ...models.graph.tap import Tap
from ..opening import Loaded
from ..passes import EntropyPass
from ..types import Array


def places(tap: Tap, values: Array) -> Array:
    """The grid's part of values as the graph holds them, as a view (n, channels, places)."""
    h, w = tap.grid
    if tap.layout == "nchw":
        return values.reshape(len(values), tap.channels, h * w)
    if tap.layout == "nhwc":
        return values.reshape(len(values), h * w, tap.channels).transpose(0, 2, 1)
    along = np.s_[tap.prefix : tap.prefix + h * w]
    return values[:, :, along] if tap.layout == "nct" else values[:, along].transpose(0, 2, 1)


@dataclass(frozen=True, slots=True)
class LinearWay:
    """Masked features through a head that is a linear layer on their mean: the features are not written anew."""

    head: LinearHead
    tap: Tap
    kind: str

    def __call__(self, rows: Array, values: Array, maps: Array, classes: Array) -> tuple[Array, Array]:
        features = places(self.tap, values)
        count = features.shape[2]
        pooled = np.matmul(features, maps[:, :, None])[:, :, 0] / count
        entropy, gradient = cross_entropy(pooled @ self.head.weight.T + self.head.bias, classes, self.kind)
        back = gradient @ self.head.weight / count
        return entropy, np.matmul(back[:, None], features)[:, 0]


@dataclass(frozen=True, slots=True)
class HeadWay:
    """Masked features through the graph behind the layer and back; tokens before the grid are not masked."""

    through: EntropyPass
    tap: Tap
    kind: str

    def __call__(self, rows: Array, values: Array, maps: Array, classes: Array) -> tuple[Array, Array]:
        masked = values.copy()
        shown = places(self.tap, masked)
        shown *= maps[:, None]
        raw, gradient = self.through.run(masked, classes)
        entropy, _ = cross_entropy(raw, classes, self.kind)
        back = places(self.tap, np.ascontiguousarray(gradient))
        return entropy, np.einsum("ncp,ncp->np", back, places(self.tap, values))


@dataclass(frozen=True, slots=True)
class ImageWay:
    """Images under the upsampled maps, over black, through the whole network and back."""

    through: EntropyPass
    loaded: Loaded
    tap: Tap
    images: Callable[[Array], Array]
    kind: str

    def __call__(self, rows: Array, values: Array, maps: Array, classes: Array) -> tuple[Array, Array]:
        entropies, backs = [], []
        for start in range(0, len(rows), self.through.batch_size):
            part = np.s_[start : start + self.through.batch_size]
            images = self.images(rows[part])
            masked = under(self.loaded, images, maps[part].reshape(-1, *self.tap.grid))
            raw, gradient = self.through.run(masked, classes[part])
            entropies.append(cross_entropy(raw, classes[part], self.kind)[0])
            if self.through.channels_last:
                gradient = gradient.transpose(0, 3, 1, 2)
            above = _channels_first(self.loaded, images) - _black(self.loaded)
            back = np.einsum("nchw,nchw->nhw", gradient, above)
            backs.append(upsample_back(back, self.tap.grid).reshape(len(back), -1))
        return np.concatenate(entropies), np.concatenate(backs)


def under(loaded: Loaded, images: Array, maps: Array) -> Array:
    """Network inputs under low-resolution maps (n, h, w), over black; in the network's own layout and type."""
    masks = host.upsample(maps, loaded.facts.size)[:, None]
    black = _black(loaded)
    masked = black + masks * (_channels_first(loaded, images) - black)
    if loaded.model.input.dtype == "uint8":
        masked = np.rint(masked).clip(0, 255)
    masked = masked if loaded.model.input.layout == "NCHW" else masked.transpose(0, 2, 3, 1)
    return np.asarray(masked, loaded.model.input.dtype)


def _black(loaded: Loaded) -> Array:
    return loaded.bounds[0].astype(np.float32)[:, None, None]


def _channels_first(loaded: Loaded, images: Array) -> Array:
    images = images.astype(np.float32, copy=False)
    return images if loaded.model.input.layout == "NCHW" else images.transpose(0, 3, 1, 2)
