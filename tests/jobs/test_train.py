"""Training an attention: its gradients, what a kill leaves, what comes out, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from heatmill import Explainer, IncompleteError, InputError, ModelError, RunError, open_run
from heatmill.engine.jobs import features as caching
from heatmill.engine.jobs import train as training
from heatmill.engine.jobs import trainer as loops
from heatmill.engine.jobs.job import explain
from heatmill.engine.jobs.plan import Job
from heatmill.engine.jobs.train import train
from heatmill.engine.jobs.train_settings import PRESETS, TrainJob
from heatmill.engine.jobs.train_ways import places
from heatmill.engine.jobs.trainer import Trainer
from heatmill.models.graph.attention import read_about
from heatmill.models.load import open_model
from tests import architectures as made

QUICK = {"epochs": 3, "batch_size": 4, "patience": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    return save_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory, save_photographs):
    return save_photographs(tmp_path_factory.mktemp("photos") / "photos", 14)


@pytest.fixture
def job(model, photos, tmp_path):
    """job(**changes) -> a short training of the small classifier."""
    return lambda **changes: TrainJob(
        **{"model": model, "inputs": (photos,), "out": tmp_path / "out.onnx", **QUICK, **changes}
    )


class Caught(Exception):
    """A trainer, stopped before its first batch."""


def opened(job: TrainJob, monkeypatch) -> Trainer:
    def stop(self, style, signals):
        raise Caught(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", stop)
        with pytest.raises(Caught) as caught:
            train(job, "quiet")
    return caught.value.args[0]


def curve(history):
    """What of a history does not depend on the machine's speed."""
    return [{key: value for key, value in entry.items() if key != "images_per_second"} for entry in history]


# ----- gradients -----


@pytest.mark.parametrize(
    ("variant", "loss", "options"),
    [
        ("fm", "own-map", {}),
        ("fm", "faithful", {}),
        ("fm", "own-map", {"head": "Dense"}),
        ("fm", "faithful", {"head": "Tokens"}),
        ("fm", "own-map", {"end": "Sigmoid"}),
        ("img", "own-map", {}),
        ("img", "faithful", {"layout": "NHWC", "spec": {"layout": "NHWC"}}),
        ("img", "own-map", {"end": "Sigmoid", "batch": 3, "head": "Reshape"}),
    ],
)
def test_a_step_goes_down_the_slope_of_the_loss(variant, loss, options, make_model, job, monkeypatch):
    """The gradients of weight and bias, against differences of the loss along them and along random directions."""
    trainer = opened(job(model=make_model(**options), variant=variant, loss=loss), monkeypatch)
    length, share = (0.002, 0.05) if variant == "img" else (0.02, 0.02)  # a ReLU of the network may bend on the way
    rng = np.random.default_rng(0)
    rows = trainer.trained[:6]
    trainer.classes[:] = rng.integers(0, 5, len(trainer.classes))  # most are not what the network is sure of
    trainer.bias.values += 0.5
    found = {}
    for name in ("weight", "bias"):
        sgd = getattr(trainer, name)
        shape = (6, *sgd.values.shape[1:])

        def keep(which, gradient, name=name, shape=shape):
            assert gradient.shape == shape
            whole = np.zeros_like(getattr(trainer, name).values)
            np.add.at(whole, which, gradient)
            found[name] = whole

        monkeypatch.setattr(sgd, "step", keep)
    parts = trainer.batch(rows, trainer.features.take(rows))
    assert all(value > 0 for value in parts.values())
    for name, gradient in found.items():
        values = getattr(trainer, name).values
        for direction in (gradient, rng.normal(size=gradient.shape)):
            step = (length / np.linalg.norm(direction) * direction).astype(np.float32)
            losses = []
            for sign in (1, -1):
                values += sign * step
                losses.append(sum(trainer.batch(rows, trainer.features.take(rows), learn=False).values()))
                values -= sign * step
            wanted = (losses[0] - losses[1]) / 2
            allowed = share * length * float(np.linalg.norm(gradient))
            assert float((gradient * step).sum()) == pytest.approx(wanted, abs=allowed)


