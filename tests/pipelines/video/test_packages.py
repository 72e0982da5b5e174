"""Packages that diffusers imports only if it can, and uses whether it could or not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROMPTS = """
import sys

if {is_absent}:
    sys.modules["ftfy"] = None  # as `import ftfy` finds it where it is not installed

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, "tests/support")
import tiny_pipelines
from diffaccel.errors import ModelError
from diffaccel.pipelines.video import FreeSwim, VideoJob, generate_video
from PIL import Image

tokenizer = Tokenizer(models.WordLevel({{"<pad>": 0, "</s>": 1, "a": 2, "cat": 3}}, "<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
config = UMT5Config(vocab_size=4, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
vae = diffusers.AutoencoderKLWan(
    base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
    temperal_downsample=[False, True, True],
)
parts = dict(
    tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),
    text_encoder=UMT5EncoderModel(config), vae=vae,
    scheduler=tiny_pipelines.wan21().pipe.scheduler,
)
words, image = {{}}, None
if "{name}" == "WanImageToVideoPipeline":
    parts |= dict(image_encoder=None, image_processor=None)
    words, image = {{"in_channels": 36}}, Image.new("RGB", (64, 48), "red")
pipe = getattr(diffusers, "{name}")(transformer=tiny_pipelines.wan_transformer(**words), **parts)
pipe.set_progress_bar_config(disable=True)
job = VideoJob(
    "a cat", (64, 48), 5, recipe=FreeSwim(guidance_scale=1.0), steps=1, native=(64, 48),
    image=image,
)
try:
    print("made", tuple(generate_video(pipe, job).frames.shape))
except ModelError as error:
    print("refused", error)
"""


def prompted(name, is_absent):
    """What a process with or without ftfy says to a prompt."""
    script = PROMPTS.format(name=name, is_absent=is_absent)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("is_absent", [True, False], ids=["absent", "present"])
@pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline"])
def test_prompts_of_wan_are_cleaned_or_refused_before_the_run(name, is_absent):
    if not is_absent:
        pytest.importorskip("ftfy")
    said = prompted(name, is_absent)
    if is_absent and name == "WanImageToVideoPipeline":
        assert said.startswith("refused WanImageToVideoPipeline needs the package ftfy")
        assert "pip install ftfy" in said
    else:  # text to video asks whether ftfy is there
        assert said == "made (1, 5, 3, 48, 64)"
