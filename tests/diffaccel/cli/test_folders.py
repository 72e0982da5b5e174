"""The command line on whole tiny pipelines of every family, loaded from folders."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import tiny_folders
from PIL import Image

from diffaccel.cli import main
from diffaccel.pipelines.image.presets import BY_PIPELINE
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.long_video import TimeWindows

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("CogView4Pipeline", "WanPipeline")
IMAGES, VIDEOS = (
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]
    for names in (tiny_folders.IMAGES, tiny_folders.VIDEOS)
)
FAST = ["--steps", "2", "--refine-steps", "2", "--device", "cpu"]


def run(command, folder, *words):
    return main([command, "a red apple", "--model", str(folder), *FAST, *words])


@pytest.fixture
def output(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("name", IMAGES)
def test_a_picture_twice_the_native_size(tmp_path, output, capsys, monkeypatch, name):
    small = replace(BY_PIPELINE[name], native=tiny_folders.NATIVE_SIDE)
    monkeypatch.setitem(BY_PIPELINE, name, small)
    folder = tiny_folders.write_folder(name, tmp_path / "model")
    path = output / "x.png"

    assert run("sample", folder, "--size", "128x64", "-o", str(path)) == 0, capsys.readouterr()
    picture = np.asarray(Image.open(path))
    assert picture.shape == (64, 128, 3) and picture.std() > 0
    record = json.loads((output / "x.png.json").read_text())
    assert record["size"] == [128, 64] and record["stages"] == [[64, 32], [128, 64]]
    assert record["prompt"] == "a red apple" and record["model"] == str(folder)
    assert record["density"].keys() == {"128x64"} and record["seconds"]["denoise 128x64"] > 0
    assert sorted(os.listdir(output)) == ["x.png", "x.png.json"]

    capsys.readouterr()
    assert run("plan", folder, "--size", "128x64") == 0, capsys.readouterr()
    planned = capsys.readouterr().out
    assert "sample 64x32" in planned and "refine to 128x64" in planned
    assert "could not be read" not in planned


@pytest.mark.parametrize("name", VIDEOS)
def test_a_clip_twice_the_native_size(tmp_path, output, capsys, monkeypatch, name):
    multiple, step = 16, 4
    if name in VIDEO_FAMILIES:
        family = VIDEO_FAMILIES[name]
        multiple, step = family.multiple, family.frame_step * family.latent_step
        small = replace(family, native=(4 * multiple, 3 * multiple))
        monkeypatch.setitem(VIDEO_FAMILIES, name, small)
    folder = tiny_folders.write_folder(name, tmp_path / "model")
    width, height, frames = 8 * multiple, 6 * multiple, step + 1
    size = ("--size", f"{width}x{height}", "--frames", str(frames))
    path = output / "x.mp4"

    assert run("sample", folder, *size, "-o", str(path)) == 0, capsys.readouterr()
    clip = iio.imread(path)
    assert clip.shape == (frames, height, width, 3) and clip.std() > 0
    record = json.loads((output / "x.mp4.json").read_text())
    assert record["size"] == [width, height] and record["native"] == [width // 2, height // 2]
    assert record["frames"] == frames and record["model"] == str(folder)
    assert all(0 < density <= 1 for density in record["density"].values()) and record["density"]
    assert sorted(os.listdir(output)) == ["x.mp4", "x.mp4.json"]

    capsys.readouterr()
    assert run("plan", folder, *size) == 0, capsys.readouterr()
    planned = capsys.readouterr().out
    assert f"sample {width // 2}x{height // 2}" in planned
    assert f"refine to {width}x{height}" in planned
    assert "could not be read" not in planned


def test_a_clip_whose_length_the_autoencoder_does_not_make_is_refused(output, tmp_path, capsys):
    folder = tiny_folders.write_folder("CogVideoXPipeline", tmp_path / "model")
    size = ("--size", "128x96", "--frames", "5")
    assert run("sample", folder, *size, "-o", str(output / "x.mp4")) == 2
    assert "1 more than a multiple of 8" in capsys.readouterr().err
    assert os.listdir(output) == []


@pytest.mark.parametrize(
    "name", ["LTXPipeline", pytest.param("AnimateDiffPipeline", marks=pytest.mark.slow)]
)
def test_a_long_clip_in_windows(tmp_path, output, capsys, monkeypatch, name):
    family = VIDEO_FAMILIES[name]
    monkeypatch.setitem(VIDEO_FAMILIES, name, replace(family, windows=TimeWindows(3, 1)))
    folder = tiny_folders.write_folder(name, tmp_path / "model")
    frames = 4 * family.frame_step + 1
    width, height = 4 * family.multiple, 3 * family.multiple
    words = ("--size", f"{width}x{height}", "--frames", str(frames), "--recipe", "windows")
    path = output / "x.mp4"
    assert run("sample", folder, *words, "-o", str(path)) == 0, capsys.readouterr()
    assert iio.imread(path).shape == (frames, height, width, 3)
    record = json.loads((output / "x.mp4.json").read_text())
    assert record["recipe"].startswith("TimeWindows(length=3")

    capsys.readouterr()
    assert run("plan", folder, *words) == 0, capsys.readouterr()
    assert "windows of 3 latent frames" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("index", "name", "words", "part"),
    [
        ("model_index", "LTX2Pipeline", ["--recipe", "windows"], "sound is denoised together"),
        ("modular_model_index", "MiniMaxH3ModularPipeline", [], "made of modular blocks"),
        ("model_index", "HeliosPipeline", [], "chunk after chunk"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_before_its_weights(
    tmp_path, output, capsys, index, name, words, part
):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / f"{index}.json").write_text(json.dumps({"_class_name": name}))
    assert run("sample", folder, "--frames", "17", *words, "-o", str(output / "x.mp4")) == 2
    said = capsys.readouterr().err
    assert name in said and part in said
    assert os.listdir(output) == []
