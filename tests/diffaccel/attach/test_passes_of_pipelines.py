"""Pipelines that guide by further passes: what a method, guidance and a report make of them."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from tiny_models.base import built
from tiny_pipelines import BUILDERS, Flow, TinyPipeline, _call, _padded, _pipe

from diffaccel import FullAttn, HeadPerturbation, SkipLayers, SparseAttn, set_attn_processor
from diffaccel import set_guidance as guided
from diffaccel.layout import TokenLayout

pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())


def ltx2() -> TinyPipeline:
    """LTX-2: CFG in one batch, then a pass without attention in block 1 and one without audio."""
    heads = {"num_attention_heads": 2, "audio_num_attention_heads": 2}
    transformer = built(
        diffusers.LTX2VideoTransformer3DModel, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=12, cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=32,
        perturbed_attn=True, **heads,
    )  # fmt: skip
    connector = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    connector["num_learnable_registers"] = None
    sides = ("video_connector", "audio_connector")
    connectors = built(
        LTX2TextConnectors, caption_channels=32, text_proj_in_factor=1,
        **{f"{side}_{name}": value for side in sides for name, value in connector.items()},
    )  # fmt: skip
    vae = built(
        diffusers.AutoencoderKLLTX2Video, latent_channels=4, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
    )  # fmt: skip
    audio = built(
        diffusers.AutoencoderKLLTX2Audio, base_channels=4, ch_mult=(1,), num_res_blocks=1,
        resolution=32, latent_channels=2, mid_block_add_attention=False, mel_bins=8,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.LTX2Pipeline, Flow(), transformer=transformer, connectors=connectors, vae=vae,
        audio_vae=audio, vocoder=None,
    )  # fmt: skip
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    arguments = _call(
        (12, 32), 256, 384, negative=12, num_frames=17, spatio_temporal_guidance_blocks=[1],
        **dict.fromkeys(masks, _padded(9, 3)),
    )  # fmt: skip
    layouts = {TokenLayout.video(2, 4, 6)}
    return TinyPipeline(pipe, arguments, "ltx2", layouts, {"transformer": 3}, 12, 6)


def sd3() -> TinyPipeline:
    """SD 3.5 with skip-layer guidance of its pipeline in the second of two steps."""
    tiny = BUILDERS["sd3"]()
    tiny.arguments |= {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    return tiny


@pytest.mark.parametrize("build", [ltx2, sd3], ids=["ltx2", "sd3"])
def test_passes_of_the_pipeline_stay_what_they_are(build):
    tiny = build()
    stock = tiny.sample()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(ran dense|no longer serves)")
        with set_attn_processor(tiny.pipe, FullAttn()):
            assert torch.equal(tiny.sample(), stock)
        with set_attn_processor(tiny.pipe, METHOD, always=True) as attachment:
            sparse = tiny.sample()
    assert not torch.equal(sparse, stock) and sparse.isfinite().all()
    report = attachment.report()
    assert all(layer.layout in tiny.layouts and not layer.dense_calls for layer in report.layers)
    left_out = [(layer.sparse_calls, layer.left_out) for layer in report.layers]
    # In SD 3 the second block alone is skipped, which then never asks for attention.
    assert left_out == ([(6, 0), (4, 2), (6, 0)] if build is ltx2 else [(3, 0), (3, 0), (2, 0)])
    assert report.density is not None and report.density < 0.6
    for kind in (HeadPerturbation(layers=(1,)), SkipLayers((1,))):
        with guided(tiny.pipe, kind, scale=1e-7) as guidance:
            assert (tiny.sample() - stock).abs().max() <= 1e-5 * stock.abs().max()
            assert guidance.report().guided_steps == 2
    assert torch.equal(tiny.sample(), stock)
