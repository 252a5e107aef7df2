"""The training of L-CAM's attention: batches, epochs, what is held out, and checkpoints."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from ... import IncompleteError, InputError, RunError
from ...kernels import host
from ...kernels.attention import Loss, Nesterov, attend, attend_pairs, regularise, sigmoid
from ...kernels.finish import minmax
from ...models.graph.head import LinearHead
from ..backends import Session, usable_cores
from ..opening import Loaded
from ..passes import open_entropy
from ..types import Array
from . import store
from .ahead import ahead
from .features import Features, forward
from .job import Signals
from .progress import Progress
from .train_settings import TrainJob
from .train_ways import HeadWay, ImageWay, LinearWay, places, under
from .worker import prepared_ahead

CHECKPOINT_SECONDS = 30.0
EVALUATIONS = 10
MOST_HELD, MEASURED, EXAMPLES = 1000, 64, 6
STARTED, SPREAD = 512, 2.0  # images that a start from the head is scaled by, and the deviation of their maps
PARTS = ("entropy", "area", "variation")


@dataclass(slots=True)
class Progressed:
    """How far a training is: what a checkpoint holds besides the optimisers."""

    epoch: int = 0
    position: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    history: list[dict[str, Any]] = field(default_factory=list)
    best: int = -1
    finished: bool = False


class Trainer:
    """The loop over epochs and batches, from a checkpoint where there is one.

    Attributes:
        weight, bias: the optimisers with the attention's values.
        trained, held: the rows that are trained on, and those held out.
        examples: (evaluations, images, h, w) the maps of a few images that are held out.
    """

    def __init__(
        self,
        job: TrainJob,
        loaded: Loaded,
        session: Session,
        features: Features,
        images: pa.Table,
        batch_size: int,
        free: bool,
        classes: int,
    ) -> None:
        if loaded.tap is None:
            raise ValueError("a training reads a layer")
        self.job, self.loaded, self.features, self.images = job, loaded, features, images
        self.session, self.network_rows = session, batch_size
        self.tap, self.loss, self.schedule = loaded.tap, Loss(), job.schedule
        self.classes = features.known.classes
        self.count = classes
        self.trained, self.held = self._split()
        self.notes: list[str] = []
        head = self._head(free)
        self._way = head if job.variant == "fm" and head is not None else self._image_way(free)
        self.weight, self.bias = self._start(head)
        self.at = Progressed()
        self.best = (self.weight.values.copy(), self.bias.values.copy())
        self.examples = np.zeros((0, len(self.shown), *self.tap.grid), np.float32)
        self._restore()
        loaded.release()

    # ----- what it begins with -----

    def _split(self) -> tuple[Array, Array]:
        """Rows to train on and rows held out, by the seed; bad images are in neither."""
        known = self.features.known
        good = np.flatnonzero(known.good)
        if len(good) < 2:
            row, reason = known.first_bad or (0, "")
            told = f"; the first bad one, {self._id(row)!r}: {reason}" if reason else ""
            raise InputError(f"{len(good)} of {len(self.images)} images can be used, and 2 are the least{told}")
        held = min(max(1, round(self.job.held_out * len(good))), MOST_HELD, len(good) - 1)
        order = np.random.Generator(np.random.Philox(key=[self.job.seed, 0])).permutation(good)
        return np.sort(order[held:]), np.sort(order[:held])

    def _id(self, row: int) -> str:
        return str(self.images["id"][int(row)].as_py())

    @property
    def shown(self) -> Array:
        """The held-out rows whose maps the report shows."""
        return self.held[:EXAMPLES]

    @property
    def untrained(self) -> list[int]:
        """The classes that no training image has."""
        return sorted(set(range(self.count)).difference(self.classes[self.trained].tolist()))

    def _head(self, free: bool) -> LinearWay | HeadWay | None:
        """The way behind the layer; None where the image's variant needs none and there is none."""
        if isinstance(self.loaded.facts.head, LinearHead):
            return LinearWay(self.loaded.facts.head, self.tap, self.loaded.posterior)
        if self.job.variant == "img" and (
            self.schedule.start == "random" or self.tap.name not in self.loaded.facts.waists
        ):
            return None
        rows = self.schedule.batch_size if free else self.network_rows
        return HeadWay(open_entropy(self.loaded, self.session, self.tap, rows, free), self.tap, self.loaded.posterior)

    def _image_way(self, free: bool) -> ImageWay:
        rows = self.schedule.batch_size if free else self.network_rows
        through = open_entropy(self.loaded, self.session, None, rows, free)
        return ImageWay(through, self.loaded, self.tap, self._read, self.loaded.posterior)

    def _read(self, rows: Array) -> Array:
        """The network's inputs of some images, decoded again."""
        threads = self.job.workers or usable_cores()
        found = []
        with ThreadPoolExecutor(threads) as pool:
            listed = self.images.take(pa.array(rows)).to_pylist()
            for image, prepared in prepared_ahead(pool, 2 * threads + 2, listed, self.loaded):
                if prepared.image is None:
                    raise IncompleteError(
                        f"{image['uri']}: could be read when the training began and now is {prepared.status} "
                        f"({prepared.error}); put it back, then the same command resumes"
                    )
                found.append(prepared.image)
        return np.stack(found)

    def _start(self, head: LinearWay | HeadWay | None) -> tuple[Nesterov, Nesterov]:
        schedule, channels = self.schedule, self.tap.channels
        if schedule.start == "head" and head is None:
            self.notes.append("values go around the layer, so that the start is random")
        if schedule.start == "random" or head is None:
            draw = np.random.Generator(np.random.Philox(key=[self.job.seed, 1]))
            weight = draw.uniform(-1, 1, (self.count, channels)) / np.sqrt(channels)
            bias = draw.uniform(-1, 1, self.count) / np.sqrt(channels)
        else:
            weight, bias = self._from_head(head)
        values = weight.astype(np.float32), bias.astype(np.float32)
        return Nesterov(values[0], schedule.rate), Nesterov(values[1], schedule.bias_rate)

    def _from_head(self, head: LinearWay | HeadWay) -> tuple[Array, Array]:
        """The head's gradient at the mean features, scaled so that the images' own maps have mean 0 and a deviation of
        SPREAD."""
        sample = self.trained[:: max(1, len(self.trained) // STARTED)]
        if isinstance(head, LinearWay):
            weight = head.head.weight.astype(np.float64)
        else:
            total = np.zeros(self.features.shape, np.float64)
            for row in sample:
                total += self.features.take(np.array([row]))[0]
            mean = (total / len(sample)).astype(np.float32)[None]
            weight = np.empty((self.count, self.tap.channels))
            for start in range(0, self.count, self.schedule.batch_size):
                asked = np.arange(start, min(start + self.schedule.batch_size, self.count))
                _, gradient = head.through.run(np.repeat(mean, len(asked), axis=0), asked)
                weight[asked] = -places(self.tap, gradient).mean(axis=2)
        maps = []
        for start in range(0, len(sample), self.schedule.batch_size):
            rows = sample[start : start + self.schedule.batch_size]
            own = weight[self.classes[rows]].astype(np.float32)
            maps.append(attend(places(self.tap, self.features.take(rows)), own, np.zeros(len(rows), np.float32)))
        whole = np.concatenate(maps).astype(np.float64)
        deviation = float(whole.std(axis=1).mean())
        scale = SPREAD / deviation if deviation > 0 else 0.0
        return weight * scale, np.full(self.count, -scale * float(whole.mean()))

    # ----- one batch -----

    def batch(self, rows: Array, values: Array, learn: bool = True) -> dict[str, float]:
        """The loss of some images, its parts as means over the batch, and if asked one step down its gradient.

        Args:
            rows: (n,) of the plan.
            values: (n, ...) float32, the layer's values of them.
        """
        classes, n = self.classes[rows], len(rows)
        features = places(self.tap, values)
        weight, bias = self.weight.rows(classes), self.bias.rows(classes)
        own = sigmoid(attend(features, weight, bias))
        entropy, back = self._way(rows, values, own, classes)
        gradient = self.loss.entropy / n * back
        if self.job.loss == "own-map":
            area, variation, extra = regularise(own.reshape(n, *self.tap.grid), n, self.loss)
            gradient = (gradient + extra.reshape(n, -1)) * own * (1 - own)
            down = np.matmul(features, gradient[:, :, None])[:, :, 0]
            shift = gradient.sum(axis=1)
        else:
            pairs = sigmoid(attend_pairs(features, weight, bias))
            area, variation, extra = regularise(pairs.reshape(n * n, *self.tap.grid), n, self.loss)
            whole = extra.reshape(n, n, -1)
            whole[np.arange(n), np.arange(n)] += gradient
            whole *= pairs * (1 - pairs)
            down = np.matmul(whole, features.transpose(0, 2, 1)).sum(axis=0)
            shift = whole.sum(axis=(0, 2))
        parts = {"entropy": self.loss.entropy * float(entropy.mean()), "area": area, "variation": variation}
        if learn:
            self.weight.step(classes, down.astype(np.float32))
            self.bias.step(classes, shift.astype(np.float32))
        return parts

    # ----- all of them -----

    def _ahead(self, order: Array) -> Iterator[tuple[Array, Array]]:
        """Batches of rows with their values; the next one is read while one is at work."""
        size = self.schedule.batch_size
        batches = (order[start : start + size] for start in range(0, len(order), size))
        with ThreadPoolExecutor(1) as pool:
            yield from ahead(pool, 2, batches, self.features.take)

    def run(self, style: str, signals: Signals) -> None:
        """Train to the end, from where the checkpoint is.

        Raises:
            IncompleteError: a checkpoint can't be written.
            KeyboardInterrupt: stopped by a signal, after a checkpoint.
        """
        at, schedule = self.at, self.schedule
        count = len(self.trained)
        saved = time.monotonic()
        with Progress(count * schedule.epochs, style, "training") as progress:
            progress.start(count * at.epoch + at.position)
            while not at.finished:
                began, first = time.monotonic(), at.position
                factor = schedule.at(at.epoch)
                self.weight.set_rate(schedule.rate * factor)
                self.bias.set_rate(schedule.bias_rate * factor)
                order = np.random.Generator(np.random.Philox(key=[self.job.seed, 2 + at.epoch])).permutation(
                    self.trained
                )
                for rows, values in self._ahead(order[first:]):
                    for name, value in self.batch(rows, values).items():
                        at.sums[name] += value * len(rows)
                    at.position += len(rows)
                    progress.advance(len(rows))
                    if signals.number is not None:
                        self._save()
                        raise KeyboardInterrupt
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        self._save()
                        saved = time.monotonic()
                speed = (count - first) / max(time.monotonic() - began, 1e-9)
                self._end_epoch(speed, progress)
                if signals.number is not None:
                    self._save()
                    raise KeyboardInterrupt
            self._save()

    def _end_epoch(self, speed: float, progress: Progress) -> None:
        """Look at the images that are held out, keep what is best, and say how it goes."""
        at, schedule, count = self.at, self.schedule, len(self.trained)
        parts = {name: at.sums[name] / count for name in PARTS}
        held = self._held_loss()
        weights = (self.weight.settle(), self.bias.settle())
        if not all(np.isfinite(found).all() for found in (sum(parts.values()), held, *weights)):
            raise InputError(
                f"{self.job.folder}: the loss is no longer finite in epoch {at.epoch + 1}; a smaller --rate may do "
                "(with --overwrite)"
            )
        entry: dict[str, Any] = {"epoch": at.epoch + 1, "loss": sum(parts.values()), **parts, "held_out": held}
        entry["images_per_second"] = speed
        better = at.best < 0 or held < at.history[at.best]["held_out"]
        if better:
            at.best = at.epoch
            self.best = (weights[0].copy(), weights[1].copy())
        last = at.epoch + 1 == schedule.epochs or at.epoch - at.best >= self.job.patience > 0
        every = max(1, schedule.epochs // EVALUATIONS)
        if at.epoch == 0 or last or (at.epoch + 1) % every == 0:
            entry["average_drop"], entry["increase"], maps = self._measure()
            self.examples = np.concatenate([self.examples, maps[None]])
        at.history.append(entry)
        at.epoch, at.position, at.sums, at.finished = at.epoch + 1, 0, dict.fromkeys(PARTS, 0.0), last
        progress.tell(told(entry, schedule.epochs), "epoch", **entry)

    def _held_loss(self) -> float:
        total = 0.0
        for rows, values in self._ahead(self.held):
            total += sum(self.batch(rows, values, learn=False).values()) * len(rows)
        return total / len(self.held)

    def _measure(self) -> tuple[float, float, Array]:
        """Average drop and increase in % over some held-out images, and the maps of those that are shown."""
        rows = self.held[:MEASURED]
        drops, rises, maps = 0.0, 0, []
        for start in range(0, len(rows), self.network_rows):
            part = rows[start : start + self.network_rows]
            classes = self.classes[part]
            raw = attend(
                places(self.tap, self.features.take(part)), self.weight.rows(classes), self.bias.rows(classes)
            ).reshape(-1, *self.tap.grid)
            maps.append(raw)
            masked = under(self.loaded, self._read(part), minmax(raw))
            (scores,) = forward(self.session, self.loaded, masked, self.network_rows, [self.loaded.scores])
            left = host.posteriors(scores.reshape(len(part), -1), self.loaded.posterior)[np.arange(len(part)), classes]
            whole = self.features.known.scores[part]
            drops += float((np.maximum(0, whole - left) / whole).sum())
            rises += int((left > whole).sum())
        return 100 * drops / len(rows), 100 * rises / len(rows), np.concatenate(maps)[: len(self.shown)]

    # ----- checkpoints -----

    def _save(self) -> None:
        arrays = {
            f"{name}_{what}": getattr(part, what)
            for name, part in (("weight", self.weight), ("bias", self.bias))
            for what in ("values", "velocity", "last")
        }
        arrays |= {"best_weight": self.best[0], "best_bias": self.best[1], "examples": self.examples}
        rates = {"weight": self.weight.rate, "bias": self.bias.rate}
        about = {**asdict(self.at), "steps": self.weight.steps, "rates": rates}
        file = io.BytesIO()
        np.savez(file, about=np.array(json.dumps(about)), **arrays)
        try:
            store.commit(self.job.folder, "checkpoint.npz", file.getvalue())
        except OSError as err:
            raise IncompleteError(store.write_refusal(self.job.folder, err)) from err

    def _restore(self) -> None:
        path = self.job.folder / "checkpoint.npz"
        if not path.exists():
            return
        try:
            with np.load(path, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                steps, rates = int(about.pop("steps")), about.pop("rates")
                for name, part in (("weight", self.weight), ("bias", self.bias)):
                    for what in ("values", "velocity", "last"):
                        values = found[f"{name}_{what}"]
                        if values.shape != getattr(part, what).shape:
                            raise ValueError(f"{name} has the shape {values.shape}")
                        setattr(part, what, values)
                    part.steps = steps
                    part.rate = float(rates[name])
                self.at = Progressed(**about)
                self.best = (found["best_weight"], found["best_bias"])
                self.examples = found["examples"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as err:
            raise RunError(f"{path}: damaged ({err}); start again with --overwrite") from None


def told(entry: Mapping[str, Any], epochs: int) -> str:
    """An epoch in one line."""
    parts = " + ".join(f"{entry[name]:.3g} {name}" for name in PARTS)
    lines = [f"epoch {entry['epoch']}/{epochs}: loss {entry['loss']:.4g} = {parts}"]
    lines.append(f"held out {entry['held_out']:.4g}")
    if "average_drop" in entry:
        lines.append(f"average drop {entry['average_drop']:.1f}%, increase {entry['increase']:.1f}%")
    return "; ".join([*lines, f"{entry['images_per_second']:.0f} images/s"])
