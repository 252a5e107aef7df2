"""TensorRT-RTX builds engines of the portable graphs, ahead of time and without a GPU; what it refuses is known.

Nothing is run here: an engine that is built may still be slow, or wrong, on a GPU.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx
import pytest

from heatmill.models.graph.backward import build
from heatmill.models.graph.canonize import Graph, canonize
from heatmill.models.graph.composites import COMPOSITES
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.relevance_starts import STARTS
from heatmill.models.graph.request import Request
from heatmill.models.graph.tap import Reading
from heatmill.models.load import open_model
from tests import architectures as made
from tests.models import test_architectures, test_vjp

pytestmark = pytest.mark.tensorrt

# The rows of the least, the usual and the largest batch, then files; for each a line: why there is no engine, or "".
CHILD = """
import json
import sys

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.ERROR:
            said.append(message)


said = []
log = Log()
batches = json.loads(sys.argv[1])
for file in sys.argv[2:]:
    said.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(file):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        print(json.dumps("parser: " + "; ".join(dict.fromkeys(reasons))), flush=True)
        continue
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        profile.set_shape(value.name, *([rows if size < 0 else size for size in value.shape] for rows in batches))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    print(json.dumps("" if plan else "builder: " + "; ".join(said)), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("tensorrt_rtx")


def refusals(
    folder: Path, graphs: Mapping[str, onnx.ModelProto], batches: tuple[int, int, int] = (1, 4, 16)
) -> dict[str, str]:
    """The graphs of which TensorRT-RTX builds no engine, and why.

    It is asked in a child process, which it may end; the graphs after that one are then asked of another.
    """
    files = []
    for number, graph in enumerate(graphs.values()):
        files.append(str(folder / f"{number}.onnx"))
        onnx.save(graph, files[-1])
    reasons: list[str] = []
    while len(reasons) < len(files):
        command = [sys.executable, "-c", CHILD, json.dumps(batches), *files[len(reasons) :]]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=900)
        reasons += [json.loads(line) for line in ended.stdout.splitlines()]
        if len(reasons) < len(files):
            code = ended.returncode
            died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            reasons.append(f"the process ended by {died} {ended.stderr[-500:]}".strip())
    return {name: reason for name, reason in zip(graphs, reasons, strict=True) if reason}


def canonical(folder: Path, proto: onnx.ModelProto) -> tuple[Graph, str]:
    """A made classifier, and the name of its last map."""
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return opened(path, proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value)


def opened(path: Path, side: int) -> tuple[Graph, str]:
    model = open_model(path)
    tap = Reading(model, (side, side)).automatic()
    return canonize(model, (side, side), raw_scores(model), [tap.name]), tap.name


def portable(graph: Graph, *requests: Request, **options) -> onnx.ModelProto:
    options = {"targets": 1, "ranks": 5, "portable": True, **options}
    return build(graph, requests, **options).proto


def observation(graph: Graph, tap: str) -> onnx.ModelProto:
    """What CF-CAM asks of an image: its last map, and how that speaks for and against two classes."""
    return portable(graph, Request("relevance", tap, "clrp1", "z-plus"), targets=2, keep=[tap])


def relevance(composite: str, start: str = "logit") -> Request:
    return Request("relevance", composite=composite, start=start)


# ----- what is taken -----

STAGES = ((1, 1, 1, 1), (6, 2, 2, 2), (6, 3, 3, 2), (6, 4, 4, 2), (6, 6, 3, 1), (6, 8, 3, 2), (6, 10, 1, 1))
DEEP = {
    "resnet50": partial(made.resnet, size=64, width=16, classes=20, depths=(3, 4, 6, 3)),
    "mobilenet_v2": partial(made.mobilenet_v2, size=64, width=8, classes=20, stages=STAGES),
    "vit": partial(made.vit, width=64, classes=20, depth=12, heads=4),
}


@pytest.mark.parametrize("name", DEEP)
def test_classifiers_of_full_depth(name, tmp_path):
    graph, tap = canonical(tmp_path, DEEP[name]())
    graphs = {"gradient": portable(graph, Request())}
    if name != "vit":
        graphs["observation"] = observation(graph, tap)
        graphs["epsilon-plus"] = portable(graph, relevance("epsilon-plus"))
        graphs["clrp1"] = portable(graph, relevance("clrp", "clrp1"))
        graphs["clrp1-code"] = portable(graph, relevance("clrp", "clrp1-code"))
    assert refusals(tmp_path, graphs) == {}


