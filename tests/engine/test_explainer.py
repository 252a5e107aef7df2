"""The Python API and the loop behind it: any input, any batch, any backend, the same maps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from heatmill import BackendError, Explainer, InputError, ModelError
from heatmill.engine import backends
from heatmill.engine.backends import Profile, open_session
from heatmill.engine.explainer import Engine
from heatmill.engine.opening import load, open_best
from heatmill.engine.trial import batch_is_free
from heatmill.engine.types import Item, Target, class_index, parse_targets

from heatmill.models.preprocess import decode, normalise, view  # isort: skip
from tests.graphs import with_a_batch_that_stays, without_scores_in_the_dark


def files(folder):
    return sorted(folder.rglob("*.png"))


def test_paths_pictures_and_ready_arrays_are_the_same_images(make_model, photographs):
    explainer = Explainer(make_model())
    paths = files(photographs)[:3]
    pictures = [np.asarray(Image.open(path)) for path in paths]
    arrays = np.stack([normalise(view(picture, explainer.spec)[0], explainer.spec, "float32") for picture in pictures])
    by_path, by_picture, by_array = (explainer.explain(images).maps for images in (paths, pictures, arrays))
    assert by_path.shape == (3, 1, 9, 8)
    assert by_path.dtype == np.float32
    np.testing.assert_array_equal(by_path, by_picture)
    np.testing.assert_array_equal(by_path, by_array)


@pytest.mark.parametrize("method", ["score-cam", "rise:masks=50", "cam"])
def test_the_map_does_not_depend_on_the_batch(make_model, photographs, method):
    path, images = make_model(), files(photographs)
    whole = Explainer(path, method=method, batch_size=32).explain(images, targets=["top2", 4])
    for size in (1, 5, 7):
        other = Explainer(path, method=method, batch_size=size).explain(images, targets=["top2", 4])
        np.testing.assert_allclose(other.maps, whole.maps, atol=1e-6)
        np.testing.assert_array_equal(other.targets, whole.targets)
    alone = Explainer(path, method=method).explain(images[2:3], targets=["top2", 4])
    np.testing.assert_allclose(alone.maps[0], whole.maps[2], atol=1e-6)


def test_several_targets_cost_no_more_passes(make_model, photographs):
    loaded = load(make_model(), ["score-cam", "rise:masks=40"])
    session = open_best(loaded, batch_size=8)
    images = [
        normalise(view(decode(path.read_bytes()), loaded.spec)[0], loaded.spec, "float32")
        for path in files(photographs)
    ]
    rows = []
    for targets in ([Target("predicted")], [Target("top", 3), Target("class", 1)]):
        engine = Engine(loaded, session, targets, 8)
        found = list(engine.stream(Item(i, image) for i, image in enumerate(images)))
        assert len(found) == 6 * 2 * sum(target.count for target in targets)
        rows.append(engine.stages.rows)
    assert rows[0] == rows[1]


def test_results_are_raw_and_upsampled_on_request(make_model, photographs):
    result = Explainer(make_model()).explain(files(photographs)[:2], targets=["predicted", "bee"])
    assert result.maps.shape == (2, 2, 9, 8)
    assert result.upsampled().shape == result.saliency().shape == (2, 2, 33, 29)
    pillow = Image.fromarray(result.maps[1, 0]).resize((29, 33), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(result.upsampled()[1, 0], np.asarray(pillow), atol=1e-5)
    assert result.saliency().min() == 0
    assert result.saliency().max() == 1


def test_stream_draws_images_as_it_needs_them(make_model, photographs):
    drawn = []

    def source():
        for path in files(photographs) * 3:
            drawn.append(path)
            yield path

    stream = Explainer(make_model(), batch_size=4).stream(source())
    first = next(stream)
    assert first.key == 0
    assert len(drawn) <= 4
    assert [explanation.key for explanation in stream] == list(range(1, 18))


@pytest.mark.parametrize(
    "options", [{"layout": "NHWC"}, {"batch": 1}, {"batch": 4, "head": "Reshape"}, {"end": "Softmax"}]
)
def test_other_files_of_the_same_network_give_the_same_maps(make_model, photographs, options):
    plain = Explainer(make_model("plain.onnx")).explain(files(photographs)[:2])
    other = Explainer(make_model("other.onnx", **options), batch_size=6).explain(files(photographs)[:2])
    np.testing.assert_allclose(other.maps, plain.maps, atol=1e-5)
    np.testing.assert_allclose(other.scores, plain.scores, atol=1e-6)


def test_a_uint8_network_gets_whole_pixels(make_model, photographs):
    path = make_model(dtype=TensorProto.UINT8, spec={"mean": [0, 0, 0], "std": [1, 1, 1]})
    explainer = Explainer(path, method="rise:masks=20,cells=3")
    result = explainer.explain(files(photographs)[:2])
    model = onnx.load(path)
    from onnx.reference import ReferenceEvaluator

    from heatmill.engine.methods import METHODS, parse_method
    from heatmill.kernels import reference

    net = ReferenceEvaluator(model)
    parameters = parse_method("rise:masks=20,cells=3").parameters
    bank = METHODS["rise"].share(explainer._loaded.facts, parameters, 0)
    masks = reference.grid_masks(bank.bits, bank.offsets, (33, 29))
    for i, file in enumerate(files(photographs)[:2]):
        pixels = view(np.asarray(Image.open(file)), explainer.spec)[0].transpose(2, 0, 1)
        total = np.zeros((33, 29))
        for mask in masks:
            (logits,) = net.run(None, {"input": np.rint(pixels * mask).astype(np.uint8)[None]})
            e = np.exp(logits[0] - logits[0].max())
            total += (e / e.sum())[result.targets[i, 0]] * mask / (20 * 0.5)
        np.testing.assert_allclose(result.maps[i, 0], total, atol=2e-3)


def mixing_rows(path):
    """A graph whose rows see one another: subtracts the batch's mean. Opening its batch axis would be wrong."""
    model = onnx.load(path)
    graph = model.graph
    for node in graph.node:
        if node.op_type == "Gemm":
            node.output[0] = "unshifted"
    graph.node.append(helper.make_node("ReduceMean", ["unshifted"], ["mean"], axes=[0], keepdims=1))
    graph.node.append(helper.make_node("Sub", ["unshifted", "mean"], ["shifted"]))
    graph.initializer.append(numpy_helper.from_array(np.arange(5, dtype=np.float32), "offset"))
    graph.node.append(helper.make_node("Add", ["shifted", "offset"], ["logits"]))
    onnx.save(model, path)
    return path


