"""One try of a model in a process of its own: hostile graphs are refused in time, and the batch size is a right one."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from heatmill import HeatmillError, ModelError
from heatmill.engine import opening, trial
from heatmill.engine.jobs.probe import probe

NETS = 60  # seconds; nothing here waits for them unless it fails


def constant(name, values):
    return numpy_helper.from_array(np.asarray(values), name)


def graph_model(*nodes, constants=(), batch="N", classes=5):
    """conv -> features -> pool -> logits (5 classes), then `nodes`, which make `scores` of them."""
    weight = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight"], ["features"], pads=[1, 1, 1, 1], name="conv"),
            helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
            *nodes,
        ],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 33, 29])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, classes])],
        [constant("weight", weight), *constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def endless():
    """Adds the logits to themselves 2^40 times."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Add", ["sum", "logits"], ["more"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["N", 5]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N", 5]),
        ],
    )
    loop = helper.make_node("Loop", ["times", "yes", "logits"], ["scores"], body=body)
    return graph_model(loop, constants=[constant("times", np.int64(2**40)), constant("yes", True)])


def greedy(values):
    """Fills a tensor of `values` float32 on the way."""
    return graph_model(
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["logits", "nothing"], ["scores"]),
        constants=[constant("shape", np.array([values], dtype=np.int64))],
    )


