"""What a run is said to cost, beside what it costs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from heatmill import InputError, RunError, open_run
from heatmill.cli import main
from heatmill.engine.jobs import forecast as forecasts
from heatmill.engine.jobs import job as jobs
from heatmill.engine.jobs.forecast import duration, forecast, forecast_text, parse_budget
from heatmill.engine.jobs.plan import Job
from heatmill.engine.methods import METHODS as METHODS_TABLE
from heatmill.engine.opening import load
from heatmill.engine.trial import Trial

# One through the network, one there and back with the observation, one there and back by rows, one through the head,
# one of two stages, one of nothing but the observation.
METHODS = [
    "score-cam",
    "group-cam:groups=4",
    "integrated-gradients:steps=5",
    "ablation-cam",
    "fg-cam:base=score-cam,to=r1",
]


def job(model, photographs, out, methods, **options) -> Job:
    return Job(model=model, inputs=(photographs,), out=out, methods=tuple(methods), batch_size=4, **options)


def test_the_passes_that_are_told_are_those_that_are_run(make_model, photographs, tmp_path):
    asked = job(make_model(head="Dense"), photographs, tmp_path / "run", [*METHODS, "lrp"], targets=("top2",))
    found = forecast(asked, seconds=0.0)
    summary = jobs.explain(asked, "quiet")
    assert found["sampled"] == found["images"] == summary.images == 6
    told = sum(each["forward"] + each["backward"] + each["head"] for each in found["methods"]) * 6 + 6
    assert told == summary.stages["rows"]
    by_method = {each["method"]: each for each in found["methods"]}
    for method in (*METHODS, "lrp"):
        rows = [row for row in open_run(asked.out).rows(method=method) if row.target_source == "top1"]
        passes = sum(row.extras["passes"] for row in rows) / 6
        each = by_method[method]
        assert each["forward"] + each["backward"] + each["head"] + each["shared"] == pytest.approx(passes)
    assert by_method["fg-cam:base=score-cam,to=r1"]["shared"] == by_method["score-cam"]["forward"] > 0
    assert by_method["ablation-cam"]["head"] > 0
    assert by_method["integrated-gradients:steps=5"]["backward"] == 12
    assert by_method["lrp"]["seconds_per_image"] == 0, "it rides with the observation"
    assert found["observe_seconds_per_image"] > 0


def test_few_passes_are_run(make_model, photographs, tmp_path, monkeypatch):
    ran = []
    real = forecasts.Engine._passed
    monkeypatch.setattr(
        forecasts.Engine, "_passed", lambda self, batch, rows: ran.append(rows) or real(self, batch, rows)
    )
    found = forecast(job(make_model(), photographs, tmp_path / "run", ["rise:masks=400"]), seconds=0.0)
    assert found["methods"][0]["forward"] > 300
    assert sum(ran) < 100
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize("method", ["grad-cam", "saliency"])
def test_observations_alone_are_timed_in_full_batches(make_model, photographs, tmp_path, method):
    found = forecast(job(make_model(head="Dense"), photographs, tmp_path / "run", [method]), seconds=0.0)
    assert found["observe_seconds_per_image"] > 0
    assert found["seconds"] > found["start_seconds"]
    assert "rides with the observation" in forecast_text(found)


def test_what_fits_a_budget_is_named(make_model, photographs, tmp_path, monkeypatch):
    """At 10 ms a pass: of those that fit, the costliest, as many as are named."""

    def priced(loaded, *others):
        methods = [
            {
                "method": call.text,
                **dict.fromkeys(("forward", "backward", "head", "shared"), 0),
                "forward": call.method.passes(loaded.facts, call.parameters),
                "observation": "forward",
                "seconds_per_image": 0.01 * call.method.passes(loaded.facts, call.parameters),
                "bytes_per_image": 10,
            }
            for call in loaded.calls
        ]
        return {"methods": methods, "observe_seconds_per_image": 0.02, "opened": 0.5, "on_device": False}

    trial = Trial("onnxruntime", "cpu", "fp32", "1", 8, True, 5, 100.0)
    monkeypatch.setattr(forecasts, "probe_job", lambda *given: trial)
    monkeypatch.setattr(forecasts, "_rehearsed", priced)
    monkeypatch.setattr(forecasts, "_sampled", lambda loaded, source: ([0], 0.0))
    asked = job(make_model(), photographs, tmp_path / "run", ["rise:masks=1000"])
    assert forecast(asked, budget=61)["fits"]
    told = []
    found = forecast(asked, budget=20.0, tell=told.append)
    assert found["fits"] is False
    assert found["seconds"] == pytest.approx(60.62, abs=0.1)
    loaded = load(asked.model, ["cam"])
    seconds = {}
    for name, method in METHODS_TABLE.items():
        values = {key: parameter.default for key, parameter in method.parameters.items()}
        if name != "rise" and not method.refuses(loaded.facts, values):
            seconds[name] = 0.5 + 6 * (0.02 + 0.01 * method.passes(loaded.facts, values))
    fitting = sorted((cost for cost in seconds.values() if cost < 19.9), reverse=True)
    costs = [each["seconds"] for each in found["cheaper"]]
    assert costs == pytest.approx(fitting[: forecasts.OFFERED], abs=0.1)
    assert {f"trying {each['method']}" for each in found["cheaper"]} <= set(told)
    assert "these would, each alone, all included" in forecast_text(found)


def test_what_rides_with_the_observation_is_not_free(make_model, photographs, tmp_path):
    asked = job(make_model(head="Dense"), photographs, tmp_path / "run", ["lrp", "rise:masks=1000"])
    found = forecast(asked, seconds=0.0)
    lrp, rise = found["methods"]
    assert (lrp["observation"], rise["observation"]) == ("there and back", "forward")
    text = forecast_text(found)
    assert "observation, there and back, once for all: " in text
    assert "lrp: rides with the observation" in text
    assert "decoding: " in text
    parts = found["observe_seconds_per_image"] + found["decode_seconds_per_image"] + rise["seconds_per_image"]
    assert found["seconds"] == pytest.approx(found["start_seconds"] + 6 * parts)


def test_several_devices_share_the_images(make_model, photographs, tmp_path, monkeypatch):
    asked = job(make_model(), photographs, tmp_path / "run", ["rise:masks=400"])
    trial = jobs.probe_job(asked, *forecasts.plans.open_job(asked), None)
    monkeypatch.setattr(forecasts, "probe_job", lambda *given: trial)
    found = forecast(replace(asked, devices=(0, 1), workers=3), seconds=0.0)
    network = found["observe_seconds_per_image"] + found["methods"][0]["seconds_per_image"]
    assert found["seconds"] == pytest.approx(
        found["start_seconds"] + 6 * (network / 2 + found["decode_seconds_per_image"])
    )


def test_what_a_run_has_is_not_counted_again(make_model, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasts.plans, "MAX_SHARD_ROWS", 2)
    asked = job(make_model(), photographs, tmp_path / "run", ["cam"])
    assert forecast(asked, seconds=0.0, resume=True)["images"] == 6, "there is none yet"
    jobs.explain(asked, "quiet")
    assert forecast(asked, seconds=0.0, resume=True)["images"] == 0
    (asked.out / "data" / "part-000001.parquet").unlink()
    assert forecast(asked, seconds=0.0, resume=True)["images"] == 2
    with pytest.raises(RunError, match="belongs to other settings"):
        forecast(replace(asked, methods=("rise:masks=9",)), seconds=0.0, resume=True)


def test_where_nothing_fits_that_is_said(make_model, photographs, tmp_path):
    found = forecast(job(make_model(), photographs, tmp_path / "run", ["score-cam"]), budget=1e-3, seconds=0.0)
    assert found["fits"] is False
    assert found["cheaper"] == []
    assert "no method with its defaults does" in forecast_text(found)


def test_images_that_can_not_be_read_are_told(make_model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of 1 sampled images can be read"):
        forecast(job(make_model(), tmp_path / "photos", tmp_path / "run", ["cam"]))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2 h", 7200), ("1D", 86400), (".5min", 30)]
)
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "2 weeks", "-1h", "0", "1h30"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match="give a time as 90s, 15m, 2h or 1d"):
        parse_budget(text)


def test_durations_are_in_the_unit_one_would_use():
    assert [duration(seconds) for seconds in (0.25, 119, 121, 7300, 200_000)] == [
        *("0.2 s", "119.0 s", "2.0 min", "2.0 h", "2.3 days")
    ]


def test_both_commands_say_the_same(make_model, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasts, "LANE_SECONDS", 0.0)
    arguments = [str(make_model()), str(photographs), "-m", "score-cam", "--batch-size", "4", "--json"]
    plan = CliRunner().invoke(main, ["plan", *arguments, "--budget", "1d"])
    dry = CliRunner().invoke(main, ["explain", *arguments, "-o", str(tmp_path / "run"), "--dry-run"])
    assert (plan.exit_code, dry.exit_code) == (0, 0)
    told, other = json.loads(plan.stdout), json.loads(dry.stdout)
    assert told["methods"][0]["forward"] == other["methods"][0]["forward"] > 0
    assert (told["fits"], other["fits"]) == (True, None)
    assert not (tmp_path / "run").exists()
    without = CliRunner().invoke(main, ["explain", *arguments, "--dry-run"])
    assert without.exit_code == 0, "nothing is written, so no folder is asked for"
    refused = CliRunner().invoke(main, ["plan", *arguments[:2], "--budget", "soon"])
    assert refused.exit_code == 2