def test_tokens_of_no_place_are_not_masked(tmp_path, photos, monkeypatch):
    """On a transformer the features are cut where nothing goes around them, with the class token as it is."""
    onnx.save(made.vit(), tmp_path / "vit.onnx")
    side = made.vit().graph.input[0].type.tensor_type.shape.dim[2].dim_value
    spec = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.25] * 3, "output": "logits"}
    (tmp_path / "vit.json").write_text(json.dumps(spec))
    trainer = opened(
        TrainJob(model=tmp_path / "vit.onnx", inputs=(photos,), out=tmp_path / "o.onnx", **QUICK), monkeypatch
    )
    assert (trainer.tap.layout, trainer.tap.prefix) == ("ntc", 1)
    rows = trainer.trained[:3]
    values = trainer.features.take(rows)
    fed = []
    through = trainer._way.through
    run = type(through).run
    monkeypatch.setattr(
        type(through), "run", lambda self, given, classes: fed.append(given) or run(self, given, classes)
    )
    maps = np.random.default_rng(0).uniform(size=(3, trainer.tap.grid[0] * trainer.tap.grid[1])).astype(np.float32)
    trainer._way(rows, values, maps, trainer.classes[rows])
    np.testing.assert_array_equal(fed[0][:, 0], values[:, 0])
    np.testing.assert_allclose(fed[0][:, 1:], values[:, 1:] * maps[:, :, None])
    whole = train(TrainJob(model=tmp_path / "vit.onnx", inputs=(photos,), out=tmp_path / "o.onnx", **QUICK), "quiet")
    assert whole.epochs == 3


def test_a_linear_head_is_the_graph_behind_the_layer(job, monkeypatch):
    """The short cut through a linear head gives what the graph gives, there and back."""
    trainer = opened(job(), monkeypatch)
    assert type(trainer._way).__name__ == "LinearWay"
    whole = opened(job(), monkeypatch)  # its own, as a trainer frees the model
    loaded, _ = training.open_training(job())
    whole.loaded = loaded
    through = loops.open_entropy(loaded, whole.session, whole.tap, 4)
    way = loops.HeadWay(through, whole.tap, "softmax")
    rows = trainer.trained[:7]
    values, classes = trainer.features.take(rows), trainer.classes[rows]
    maps = np.random.default_rng(1).uniform(size=(7, 72)).astype(np.float32)
    for found, wanted in zip(trainer._way(rows, values, maps, classes), way(rows, values, maps, classes), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


# ----- what comes out -----


@pytest.mark.parametrize("variant", ["fm", "img"])
def test_a_training_ends_in_a_file_that_explains(variant, job, photos, tmp_path):
    folder = tmp_path / "with bad ones"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes(b"not a picture")
    told = train(job(inputs=(folder,), variant=variant, max_bad=0.5), "quiet")
    assert (told.images, told.bad, told.exit_code) == (15, 1, 0)
    assert told.statuses == {"not_an_image": 1, "ok": 14}
    assert (told.trained, told.held_out) == (13, 1)
    assert [entry["epoch"] for entry in told.history] == [1, 2, 3]
    for entry in told.history:
        assert entry["loss"] == pytest.approx(entry["entropy"] + entry["area"] + entry["variation"])
    page = Path(told.page).read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=.?(http|/)", page)
    about = read_about(open_model(tmp_path / "out.onnx"))
    assert (about["variant"], about["images"], about["layer"]) == (variant, 13, "features")
    assert len(about["untrained"]) == told.untrained == 5 - told.classes
    assert not any(str(tmp_path) in str(value) for value in about.values())
    summary = explain(
        Job(
            model=tmp_path / "out.onnx",
            inputs=(photos,),
            out=tmp_path / "run",
            methods=("l-cam", "grad-cam"),
            targets=("predicted", str(about["untrained"][0])),
        ),
        "quiet",
    )
    assert summary.statuses == {"ok": 56}
    for row in open_run(tmp_path / "run").rows("l-cam"):
        assert ("untrained" in row.extras.get("warning", "")) == (row.target in about["untrained"])
        assert row.saliency().min() >= 0
        assert row.saliency().max() <= 1


def test_a_second_call_does_nothing_again(job, monkeypatch, tmp_path):
    first = train(job(), "quiet")
    data = (tmp_path / "out.onnx").read_bytes()
    monkeypatch.setattr(Trainer, "batch", None)
    again = train(job(), "quiet")
    assert (tmp_path / "out.onnx").read_bytes() == data
    assert again == first


def test_labels_of_a_manifest_are_learnt(job, photos, tmp_path):
    names = sorted(str(path) for path in photos.rglob("*.png"))
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["uri", "label"], *([name, 1 + i % 3] for i, name in enumerate(names))])
    told = train(job(inputs=(tmp_path / "list.csv",), target="label"), "quiet")
    assert told.classes == 3
    assert read_about(open_model(tmp_path / "out.onnx"))["untrained"] == [0, 4]
    with pytest.raises(InputError, match="needs a manifest"):
        train(job(target="label", out=tmp_path / "other.onnx"), "quiet")
    (tmp_path / "list.csv").write_text(f"uri,label\n{names[0]},1\n{names[1]},9")
    with pytest.raises(InputError, match=r"label of .*photo\d+\.png': class 9"):
        train(job(inputs=(tmp_path / "list.csv",), target="label", overwrite=True), "quiet")


