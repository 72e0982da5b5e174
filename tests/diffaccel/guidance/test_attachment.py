"""Guidance by comparison: the formula, the exact forms, and that nothing stays behind."""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import pytest
import torch

from diffaccel import (
    FullAttn,
    HeadPerturbation,
    PermuteTokens,
    SkipLayers,
    SparseAttn,
    restore_guidance,
    set_attn_processor,
    set_guidance,
)
from diffaccel.kernels.reference.perturbed import (
    apply_map,
    attention_map,
    blurred_grid,
    identity_map,
    image_mass_on_diagonal,
    isolated_image_map,
    uniform_map,
)
from diffaccel.methods.base import Method
from diffaccel.methods.inputs import Attended

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = (
    "flux",
    "sd3",
    "qwen",
    "wan2.1",
    "wan2.2",
    "hunyuan",
    "cogvideox",
    "ltx",
    "sd15",
    "sdxl",
)
HEADS = HeadPerturbation(heads=((1, 0),), strength=0.7)
PERTURBATIONS = {
    "heads": HEADS,
    "pag": HeadPerturbation(layers=(1,)),
    "image": HeadPerturbation(layers=(1,), scope="image"),
    "image-mass": HeadPerturbation(layers=(1,), scope="image_mass", strength=0.5),
    "uniform": HeadPerturbation(layers=(1,), target="uniform"),
    "seg": HeadPerturbation(layers=(1,), target="blur"),
    "seg-2": HeadPerturbation(layers=(1,), target="blur", sigma=2.0),
    "skip": SkipLayers((1,)),
    "permute": PermuteTokens((1,)),
}


class Recorder:
    """Writes down every call of a model and what the pipeline got from it."""

    def __init__(self, model):
        self.calls = []
        self.handle = model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, model, args, kwargs, output):
        self.calls.append((args, dict(kwargs), output[0]))


@dataclass(frozen=True, slots=True)
class DamagedMap(Method):
    """Dense attention by explicit maps in fp64, the map of layer 1 damaged by definition."""

    kind: str

    def compute(self, inputs, position):
        sound = weights = attention_map(inputs.query, inputs.key, inputs.scale)
        if position.layer == 1:
            weights = self.damaged(sound, inputs)
        if self.kind == "heads":
            weights = torch.stack([0.3 * sound[:, 0] + 0.7 * weights[:, 0], sound[:, 1]], 1)
        if self.kind == "image-mass":
            weights = 0.5 * sound + 0.5 * weights
        return Attended(apply_map(weights, inputs.value).to(inputs.query.dtype), 1.0)

    def damaged(self, sound, inputs):
        query, key, image = inputs.query, inputs.key, inputs.layout.visual_slice
        is_image = torch.zeros(query.shape[1], dtype=torch.bool)
        is_image[image] = True
        if self.kind == "uniform":
            return uniform_map(sound)
        if self.kind == "image":
            return isolated_image_map(query, key, is_image, inputs.scale)
        if self.kind == "image-mass":
            return image_mass_on_diagonal(sound, is_image)
        if self.kind.startswith("seg"):
            blurred = query.double()
            visual = blurred[:, image]
            blurred[:, image] = (
                visual.mean(1, keepdim=True)
                if self.kind == "seg"
                else blurred_grid(visual, inputs.layout.grid, 2.0)
            )
            return attention_map(blurred, key, inputs.scale)
        return identity_map(sound)


@contextmanager
def damaged_by_hand(model, kind):
    """While active, layer 1 of a FLUX model, the second double block, is damaged."""
    block = model.transformer_blocks[1]
    if kind == "skip":
        handle = block.register_forward_hook(
            lambda _block, _args, kwargs, _out: (
                kwargs["encoder_hidden_states"],
                kwargs["hidden_states"],
            ),
            with_kwargs=True,
        )
    elif kind == "permute":  # seed 0, step 0 and layer 1 decide about the order
        drawn = torch.Generator().manual_seed(hash((0, 0, 1)) & 0x7FFF_FFFF)
        handle = block.register_forward_pre_hook(
            lambda _block, args, kwargs: (
                args,
                kwargs
                | {
                    "hidden_states": kwargs["hidden_states"][
                        :, torch.randperm(kwargs["hidden_states"].shape[1], generator=drawn)
                    ]
                },
            ),
            with_kwargs=True,
        )
    else:
        handle = set_attn_processor(model, DamagedMap(kind), always=True)
    yield
    handle.remove()


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_the_pipeline_is_steered_away_from_the_damage_by_definition(tiny_pipelines, kind):
    """The pipeline gets c + w (c - p), p being a forward that is damaged by hand."""
    tiny = tiny_pipelines.flux()
    model = tiny.pipe.transformer
    with set_guidance(tiny.pipe, PERTURBATIONS[kind], scale=2.0):
        recorder = Recorder(model)
        tiny.sample()
        recorder.handle.remove()
        args, kwargs, got = recorder.calls[1]
    with torch.no_grad():
        sound = model(*args, **kwargs)[0]
        with damaged_by_hand(model, kind):
            damaged = model(*args, **kwargs)[0]
    delta = 2.0 * (sound - damaged)
    assert (got - (sound + delta)).abs().max() < 5e-6
    assert delta.abs().max() > 1e-2, "too small to tell the sign"


