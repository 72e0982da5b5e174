"""The command line with --frames, on a tiny Wan pipeline that lies in a folder."""

import json
import os

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffaccel.cli import main
from diffaccel.pipelines import embedded
from diffaccel.pipelines.embedded import EMBEDDED_VIDEO


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory, tiny_pipelines):
    folder = tmp_path_factory.mktemp("wan")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "cat": 3}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )  # fmt: skip
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=4, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    tiny = tiny_pipelines.wan21()
    diffusers.WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),
        text_encoder=encoder, vae=vae, scheduler=tiny.pipe.scheduler,
        transformer=tiny.pipe.transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sample(folder, output, *words):
    fast = ["--steps", "1", "--refine-steps", "1", "--device", "cpu"]
    return main(["sample", "a cat", "--model", str(folder), "-o", str(output), *fast, *words])


def test_a_clip_and_its_record(tmp_path, wan_folder):
    path = tmp_path / "clip.mp4"
    # native area would be 832x480: at or below it, a video is sampled directly
    assert sample(wan_folder, path, "--frames", "5", "--size", "64x48", "--fps", "8") == 0
    assert iio.imread(path).shape == (5, 48, 64, 3)
    record = json.loads((tmp_path / "clip.mp4.json").read_text())
    assert record["frames"] == 5 and record["fps"] == 8 and record["size"] == [64, 48]
    assert record["recipe"].startswith("FreeSwim(")
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "clip.mp4.json"]


@pytest.mark.slow
def test_long_clips_and_frames_as_pictures(tmp_path, wan_folder):
    words = ("--frames", "13", "--size", "32x48", "--recipe", "windows")
    assert sample(wan_folder, tmp_path / "frames", *words) == 0
    assert len(os.listdir(tmp_path / "frames")) == 13
    assert iio.imread(tmp_path / "frames" / "0012.png").shape == (48, 32, 3)
    record = json.loads((tmp_path / "frames.json").read_text())
    assert record["recipe"].startswith("TimeWindows(")


@pytest.mark.parametrize(
    ("words", "output", "part"),
    [
        (["--frames", "6"], "clip.mp4", "1 more than a multiple of 4"),
        (["--frames", "5", "--size", "50x48"], "clip.mp4", "multiples of 16"),
        (["--frames", "0"], "clip.mp4", "at least 1"),
        (["--frames", "5", "--fps", "0"], "clip.mp4", "at least 1"),
        (["--frames", "5"], "clip.gif", "must end in .mp4"),
        (["--frames", "5"], "missing/clip.mp4", "folder must exist"),
        (["--frames", "5", "--method", "full"], "clip.mp4", "--method and --set are for images"),
        (["--frames", "5", "--recipe", "magic"], "clip.mp4", "--recipe"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, capsys, wan_folder, words, output, part):
    assert sample(wan_folder, tmp_path / output, *words) == 2
    message = capsys.readouterr().err.strip()
    assert part in message and "Traceback" not in message
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not EMBEDDED_VIDEO.is_dir(), reason="the embedded video model is not made")
def test_the_embedded_model_makes_what_is_asked_for(tmp_path):
    path = tmp_path / "clip.mp4"
    fast = ["--frames", "17", "--steps", "10", "--device", "cpu"]
    assert main(["sample", "a rocket flies to the left", "-o", str(path), *fast]) == 0
    clip = iio.imread(path).astype(float)
    assert clip.shape == (17, 128, 128, 3)
    record = json.loads((tmp_path / "clip.mp4.json").read_text())
    assert record["model"] == "embedded" and record["native"] == [128, 128]
    ground = np.median(clip.reshape(-1, 3), axis=0)
    columns = [np.nonzero(np.abs(clip[i] - ground).max(-1) > 60)[1].mean() for i in (0, 16)]
    assert columns[1] < columns[0] - 20


def test_a_video_needs_a_video_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedded, "EMBEDDED_VIDEO", tmp_path / "missing")
    path = str(tmp_path / "clip.mp4")
    assert main(["sample", "a cat", "--frames", "5", "-o", path]) == 2
    assert "--frames needs a video model" in capsys.readouterr().err