def test_a_label_that_only_the_run_model_shows_to_be_of_no_class(make_model, photos, tmp_path, job):
    """Where the file leaves the number of classes open."""
    path = make_model(spec={"label_names": []})
    proto = onnx.load(path)
    for name, value in (("zero", 0), ("one", 1)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(value), name))
    proto.graph.node.extend(
        [
            helper.make_node("Shape", ["logits"], ["shape"], start=1),
            helper.make_node("Squeeze", ["shape"], ["count"]),
            helper.make_node("Range", ["zero", "count", "one"], ["classes"]),
            helper.make_node("Gather", ["logits", "classes"], ["scores"], axis=1),
        ]
    )
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["N", "classes"]))
    onnx.save(proto, path)
    names = sorted(str(path) for path in photos.rglob("*.png"))
    (tmp_path / "list.csv").write_text("uri,label\n" + "\n".join(f"{name},9" for name in names))
    with pytest.raises(InputError, match=r"label of .*photo\d+\.png': class 9; the model has classes 0 to 4"):
        train(job(model=path, inputs=(tmp_path / "list.csv",), target="label"), "quiet")


def test_what_is_held_out_ends_a_training_early(job, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 1.0])
    monkeypatch.setattr(Trainer, "_held_loss", lambda self: next(losses))
    told = train(job(epochs=6, patience=2), "quiet")
    assert (told.epochs, told.best_epoch) == (4, 2)
    assert "average_drop" in told.history[-1]


def test_the_average_drop_is_of_the_black_masked_image(job, monkeypatch, model):
    """Against the explainer's map, upsampled and multiplied by hand."""
    told = train(job(held_out=0.5), "quiet")
    trainer = opened(job(held_out=0.5), monkeypatch)
    lcam, plain = Explainer(told.out, method="l-cam"), Explainer(model, method="cam")
    drops = []
    mean, std = np.array([0.5, 0.45, 0.4])[:, None, None], np.array([0.25, 0.2, 0.3])[:, None, None]
    trainer.weight.values, trainer.bias.values = trainer.best
    trainer.weight.last[:], trainer.bias.last[:] = trainer.weight.steps, trainer.bias.steps
    found, _, _ = trainer._measure()
    for row in trainer.held:
        image = trainer._read(np.array([row]))
        mask = lcam.explain(image).saliency()[0, 0]
        masked = ((image * std + mean) * mask - mean) / std
        whole = float(plain.explain(image).scores[0, 0])
        left = float(plain.explain(masked.astype(np.float32), [int(trainer.classes[row])]).scores[0, 0])
        drops.append(max(0, whole - left) / whole)
    assert found == pytest.approx(100 * np.mean(drops), abs=0.1)


