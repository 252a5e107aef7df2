"""heatmill: explain ONNX image classifiers at data-set scale."""

from typing import Any

__version__ = "0.1.0"


class HeatmillError(Exception):
    """A refusal that a user can act on: one line saying what, where and the way out."""

    exit_code = 2


class ModelError(HeatmillError):
    """The model file, its spec or a target layer was refused."""


class InputError(HeatmillError):
    """The images, the manifest or a flag was refused."""


class BackendError(HeatmillError):
    """A runtime is missing or refuses the model."""


class IncompleteError(HeatmillError):
    """The run stopped early and can be resumed (disk full, too many worker deaths, SIGTERM)."""

    exit_code = 4


class RunError(HeatmillError):
    """The run folder belongs to other settings or is damaged."""

    exit_code = 5


_PUBLIC = {
    "Explainer": "heatmill.engine.explainer",
    "open_run": "heatmill.engine.jobs.store",
}

__all__ = [
    "BackendError",
    "Explainer",
    "HeatmillError",
    "IncompleteError",
    "InputError",
    "ModelError",
    "RunError",
    "__version__",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
