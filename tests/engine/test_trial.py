"""The trial on GPUs: memory that is short, and scores that half precision spoils."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from heatmill import BackendError
from heatmill.engine import trial
from heatmill.engine.backends import Profile, open_session
from heatmill.engine.opening import load
from heatmill.models.graph.precision import typed

MESSAGES = [
    "out of memory: a batch of 64 rows needs 900 MB of the GPU",
    "CUDA failure 2: out of memory",
    "[defaultAllocator.cpp::allocate::57] Error Code 1: Cuda Runtime (out of memory)",
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to allocate memory for requested buffer of size 1024",
    "std::bad_alloc",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_an_error_that_says_that_no_memory_was_left(message):
    assert trial.ran_out_of_memory(BackendError(message))
    assert not trial.ran_out_of_memory(BackendError("the operator has no kernel"))


def test_a_smaller_batch_is_tried_and_said_once(make_model, monkeypatch, caplog):
    opened, asked = trial.open_best, []

    def small(loaded, backend, provider, precision, size, threads, device):
        asked.append(size)
        if size > 8:
            raise BackendError(f"out of memory: a batch of {size} rows")
        return opened(loaded, backend, provider, precision, size, threads, device)

    monkeypatch.setattr(trial, "open_best", small)
    loaded = load(make_model(), ["cam"])
    found, _ = trial.try_model(loaded)
    assert asked == [32, 16, 8]
    assert found.batch_size == 8
    said = "the memory does not hold a batch of 32 rows; it is run in batches of 8"
    assert found.notes == (said,)
    assert [record.getMessage() for record in caplog.records] == [f"model.onnx: {said}"]
    with pytest.raises(BackendError, match="a batch of 16 rows"):
        trial.try_model(loaded, batch_size=16)


def half_session(loaded, change=lambda scores: scores, precision="fp16"):
    """The model in fp16 on the CPU, as a GPU would be asked for it, and what is done to its scores."""
    proto = typed(onnx.load_model_from_string(loaded.serialized(dynamic=True)), "fp16")
    session = open_session("onnxruntime", proto.SerializeToString(), Profile(4))

    def run(feeds, outputs):
        values = session.run(feeds, outputs)
        return [change(values[0].copy()), *values[1:]]

    return SimpleNamespace(run=run, precision=precision)


def test_scores_in_half_precision_are_held_against_fp32(make_model):
    loaded = load(make_model(), ["cam"])
    assert trial.check_scores(loaded, half_session(loaded), 4) == []


def swapped(scores):
    """The greatest and the least change places in the last row."""
    first, last = scores[-1].argmax(), scores[-1].argmin()
    scores[-1, [first, last]] = scores[-1, [last, first]]
    return scores


def test_another_class_in_front_is_refused(make_model):
    loaded = load(make_model(), ["cam"])
    with pytest.raises(BackendError, match=r"in fp16 class \d comes first on trial image 4, in fp32 class \d; run it"):
        trial.check_scores(loaded, half_session(loaded, swapped), 4)
    assert trial.check_scores(loaded, half_session(loaded, swapped, "fp32"), 4) == []


def test_scores_that_are_no_numbers_are_refused(make_model):
    loaded = load(make_model(), ["cam"])
    broken = half_session(loaded, lambda scores: np.where(scores == scores.max(), np.nan, scores))
    with pytest.raises(BackendError, match="in fp16 some scores are not numbers; run it with --precision fp32"):
        trial.check_scores(loaded, broken, 4)


def test_a_lost_class_further_down_is_a_warning(make_model, monkeypatch):
    monkeypatch.setattr(trial, "TOP", 3)
    loaded = load(make_model(), ["cam"])

    def worse(scores):
        order = np.argsort(scores[0])
        scores[0, order[[2, 0]]] = scores[0, order[[0, 2]]]  # the third of five and the last
        return scores

    (note,) = trial.check_scores(loaded, half_session(loaded, worse), 4)
    assert note == "in fp16 the first 3 classes are not those of fp32 on trial image 1"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_trial_images_are_smooth_and_in_range(make_model, layout):
    loaded = load(make_model(layout=layout), ["rise"])
    rows = trial._smooth_rows(loaded, 3)
    images = rows if layout == "NCHW" else rows.transpose(0, 3, 1, 2)
    assert images.shape == (3, 3, 33, 29)
    low, high = (np.reshape(bound, (3, 1, 1)) for bound in loaded.bounds)
    assert ((low - 1e-5 <= images) & (images <= high + 1e-5)).all()
    assert np.abs(np.diff(images, axis=3)).max() < 0.3 * (high - low).max()
