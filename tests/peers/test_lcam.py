"""Whole training steps of an attention against PyTorch's autograd and torch.optim.SGD, on an exported network."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest

from heatmill.engine.jobs.train import train
from heatmill.engine.jobs.train_settings import TrainJob
from heatmill.engine.jobs.trainer import Trainer

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

pytestmark = pytest.mark.peers

SIZE, CLASSES = 40, 7
SPEC = {"input_size": [3, SIZE, SIZE], "mean": [0.5, 0.45, 0.4], "std": [0.25, 0.2, 0.3], "output": "logits"}


class Net(nn.Module):
    """Convolutions with normalisation, and a head of one linear layer on the mean, or of two on all places."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 12, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(12, 16, 3, 2, 1),
            nn.ReLU(),
        )
        if head == "linear":
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
        else:
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(400, 24), nn.SiLU(), nn.Linear(24, CLASSES))
        nn.init.normal_(self.head[-1].weight, 0, 1)

    def forward(self, x):
        return self.head(self.body(x))


def exported(folder, head):
    torch.manual_seed(0)
    net = Net(head).eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(2, 3, SIZE, SIZE),), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}}
        )
    (folder / "net.onnx").write_bytes(file.getvalue())
    (folder / "net.json").write_text(json.dumps(SPEC))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net, folder / "net.onnx"


class Caught(Exception):
    """A trainer, stopped before its first batch."""


def opened(job, monkeypatch):
    def stop(self, style, signals):
        raise Caught(self)

    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(Caught) as caught:
        train(job, "quiet")
    return caught.value.args[0]


def variation(a):
    """As METHODS.md writes it, over (m, h, w)."""
    inner = (a[:, 1:] - a[:, :-1]).pow(2).sum() + (a[:, :, 1:] - a[:, :, :-1]).pow(2).sum()
    border = a[:, 0].pow(2).sum() + a[:, -1].pow(2).sum() + a[:, :, 0].pow(2).sum() + a[:, :, -1].pow(2).sum()
    return inner + 0.3 * border


@pytest.mark.parametrize("loss", ["own-map", "faithful"])
@pytest.mark.parametrize(("variant", "head"), [("fm", "linear"), ("fm", "deep"), ("img", "linear"), ("img", "deep")])
def test_steps(variant, head, loss, save_photographs, tmp_path, monkeypatch):
    net, model = exported(tmp_path, head)
    photos = save_photographs(tmp_path / "photos", 20)
    job = TrainJob(model=model, inputs=(photos,), out=tmp_path / "o.onnx", variant=variant, loss=loss, rate=0.05)
    trainer = opened(job, monkeypatch)
    assert trainer.tap.channels == 16
    attention = nn.Conv2d(16, CLASSES, 1)
    with torch.no_grad():
        attention.weight.copy_(torch.from_numpy(trainer.weight.values)[:, :, None, None])
        attention.bias.copy_(torch.from_numpy(trainer.bias.values))
    groups = [
        {"params": [attention.weight], "lr": trainer.weight.rate},
        {"params": [attention.bias], "lr": trainer.bias.rate},
    ]
    sgd = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, nesterov=True)
    mean, std = (torch.tensor(SPEC[name])[:, None, None] for name in ("mean", "std"))
    rng, gradients = np.random.default_rng(1), {}
    for name in ("weight", "bias"):
        step = getattr(trainer, name).step

        def noted(which, gradient, name=name, step=step):
            whole = np.zeros_like(getattr(trainer, name).values)
            np.add.at(whole, which, gradient)
            gradients[name] = whole
            step(which, gradient)

        monkeypatch.setattr(getattr(trainer, name), "step", noted)
    for _ in range(4):
        rows = rng.permutation(trainer.trained)[:6]
        classes = rng.integers(0, CLASSES - 2, 6)
        trainer.classes[rows] = classes
        images, labels = torch.from_numpy(trainer._read(rows)), torch.from_numpy(classes)
        features = net.body(images).half().float()  # as they are cached
        a = torch.sigmoid(attention(features))
        own = a[torch.arange(6), labels]
        if variant == "fm":
            scores = net.head(own[:, None] * features)
        else:
            mask = functional.interpolate(own[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            scores = net((mask * (images * std + mean) - mean) / std)
        maps = own if loss == "own-map" else a[:, labels].flatten(0, 1)
        entropy = 1.5 * functional.cross_entropy(scores, labels)
        area, tv = 2 * ((maps + 0.0005) ** 0.3).mean(), 0.01 * variation(maps) / (2 * 6)
        sgd.zero_grad()
        (entropy + area + tv).backward()
        parts = trainer.batch(rows, trainer.features.take(rows))
        wanted = dict(zip(("entropy", "area", "variation"), (entropy.item(), area.item(), tv.item()), strict=True))
        assert parts == pytest.approx(wanted, rel=1e-4)
        for name, parameter in (("weight", attention.weight), ("bias", attention.bias)):
            expected = parameter.grad.numpy().reshape(gradients[name].shape)
            assert np.abs(gradients[name] - expected).max() <= 1e-4 * np.abs(expected).max()
        sgd.step()
    for name, parameter in (("weight", attention.weight), ("bias", attention.bias)):
        expected = parameter.detach().numpy().reshape(getattr(trainer, name).values.shape)
        np.testing.assert_allclose(getattr(trainer, name).settle(), expected, rtol=1e-4, atol=1e-5)
