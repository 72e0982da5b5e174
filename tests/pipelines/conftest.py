"""Tiny Wan pipelines with a tiny video autoencoder."""

import diffusers
import pytest
import torch


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """All tests of this folder run so."""


@pytest.fixture
def video_pipe(tiny_pipelines):
    """Builds a Wan pipeline that decodes, with prompt embeddings for it."""

    def build(pipeline=diffusers.WanPipeline, **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = diffusers.AutoencoderKLWan(
                base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ).eval()  # fmt: skip
        tiny = tiny_pipelines.wan21()
        optional = (
            {}
            if pipeline is diffusers.WanPipeline
            else {"image_encoder": None, "image_processor": None}
        )
        pipe = pipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=tiny.pipe.scheduler,
            transformer=tiny_pipelines.wan_transformer(**changes), **optional,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        embeds = {
            name: tiny.arguments[name] for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        return pipe, embeds

    return build
