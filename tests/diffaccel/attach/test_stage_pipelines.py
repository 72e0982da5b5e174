"""Pipelines in several stages, whose denoisers have other names and times of another unit."""

import diffusers
import pytest
import torch
from tiny_models import MODELS
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffaccel import HeadPerturbation, RectifiedSpaAttn, set_attn_processor
from diffaccel.guidance.attachment import set_guidance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prior():
    """The first stage of Stable Cascade, and one way to call it."""
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=10, projection_dim=12, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, vocab_size=10, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    pipe = diffusers.StableCascadePriorPipeline(
        tokenizer=None, text_encoder=encoder, prior=MODELS["StableCascadeUNet"]().model,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    words = torch.randn(2, 1, 6, 10, generator=torch.Generator().manual_seed(1))
    pooled = torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(2))

    def sample():
        return pipe(
            prompt_embeds=words[0], prompt_embeds_pooled=pooled[0], height=400, width=560,
            negative_prompt_embeds=words[1], negative_prompt_embeds_pooled=pooled[1],
            num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0),
        ).image_embeddings  # fmt: skip

    return pipe, sample


def test_a_method_knows_layers_layouts_and_steps(prior):
    pipe, sample = prior
    stock = sample()
    method = RectifiedSpaAttn(drop=0.5, block=16, dense_steps=1)
    with set_attn_processor(pipe, method, always=True) as attachment:
        sparse = sample()
        report = attachment.report().denoisers[0]
    assert report.component == "prior" and report.steps == 3
    assert report.dense_steps == {0: "dense_steps=1"}
    assert all(layer.sparse_calls == 2 for layer in report.layers) and len(report.layers) == 4
    assert not torch.equal(sparse, stock) and torch.equal(sample(), stock)


def test_the_prompt_is_the_first_half_of_the_batch(prior):
    """Guiding the negative prompt instead, or both, would move the result elsewhere."""
    pipe, sample = prior
    seen = []
    handle = pipe.prior.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["clip_text"]), with_kwargs=True
    )
    with set_guidance(pipe, HeadPerturbation(layers=(0,)), scale=1.0):
        sample()
    handle.remove()
    alone = [text for text in seen if len(text) == 1]
    both = next(text for text in seen if len(text) == 2)
    assert len(alone) == 3 and all(torch.equal(text[0], both[0]) for text in alone)