def test_a_real_model(shared_data, tmp_path):
    graph, tap = opened(shared_data / "models" / "resnet50.onnx", 224)
    graphs = {
        "gradient": portable(graph, Request()),
        "epsilon-plus": portable(graph, relevance("epsilon-plus")),
        "observation": observation(graph, tap),
    }
    assert refusals(tmp_path, graphs) == {}


@pytest.mark.parametrize("name", test_architectures.CASES)
def test_every_architecture(name, tmp_path):
    """Gradients and relevance in one engine."""
    case = test_architectures.CASES[name]
    graph, tap = canonical(tmp_path, case.make())
    requests = [Request(), Request(at=tap)]
    if not case.attention:
        requests += [relevance(composite) for composite in test_architectures.COMPOSITES]
    assert refusals(tmp_path, {name: portable(graph, *requests)}) == {}


def test_every_composite_and_start(tmp_path):
    graph, tap = canonical(tmp_path, made.resnet())
    requests = {composite: relevance(composite) for composite in COMPOSITES}
    requests |= {start: relevance("clrp", start) for start in (*STARTS, "clrp2")}
    requests["map"] = Request("relevance", start="map", composite="fg-cam", start_at=tap)
    requests["guided"] = Request("guided")
    requests["times input"] = Request(times_input=True)
    bounds = ([-2.2, -2.1, -1.8], [2.3, 2.5, 2.7])
    graphs = {name: portable(graph, request, targets=2, bounds=bounds) for name, request in requests.items()}
    assert refusals(tmp_path, graphs) == {}


def test_the_way_back_is_taken_wherever_the_classifier_is(tmp_path):
    """Every rule for a gradient, in every case of its own tests."""
    forward, backward = {}, {}
    for kind, cases in test_vjp.CASES.items():
        for number, case in enumerate(cases):
            net = test_vjp.Net()
            path = net.save(tmp_path / "case.onnx", case.make(net, "x"), opset=case.opset)
            model = open_model(path)
            graph = canonize(model, test_vjp.SIZE, model.output)
            forward[f"{kind} {number}"] = graph.proto
            backward[f"{kind} {number}"] = portable(graph, Request(), ranks=0)
    refused = refusals(tmp_path, backward, batches=(1, 2, 4))
    assert len(refused) < len(backward) / 10
    assert refusals(tmp_path, {name: forward[name] for name in refused}, batches=(1, 2, 4)).keys() == refused.keys()


# ----- what is refused: once it is taken, there is something to simplify -----


def strided_and_dilated() -> onnx.ModelProto:
    net = made.Net(size=32, classes=7)
    window = {"strides": [2, 2], "dilations": [2, 2], "pads": [2] * 4}
    return net.classified(net("Relu", net("Conv", made.IMAGE, net.random(4, 3, 3, 3), channels=4, **window)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(made.resnet, "outputs for MaxPool"), (strided_and_dilated, "Strided & Dilated Deconv")],
    ids=["MaxPool with Indices", "ConvTranspose with strides and dilations"],
)
def test_forms_that_only_onnx_runtime_takes(make, reason, tmp_path):
    graph, _ = canonical(tmp_path, make())
    graphs = {"portable": portable(graph, Request()), "plain": portable(graph, Request(), portable=False)}
    refused = refusals(tmp_path, graphs)
    assert refused.keys() == {"plain"}
    assert reason in refused["plain"]


def test_classifiers_that_are_not_taken(tmp_path):
    dilated, attentive = made.Net(size=16, classes=7), made.Net(size=16, classes=7, opset=23)
    pooled = dilated("MaxPool", made.IMAGE, kernel_shape=[2, 2], dilations=[2, 2])
    graphs = {
        "Attention": attentive.classified(attentive("Attention", made.IMAGE, made.IMAGE, made.IMAGE)),
        "dilated MaxPool": dilated.classified(pooled),
        "none of these": made.vgg(),
    }
    refused = refusals(tmp_path, graphs)
    assert refused.keys() == {"Attention", "dilated MaxPool"}
    assert refused["Attention"].startswith("the process ended by SIGSEGV")
    assert "does not support dilations" in refused["dilated MaxPool"]