def test_a_fixed_batch_is_opened_only_where_rows_stay_apart(make_model):
    assert batch_is_free(load(make_model("a.onnx", batch=1), ["cam"]), "auto", None, "auto")
    assert batch_is_free(load(make_model("b.onnx", batch=1, head="Reshape"), ["cam"]), "auto", None, "auto")
    mixed = load(mixing_rows(make_model("c.onnx", batch=1)), ["score-cam"])
    assert not batch_is_free(mixed, "auto", None, "auto")


def test_a_fixed_batch_that_can_not_be_opened_is_packed_to_its_size(make_model, photographs):
    path = make_model("hard.onnx", batch=3, head="Reshape")
    with_a_batch_that_stays(path)
    plain = Explainer(make_model("plain.onnx")).explain(files(photographs)[:4])
    hard = Explainer(path)
    assert hard._rows == 3
    np.testing.assert_allclose(hard.explain(files(photographs)[:4]).maps, plain.maps, atol=1e-5)


def test_a_network_that_gives_nan_gives_rows_without_maps(make_model, photographs):
    path = make_model()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "b3":
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, np.nan, 0, 0, 0], np.float32), "b3"))
    onnx.save(model, path)
    found = list(Explainer(path).stream(files(photographs)[:2], targets=["predicted", "top2"]))
    assert [e.status for e in found] == ["nonfinite"] * 6
    assert all(e.map is None and "finite" in e.error for e in found)


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_backend_gives_the_standards_numbers(make_model, backend):
    loaded = load(make_model(), ["score-cam"])
    graph = loaded.serialized(dynamic=True)
    if not any(offer.precisions for offer in backends.survey() if offer.backend == backend):  # test_trt has stand-ins
        with pytest.raises(BackendError):
            open_session(backend, graph, Profile(3))
        return
    batch = np.random.default_rng(0).normal(size=(3, 3, 33, 29)).astype(np.float32)
    session = open_session(backend, graph, Profile(3))
    logits, features = session.run({"input": batch}, ["logits", "features"])
    truth = open_session("reference", graph, Profile(3)).run({"input": batch}, ["features", "logits"])
    np.testing.assert_allclose(logits, truth[1], atol=1e-5)
    np.testing.assert_allclose(features, truth[0], atol=1e-5)
    assert session.backend == backend
    with pytest.raises(BackendError):
        open_session(backend, graph, Profile(3, precision="bf16"))
    with pytest.raises(BackendError, match=r"refuses|can't run"):
        open_session(backend, b"not a model", Profile(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "no backend 'tensorflow'; known: reference, onnxruntime"),
        ({"provider": "rocm"}, "no provider 'rocm'; known: cpu"),
        ({"precision": "int8"}, "needs a quantised"),
        ({"precision": "fp16"}, "needs a model file in half precision"),
        ({"precision": "fp8"}, "no precision 'fp8'; known: auto, fp32"),
    ],
)
def test_a_backend_that_can_not_is_refused(make_model, options, message):
    with pytest.raises(BackendError) as caught:
        Explainer(make_model(), **options)
    assert message in str(caught.value)


