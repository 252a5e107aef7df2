"""Building ahead what a GPU runs: the network, and every backward graph that methods need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..backends import Profile, build_plan, pick_provider, wanted_precision
from ..opening import DEFAULT_BATCH, Loaded, load, row_shape
from ..passes import check_backward, graphs_to_build
from ..types import Target, parse_targets

MANY = 10**6  # classes of a model that does not say how many it has


def compile_model(
    model: Path,
    methods: Sequence[str] = ("score-cam",),
    targets: Sequence[str] = ("predicted",),
    gpus: Sequence[str] = (),
    *,
    backend: str = "tensorrt",
    provider: str | None = None,
    precision: str = "auto",
    batch_size: int | None = None,
    layer: str | None = None,
    preprocess: str | None = None,
    labels: Path | None = None,
    output: str | None = None,
    scores: str | None = None,
) -> dict[str, Any]:
    """Build every graph of a run, as `explain` with the same arguments will look for it; what is there is kept.

    Args:
        gpus: what the plans are for, as sm_89, one of its own for each; none is what the library takes by itself.

    Returns:
        JSON values; under `graphs` each plan's path, size, seconds, rows, target and activation memory.

    Raises:
        HeatmillError: the model or a method is refused, the library is missing, or it refuses a graph.
    """
    loaded = load(model, methods, layer=layer, preprocess=preprocess, labels=labels, output=output, scores=scores)
    kind = wanted_precision(precision, loaded.own_precision)
    check_backward(loaded)
    chosen = provider or pick_provider(backend)
    asked = parse_targets(list(targets), loaded.model.classes or MANY, loaded.spec.label_names)
    size = batch_size or loaded.model.input.batch or DEFAULT_BATCH
    built = []
    for name, data, profile in _graphs(loaded, backend, chosen, kind, asked, size):
        for gpu in gpus or (None,):
            plan = build_plan(backend, data, profile, gpu)
            built.append(
                {
                    "graph": name,
                    "precision": profile.precision,
                    "rows": plan.about["rows"],
                    "target": gpu or plan.about["targets"],
                    "plan": str(plan.path),
                    "bytes": len(plan.data),
                    "seconds": plan.about["seconds"],
                    "activation_bytes": plan.about["activation_bytes"],
                    "cached": plan.cached,
                }
            )
    return {"model": str(model), "backend": backend, "provider": chosen, "graphs": built}


def _graphs(
    loaded: Loaded, backend: str, provider: str, precision: str, targets: Sequence[Target], size: int
) -> Iterator[tuple[str, bytes, Profile]]:
    network = loaded.serialized(dynamic=size != loaded.model.input.batch)
    yield "network", network, Profile(size, precision, provider, input_shape=row_shape(loaded))
    yield from graphs_to_build(loaded, backend, provider, targets, size)


def compile_text(found: dict[str, Any]) -> str:
    """The answer of `compile_model` for people."""
    lines = [f"{found['model']}: {found['backend']} / {found['provider']}"]
    for one in found["graphs"]:
        memory = one["activation_bytes"]
        held = "" if memory is None else f", {memory / 1e6:.1f} MB of activations"
        how = "was there" if one["cached"] else f"built in {one['seconds']:.1f} s"
        lines.append(
            f"{one['graph']:12} {one['precision']}, up to {one['rows']} rows, for {one['target']}: "
            f"{one['bytes'] / 1e6:.1f} MB{held}, {how}"
        )
        lines.append(f"             {one['plan']}")
    return "\n".join(lines) + "\n"
