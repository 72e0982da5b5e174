"""The command line on the embedded model: files, records, exit codes."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from diffaccel.cli import main
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE

FAST = ["--steps", "2", "--refine-steps", "1"]


def sample(folder, *words):
    path = folder / "out.png"
    code = main(["sample", "a red apple on a blue background", "-o", str(path), *FAST, *words])
    return code, path


def test_native_sample_and_record(tmp_path, capsys):
    code, path = sample(tmp_path, "--seed", "3")
    assert code == 0
    assert Image.open(path).size == (256, 256)
    record = json.loads((tmp_path / "out.png.json").read_text())
    assert record["seed"] == 3 and record["size"] == [256, 256]
    assert record["model"] == "embedded"
    assert record["versions"]["torch"] and record["device"]
    assert sorted(os.listdir(tmp_path)) == ["out.png", "out.png.json"]


@pytest.mark.slow
def test_large_non_square_sample_is_sparse_and_repeatable(tmp_path):
    words = ["--size", "768x512", "--method", "rectified", "--set", "drop=0.5"]
    words += ["--set", "block=64"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert sample(tmp_path / "a", *words)[0] == 0
    assert sample(tmp_path / "b", *words)[0] == 0
    first, second = (np.asarray(Image.open(tmp_path / f / "out.png")) for f in "ab")
    assert first.shape == (512, 768, 3)
    assert np.array_equal(first, second)
    record = json.loads((tmp_path / "a" / "out.png.json").read_text())
    assert record["method"].startswith("RectifiedSpaAttn(drop=0.5")
    assert 0.4 < record["density"]["768x512"] < 0.9


@pytest.mark.slow
def test_the_embedded_model_attends_its_native_window_by_default(tmp_path):
    assert sample(tmp_path, "--size", "512x512")[0] == 0
    record = json.loads((tmp_path / "out.png.json").read_text())
    assert record["method"].startswith("NeighborhoodAttn(kernel_size=16")
    assert record["density"]["512x512"] < 0.35


@pytest.mark.slow
def test_the_embedded_unet_goes_by_its_name(tmp_path):
    words = ["--model", "embedded-unet", "--method", "agent", "--set", "least_tokens=0"]
    assert sample(tmp_path, *words)[0] == 0
    record = json.loads((tmp_path / "out.png.json").read_text())
    assert record["model"].endswith("unet") and record["method"].startswith("AgentAttn(")
    assert Image.open(tmp_path / "out.png").size == (256, 256)


@pytest.mark.slow
def test_density_is_full_with_the_full_method(tmp_path):
    assert sample(tmp_path, "--size", "512x512", "--method", "full")[0] == 0
    record = json.loads((tmp_path / "out.png.json").read_text())
    assert record["density"] == {"512x512": 1.0}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--method", "fast"], "--method must be one of"),
        (["--set", "dorp=0.5"], "--set must name a knob of a method"),
        (["--method", "rectified", "--set", "keep=0.5"], "--set must name a knob of rectified"),
        (["--set", "drop=0.5"], "--set must name a knob of neighborhood"),
        (["--set", "drop"], "--set takes knob=value"),
        (["--method", "rectified", "--set", "drop=1.5"], "drop"),
        (["--method", "rectified", "--set", "correction=best"], "correction must be one of"),
        (["--size", "100x100"], "multiples of 16"),
        (["--size", "0x64"], "multiples of 16"),
        (["--size", "big"], "--size must be WxH"),
        (["--steps", "-3"], "at least 1"),
        (["--seed", "-1"], "at least 0"),
        (["--strength", "0"], "(0, 1]"),
        (["--model", "no/such/folder"], "diffusers folder"),
        (["--model", "."], "model_index.json"),
        (["--device", "nonsense"], "--device"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    code, _ = sample(tmp_path, *words)
    message = capsys.readouterr().err.strip()
    assert code == 2
    assert part in message
    assert "\n" not in message and "Traceback" not in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("missing/out.png", "folder must exist"),
        ("out.tiff", "must end in one of"),
        (".", "must end in one of"),
    ],
)
def test_bad_output_is_refused_before_any_work(tmp_path, capsys, output, part):
    assert main(["sample", "a cat", "-o", str(tmp_path / output)]) == 2
    assert part in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_empty_prompt_is_refused(tmp_path, capsys):
    assert main(["sample", "  ", "-o", str(tmp_path / "out.png")]) == 2
    assert "prompt must not be empty" in capsys.readouterr().err


def test_model_folder_that_lost_a_file_is_refused(tmp_path, capsys):
    """A truncated download: the index is there, the weights are not."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_IMAGE, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    out = tmp_path / "results"
    out.mkdir()
    code = main(["sample", "a cat", "--model", str(folder), "-o", str(out / "out.png")])
    assert code == 2
    assert "must load as a diffusers pipeline" in capsys.readouterr().err
    assert os.listdir(out) == []


def test_pipeline_of_an_unknown_kind_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    code = main(["sample", "a cat", "--model", str(tmp_path), "-o", str(tmp_path / "out.png")])
    assert code == 2
    assert "got DDPMPipeline" in capsys.readouterr().err


def test_info_lists_methods_and_models(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "rectified" in printed and "FluxTransformer2DModel" in printed