def test_presets_and_flags():
    plain = TrainJob(model=Path("m"), inputs=(), out=Path("o.onnx"), preset="resnet")
    assert (plain.schedule.epochs, plain.schedule.rate, plain.folder) == (26, 1e-4, Path("o.training"))
    assert [round(plain.schedule.at(epoch), 4) for epoch in (0, 1, 12, 25)] == [1, 0.95, 0.5404, 0.5404]
    faster = TrainJob(model=Path("m"), inputs=(), out=Path("o.onnx"), preset="vgg", rate=0.02, epochs=2)
    assert (faster.schedule.bias_rate, faster.schedule.epochs) == (pytest.approx(0.04), 2)
    assert PRESETS["vgg"].at(8) == pytest.approx(0.75**8)


@pytest.mark.parametrize("preset", ["vgg", "resnet"])
def test_published_schedules_start_as_torch_does(preset, job, monkeypatch):
    trainer = opened(job(preset=preset), monkeypatch)
    bound = 1 / np.sqrt(12)
    assert 0.9 * bound < np.abs(trainer.weight.values).max() <= bound


@pytest.mark.parametrize("head", ["Gemm", "Tanh"])
def test_the_start_follows_the_head(head, job, make_model, monkeypatch):
    """The images' maps have mean 0 and deviation 2, and a class's row points where its score rises."""
    trainer = opened(job(model=make_model(head=head)), monkeypatch)
    features = places(trainer.tap, trainer.features.take(trainer.trained))
    rows = trainer.classes[trainer.trained]
    maps = np.einsum("nc,ncp->np", trainer.weight.values[rows], features) + trainer.bias.values[rows][:, None]
    assert maps.mean() == pytest.approx(0, abs=2e-3)
    assert maps.std(axis=1).mean() == pytest.approx(2, abs=2e-3)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(make_model(head=head)).graph.initializer}
    for row, own in zip(trainer.weight.values, weights["w3"], strict=True):
        assert np.corrcoef(row, own)[0, 1] > 0.5


# ----- kills -----

KILLED = """
import os, signal, sys
from heatmill.cli import main
from heatmill.engine.jobs import trainer
trainer.CHECKPOINT_SECONDS = -1
left, save = int(sys.argv.pop(1)), trainer.Trainer._save
def saved(self):
    global left
    save(self)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer._save = saved
main()
"""


def test_a_killed_training_resumes_to_the_same_curve(job, model, photos, tmp_path):
    undisturbed = train(job(), "quiet")
    flags = ["--epochs", "3", "--batch-size", "4", "--patience", "0", "--quiet", "--json"]
    for kills in (2, 5, 0):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(kills), "train-lcam", model, photos, "-o", tmp_path / "k.onnx", *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == (-signal.SIGKILL if kills else 0), done.stderr
        assert (tmp_path / "k.onnx").exists() == (not kills)
    told = json.loads(done.stdout)
    assert curve(told["history"]) == curve(undisturbed.history)
    found, wanted = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / name).graph.initializer}
        for name in ("k.onnx", "out.onnx")
    )
    np.testing.assert_allclose(found["l-cam/weight"], wanted["l-cam/weight"], rtol=1e-6)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 5), (signal.SIGTERM, 4), (signal.SIGINT, 3)])
