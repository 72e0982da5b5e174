"""Denoisers that cannot be guided in some way say so at once."""

import diffusers
import pytest
import torch
from tiny_models import MODELS

from diffaccel import HeadPerturbation
from diffaccel.errors import ModelError
from diffaccel.guidance.attachment import set_guidance
from diffaccel.guidance.normalized.config import NormalizedAttention
from diffaccel.guidance.normalized.negative_prompt import NegativePrompt


def test_text_that_is_repeated_for_each_frame_is_not_taken_apart():
    pipe = diffusers.AnimateDiffPipeline(
        vae=None, text_encoder=None, tokenizer=None, motion_adapter=None,
        unet=MODELS["UNetMotionModel"]().model, scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip
    with pytest.raises(ModelError, match="cannot be told from those of its frames"):
        set_guidance(pipe, HeadPerturbation(layers=(0,)), scale=2.0)


def test_samples_that_are_attended_apart_have_no_second_prompt():
    pipe = diffusers.MochiPipeline(
        vae=None, text_encoder=None, tokenizer=None,
        transformer=MODELS["MochiTransformer3DModel"]().model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    method = NormalizedAttention(negative_prompt=torch.zeros(1, 3, 16))
    with pytest.raises(ModelError, match="two prompts in one attention call"):
        set_guidance(pipe, method, scale=2.0)


def test_a_negative_prompt_of_other_channels_is_refused():
    """Pipelines with connectors, as LTX-2's, change embeddings before the model gets them."""
    arguments = {"encoder_hidden_states": torch.zeros(1, 6, 16)}
    with pytest.raises(ModelError, match="must have 16 channels"):
        NegativePrompt(torch.zeros(1, 3, 12)).replaced_in(arguments, 1, 6)