def test_a_quantised_file_runs_as_it_is(make_model, photographs):
    path = make_model()
    model = onnx.load(path)
    scale, zero = numpy_helper.from_array(np.float32(0.03), "s"), numpy_helper.from_array(np.uint8(0), "z")
    model.graph.initializer.extend([scale, zero])
    for node in model.graph.node:
        if node.op_type == "GlobalAveragePool":
            node.input[0] = "dequantised"
    model.graph.node.insert(4, helper.make_node("QuantizeLinear", ["features", "s", "z"], ["quantised"]))
    model.graph.node.insert(5, helper.make_node("DequantizeLinear", ["quantised", "s", "z"], ["dequantised"]))
    onnx.save(model, path)
    explainer = Explainer(path)
    assert explainer._session.precision == "int8"
    assert explainer._loaded.tap.name == "dequantised", "a tap before the quantiser would split the integer operator"
    assert np.isfinite(explainer.explain(files(photographs)[:2]).maps).all()
    with pytest.raises(BackendError, match="runs as it is"):
        Explainer(path, precision="bf16")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((3, 33, 28), np.float32)], r"image 0 has shape \(3, 33, 28\); the network takes \(3, 33, 29\)"),
        ([np.zeros((33, 29), np.uint8)], r"pictures are uint8 \(H, W, c\)"),
        (["/nowhere/cat.jpg"], "image 0: .*cat.jpg"),
        ([], "no images were given"),
    ],
)
def test_wrong_images_are_refused(make_model, images, message):
    with pytest.raises(InputError, match=message):
        Explainer(make_model()).explain(images)


