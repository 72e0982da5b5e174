"""Normalised attention guidance: the formula, and that it acts on every family."""

from __future__ import annotations

import pytest
import torch

from diffaccel import FullAttn, NormalizedAttention, SparseAttn, restore_guidance, set_guidance
from diffaccel.guidance.normalized.negative_prompt import NegativePrompt, negative_prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = (
    *("flux", "sd3", "qwen", "sd15", "sdxl"),
    *("wan2.1", "wan2.2", "hunyuan", "cogvideox", "ltx"),
)
JOINT = ("flux", "sd3", "qwen", "hunyuan", "cogvideox")


def nag(embeddings, mask=None, **options):
    return NormalizedAttention(embeddings, negative_mask=mask, **options)


def some_negative(tiny, seed=9, **options):
    shape = tiny.arguments["prompt_embeds"].shape
    text = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return nag(text, **options)


def the_prompt_itself(tiny):
    mask = tiny.arguments.get("prompt_attention_mask", tiny.arguments.get("prompt_embeds_mask"))
    return nag(tiny.arguments["prompt_embeds"], mask)


def without_cfg(tiny):
    """Arguments of a call without classifier-free guidance, where the family has it."""
    if "true_cfg_scale" in tiny.arguments:
        return {"true_cfg_scale": 1.0}
    return {"guidance_scale": 1.0}


def test_the_formula_in_fp64():
    positive, negative = torch.randn(2, 2, 30, 3, 8, dtype=torch.float64).unbind(0)
    positive[0, 0] = 0.0
    scale, limit, blend = 4.0, 1.5, 0.25
    pushed = positive + scale * (positive - negative)
    ratio = pushed.abs().sum((-2, -1)) / positive.abs().sum((-2, -1))
    shrink = torch.minimum(ratio, torch.tensor(limit)) / ratio
    expected = blend * pushed * shrink[..., None, None] + (1 - blend) * positive
    expected[0, 0] = 0.0
    got = nag(torch.zeros(1, 1, 1), limit=limit, blend=blend).combined(positive, negative, scale)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.isfinite().all()


def test_the_norm_grows_to_the_limit_at_most():
    positive, negative = torch.randn(2, 1, 50, 2, 8).unbind(0)
    got = nag(torch.zeros(1, 1, 1), limit=1.2, blend=1.0).combined(positive, negative, 9.0)
    growth = got.abs().sum((-2, -1)) / positive.abs().sum((-2, -1))
    assert growth.max() <= 1.2 + 1e-5 and growth.max() > 1.19


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_it_changes_every_family_and_leaves_nothing_behind(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    calls = without_cfg(tiny)
    plain = tiny.sample(**calls)
    with set_guidance(tiny.pipe, some_negative(tiny), scale=4.0) as guidance:
        guided = tiny.sample(**calls)
        assert torch.equal(guided, tiny.sample(**calls))
        report = guidance.report()
    assert (guided - plain).abs().max() > 1e-6 and guided.isfinite().all()
    assert report.steps == report.guided_steps == 2
    assert report.extra_forwards == (2 if name in JOINT else 0)
    assert torch.equal(tiny.sample(**calls), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_itself_as_negative_changes_nothing(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    calls = without_cfg(tiny)
    plain = tiny.sample(**calls)
    with set_guidance(tiny.pipe, the_prompt_itself(tiny), scale=4.0):
        guided = tiny.sample(**calls)
    assert (guided - plain).abs().max() <= 2e-5 * plain.abs().max()


@pytest.mark.parametrize("name", ["flux", "wan2.1"])
@pytest.mark.parametrize("options", [{"scale": 0.0}, {"blend": 0.0}])
def test_nothing_to_do_is_bit_identical(tiny_pipelines, name, options):
    tiny = tiny_pipelines.BUILDERS[name]()
    plain = tiny.sample()
    negative = some_negative(tiny, blend=options.get("blend", 0.25))
    with set_guidance(tiny.pipe, negative, scale=options.get("scale", 4.0)) as guidance:
        assert torch.equal(tiny.sample(), plain)
        assert guidance.report().guided_steps == 0


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_it_composes_with_methods(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    sparse = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
    with set_guidance(tiny.pipe, some_negative(tiny), scale=4.0):
        guided = tiny.sample()
        with tiny.pipe.set_attn_processor(FullAttn()):
            assert torch.equal(tiny.sample(), guided)
        with tiny.pipe.set_attn_processor(sparse):
            assert not torch.equal(tiny.sample(), guided)
        assert torch.equal(tiny.sample(), guided)


@pytest.mark.parametrize("name", ["flux", "wan2.1"])
def test_an_exception_leaves_the_model_as_it_was(tiny_pipelines, monkeypatch, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    plain = tiny.sample()
    with set_guidance(tiny.pipe, some_negative(tiny), scale=4.0):
        monkeypatch.setattr(NormalizedAttention, "combined", None)
        with pytest.raises(TypeError):
            tiny.sample()
    monkeypatch.undo()
    assert torch.equal(tiny.sample(), plain)
    assert not tiny.pipe.transformer._forward_hooks


def test_a_shorter_window_guides_less(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    with set_guidance(tiny.pipe, some_negative(tiny), scale=4.0, stop=0.5) as guidance:
        tiny.sample()
        assert guidance.report().guided_steps == 1
    restore_guidance(tiny.pipe)


def test_texts_of_another_length_are_fitted():
    text = torch.ones(1, 3, 4)
    call = {
        "encoder_hidden_states": torch.zeros(2, 5, 4),
        "encoder_attention_mask": torch.ones(2, 5),
    }
    replaced = NegativePrompt(text).replaced_in(call, 2)
    assert replaced["encoder_hidden_states"].shape == (2, 5, 4)
    assert replaced["encoder_hidden_states"][:, 3:].abs().max() == 0
    assert replaced["encoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2
    call["encoder_hidden_states"] = torch.zeros(2, 2, 4)
    assert NegativePrompt(text).replaced_in(call, 2)["encoder_hidden_states"].shape == (2, 2, 4)


def test_a_text_is_encoded_by_the_pipeline():
    from diffaccel.pipelines.loading import load_image_pipeline

    pipe = load_image_pipeline()
    negative = negative_prompt_of(pipe, NormalizedAttention("a rocket"))
    torch.testing.assert_close(negative.embeddings, pipe.encode_prompt("a rocket", None)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0.5}, "limit must"), ({"blend": 2.0}, "blend must")],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NormalizedAttention("x", **options)
    with pytest.raises(TypeError, match="must be a text"):
        NormalizedAttention(3)
