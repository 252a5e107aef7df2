"""The same maps whether batches are painted and run in the host's memory or on a GPU, for which an emulator stands in.

The emulator compiles the kernels' own sources for the CPU, and its streams run nothing before somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from heatmill import BackendError, Explainer
from heatmill.engine import explainer as explaining
from heatmill.engine import passes as engine_passes
from heatmill.engine import trial
from heatmill.engine.backends import DeviceSession, Profile, ort
from heatmill.engine.canvas import DeviceCanvas, HostCanvas
from heatmill.engine.coincide import Asked
from heatmill.engine.explainer import Engine, in_full
from heatmill.engine.opening import load, open_best
from heatmill.engine.passes import open_passes
from heatmill.engine.types import Explanation, Item, PathBank, RankBank, Target
from heatmill.kernels.device import DeviceArray
from tests.emulator.emulated import EmulatedDriver
from tests.engine.host_driver import HostDriver
from tests.engine.test_methods import pictures
from tests.graphs import without_scores_in_the_dark
from tests.kernels.test_foreign import ByDlpack, ByInterface

SIZE = (33, 29)
RNG = np.random.default_rng(0)
TARGETS = [Target("top", 2), Target("class", 3)]
CASES = {
    "score-cam": "maps, nothing behind them",
    "score-cam:variant=paper": "the baseline's score, and logits",
    "cf-cam": "a blurred image behind the maps, and a way back",
    "group-cam:groups=3": "a blurred image, two stages",
    "rise:masks=50": "grids, summed on the device",
    "rise:masks=20,baseline=mean": "one number per channel behind",
    "lime:samples=40,superpixels=slic,segments=9": "superpixels, each in its mean colour",
    "ablation-ca:samples=40,segments=8,score=logit": "logits",
    "occlusion:window=12,stride=9": "windows",
    "occlusion:window=12,stride=9,baseline=black": "a whole image behind",
    "sidu": "scores of every class",
    "sise": "several layers",
    "is-cam:steps=2": "many rows",
    "ablation-cam": "the head alone",
    "integrated-gradients:steps=4": "there and back",
    "grad-cam": "the observation",
    "cam": "one pass",
}


class Queued(ort.OrtDeviceSession):
    """ONNX Runtime behind the emulator's stream: a batch runs when somebody waits for it."""

    def run_on_device(self, feeds: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        self.driver._queue(self.stream, lambda: ort.OrtDeviceSession.run_on_device(self, feeds, outputs))


def on_emulator(data: bytes, profile: Profile, driver: EmulatedDriver) -> Queued:
    session = onnxruntime.InferenceSession(ort.device_graph(data, profile, "here"), providers=["CPUExecutionProvider"])
    return Queued(session, "cuda", profile.precision, ("cpu", 0), driver, driver.stream())


def explained(path, methods: Sequence[str], images, rows: int, driver: EmulatedDriver | None, precision="fp32"):
    loaded = load(path, list(methods))
    if driver is None:
        session = open_best(loaded, batch_size=rows)
        passes = open_passes(loaded, session, TARGETS, rows)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_passes, "open_session", lambda _, data, profile: on_emulator(data, profile, driver))
            session = on_emulator(loaded.serialized(True), Profile(rows, precision), driver)
            passes = open_passes(loaded, session, TARGETS, rows)
    assert isinstance(session, DeviceSession) == (driver is not None)
    engine = Engine(loaded, session, TARGETS, rows, seed=2, passes=passes)
    assert isinstance(engine._canvas, DeviceCanvas if driver else HostCanvas)
    found = list(engine.stream(Item(i, image) for i, image in enumerate(images)))
    return sorted(found, key=lambda e: (e.key, e.method.text)), engine


def same(found: Sequence[Explanation], wanted: Sequence[Explanation], atol: float = 2e-5) -> None:
    assert [(e.key, e.target, e.status, e.extras.get("passes")) for e in found] == [
        (e.key, e.target, e.status, e.extras.get("passes")) for e in wanted
    ]
    for one, other in zip(found, wanted, strict=True):
        if other.map is not None:
            np.testing.assert_allclose(one.map, other.map, atol=atol * max(1, np.abs(other.map).max()))


def test_masks_that_two_methods_share_are_summed_for_each(make_model, emulated_driver):
    """The bank of a sum was never painted: what is painted is both methods' together."""
    path, images = make_model(), pictures(4, SIZE)
    methods = ["rise:masks=60", "rise:masks=90", "rise:masks=60,p=0.3"]
    wanted, _ = explained(path, methods, images, 8, None)
    found, engine = explained(path, methods, images, 8, emulated_driver)
    same(found, wanted)
    assert engine.stages.rows < 4 * (1 + 90 + 60) + 8


def test_a_canvas_of_the_same_session_makes_nothing_anew(make_model, emulated_driver):
    path, images = make_model(), pictures(2, SIZE)
    loaded = load(path, ["rise:masks=20"])
    session = on_emulator(loaded.serialized(True), Profile(8), emulated_driver)
    made = []
    for _ in range(3):
        engine = Engine(loaded, session, TARGETS, 8)
        list(engine.stream(Item(i, image) for i, image in enumerate(images)))
        made.append(len(emulated_driver._objects))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("method", CASES)
