"""Every supported model family: nothing changes that should not, and methods see true layouts."""

from __future__ import annotations

from collections import Counter

import diffusers
import pytest
import torch

from diffaccel.attach.attachment import restore_attn_processor, set_attn_processor
from diffaccel.bindings import ModelCall, binding_of
from diffaccel.bindings.flux import image_grids
from diffaccel.methods import FullAttn, RectifiedSpaAttn
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE

FAMILIES = (
    "flux",
    "sd3",
    "qwen",
    "wan2.1",
    "wan2.2",
    "wan2.2-ti2v",
    "hunyuan",
    "cogvideox",
    "ltx",
    "sd15",
    "sdxl",
)
LATENTS = {
    "flux": (16, 24), "sd3": (16, 24), "qwen": (16, 24), "wan2.1-t2v": (3, 8, 12),
    "wan2.2-t2v": (3, 8, 12), "wan2.2-ti2v": (3, 8, 12), "hunyuan": (3, 8, 12),
    "cogvideox": (3, 8, 12), "ltx": (3, 4, 6), "sd15": (18, 30), "sdxl": (18, 26),
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built():
    return {}


@pytest.fixture(params=FAMILIES)
def family(request, tiny_pipelines, built):
    """A tiny pipeline and its stock output, built once for each family."""
    name = request.param
    if name not in built:
        tiny = tiny_pipelines.BUILDERS[name]()
        built[name] = tiny, tiny.sample()
    yield built[name]
    restore_attn_processor(built[name][0].pipe)


def test_every_family_is_tested(tiny_pipelines):
    assert set(FAMILIES) == set(tiny_pipelines.BUILDERS)


def test_full_attention_changes_nothing_and_restore_leaves_nothing(family):
    tiny, stock = family
    before = [snapshot(model) for model in tiny.denoisers().values()]

    attachment = set_attn_processor(tiny.pipe, FullAttn())
    assert torch.equal(tiny.sample(), stock)
    attachment.remove()

    assert [snapshot(model) for model in tiny.denoisers().values()] == before
    assert torch.equal(tiny.sample(), stock)


def test_method_sees_layouts_layers_and_steps(family, watched, tiny_pipelines):
    tiny, stock = family
    attachment = set_attn_processor(tiny.pipe, watched)

    assert torch.equal(tiny.sample(), stock)

    assert {call.layout for call in watched.calls} == tiny.layouts
    assert all(call.layout.length == call.shape[1] for call in watched.calls)
    calls_of_layer = Counter(call.layer for call in watched.calls)
    assert set(calls_of_layer) == set(range(max(tiny.layers.values())))
    assert set(calls_of_layer.values()) == {tiny.calls}
    report = attachment.report()
    assert {part.component: len(part.layers) for part in report.denoisers} == tiny.layers
    assert len(report.denoisers[0].skipped) == tiny.skipped
    assert {part.family for part in report.denoisers} == {tiny.family}
    assert sum(part.steps for part in report.denoisers) == tiny_pipelines.STEPS
    steps = [set(range(part.steps)) for part in report.denoisers]
    assert {call.step for call in watched.calls} == set.union(*steps)


@torch.no_grad()
def test_an_example_call_is_whole_and_has_the_layouts_of_a_real_one(family):
    tiny, _ = family
    text = tiny.arguments["prompt_embeds"].shape[1]
    for model in tiny.denoisers().values():
        binding = binding_of(model)
        call = binding.example_call(model, LATENTS[tiny.family], text, batch=2)
        assert len(model(**call, return_dict=False)[0]) == 2
        seen = {binding.layout(model, ModelCall(call, {}), x) for x in binding.layers(model)}
        assert seen <= tiny.layouts
        assert binding.latents in call


def test_text_is_joint_or_has_layers_of_its_own(family):
    tiny, _ = family
    for model in tiny.denoisers().values():
        binding = binding_of(model)
        is_joint = any(layer.kind == "joint" for layer in binding.layers(model))
        reasons = binding.skipped(model)
        assert is_joint != bool(binding.text_layers(model))
        assert is_joint == (binding.text_length == 0)
        assert all(reasons[name] == "cross-attention" for name in binding.text_layers(model))


@pytest.mark.parametrize(("name", "grid"), [("image", (1, 16, 16)), ("video", (5, 8, 8))])
def test_embedded_models_tell_their_native_size_without_a_warning(name, grid, capfd):
    kind = {"image": diffusers.FluxTransformer2DModel, "video": diffusers.WanTransformer3DModel}
    folder = EMBEDDED_IMAGE.with_name(name) / "transformer"
    model = kind[name].from_config(kind[name].load_config(folder))
    binding = binding_of(model)
    assert binding.native(model, binding.layers(model)[0]) == grid
    assert "_native_grid" not in capfd.readouterr().err


def test_sparse_method_keeping_everything_is_close_and_dropping_half_is_not(family):
    tiny, stock = family
    knobs = {"block": 16, "dense_steps": 0, "dense_layers": ()}

    set_attn_processor(tiny.pipe, RectifiedSpaAttn(drop=0.0, **knobs))
    kept_all = tiny.sample()
    set_attn_processor(
        tiny.pipe, RectifiedSpaAttn(drop=0.5, p_remain=0.0, neighbors=False, **knobs)
    )
    dropped_half = tiny.sample()

    torch.testing.assert_close(kept_all, stock, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(dropped_half).all()
    assert not torch.equal(dropped_half, stock)


def test_report_counts_calls_and_density(family):
    tiny, _ = family
    method = RectifiedSpaAttn(
        drop=0.5, p_remain=0.0, neighbors=False, block=16, dense_steps=0, dense_layers=(0,)
    )
    with set_attn_processor(tiny.pipe, method) as attachment:
        tiny.sample()
        tiny.sample()
        report = attachment.report()

    calls = tiny.calls // len(tiny.layers)
    for denoiser in report.denoisers:
        first, *others = denoiser.layers
        assert first.dense_calls == {"dense_layers=(0,)": calls} and first.density == 1.0
        for layer in others:
            assert sum(layer.dense_calls.values()) + layer.sparse_calls == calls
            assert 0.0 < layer.density <= 1.0
        assert any(layer.sparse_calls for layer in others)
        assert denoiser.dense_steps == {}
    assert 0.3 < report.density < 1.0
    assert report.denoisers[0].layers[-1].name in str(report)


def test_both_wan22_transformers_get_the_method(tiny_pipelines, watched_class):
    tiny = tiny_pipelines.wan22()
    # Each transformer counts its own steps: one dense step makes both run dense throughout.
    attachment = set_attn_processor(tiny.pipe, watched_class(dense_steps=1))
    tiny.sample()
    high, low = attachment.report().denoisers
    assert (high.component, low.component) == ("transformer", "transformer_2")
    assert high.dense_steps == low.dense_steps == {0: "dense_steps=1"}
    assert high.steps == low.steps == 1


def test_published_schedule_follows_the_family_and_the_expert(tiny_pipelines):
    tiny = tiny_pipelines.wan22()
    report = set_attn_processor(tiny.pipe, RectifiedSpaAttn()).report()
    high, low = (part.method for part in report.denoisers)
    assert "dense_steps=3" in high and "dense_steps=1" in low
    assert "dense_layers=2" in high and "first_frame=True" in low


def test_text_padding_reaches_the_method(tiny_pipelines, watched):
    tiny = tiny_pipelines.hunyuan()
    set_attn_processor(tiny.pipe, watched)
    tiny.sample()
    expected = torch.tensor([[True] * (72 + 7) + [False] * 4])
    assert all(torch.equal(call.key_padding_mask, expected) for call in watched.calls)


def test_text_without_padding_changes_nothing(tiny_pipelines):
    """An all-true mask must not cost or change anything."""
    tiny = tiny_pipelines.hunyuan()
    tiny.arguments["prompt_attention_mask"] = torch.ones(1, 11, dtype=torch.long)
    stock = tiny.sample()
    set_attn_processor(tiny.pipe, FullAttn())
    torch.testing.assert_close(tiny.sample(), stock, rtol=1e-5, atol=1e-5)


def test_flux_reference_image_is_a_condition(tiny_pipelines, watched):
    """Kontext appends a reference image whose ids start with 1; it must not be mis-gridded."""
    model = tiny_pipelines.flux().pipe.transformer
    ids = torch.cat([flux_ids(0, 4, 6), flux_ids(1, 2, 3)])
    with torch.no_grad():
        set_attn_processor(model, watched)
        model(
            hidden_states=torch.randn(1, 30, 16),
            encoder_hidden_states=torch.randn(1, 5, 32),
            pooled_projections=torch.randn(1, 32),
            timestep=torch.tensor([1.0]),
            img_ids=ids.bfloat16(),
            txt_ids=torch.zeros(5, 3),
        )
    (layout,) = {call.layout for call in watched.calls}
    assert [part.kind for part in layout.segments] == ["text", "visual", "condition"]
    assert layout.grid == (1, 4, 6) and layout.segments[2].grid == (1, 2, 3)


def test_flux_grid_survives_rounded_position_ids():
    """In bf16, ids beyond 256 are rounded: the largest id no longer tells the height."""
    assert image_grids(flux_ids(0, 3, 520).bfloat16()) == [(1, 3, 520)]
    assert image_grids(flux_ids(0, 520, 3).bfloat16()) == [(1, 520, 3)]
    assert image_grids(flux_ids(0, 1, 7)) == [(1, 1, 7)]
    assert image_grids(flux_ids(0, 7, 1)) == [(1, 7, 1)]


def test_qwen_images_to_edit_are_conditions(tiny_pipelines, watched):
    model = tiny_pipelines.qwen().pipe.transformer
    with torch.no_grad():
        set_attn_processor(model, watched)
        model(
            hidden_states=torch.randn(1, 24 + 6, 16),
            encoder_hidden_states=torch.randn(1, 5, 16),
            timestep=torch.tensor([1.0]),
            img_shapes=[[(1, 4, 6), (1, 2, 3)]],
        )
    (layout,) = {call.layout for call in watched.calls}
    assert layout.grid == (1, 4, 6)
    assert [part.length for part in layout.segments] == [5, 24, 6]


def test_cogvideox15_patches_frames(tiny_pipelines, watched):
    config = dict(tiny_pipelines.cogvideox().pipe.transformer.config)
    del config["_use_default_values"]
    config.update(patch_size_t=2, patch_bias=False, max_text_seq_length=8)
    model = diffusers.CogVideoXTransformer3DModel.from_config(config).eval()
    rotary = (torch.ones(2 * 4 * 6, 16), torch.zeros(2 * 4 * 6, 16))
    with torch.no_grad():
        set_attn_processor(model, watched)
        model(
            hidden_states=torch.randn(1, 4, 4, 8, 12),
            encoder_hidden_states=torch.randn(1, 8, 32),
            timestep=torch.tensor([1]),
            image_rotary_emb=rotary,
        )
    (layout,) = {call.layout for call in watched.calls}
    assert layout.grid == (2, 4, 6) and layout.text_length == 8


@pytest.mark.parametrize("head_dim", [64, 128])
def test_real_head_dims(tiny_pipelines, head_dim):
    tiny = tiny_pipelines.flux(head_dim=head_dim)
    stock = tiny.sample()
    set_attn_processor(tiny.pipe, RectifiedSpaAttn(drop=0.0, block=16))
    torch.testing.assert_close(tiny.sample(), stock, rtol=1e-3, atol=1e-3)


def flux_ids(image: int, height: int, width: int) -> torch.Tensor:
    """Position ids of one image, as the FLUX pipelines make them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(-1, 3)


def snapshot(model):
    """What attaching may touch: processor objects, their attributes, hooks, module attributes."""
    processors = [
        (name, id(module.processor), dict(vars(module.processor)), sorted(vars(module)))
        for name, module in model.named_modules()
        if hasattr(module, "processor")
    ]
    hooks = (dict(model._forward_pre_hooks), dict(model._forward_pre_hooks_with_kwargs))
    return processors, hooks, sorted(vars(model))


def test_the_order_of_layers_does_not_depend_on_when_modules_were_registered(family):
    """cache-dit takes stacks of blocks out of a model while it runs, and puts them back last."""
    tiny, _ = family
    for model in tiny.denoisers().values():
        binding = binding_of(model)
        before = binding.layers(model), binding.stages(model)
        for name in reversed(list(model._modules)):
            model._modules[name] = model._modules.pop(name)
        assert (binding.layers(model), binding.stages(model)) == before