def test_a_file_that_is_no_image_is_refused_by_name(make_model, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(InputError, match="image 0: not_an_image"):
        Explainer(make_model()).explain([tmp_path / "page.jpg"])


def test_targets_are_read_and_refused():
    names = ("ant", "great white", "crane", "Crane")
    assert parse_targets(["all"], 4, names) == tuple(Target("class", number) for number in range(4))
    parsed = parse_targets(["predicted", "top3", "0", "Great_White", "label"], 4, names)
    assert [target.text for target in parsed[:3]] == ["predicted", "top3", "0"]
    assert parsed[3].value == 1
    for texts, message in [
        (["4"], "class 4 is out of range: the model has classes 0 to 3"),
        (["-1"], "out of range"),
        (["top9"], "the model has 4 classes"),
        (["bat"], "no class 'bat'; nearest: ant"),
        (["CRANE"], "stands for classes 2, 3: give the number"),
        (["1", "1"], "given twice"),
    ]:
        with pytest.raises(InputError) as caught:
            parse_targets(texts, 4, names)
        assert message in str(caught.value)
    with pytest.raises(InputError, match="does not say how many classes"):
        parse_targets(["all"], 2**31 - 1, ())
    assert class_index("Crane", 4, names) == 3
    with pytest.raises(InputError, match="no label names"):
        class_index("ant", 4, ())


def test_one_score_with_a_softmax_is_refused(make_model, photographs):
    path = make_model(spec={"label_names": []})
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in ("w3", "b3"):
        weights[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[name])[:1], name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, path)
    with pytest.raises(ModelError, match="softmax over one class"):
        Explainer(path)


def test_external_weights_are_read_into_the_graph(make_model, photographs, tmp_path):
    plain = make_model("plain.onnx")
    whole = Explainer(plain).explain(files(photographs)[:2])
    (tmp_path / "apart").mkdir()
    path = tmp_path / "apart" / "apart.onnx"
    onnx.save(onnx.load(plain), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.with_suffix(".json").write_text(plain.with_suffix(".json").read_text())
    assert onnx.load(path, load_external_data=False).graph.initializer[0].data_location == TensorProto.EXTERNAL
    np.testing.assert_array_equal(Explainer(path).explain(files(photographs)[:2]).maps, whole.maps)


@pytest.mark.parametrize("batch", ["N", 4])
def test_a_network_whose_rows_see_one_another_is_run_row_by_row_or_refused(make_model, photographs, batch):
    path = mixing_rows(make_model(batch=batch))
    if batch == 4:
        with pytest.raises(ModelError, match="in its batch of 4, an image's scores depend on the other images"):
            Explainer(path)
    else:
        assert Explainer(path)._rows == 1


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({}, {"output": "sigmoid"}, "the spec says sigmoid, and the scores reach from"),
        ({}, {"output": "probabilities"}, "the spec says probabilities, and a row of scores sums to"),
    ],
)
def test_scores_that_are_not_what_the_spec_says_are_refused(make_model, options, spec, message):
    with pytest.raises(ModelError, match=message):
        Explainer(make_model(spec=spec, **options))


def test_a_softmax_spelled_out_is_not_taken_for_logits(make_model):
    path = make_model()
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("Exp", ["raw"], ["exp"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["exp"], ["total"], keepdims=1))
    model.graph.node.append(helper.make_node("Div", ["exp", "total"], ["logits"]))
    axes = numpy_helper.from_array(np.array([1]), "axes")
    model.graph.initializer.append(axes)
    model.graph.node[-2].input.append("axes")
    onnx.save(model, path)
    with pytest.raises(ModelError, match="every row sums to 1; say --output probabilities"):
        Explainer(path)
    assert Explainer(path, output="probabilities")


def test_numeric_class_names_are_not_taken_for_numbers():
    with pytest.raises(InputError, match="is class 1 by number and class 0 by name"):
        class_index("1", 3, ("1", "2", "3"))
    assert class_index("1", 3, ("0", "1", "2")) == 1
    for word in ("²", "--5", "top³"):
        with pytest.raises(InputError):
            parse_targets([word], 5, ("ant",))


def test_rows_without_scores_keep_what_was_asked(make_model, photographs):
    path = make_model()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "b3":
            tensor.CopyFrom(numpy_helper.from_array(np.full(5, np.inf, np.float32), "b3"))
    onnx.save(model, path)
    loaded = load(path, ["score-cam"])
    engine = Engine(loaded, open_best(loaded), [Target("top", 2), Target("class", 3), Target("label")], 8)
    found = list(engine.stream([Item(0, np.zeros((3, 33, 29), np.float32), label=2)]))
    asked = [(e.target, e.target_source, e.status) for e in found]
    assert asked == [(t, s, "nonfinite") for t, s in ((-1, "top1"), (-1, "top2"), (3, "class"), (2, "label"))]


