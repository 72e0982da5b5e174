"""Normalised attention guidance: the formula, and that it acts on every family."""

from __future__ import annotations

import pytest
import torch

from diffaccel import FullAttn, NormalizedAttention, SparseAttn, restore_guidance, set_guidance
from diffaccel.errors import ModelError
from diffaccel.guidance.normalized.negative_prompt import negative_prompt_of

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
    assert (got - expected).abs().max() < 1e-13, "fp64 is computed in fp64"
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_prompt_that_comes_as_one_row_for_several_images_is_guided(tiny_pipelines, name):
    """These pipelines leave embeddings as they are given, and the models broadcast them."""
    tiny = tiny_pipelines.BUILDERS[name]()
    calls = without_cfg(tiny) | {"num_images_per_prompt": 2}
    plain = tiny.sample(**calls)
    with set_guidance(tiny.pipe, the_prompt_itself(tiny), scale=4.0):
        torch.testing.assert_close(tiny.sample(**calls), plain, rtol=1e-4, atol=1e-5)
    with set_guidance(tiny.pipe, some_negative(tiny), scale=4.0):
        assert (tiny.sample(**calls) - plain).abs().max() > 1e-3


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


PADDED = ("wan2.1", "wan2.2")  # their pipelines fill up with zeros that are attended to
MASKS = {
    "qwen": ("prompt_embeds_mask", "negative_prompt_embeds_mask"),
    "hunyuan": ("prompt_attention_mask",),
    "ltx": ("prompt_attention_mask", "negative_prompt_attention_mask"),
}


def texts(tiny, *shape, seed):
    width = tiny.arguments["prompt_embeds"].shape[-1]
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))


def guided(tiny, negative, mask=None, **calls):
    with set_guidance(tiny.pipe, nag(negative, mask), scale=4.0):
        return tiny.sample(**{**without_cfg(tiny), **calls})


@pytest.mark.parametrize("longer", [-3, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_of_a_negative_of_any_length_counts(tiny_pipelines, name, longer):
    tiny = tiny_pipelines.BUILDERS[name]()
    count = tiny.arguments["prompt_embeds"].shape[1] + longer
    negative = texts(tiny, 1, count, seed=5)
    first = guided(tiny, negative)
    for token in (0, count // 2, count - 1):
        other = negative.clone()
        other[:, token] = -other[:, token]
        assert (guided(tiny, other) - first).abs().max() > 1e-6


@pytest.mark.parametrize("longer", [-3, 0, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_of_a_negative_never_counts(tiny_pipelines, name, longer):
    tiny = tiny_pipelines.BUILDERS[name]()
    count = tiny.arguments["prompt_embeds"].shape[1] + longer
    negative = texts(tiny, 1, count, seed=5)
    expected = guided(tiny, negative)
    padded = torch.cat([negative, texts(tiny, 1, 4, seed=6)], 1)
    got = guided(tiny, padded, torch.tensor([[1] * count + [0] * 4]))
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("count", [6, 21])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_negative_branch_is_the_negative_in_the_place_of_the_prompt(
    tiny_pipelines, name, count
):
    """With w = -1 and without limits Z is Z-, so the run must be that of the negative alone."""
    tiny = tiny_pipelines.BUILDERS[name]()
    negative = texts(tiny, 1, count, seed=7)
    whole = negative
    if name in PADDED:
        missing = tiny.arguments["prompt_embeds"].shape[1] - count
        whole = torch.nn.functional.pad(negative, (0, 0, 0, max(0, missing)))
    alone = {"prompt_embeds": whole}
    if "negative_prompt_embeds" in tiny.arguments:
        alone["negative_prompt_embeds"] = torch.zeros_like(whole)
    for key in MASKS.get(name, ()):
        alone[key] = torch.ones(whole.shape[:2], dtype=torch.long)
    expected = tiny.sample(**without_cfg(tiny), **alone)
    with set_guidance(tiny.pipe, nag(negative, limit=1e6, blend=1.0)) as guidance:
        for guide in guidance._guides:
            guide.scale = -1.0
        got = tiny.sample(**without_cfg(tiny))
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (got - tiny.sample(**without_cfg(tiny))).abs().max() > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("longer", [-3, 5])
def test_each_of_two_prompts_is_guided_as_alone(tiny_pipelines, name, longer):
    tiny = tiny_pipelines.BUILDERS[name]()
    first = tiny.arguments["prompt_embeds"]
    both = torch.cat([first, texts(tiny, *first.shape[:2], seed=8)])
    negative = texts(tiny, 1, first.shape[1] + longer, seed=5)
    names = [key for key in tiny.arguments if key.endswith(("embeds", "mask"))]
    batch = {key: tiny.arguments[key].repeat(2, *[1] * (tiny.arguments[key].ndim - 1))
             for key in names} | {"prompt_embeds": both}  # fmt: skip
    if name in MASKS:  # lengths differ within the batch
        mask = batch[MASKS[name][0]].clone()
        mask[1, 5:] = 0
        batch[MASKS[name][0]] = mask
    together = guided(tiny, negative, **batch)
    changed = guided(tiny, negative, **{**batch, "prompt_embeds": both[:1].repeat(2, 1, 1)})
    assert (together[0] - changed[0]).abs().max() <= 2e-5 * changed.abs().max()
    assert (together[1] - changed[1]).abs().max() > 1e-6


def test_what_a_family_cannot_take_is_refused(tiny_pipelines):
    tiny = tiny_pipelines.cogvideox()
    tiny.pipe.transformer.register_to_config(use_rotary_positional_embeddings=False)
    with pytest.raises(ModelError, match="takes 16 text tokens at most"):
        set_guidance(tiny.pipe, nag(texts(tiny, 1, 17, seed=5)), scale=4.0)
    assert not tiny.pipe.transformer._forward_hooks
    with pytest.raises(ValueError, match="negative_mask must be"):
        set_guidance(tiny.pipe, nag(texts(tiny, 1, 3, seed=5), torch.zeros(1, 3)), scale=4.0)


def test_a_method_sees_the_longer_sequence(tiny_pipelines):
    for order in (False, True):
        tiny = tiny_pipelines.flux()
        negative = nag(texts(tiny, 1, 20, seed=5))
        if order:
            tiny.pipe.set_attn_processor(FullAttn(), always=True)
        with set_guidance(tiny.pipe, negative, scale=4.0):
            if not order:
                tiny.pipe.set_attn_processor(FullAttn(), always=True)
            report = tiny.pipe.set_attn_processor(FullAttn(), always=True)
            tiny.sample()
            assert {layer.layout.text_length for layer in report.report().layers} == {20}


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
