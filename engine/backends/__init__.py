"""The runtimes by name, and the choice among them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ... import BackendError
from .base import PRECISIONS, Offer, Profile, Session, cpu_flags, usable_cores

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Offer",
    "Profile",
    "Session",
    "choose",
    "cpu_flags",
    "open_session",
    "survey",
    "usable_cores",
]

BACKENDS: dict[str, str] = {"reference": ".reference", "onnxruntime": ".ort"}


def _door(name: str) -> Any:
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}; known: {', '.join(BACKENDS)}")
    try:
        return import_module(BACKENDS[name], __package__)
    except ModuleNotFoundError as err:
        raise BackendError(f"backend {name!r} needs {err.name}: pip install '{err.name}'") from err


def open_session(backend: str, model: bytes, profile: Profile) -> Session:
    """A session of the named backend.

    Raises:
        BackendError: unknown or not installed (with the pip line), or it refuses the model or the precision.
    """
    session: Session = _door(backend).open(model, profile)
    return session


def survey() -> list[Offer]:
    """What every known backend gives on this machine."""
    return [offer for name in BACKENDS for offer in _door(name).survey()]


def choose(backend: str, provider: str | None, precision: str, quantised: bool) -> list[tuple[str, str, str]]:
    """The (backend, provider, precision) that give what was asked, best first by what was measured.

    `auto` precision is the file's own arithmetic: int8 for quantised files, else fp32. Between ONNX Runtime's kernels
    and OpenVINO's at one precision, the caller measures on the model itself.

    Raises:
        BackendError: nothing on this machine gives it; says what each backend lacks.
    """
    wanted = ("int8" if quantised else "fp32") if precision == "auto" else precision
    if wanted == "int8" and not quantised:
        raise BackendError("precision int8 needs a quantised (QDQ) model file; this one is not")
    if quantised and wanted not in ("int8", "fp32"):
        raise BackendError(f"the model is quantised: it runs as it is (--precision auto), not in {wanted}")
    named = "onnxruntime" if backend == "auto" else backend
    offers = [offer for offer in _door(named).survey() if provider in (None, offer.provider)]
    if not offers:
        known = ", ".join(offer.provider for offer in _door(named).survey())
        raise BackendError(f"backend {named} has no provider {provider!r}; known: {known}")
    fit = [(offer.backend, offer.provider, wanted) for offer in offers if wanted in offer.precisions]
    if not fit:
        reasons = "; ".join(f"{offer.provider}: {offer.note}" for offer in offers)
        raise BackendError(f"no {wanted} on this machine with backend {named} ({reasons})")
    return fit
