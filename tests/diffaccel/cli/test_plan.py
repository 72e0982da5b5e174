"""`diffaccel plan` and `--plan-only`: what is printed, and what is refused."""

import json
import os
import re
import shutil

import pytest

from diffaccel.cli import main
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE


@pytest.fixture
def without_weights(tmp_path):
    """The embedded model's folder without a single weight or tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_IMAGE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(folder / "tokenizer")
    return folder


@pytest.mark.slow
def test_a_plan_names_every_phase(capsys):
    assert main(["plan", "--size", "1024x512", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "embedded model, recipe cascade: 9.8 M parameters, float32" in printed
    phases = re.findall(r"^(sample|refine to) (\d+x\d+)", printed, re.MULTILINE)
    assert phases[0][0] == "sample" and phases[-1] == ("refine to", "1024x512")
    assert "2,048 (32 x 64) + 32 of text" in printed
    assert "NeighborhoodAttn(kernel_size=16" in printed
    assert re.search(r"exact [\d.]+%, visited [\d.]+%, ideal [\d.]+%", printed)
    for part in ("GB at the peak", "x dense", "how: ratios count operations", "measured here"):
        assert part in printed


@pytest.mark.slow
def test_no_weight_is_needed_and_nothing_is_written(
    tmp_path, capsys, monkeypatch, without_weights
):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(without_weights), "--size", "2048x2048", "--device", "cpu"]
    assert main(["sample", "a cat", "--plan-only", *words, "--recipe", "guided"]) == 0
    first = capsys.readouterr().out
    assert main(["plan", "a cat", *words, "--recipe", "guided"]) == 0
    ratios = re.compile(r"(?:exact|visited|ideal|tokens|x dense|memory).*?(?=;|\n)")
    assert ratios.findall(first) == ratios.findall(capsys.readouterr().out)
    assert "SlidingWindowAttn" in first and "16,384" in first
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.slow
def test_switches_show_in_the_plan(capsys):
    words = ["--size", "512x512", "--set", "stride=8", "--jitter", "--proportional"]
    assert main(["plan", *words, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "ProportionalAttn(method=JitteredAttn(method=NeighborhoodAttn(kernel_size=16" in printed
    words = ["--size", "1024x1024", "--recipe", "direct", "--method", "rectified"]
    assert main(["plan", *words, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("denoiser rows") == 1 and "RectifiedSpaAttn(drop=0.9" in printed


@pytest.mark.slow
def test_a_sample_records_its_switches(tmp_path):
    path = tmp_path / "out.png"
    words = ["--steps", "1", "--refine-steps", "1", "--size", "512x256", "--recipe", "window"]
    words += ["--rope", "ntk", "--shift", "size", "--set", "stride=4", "--jitter"]
    assert main(["sample", "a red apple", "-o", str(path), "--device", "cpu", *words]) == 0
    record = json.loads((tmp_path / "out.png.json").read_text())
    assert record["recipe"] == "window"
    told = record["refinement"]
    assert (told["rope"], told["shift"], told["jitter"], told["steps"]) == ("ntk", "size", True, 1)
    assert told["guidance"] == 0.0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "nobody/nothing-here"], "not in the hub's cache"),
        (["--model", "."], "model_index.json"),
        (["--size", "100x100"], "multiples of 16"),
        (["--recipe", "magic"], "--recipe of an image must be one of direct"),
        (["--recipe", "freeswim"], "--recipe of an image must be one of direct"),
        (["--frames", "5", "--recipe", "guided"], "--recipe of a video must be one of freeswim"),
        (["--frames", "5", "--rope", "ntk"], "--rope is for images"),
        (["--frames", "5", "--max-upscale", "2"], "--max-upscale is for images"),
        (["--method", "full", "--jitter"], "jitter moves the borders of windows"),
        (["--max-upscale", "1"], "above 1"),
        (["--guidance", "2"], "0 to 1"),
        (["--shift", "wide"], "above 0 or size"),
        (["--rope", "linear"], "--rope"),
        (["--set", "dorp=1"], "--set must name a knob of a method"),
        (["--device", "nonsense"], "--device"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    for command in (["plan"], ["sample", "a cat", "--plan-only"]):
        assert main([*command, *words]) == 2
        message = capsys.readouterr().err.strip()
        assert part in message
        assert "\n" not in message and "Traceback" not in message
    assert os.listdir(tmp_path) == []