def test_a_signal_ends_after_the_batch_and_a_checkpoint(number, at, job, tmp_path, monkeypatch):
    """In the middle of an epoch, and after its last batch."""
    undisturbed = train(job(out=tmp_path / "whole.onnx"), "quiet")
    batch, count = Trainer.batch, []

    def signalled(self, rows, values, learn=True):
        count.append(learn)
        if sum(count) == at:
            os.kill(os.getpid(), number)
        return batch(self, rows, values, learn)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "batch", signalled)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else IncompleteError, match="resumes"):
            train(job(), "quiet")
    assert sum(count) == at
    assert not (tmp_path / "out.onnx").exists()
    assert curve(train(job(), "quiet").history) == curve(undisturbed.history)


def test_features_are_computed_once(job, tmp_path, monkeypatch):
    """A kill between two parts, and an overwrite with another loss: what is committed is not computed again."""
    monkeypatch.setattr(caching, "MAX_PART_ROWS", 5)
    observed, observe, commit = [], caching._observe, caching.Features.commit

    def counted(loaded, session, waiting, *others):
        observed.append(len(waiting))
        observe(loaded, session, waiting, *others)

    def deadly(self, part, *others):
        if part == 1:
            raise OSError(28, "No space left on device")
        commit(self, part, *others)

    monkeypatch.setattr(caching, "_observe", counted)
    with monkeypatch.context() as patched:
        patched.setattr(caching.Features, "commit", deadly)
        with pytest.raises(IncompleteError, match="no space is left"):
            train(job(), "quiet")
    assert sum(observed) == 10
    train(job(), "quiet")
    assert sum(observed) == 10 + 9
    told = train(job(loss="faithful", overwrite=True), "quiet")
    assert sum(observed) == 19
    assert told.epochs == 3
    train(job(limit=13, overwrite=True), "quiet")
    assert sum(observed) == 19 + 13


# ----- refusals -----


def test_an_image_alone_is_not_enough(job, photos):
    one = next(photos.glob("*.png"))
    with pytest.raises(InputError, match="1 image is not enough"):
        train(job(inputs=(one,)), "quiet")


def test_bad_images_alone_are_not_enough(job, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"none")
    with pytest.raises(InputError, match=r"0 of 2 images can be used, and 2 are the least; the first bad one, 'a.png'"):
        train(job(inputs=(tmp_path / "bad",)), "quiet")


def test_too_many_bad_images_are_told_by_the_exit_code(job, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes(b"")
    assert train(job(inputs=(folder,)), "quiet").exit_code == 3


def test_a_layer_without_a_grid_is_refused(job, make_model):
    with pytest.raises(ModelError, match=r"layer 'flat' has shape \[1, 12\] and is not a feature map"):
        train(job(layer="flat"), "quiet")
    with pytest.raises(InputError, match=r"values go around layer 'c2'.*--layer r1, or --variant img"):
        train(job(model=make_model(body="sum"), layer="c2"), "quiet")


def test_a_model_without_a_grid_is_refused(job, make_model):
    path = make_model()
    proto = onnx.load(path)
    flat = helper.make_node("Flatten", ["input"], ["flat"])
    weight = onnx.numpy_helper.from_array(np.zeros((5, 3 * 33 * 29), np.float32), "w3")
    del proto.graph.node[:-1]
    proto.graph.node.insert(0, flat)
    next(tensor for tensor in proto.graph.initializer if tensor.name == "w3").CopyFrom(weight)
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"found no feature map .*an attention needs a spatial layer"):
        train(job(model=path), "quiet")


def test_scores_that_are_not_known_are_refused(job, make_model):
    path = make_model(spec={"output": "probabilities"})
    with pytest.raises(InputError, match="its raw scores are not known"):
        train(job(model=path), "quiet")


def test_a_run_of_other_settings_is_refused(job, make_model):
    train(job(), "quiet")
    with pytest.raises(RunError, match="--variant: fm in the run, img asked"):
        train(job(variant="img"), "quiet")
    with pytest.raises(RunError, match=r"model: \w+\.* in the run, \w+\.* asked"):
        train(job(model=make_model(seed=3)), "quiet")


