"""Calls of pipelines that carry more than text and an image: references, caches, odd masks."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from PIL import Image
from tiny_models import MODELS

from diffaccel import HeadPerturbation, NormalizedAttention, set_guidance
from diffaccel.attach.attachment import restore_attn_processor, set_attn_processor
from diffaccel.attach.key_bias import folded
from diffaccel.bindings.position_ids import image_grids
from diffaccel.bindings.rope import Yarn, scaled_rope
from diffaccel.errors import InputError
from diffaccel.kernels import dense_attention
from diffaccel.methods import RectifiedSpaAttn

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = RectifiedSpaAttn(
    drop=0.5, p_remain=0.0, neighbors=False, block=16, dense_steps=0, dense_layers=()
)


def test_klein_attends_sparsely_to_cached_references_at_every_step():
    model = MODELS["Flux2Transformer2DModel"]().model
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipe = diffusers.Flux2KleinKVPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, model
    )
    pipe.set_progress_bar_config(disable=True)

    def sample():
        return pipe(
            prompt_embeds=torch.ones(1, 6, 32), image=[Image.new("RGB", (128, 64), "red")],
            height=80, width=208, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    stock = sample()
    with set_attn_processor(pipe, HALF, always=True) as attachment:
        sampled = sample()
        layers = attachment.report().denoisers[0].layers
    assert not torch.equal(sampled, stock) and torch.equal(sample(), stock)
    for layer in layers:
        assert (layer.sparse_calls, layer.dense_calls) == (2, {})
        lengths = [(part.kind, part.length) for part in layer.layout.segments]
        assert lengths == [("text", 6), ("condition", 32), ("visual", 65)]


def test_reading_an_image_to_edit_is_dense_and_says_so():
    tiny = MODELS["GlmImageTransformer2DModel"]()
    results = []
    for method in (None, HALF):
        cache = GlmImageKVCache(2)
        cache.set_mode("write")
        if method is not None:
            attachment = set_attn_processor(tiny.model, method, always=True)
            with pytest.warns(UserWarning, match="reads an image to edit"):
                tiny.predict({**tiny.arguments, "kv_caches": cache})
            layers = attachment.report().denoisers[0].layers
            assert all(layer.dense_calls and not layer.sparse_calls for layer in layers)
            restore_attn_processor(tiny.model)
        else:
            tiny.predict({**tiny.arguments, "kv_caches": cache})
        results.append([layer.k_caches[0] for layer in cache.caches])
    assert all(map(torch.equal, *results))


def test_a_mask_that_is_added_to_the_scores_of_text_is_served():
    """The pipelines of Chroma pass a mask of ones and zeros as floats, which SDPA adds.

    That windows under it equal stock attention under the same windows is tested on every class.
    """
    tiny = MODELS["ChromaTransformer2DModel:floats"]()
    stock = tiny.predict()
    as_bool = {**tiny.arguments, "attention_mask": tiny.arguments["attention_mask"].bool()}
    assert not torch.allclose(stock, tiny.predict(as_bool), atol=1e-4)
    with set_attn_processor(tiny.model, HALF, always=True) as attachment:
        floats, layers = tiny.predict(), attachment.report().denoisers[0].layers
        assert not torch.allclose(floats, tiny.predict(as_bool), atol=1e-4)
    assert all((layer.sparse_calls, layer.dense_calls) == (1, {}) for layer in layers)
    assert torch.equal(tiny.predict(), stock)


def test_a_mask_that_adds_different_numbers_to_visual_keys_runs_dense():
    tiny = MODELS["ChromaTransformer2DModel:floats"]()
    mask = tiny.arguments["attention_mask"].clone()
    mask[:, -5:] = 0.5
    arguments = {**tiny.arguments, "attention_mask": mask}
    stock = tiny.predict(arguments)
    set_attn_processor(tiny.model, HALF, always=True)
    with pytest.warns(UserWarning, match="is not key padding"):
        assert torch.equal(tiny.predict(arguments), stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_carried_by_keys_is_that_of_the_scores(dtype):
    query, key, value = torch.randn(3, 2, 9, 2, 16, dtype=dtype).unbind()
    bias = torch.randn(2, 9)
    expected = dense_attention(query, key, value, key_bias=bias.double())
    if dtype == torch.bfloat16:
        expected = dense_attention(*(x.double() for x in (query, key, value)), key_bias=bias)
    found = dense_attention(*folded(query, key, value, bias, 0.25), scale=0.25)[..., :16]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.to(expected), expected, rtol=0, atol=tolerance)


def test_images_are_told_apart_by_any_axis_of_their_ids():
    first = torch.cartesian_prod(*map(torch.arange, (1, 3, 4, 1)))
    second = torch.cartesian_prod(*map(torch.arange, (1, 2, 5, 1)))
    for axis in (0, 3):
        moved = second.clone()
        moved[:, axis] = -1
        assert image_grids(torch.cat([first, moved])) == [(1, 3, 4), (1, 2, 5)]
    assert image_grids(first[None].expand(2, -1, -1)) == [(1, 3, 4)]


def test_angles_cannot_be_sharpened():
    tiny = MODELS["ErnieImageTransformer2DModel"]()
    with pytest.raises(InputError, match="pass Linear or Ntk"):
        with scaled_rope(tiny.model, height=Yarn(2.0, 64)):
            pass


def test_guidance_refuses_pipelines_whose_prompts_it_cannot_find():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = MODELS["DreamLiteUNetModel"]().model
    pipe = diffusers.DreamLitePipeline(None, None, None, None, model, scheduler)
    with pytest.raises(InputError, match="tells which rows of a batch hold the prompt"):
        set_guidance(pipe, HeadPerturbation(layers=(0,)), scale=1.0)
    model = MODELS["ChromaTransformer2DModel"]().model
    pipe = diffusers.ChromaPipeline(scheduler, None, None, None, model)
    with pytest.raises(InputError, match="more than one argument of a call"):
        set_guidance(pipe, NormalizedAttention(torch.ones(1, 4, 32)), scale=1.0)


def test_a_model_for_the_empty_prompt_is_served_and_not_guided():
    model, other = (MODELS["Ideogram4Transformer2DModel"]().model for _ in range(2))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.Ideogram4Pipeline(scheduler, None, None, None, model, other)
    report = set_attn_processor(pipe, HALF).report()
    assert [part.component for part in report.denoisers] == [
        "transformer",
        "unconditional_transformer",
    ]
    with pytest.raises(InputError, match="with and without the prompt"):
        set_guidance(pipe, HeadPerturbation(layers=(0,)), scale=1.0)
