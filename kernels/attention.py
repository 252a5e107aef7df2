"""L-CAM's attention in NumPy: the maps, the loss with its gradient, and the optimiser.

The attention is a 1x1 convolution from the layer's channels to the classes; of an image only the row of its class is
used. Source: Gkartzonika, Gkalelis and Mezaris, ECCV workshops 2022, and the constants of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .host import resize_matrix

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Loss:
    """`entropy * cross-entropy + area * mean((a + shift)^power) + variation * TV(a)`; the defaults are published."""

    entropy: float = 1.5
    area: float = 2.0
    variation: float = 0.01
    power: float = 0.3
    shift: float = 0.0005
    border: float = 0.3


def attend(features: Array, weight: Array, bias: Array) -> Array:
    """Each image's map of its own class before the sigmoid, (n, p).

    Args:
        features: (n, c, p), the layer's maps with the grid flattened.
        weight, bias: (n, c) and (n,), the rows of the images' classes.
    """
    return np.asarray(np.matmul(weight[:, None], features)[:, 0] + bias[:, None])


def attend_pairs(features: Array, weight: Array, bias: Array) -> Array:
    """Every image's map for the class of every image, (n, n, p): image, class, place."""
    return np.asarray(np.matmul(weight, features) + bias[:, None])


def sigmoid(values: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * values)))


def cross_entropy(raw: Array, classes: Array, kind: str = "softmax") -> tuple[Array, Array]:
    """-log of each row's posterior (n,), and its gradient at the raw scores (n, classes).

    Args:
        kind: softmax, or sigmoid, where the other classes' scores do not count.
    """
    rows = np.arange(len(raw))
    gradient = np.zeros_like(raw)
    if kind == "sigmoid":
        chosen = raw[rows, classes]
        gradient[rows, classes] = sigmoid(chosen) - 1
        return np.asarray(np.logaddexp(0, -chosen)), gradient
    shifted = raw - raw.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    total = powers.sum(axis=1)
    np.divide(powers, total[:, None], out=gradient)
    gradient[rows, classes] -= 1
    return np.asarray(np.log(total) - shifted[rows, classes]), gradient


def regularise(maps: Array, images: int, loss: Loss) -> tuple[float, float, Array]:
    """The weighted area and total variation of maps (m, h, w), and their gradient.

    `TV = (sum dx^2 + sum dy^2 + border * sum of the squared first and last rows and columns) / (2 images)`; a corner is
    in a row and in a column.

    Args:
        maps: after the sigmoid; the batch's own, or those of every pair.
        images: of the batch.
    """
    lifted = maps + loss.shift
    powered = lifted**loss.power
    area = loss.area * float(powered.mean())
    gradient = loss.area * loss.power / maps.size * (powered / lifted)
    across, down = np.diff(maps, axis=2), np.diff(maps, axis=1)
    edges = (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1])
    squares = float((across**2).sum() + (down**2).sum())
    squares += loss.border * sum(float((maps[edge] ** 2).sum()) for edge in edges)
    scale = loss.variation / images
    gradient[:, :, 1:] += scale * across
    gradient[:, :, :-1] -= scale * across
    gradient[:, 1:] += scale * down
    gradient[:, :-1] -= scale * down
    for edge in edges:
        gradient[edge] += scale * loss.border * maps[edge]
    return area, loss.variation * squares / (2 * images), gradient


def upsample_back(gradient: Array, grid: tuple[int, int]) -> Array:
    """What comes back at maps (n, h, w) for a gradient (n, H, W) at their upsampling: its exact transpose."""
    rows = resize_matrix(grid[0], gradient.shape[1], "half-pixel").astype(gradient.dtype)
    columns = resize_matrix(grid[1], gradient.shape[2], "half-pixel").astype(gradient.dtype)
    return np.asarray(rows.T @ (gradient @ columns))


class Nesterov:
    """SGD with Nesterov momentum and weight decay, as torch.optim.SGD's, where a step has gradients for few rows.

    A row without one moves all the same, by momentum and decay: k such steps are one product with the k-th power of a
    2 x 2 matrix on (value, velocity), the same for every number. It is made up for when the row is next read, so that a
    step costs the rows it has, and the result is the dense one's.

    Args:
        values: (rows, ...), owned from now on.
        rate: step length.
    """

    def __init__(self, values: Array, rate: float, momentum: float = 0.9, decay: float = 5e-4) -> None:
        self.values, self.velocity = values, np.zeros_like(values)
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.last = np.zeros(len(values), np.int64)
        self.steps = 0
        self._powers = np.eye(2)[None]

    def rows(self, which: Array) -> Array:
        """Some rows' values, up to date."""
        late = np.unique(which)
        late = late[self.last[late] < self.steps]
        if len(late):
            idle = self.steps - self.last[late]
            moves = self._moves(int(idle.max()))[idle].astype(self.values.dtype)
            moves = moves.reshape(len(late), 2, 2, *(1 for _ in self.values.shape[1:]))
            value, velocity = self.values[late], self.velocity[late]
            self.values[late] = moves[:, 0, 0] * value + moves[:, 0, 1] * velocity
            self.velocity[late] = moves[:, 1, 0] * value + moves[:, 1, 1] * velocity
            self.last[late] = self.steps
        return np.asarray(self.values[which])

    def step(self, which: Array, gradient: Array) -> None:
        """One step; gradients of a row that is named several times are added."""
        unique, place = np.unique(which, return_inverse=True)
        value = self.rows(unique)
        if len(unique) < len(which):
            summed = np.zeros((len(unique), *gradient.shape[1:]), gradient.dtype)
            np.add.at(summed, place, gradient)
        else:
            summed = gradient[np.argsort(which)]
        summed = summed + self.decay * value
        velocity = self.momentum * self.velocity[unique] + summed
        self.velocity[unique] = velocity
        self.values[unique] = value - self.rate * (summed + self.momentum * velocity)
        self.steps += 1
        self.last[unique] = self.steps

    def settle(self) -> Array:
        """All values, up to date."""
        return self.rows(np.arange(len(self.values)))

    def set_rate(self, rate: float) -> None:
        """Another step length from the next step on."""
        if rate != self.rate:
            self.settle()
            self.rate = rate
            self._powers = np.eye(2)[None]

    def _moves(self, most: int) -> Array:
        """At least the powers 0 .. most of an idle step's matrix."""
        rate, momentum, decay = self.rate, self.momentum, self.decay
        idle = np.array([[1 - rate * decay * (1 + momentum), -rate * momentum**2], [decay, momentum]])
        while len(self._powers) <= most:
            self._powers = np.concatenate([self._powers, self._powers @ (idle @ self._powers[-1])])
        return self._powers