def test_masked_passes_that_are_not_finite_end_their_request_and_no_other(make_model, photographs):
    """A network that overflows where the image is dark: whole images are fine, masked ones are not."""
    path = make_model()
    without_scores_in_the_dark(path)
    images = [np.full((3, 33, 29), 1.0, np.float32), np.full((3, 33, 29), 50.0, np.float32)]
    images[0][:, :5] = 0.3
    images[1][:, :9] = 20.0
    loaded = load(path, ["rise:masks=300"])
    engine = Engine(loaded, open_best(loaded, batch_size=16), [Target("predicted")], 16)
    found = {e.key: e for e in engine.stream(Item(i, image) for i, image in enumerate(images))}
    assert found[0].status == "nonfinite"
    assert found[0].map is None
    assert found[1].status == "ok"
    assert np.isfinite(found[1].map).all()
    assert engine.stages.rows < 2 + 2 * 300, "the rest of the lost request was not run"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("cat.jpg", r"images is a list; for one image give \['cat.jpg'\]"),
        ([[[1, 2], [3, 4]]], "image 0 is a list; give a path, or an array of NumPy's or a GPU's"),
        ([np.zeros((33, 29, 4), np.uint8)], "of 3 channels"),
        ([np.zeros((3, 33, 29), np.uint8)], "of 3 channels"),
    ],
)
def test_pictures_of_another_form_are_refused(make_model, images, message):
    with pytest.raises(InputError, match=message):
        Explainer(make_model()).explain(images)


def test_ready_floats_are_not_given_to_a_uint8_network(make_model):
    path = make_model(dtype=TensorProto.UINT8, spec={"mean": [0, 0, 0], "std": [1, 1, 1]})
    with pytest.raises(InputError, match="takes uint8 pixels"):
        Explainer(path, method="cam").explain(np.zeros((1, 3, 33, 29), np.float32))


def test_cam_reads_external_weights(make_model, photographs, tmp_path):
    plain = make_model("plain.onnx")
    path = tmp_path / "apart.onnx"
    onnx.save(onnx.load(plain), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.with_suffix(".json").write_text(plain.with_suffix(".json").read_text())
    whole, apart = (Explainer(p, method="cam").explain(files(photographs)[:1]).maps for p in (plain, path))
    np.testing.assert_array_equal(whole, apart)


def test_a_tap_read_only_inside_a_branch_is_followed(make_model, photographs):
    plain = make_model("plain.onnx")
    path = make_model("branch.onnx")
    model = onnx.load(path)
    branches = [
        helper.make_graph(
            [helper.make_node("GlobalAveragePool", ["features"], [f"pooled_{name}"])],
            name,
            [],
            [helper.make_tensor_value_info(f"pooled_{name}", TensorProto.FLOAT, None)],
        )
        for name in ("then", "else")
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    at = next(i for i, node in enumerate(model.graph.node) if node.op_type == "GlobalAveragePool")
    model.graph.node[at].CopyFrom(
        helper.make_node("If", ["always"], ["pooled"], then_branch=branches[0], else_branch=branches[1])
    )
    onnx.save(model, path)
    branched = Explainer(path, layer="features").explain(files(photographs)[:1])
    np.testing.assert_allclose(branched.maps, Explainer(plain).explain(files(photographs)[:1]).maps, atol=1e-6)


def test_a_streamed_explanation_finishes_itself(make_model, photographs):
    explainer = Explainer(make_model(), method="score-cam:variant=grad-cam")
    whole = explainer.explain(files(photographs)[:2])
    for explanation in explainer.stream(files(photographs)[:2]):
        np.testing.assert_array_equal(explanation.saliency(), whole.saliency()[explanation.key, 0])
        np.testing.assert_array_equal(explanation.upsampled(), whole.upsampled()[explanation.key, 0])


def test_an_explainer_has_one_method(make_model):
    with pytest.raises(InputError, match="one method, as text"):
        Explainer(make_model(), method=["cam", "rise"])