def test_a_checkpoint_that_does_not_belong_or_is_damaged(job, tmp_path, make_model):
    train(job(), "quiet")
    path = tmp_path / "out.training" / "checkpoint.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunError, match=r"checkpoint\.npz: damaged"):
        train(job(), "quiet")
    other = job(model=make_model(head="Tanh"), layer="r1", out=tmp_path / "other.onnx")
    train(other, "quiet")
    shutil.copy(tmp_path / "other.training" / "checkpoint.npz", path)
    with pytest.raises(RunError, match=r"checkpoint.npz: damaged \(weight has the shape \(5, 8\)\)"):
        train(job(), "quiet")
    (tmp_path / "out.training" / "features" / "part-000000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(RunError, match=r"part-000000\.npy: damaged"):
        train(job(), "quiet")
    assert train(job(overwrite=True), "quiet").epochs == 3
    (tmp_path / "out.training" / "train.json").write_text("{")
    with pytest.raises(RunError, match=r"train\.json: damaged .* --overwrite"):
        train(job(), "quiet")
    assert train(job(overwrite=True), "quiet").epochs == 3


def test_where_it_is_written(job, model, tmp_path):
    for out, told in (
        (tmp_path / "out.bin", "takes the name of an .onnx file"),
        (model, "is the model itself"),
    ):
        with pytest.raises(InputError, match=told):
            train(job(out=out), "quiet")
    (tmp_path / "there.onnx").write_bytes(b"something else")
    with pytest.raises(InputError, match="is there already"):
        train(job(out=tmp_path / "there.onnx"), "quiet")
    train(job(run=tmp_path / "begun"), "quiet")
    with pytest.raises(InputError, match="is there already"):
        train(job(out=tmp_path / "there.onnx", run=tmp_path / "begun"), "quiet")
    assert (tmp_path / "there.onnx").read_bytes() == b"something else"
    (tmp_path / "out.onnx").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'diary.txt', which is not of a training"):
        train(job(run=tmp_path / "full", overwrite=True), "quiet")
    train(job(), "quiet")
    with pytest.raises(InputError, match="has an attention already"):
        train(job(model=tmp_path / "out.onnx", out=tmp_path / "twice.onnx"), "quiet")


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_loss_that_leaves_the_numbers_is_refused(job, epochs, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(InputError, match=r"no longer finite.*a smaller --rate"):
        train(job(rate=1e38, epochs=epochs), "quiet")
    assert not (tmp_path / "out.onnx").exists()


def test_a_rate_that_changes_is_resumed_where_it_was(job, monkeypatch, tmp_path):
    """Held-out losses that rise settle nothing, so that rows still owe steps of the old rate at an epoch's end."""
    held, seen = Trainer._held_loss, []

    def rising(self):
        held(self)
        seen.append(self.at.epoch)
        if kill == len(seen):
            os.kill(os.getpid(), signal.SIGINT)
        return float(self.at.epoch)

    monkeypatch.setattr(Trainer, "_held_loss", rising)
    asked = {"epochs": 4, "preset": "vgg", "rate": 0.5}
    kill = 0
    whole = train(job(out=tmp_path / "whole.onnx", **asked), "quiet")
    kill, seen[:] = 2, []
    with pytest.raises(KeyboardInterrupt):
        train(job(**asked), "quiet")
    resumed = train(job(**asked), "quiet")
    assert curve(resumed.history) == curve(whole.history)


def test_a_disk_without_room_is_told_before_any_work(job, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InputError, match=r"features of 14 images need .* give --run on another disk"):
        train(job(), "quiet")


def test_an_image_that_is_gone_in_the_middle_is_told(job, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "run", lambda self, style, signals: shutil.rmtree(folder) or self._measure())
        with pytest.raises(IncompleteError, match="could be read when the training began and now is missing"):
            train(job(inputs=(folder,)), "quiet")
