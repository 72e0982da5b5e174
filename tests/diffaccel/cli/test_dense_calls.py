"""What turns dense against what was asked for: nothing but what the command says."""

import json
import re

import pytest

from diffaccel import AgentAttn, NeighborhoodAttn, ProportionalAttn, RectifiedSpaAttn
from diffaccel.attach import forecast
from diffaccel.cli import main
from diffaccel.cli.dense_calls import described, recorded
from diffaccel.cli.options.recipe_options import image_job
from diffaccel.cli.options.sample_options import SampleOptions
from diffaccel.methods import SlidingWindowAttn
from diffaccel.pipelines.image.presets import BY_PIPELINE
from diffaccel.pipelines.windows import has_windows, throughout

FAST = ["--steps", "2", "--refine-steps", "2", "--size", "512x256", "--device", "cpu"]


def sampled(folder, capsys, *words):
    """Record and print of a sample."""
    path = folder / "out.png"
    assert main(["sample", "a cat", "-o", str(path), *FAST, *words]) == 0
    return json.loads((folder / "out.png.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("name", BY_PIPELINE)
@pytest.mark.parametrize("recipe", ["window", "guided", "cascade"])
def test_the_forecast_decides_about_what_was_chosen_for_speed_alone(name, recipe):
    preset = BY_PIPELINE[name]
    job = image_job(None, SampleOptions(recipe=recipe), preset)
    assert job.is_for_speed == (preset.recipes[recipe].method == "rectified")
    assert not image_job(None, SampleOptions(recipe=recipe, always=True), preset).is_for_speed
    named = SampleOptions(recipe=recipe, method="rectified")
    assert not image_job(None, named, preset).is_for_speed


def test_windows_hold_in_every_step_and_layer_unless_they_say_so_themselves():
    windows = throughout(ProportionalAttn(SlidingWindowAttn()))
    assert has_windows(windows) and not has_windows(RectifiedSpaAttn())
    resolved = windows.resolved("flux", 57).method
    assert (resolved.dense_steps, resolved.dense_layers) == (0, 0)
    told = throughout(NeighborhoodAttn(16, dense_steps=2, dense_layers=(1,)))
    assert (told.dense_steps, told.dense_layers) == (2, (1,))
    assert throughout(AgentAttn()) == AgentAttn()


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "window", "--set", "kernel_size=15"],
        ["--method", "sparse", "--set", "keep=0.9"],
    ],
)
def test_what_is_asked_for_runs_against_the_forecast(tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(forecast, "CPU_TOKENS", 1)
    monkeypatch.setattr(forecast, "LEAST_GAIN", 0.0)
    record, printed = sampled(tmp_path, capsys, *words)
    assert record["density"]["512x256"] < 1.0
    assert record["attention"]["512x256"]["dense"] == {} and "ran dense" not in printed


def test_an_agent_after_its_part_of_the_schedule_says_that_all_ran_dense(tmp_path, capsys):
    words = ["--method", "agent", "--set", "least_tokens=0"]
    record, printed = sampled(tmp_path, capsys, *words)
    told = record["attention"]["512x256"]
    assert told["dense"] == {"outside start=0.0 to stop=0.4": told["calls"]}
    assert f"512x256: all {told['calls']} attention calls ran dense (outside start=0.0" in printed
    assert main(["plan", *FAST, *words]) == 0
    planned = capsys.readouterr().out
    assert re.search(r"100% of it stays dense; outside start=0\.0 to stop=0\.4", planned)


def test_the_forecast_is_printed_with_what_overrules_it(tiny_pipelines, monkeypatch):
    monkeypatch.setattr(forecast, "CPU_TOKENS", 1)
    monkeypatch.setattr(forecast, "LEAST_GAIN", 0.0)
    tiny = tiny_pipelines.flux()
    with tiny.pipe.set_attn_processor(NeighborhoodAttn(3)) as attachment:
        tiny.sample()
        report = attachment.report()
    line = described("96x64", report)
    assert line.startswith("  96x64: all 8 attention calls ran dense (expected to take")
    assert "--always runs the method" in line
    (count,) = recorded({"96x64": report})["96x64"]["dense"].values()
    assert count == report.calls == 8