def mixing(batch):
    """Adds the mean over the batch."""
    return graph_model(
        helper.make_node("ReduceMean", ["logits"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Add", ["logits", "mean"], ["scores"]),
        batch=batch,
    )


def hard_coded(batch):
    """Flattens the whole batch to one row and back, which fits a batch of 1 only."""
    return graph_model(
        helper.make_node("Reshape", ["logits", "all"], ["flat"]),
        helper.make_node("Reshape", ["flat", "one"], ["scores"]),
        constants=[constant("all", np.array([5], dtype=np.int64)), constant("one", np.array([1, -1], dtype=np.int64))],
        batch=batch,
    )


@pytest.fixture
def model(tmp_path, save_model):
    """model(proto=None, spec={...}, **options) -> path; a proto replaces the usual classifier."""

    def make(proto=None, **options):
        path = save_model(tmp_path / "model.onnx", **options)
        if proto is not None:
            onnx.save(proto, path)
        return path

    return make


def tried(path, method="cam", deadline=NETS, **options):
    arguments = {"model": str(path), "methods": [method]}
    return probe(arguments, deadline=deadline, **options)


def refusal(path, **options):
    with pytest.raises(HeatmillError) as refused:
        tried(path, **options)
    assert refused.type is ModelError
    assert "\n" not in str(refused.value)
    assert not multiprocessing.active_children()
    return str(refused.value)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def eventually(check):
    deadline = time.monotonic() + NETS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- hostile models -----------------------------------------------------------------------------------------


def test_a_model_that_loops_for_ever(model, capfd):
    assert "gave no answer within 2 s" in refusal(model(endless()), deadline=2, method="rise")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("backend", ["onnxruntime", "reference"])
def test_a_model_that_wants_256_gib(model, capfd, backend):
    path = model(greedy(2**36))
    line = refusal(path, backend=backend, method="rise")
    assert line == f"{path}: running the model needs more memory than this machine has"
    assert capfd.readouterr() == ("", "")


def test_the_memory_can_be_bounded(model):
    path = model(greedy(2**28))
    assert "needs more memory" in refusal(path, backend="onnxruntime", provider="cpu", method="rise", memory=2**29)


def test_a_model_that_fails_when_it_runs(model, capfd):
    nodes = [
        helper.make_node("Reshape", ["logits", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["scores"]),
    ]
    constants = [constant("shape", np.array([-1, 7])), constant("matrix", np.ones((7, 5), dtype=np.float32))]
    line = refusal(model(graph_model(*nodes, constants=constants)), method="rise")
    assert "running the model failed" in line
    assert capfd.readouterr() == ("", "")


def test_a_process_that_dies(model, tmp_path, monkeypatch):
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from heatmill.engine import opening\n"
        "opening.load = lambda **arguments: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "patch"))
    assert "the process that tried the model died (killed by SIGSEGV)" in refusal(model())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_child_outlives_its_parent(model, number):
    script = (
        "import sys, signal\n"
        "from heatmill.engine.jobs.probe import probe\n"
        "probe({'model': sys.argv[1], 'methods': ['rise']})\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, model(endless())], stderr=subprocess.PIPE, start_new_session=True
    )
    started = psutil.Process(parent.pid)
    eventually(lambda: any("spawn_main" in " ".join(child.cmdline()) for child in started.children()))
    children = [child.pid for child in started.children()]
    time.sleep(0.5)
    os.killpg(parent.pid, number) if number == signal.SIGINT else parent.send_signal(number)
    _, told = parent.communicate(timeout=NETS)
    eventually(lambda: all(gone(pid) for pid in children))
    assert told.count(b"Traceback") <= (number == signal.SIGINT)  # the parent's own


# --- what it finds ------------------------------------------------------------------------------------------


def test_what_a_probe_tells(model):
    found = tried(model(), backend="onnxruntime", provider="cpu")
    assert (found.backend, found.provider, found.precision) == ("onnxruntime", "cpu", "fp32")
    assert (found.classes, found.batch_size, found.free_batch, found.trials) == (5, 32, True, {})
    assert found.rows_per_second > 0


def test_the_batch_size_is_measured_where_it_is_worth_it(model):
    found = tried(model(), backend="onnxruntime", provider="cpu", rows=100_000)
    assert set(found.trials) <= {8, 16, 32, 64}
    assert found.batch_size in found.trials
    assert found.trials[found.batch_size] * 1.03 >= max(found.trials.values())
    assert tried(model(), backend="onnxruntime", provider="cpu", rows=100_000, batch_size=7).batch_size == 7


def test_trials_end_where_a_batch_takes_too_long_or_too_much_memory():
    seconds = {8: 4.0, 16: 9.0}
    assert trial._measure(seconds.__getitem__, trial.TRIAL_SIZES) == {8: 2.0, 16: pytest.approx(16 / 9)}

    def hungry(rows):
        if rows > 8:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
        return 1.0

    assert trial._measure(hungry, trial.TRIAL_SIZES) == {8: 8.0}
    with pytest.raises(KeyError):
        trial._measure({8: 1.0}.__getitem__, trial.TRIAL_SIZES)


class Strict:
    """A session that takes exactly the batch it was opened for, as OpenVINO's do."""

    flexible = False

    def __init__(self, session, rows):
        self.session, self.rows = session, rows
        self.backend, self.provider = session.backend, session.provider
        self.precision, self.version = session.precision, session.version

    def run(self, feeds, outputs):
        assert [len(values) for values in feeds.values()] == [self.rows]
        return self.session.run(feeds, outputs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("proto", "options", "batch_size", "free"),
    [
        (None, {"batch": 1}, 32, True),
        (None, {"batch": 1, "head": "Reshape"}, 32, True),
        (None, {"batch": 4, "head": "Reshape"}, 32, True),
        (hard_coded(1), {}, 1, False),
        (hard_coded("N"), {}, 1, False),
        (mixing(1), {}, 1, False),
        (mixing("N"), {}, 1, False),
    ],
    ids=["fixed", "reshape", "reshape4", "hard-coded", "hard-coded, said open", "mixing", "mixing, said open"],
)
def test_rows_are_packed_where_the_graph_keeps_them_apart(model, monkeypatch, strict, proto, options, batch_size, free):
    opened = opening.open_session

    def strictly(name, graph, profile):
        return Strict(opened(name, graph, profile), profile.batch_size)

    if strict:
        monkeypatch.setattr(opening, "open_session", strictly)
    loaded = opening.load(model(proto, **options), ["rise"])
    found, _ = trial.try_model(loaded, "onnxruntime", "cpu", "auto")
    assert (found.batch_size, found.free_batch, found.classes) == (batch_size, free, 5)


def test_a_batch_of_several_that_mixes_its_images_is_refused(model):
    line = refusal(model(mixing(4)), method="rise")
    assert "in its batch of 4, an image's scores depend on the other images" in line


def test_scores_that_are_not_what_the_spec_says(model):
    line = refusal(model(spec={"output": "probabilities"}))
    assert "the spec says probabilities, and a row of scores sums to" in line
    counted = graph_model(  # as many scores as the logits have, which the file's shapes do not say
        helper.make_node("Shape", ["logits"], ["shape"], start=1),
        helper.make_node("Squeeze", ["shape"], ["count"]),
        helper.make_node("Range", ["zero", "count", "one"], ["classes"]),
        helper.make_node("Gather", ["logits", "classes"], ["scores"], axis=1),
        constants=[constant("zero", np.int64(0)), constant("one", np.int64(1))],
        classes="classes",
    )
    assert tried(model(counted, spec={"label_names": []}), method="rise").classes == 5
    names = {"label_names": ["one", "two", "three"]}
    assert "has 5 classes, the spec 3 label names" in refusal(model(counted, spec=names), method="rise")