def test_maps_on_the_device_are_those_of_the_host(make_model, method, emulated_driver):
    path, images = make_model(**({} if method == "cam" else {"head": "Dense"})), pictures(3, SIZE)
    wanted, _ = explained(path, [method], images, 7, None)
    before = emulated_driver.memory()[0]
    found, engine = explained(path, [method], images, 7, emulated_driver)
    same(found, wanted)
    assert all(e.status == "ok" for e in found)
    del engine, found
    assert emulated_driver.memory()[0] == before, "all memory went back"


def test_methods_and_images_share_batches_and_one_is_queued_while_another_is_waited_for(make_model, emulated_driver):
    path, images = make_model(), pictures(6, SIZE)
    methods = ["score-cam", "rise:masks=40", "occlusion:window=12,stride=9", "cf-cam"]
    wanted, _ = explained(path, methods, images, 8, None)
    queued: list[int] = []
    seen: list[int] = []

    class Noting(Queued):
        def run_on_device(self, feeds, outputs):
            queued.append(len(feeds))
            super().run_on_device(feeds, outputs)

    real = DeviceCanvas.run

    def run(self, *given):
        ran = real(self, *given)
        number, scores = len(queued), ran.scores
        ran.scores = lambda *wish: seen.append(len(queued) - number) or scores(*wish)
        return ran

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.Queued", Noting)
        patch.setattr(DeviceCanvas, "run", run)
        found, engine = explained(path, methods, images, 8, emulated_driver)
    same(found, wanted)
    assert set(seen) == {0, 1}
    assert seen.count(1) > seen.count(0), "mostly the next batch is on its way"
    assert engine.stages.slots - engine.stages.rows < 8 * 3


@pytest.mark.parametrize(
    ("options", "spec"),
    [({"layout": "NHWC"}, {"layout": "NHWC"}), ({"dtype": TensorProto.UINT8}, {"mean": [0, 0, 0], "std": [1, 1, 1]})],
)
def test_other_layouts_and_types(make_model, options, spec, emulated_driver):
    path = make_model(spec=spec, **options)
    images = pictures(2, SIZE)
    if "layout" in options:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if "dtype" in options:
        images = np.clip(images * 60 + 120, 0, 255).astype(np.uint8)
    for method in ("rise:masks=30,baseline=mean", "cf-cam", "occlusion:window=12,stride=9,baseline=black"):
        wanted, _ = explained(path, [method], images, 5, None)
        found, _ = explained(path, [method], images, 5, emulated_driver)
        same(found, wanted, 1e-3 if "dtype" in options else 2e-5)


def test_half_precision_is_painted_and_read_as_such(make_model, emulated_driver):
    path, images = make_model(), pictures(2, SIZE)
    wanted, _ = explained(path, ["rise:masks=60", "score-cam"], images, 8, None)
    found, engine = explained(path, ["rise:masks=60", "score-cam"], images, 8, emulated_driver, "fp16")
    assert engine.session.input_dtype == np.float16
    same(found, wanted, 2e-2)
    with pytest.raises(AssertionError):
        same(found, wanted)


def test_what_is_not_finite_ends_its_request_and_no_other(make_model, emulated_driver):
    path = make_model()
    without_scores_in_the_dark(path)
    images = [np.full((3, *SIZE), level, np.float32) for level in (1.0, 50.0)]
    images[0][:, :5], images[1][:, :9] = 0.3, 20.0
    methods = ["rise:masks=300", "occlusion:window=5,stride=5"]
    wanted, _ = explained(path, methods, images, 16, None)
    found, engine = explained(path, methods, images, 16, emulated_driver)
    same(found, wanted)
    assert {e.status for e in found if e.key == 0 and e.method.method.name == "rise"} == {"nonfinite"}
    assert {e.status for e in found if e.key == 1} == {"ok"}
    assert engine.stages.rows < 2 * (300 + 42)


