"""What is asked of a training of L-CAM's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and in which steps is trained.

    Attributes:
        rate, bias_rate: step length of the weights and of the biases.
        decay, decays: what both are multiplied by at the start of each of the epochs 1 .. decays.
        start: random, as torch begins a convolution, or head: what the head's gradient at the mean features gives.
    """

    epochs: int
    rate: float
    bias_rate: float
    decay: float
    decays: int
    start: str
    batch_size: int = 64

    def at(self, epoch: int) -> float:
        """The factor of both rates in an epoch, from 0."""
        return float(self.decay ** min(epoch, self.decays))


PRESETS = {
    "head": Schedule(20, 1e-2, 1e-1, 0.9, 20, "head"),
    "vgg": Schedule(8, 1e-2, 2e-2, 0.75, 22, "random"),
    "resnet": Schedule(26, 1e-4, 2e-4, 0.95, 12, "random"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What the user asked for; every field is a flag of `heatmill train-lcam`."""

    model: Path
    inputs: tuple[Path, ...]
    out: Path
    run: Path | None = None
    variant: str = "fm"
    loss: str = "own-map"
    preset: str = "head"
    epochs: int | None = None
    batch_size: int | None = None
    rate: float | None = None
    target: str = "predicted"
    held_out: float = 0.1
    patience: int = 5
    seed: int = 0
    limit: int | None = None
    layer: str | None = None
    backend: str = "auto"
    provider: str | None = None
    workers: int | None = None
    preprocess: str | None = None
    labels: Path | None = None
    output: str | None = None
    scores: str | None = None
    max_bad: float = 0.01
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.run or self.out.with_suffix(".training")

    @property
    def schedule(self) -> Schedule:
        preset = PRESETS[self.preset]
        scale = 1.0 if self.rate is None else self.rate / preset.rate
        return replace(
            preset,
            epochs=self.epochs or preset.epochs,
            batch_size=self.batch_size or preset.batch_size,
            rate=preset.rate * scale,
            bias_rate=preset.bias_rate * scale,
        )