@pytest.mark.parametrize(
    ("name", "kind"), zip(FAMILIES, itertools.cycle(PERTURBATIONS), strict=False)
)
@pytest.mark.slow
def test_every_family_is_guided_and_comes_back(tiny_pipelines, name, kind):
    tiny = tiny_pipelines.BUILDERS[name]()
    plain = tiny.sample()
    with tiny.pipe.set_guidance(PERTURBATIONS[kind], scale=2.0) as guidance:
        guided = tiny.sample()
        assert torch.equal(guided, tiny.sample())
        report = guidance.report()
    assert not torch.equal(guided, plain)
    assert guided.isfinite().all()
    assert report.steps == report.guided_steps == 2
    assert torch.equal(tiny.sample(), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_formula_holds_on_every_family(tiny_pipelines, name):
    """The pipeline gets c + w (c - p), computed apart from each other."""
    tiny = tiny_pipelines.BUILDERS[name]()
    perturbation = HeadPerturbation(heads=((1, 0),), strength=0.7)
    model = next(iter(tiny.denoisers().values()))
    with set_guidance(tiny.pipe, perturbation, scale=2.0):
        recorder = Recorder(model)
        tiny.sample()
        recorder.handle.remove()
        # First the damaged forward ends, then the call that the pipeline made.
        args, kwargs, got = recorder.calls[1]
    with torch.no_grad():
        plain = model(*args, **kwargs)[0]
        with set_attn_processor(model, perturbation, always=True):
            damaged = model(*args, **kwargs)[0]
    delta = 2.0 * (plain - damaged)
    rows = len(plain)
    if rows == 2:  # the empty prompt comes first
        delta = delta[rows // 2 :].repeat(2, *[1] * (delta.ndim - 1))
    torch.testing.assert_close(got, plain + delta, rtol=1e-4, atol=1e-6)
    assert (got - plain).abs().max() > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("index", ["first", "last"])
@pytest.mark.slow
def test_the_shared_prefix_changes_nothing(tiny_pipelines, monkeypatch, name, index):
    tiny = tiny_pipelines.BUILDERS[name]()
    count = next(iter(tiny.layers.values()))
    perturbation = HeadPerturbation(layers=(0 if index == "first" else count - 1,))
    with set_guidance(tiny.pipe, perturbation) as guidance:
        shared = tiny.sample()
        report = guidance.report()
        monkeypatch.setattr(
            "diffaccel.guidance.perturb.shared_prefix.SharedPrefix.complete",
            property(lambda self: False),
        )
        whole = tiny.sample()
        assert guidance.report().extra_forwards == 2
    # Rows of another batch size round differently.
    assert (shared - whole).abs().max() <= 2e-5 * whole.abs().max()
    assert report.extra_forwards == pytest.approx(2 * report.rerun)
    assert report.rerun < 1 or index == "first"


@pytest.mark.parametrize(
    ("perturbation", "scale"),
    [(HEADS, 0.0), (HeadPerturbation(heads=((1, 0),), strength=0.0), 3.0)],
)
def test_nothing_to_do_is_bit_identical_and_free(tiny_pipelines, perturbation, scale):
    tiny = tiny_pipelines.sd3()
    plain = tiny.sample()
    with set_guidance(tiny.pipe, perturbation, scale=scale) as guidance:
        assert torch.equal(tiny.sample(), plain)
        assert guidance.report().extra_forwards == 0


def test_all_heads_are_the_layer(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    outputs = []
    for perturbation in (
        HeadPerturbation(layers=(2,)),
        HeadPerturbation(heads=((2, 0), (2, 1))),
    ):
        with set_guidance(tiny.pipe, perturbation):
            outputs.append(tiny.sample())
    assert torch.equal(*outputs)


def test_identity_on_all_heads_is_the_value(tiny_pipelines):
    query, key, value = torch.randn(3, 2, 24, 4, 16).unbind(0)
    layout = tiny_pipelines.TokenLayout.image(4, 5, text_before=4)
    got = HeadPerturbation(layers=(0,)).attend(query, key, value, layout)
    assert torch.equal(got, value)
    dense = FullAttn().attend(query, key, value, layout)
    some = HeadPerturbation(heads=((3, 1),)).attend(query, key, value, layout, layer=3)
    assert torch.equal(some[:, :, [0, 2, 3]], dense[:, :, [0, 2, 3]])
    assert torch.equal(some[:, :, 1], value[:, :, 1])
    assert torch.equal(HeadPerturbation(layers=(1,)).attend(query, key, value, layout), dense)


@pytest.mark.parametrize("scope", ["image", "image_mass"])
def test_text_rows_stay_dense(tiny_pipelines, scope):
    query, key, value = torch.randn(3, 2, 26, 4, 16).unbind(0)
    layout = tiny_pipelines.TokenLayout.image(4, 5, text_before=4, text_after=2)
    dense = FullAttn().attend(query, key, value, layout)
    got = HeadPerturbation(layers=(0,), scope=scope).attend(query, key, value, layout)
    assert torch.equal(got[:, :4], dense[:, :4])
    assert torch.equal(got[:, 24:], dense[:, 24:])
    assert (got - dense).abs().max() > 0.1


def test_steps_outside_the_window_are_not_guided(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    with set_guidance(tiny.pipe, HEADS, stop=0.5) as guidance:
        early = tiny.sample()
        assert guidance.report().guided_steps == 1
    with set_guidance(tiny.pipe, HEADS, start=0.5) as guidance:
        late = tiny.sample()
        assert guidance.report().guided_steps == 1
    assert not torch.equal(early, late)


def test_it_composes_with_a_sparse_method(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    sparse = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
    with tiny.pipe.set_attn_processor(sparse):
        plain = tiny.sample()
        with tiny.pipe.set_guidance(HEADS):
            both = tiny.sample()
        assert torch.equal(tiny.sample(), plain)
    with tiny.pipe.set_guidance(HEADS):
        guided = tiny.sample()
    assert not torch.equal(both, guided)
    assert not torch.equal(both, plain)


def test_full_attention_beside_guidance_changes_no_bit(tiny_pipelines):
    tiny = tiny_pipelines.wan21()
    with tiny.pipe.set_guidance(HEADS):
        guided = tiny.sample()
        with tiny.pipe.set_attn_processor(FullAttn()):
            assert torch.equal(tiny.sample(), guided)


def test_two_pipelines_with_different_heads(tiny_pipelines):
    first, second = tiny_pipelines.flux(), tiny_pipelines.flux()
    other = HeadPerturbation(heads=((2, 1),))
    with set_guidance(first.pipe, HEADS):
        alone = first.sample()
        with set_guidance(second.pipe, other):
            assert not torch.equal(second.sample(), alone)
            assert torch.equal(first.sample(), alone)


def test_an_exception_leaves_the_model_as_it_was(tiny_pipelines, monkeypatch):
    tiny = tiny_pipelines.sd15()
    plain = tiny.sample()
    with set_guidance(tiny.pipe, HEADS):
        monkeypatch.setattr(
            HeadPerturbation, "perturb", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no"))
        )
        with pytest.raises(RuntimeError, match="no"):
            tiny.sample()
    monkeypatch.undo()
    model = tiny.pipe.unet
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all("forward" not in part.__dict__ for part in model.modules())
    assert torch.equal(tiny.sample(), plain)


def test_a_copied_model_is_guided_by_itself(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    plain = tiny.sample()
    set_guidance(tiny.pipe, HEADS)
    guided = tiny.sample()
    copied = copy.deepcopy(tiny.pipe.transformer)
    restore_guidance(tiny.pipe)
    assert torch.equal(tiny.sample(), plain)
    tiny.pipe.register_modules(transformer=copied)
    assert torch.equal(tiny.sample(), guided)
    restore_guidance(tiny.pipe)
    assert torch.equal(tiny.sample(), plain)


def test_setting_twice_replaces(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    set_guidance(tiny.pipe, SkipLayers((0,)))
    set_guidance(tiny.pipe, HEADS)
    twice = tiny.sample()
    restore_guidance(tiny.pipe)
    with set_guidance(tiny.pipe, HEADS):
        assert torch.equal(tiny.sample(), twice)
    restore_guidance(tiny.pipe)
    assert not tiny.pipe.transformer._forward_hooks


def test_shuffling_leaves_the_noise_of_the_sampler_alone(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    state = torch.random.get_rng_state()
    with set_guidance(tiny.pipe, PermuteTokens((1, 2))):
        first = tiny.sample()
    assert torch.equal(state, torch.random.get_rng_state())
    with set_guidance(tiny.pipe, PermuteTokens((1, 2), seed=1)):
        assert not torch.equal(tiny.sample(), first)


# Bad input


@pytest.mark.parametrize(
    ("perturbation", "message"),
    [
        (HeadPerturbation(heads=((9, 0),)), "layers must lie in 0 to 3 .* got 9"),
        (HeadPerturbation(heads=((0, 2),)), "heads of layer 0 .* 0 to 1, got 2"),
        (SkipLayers((0, 4)), "layers must lie in 0 to 3 .* got 4"),
        (HeadPerturbation(), "must name a layer or head"),
    ],
)
def test_unknown_layers_and_heads_are_refused(tiny_pipelines, perturbation, message):
    tiny = tiny_pipelines.flux()
    with pytest.raises(ValueError, match=message):
        set_guidance(tiny.pipe, perturbation)
    assert not tiny.pipe.transformer._forward_hooks


@pytest.mark.parametrize(
    "arguments",
    [{"strength": 1.1}, {"strength": -0.1}, {"target": "nothing"}, {"scope": "text"}]
    + [{"heads": ((0,),)}, {"heads": ((0, -1),)}, {"layers": (-1,)}, {"sigma": 0.0}]
    + [{"target": "blur", "scope": "image"}],
    ids=str,
)
def test_bad_perturbations_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        HeadPerturbation(**{"layers": (0,), **arguments})


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"start": 0.6, "stop": 0.5}, {"stop": 2.0}])
def test_bad_numbers_are_refused(tiny_pipelines, options):
    with pytest.raises(ValueError, match="scale must|start <= stop"):
        set_guidance(tiny_pipelines.flux().pipe, HEADS, **options)


def test_other_targets_are_refused(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    with pytest.raises(TypeError, match="needs a diffusers pipeline"):
        set_guidance(tiny.pipe.transformer, HEADS)
    with pytest.raises(TypeError, match="a perturbation is needed"):
        set_guidance(tiny.pipe, FullAttn())
    assert hasattr(diffusers.DiffusionPipeline, "set_guidance")


def test_heads_travel_as_json(tmp_path):
    chosen = HeadPerturbation(heads=((3, 1), (0, 2)), layers=(4,), strength=0.25)
    chosen.save(tmp_path / "heads.json")
    assert HeadPerturbation.load(tmp_path / "heads.json") == chosen
    assert math.isinf(HeadPerturbation.load(tmp_path / "heads.json").sigma)
    (tmp_path / "bad.json").write_text('{"perturbation": {"strength": 3}}')
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ValueError, match="a head file must be JSON"):
            HeadPerturbation.load(tmp_path / name)


def test_the_report_counts_what_ran(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    runs = dict.fromkeys(range(4), 0)

    def counter(index):
        def count(*_):
            runs[index] += 1

        return count

    model = tiny.pipe.transformer
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    handles = [b.attn.register_forward_hook(counter(i)) for i, b in enumerate(blocks)]
    with set_guidance(tiny.pipe, HeadPerturbation(layers=(2,))) as guidance:
        tiny.sample()
        report = guidance.report()
    for handle in handles:
        handle.remove()
    assert runs == {0: 2, 1: 2, 2: 4, 3: 4}
    assert report.extra_forwards == (sum(runs.values()) - 8) / 4 == 1.0
    assert report.rerun == 0.5 and report.seconds > 0
    assert "2 of 2 steps, 1.00 extra forwards (50% of the stages each)" in str(report)