def test_an_image_that_half_precision_loses_is_done_again_in_full(make_model, emulated_driver, monkeypatch):
    path, images = make_model(), pictures(3, SIZE)
    images[1] *= 1e5 / np.abs(images[1]).max()  # beyond what fp16 holds
    methods = ["rise:masks=30", "cam"]
    loaded = load(path, methods)
    session = on_emulator(loaded.serialized(True), Profile(8, "fp16"), emulated_driver)

    def on_the_emulator_too(again, backend, provider, precision, size, device):
        if precision == "fp32" and lacking:
            raise BackendError("no fp32")
        asked.append((backend, provider, precision, device))
        return on_emulator(again.serialized(True), Profile(size, precision), emulated_driver)

    monkeypatch.setattr(explaining, "open_best", on_the_emulator_too)
    for lacking in (False, True):
        asked: list[tuple] = []
        spare = in_full(loaded, lambda: load(path, methods), session, TARGETS, 8, 2)
        engine = Engine(loaded, session, TARGETS, 8, seed=2, spare=spare)
        found = list(engine.stream(Item(i, image) for i, image in enumerate(images)))
        found.sort(key=lambda e: (e.key, e.method.text))
        full = "tf32" if lacking else "fp32"
        assert asked == [("onnxruntime", "cuda", full, 0)]
        wanted, _ = explained(path, methods, images, 8, None)
        same([e for e in found if e.key == 1], [e for e in wanted if e.key == 1])
        notes = {e.key: e.extras.get("note", "") for e in found}
        assert notes[1] == f"fp16 gave a value that is not finite; done again in {full}"
        assert {notes[0], notes[2]} == {""}

    def no_room():
        raise BackendError("out of memory")

    engine = Engine(loaded, session, TARGETS, 8, seed=2, spare=no_room)
    found = list(engine.stream(Item(i, image) for i, image in enumerate(images)))
    assert {e.key: e.status for e in found} == {0: "ok", 1: "nonfinite", 2: "ok"}
    told = {e.extras.get("note") for e in found if e.key == 1}
    assert told == {"fp16 gave a value that is not finite, nor could it be done again in fp32"}
    lost = list(Engine(loaded, session, TARGETS, 8, seed=2).stream([Item(1, images[1])]))
    assert {e.status for e in lost} == {"nonfinite"}
    plain = open_best(loaded, batch_size=8)
    assert in_full(loaded, lambda: loaded, plain, TARGETS, 8) is None
    assert in_full(replace(loaded, own_precision="fp16"), lambda: loaded, session, TARGETS, 8) is None


@pytest.mark.parametrize(("baseline", "layout"), [("rise-blur", "NCHW"), ("mean", "NHWC"), ("road", "NCHW")])
def test_ranks_of_pixels_are_painted_as_on_the_host(make_model, emulated_driver, baseline, layout):
    loaded = load(make_model(layout=layout, spec={"layout": layout}), ["rise:masks=5"])
    session = on_emulator(loaded.serialized(True), Profile(6), emulated_driver)
    ranks = np.stack([RNG.permutation(33 * 29).reshape(SIZE) for _ in range(2)]).astype(np.int32)
    bank = RankBank(ranks, np.array([0, 0, 1, 1, 0], np.int32), np.array([9, 400, 0, 957, 77], np.int32))
    image = pictures(1, SIZE)[0]
    item = Item("an image", image if layout == "NCHW" else np.ascontiguousarray(image.transpose(1, 2, 0)))
    asked = Asked(bank, baseline, {0: None})
    on_host = HostCanvas(loaded, session, 6, (0,), 0)
    canvas = DeviceCanvas(loaded, session, 6, HostCanvas(loaded, session, 6, (0,), 0))
    for rows in (slice(0, 5), slice(1, 4)):
        slots = slice(1, 1 + rows.stop - rows.start)
        on_host.paint(slots, item, asked, rows)
        canvas.paint(slots, item, asked, rows)
        found = canvas._kernels.download(canvas._images, stream=session.stream)
        np.testing.assert_allclose(found[slots], on_host.images[slots], atol=1e-5)


def test_a_bank_without_a_kernel_is_refused(make_model, emulated_driver):
    loaded = load(make_model(), ["rise:masks=5"])
    session = on_emulator(loaded.serialized(True), Profile(4), emulated_driver)
    on_host = HostCanvas(loaded, session, 4, (0,), 0)
    canvas = DeviceCanvas(loaded, session, 4, on_host)
    bank = PathBank(np.ones(2, np.float32), np.full(2, -1))
    item = Item(0, pictures(1, SIZE)[0])
    with pytest.raises(ValueError, match="no kernel paints a PathBank"):
        canvas.paint(slice(0, 2), item, Asked(bank, "zero", {0: None}), slice(0, 2))
    with pytest.raises(ValueError, match="rows without masks"):
        canvas.paint(slice(0, 2), item, Asked(None, "zero", {0: None}), slice(0, 2))


def test_images_may_lie_on_a_gpu(make_model, monkeypatch):
    path, images = make_model(), pictures(3, SIZE)
    explainer = Explainer(path, method="rise:masks=20")
    wanted = explainer.explain(images).maps
    monkeypatch.setattr(explaining, "open_driver", lambda index: HostDriver())
    np.testing.assert_array_equal(explainer.explain([ByInterface(image) for image in images]).maps, wanted)
    np.testing.assert_array_equal(explainer.explain([ByDlpack(image) for image in images]).maps, wanted)


def test_a_trial_on_a_gpu_times_what_is_there_already_and_sizes_batches_by_memory(make_model, emulated_driver):
    loaded = load(make_model(), ["rise:masks=5"])
    session = on_emulator(loaded.serialized(True), Profile(4, "fp16"), emulated_driver)
    before = emulated_driver.memory()[0]
    assert 0 < trial.batch_seconds(loaded, session, 4) < 60
    assert emulated_driver.memory()[0] == before
    assert trial._sizes(session) == list(trial.DEVICE_SIZES)
    session.memory_per_row = before // 300
    assert trial._sizes(session) == [32, 64]
    session.memory_per_row = before
    assert trial._sizes(session) == trial.DEVICE_SIZES[:1]
    assert trial._sizes(open_best(loaded)) == trial.TRIAL_SIZES
