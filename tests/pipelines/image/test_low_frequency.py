"""Low-frequency guidance: the projection, the weights, and what it does to a velocity."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffaccel.errors import InputError
from diffaccel.pipelines.image.low_frequency import (
    guided_scheduler,
    low_frequencies,
    packed_like,
    unpacked,
)
from diffaccel.pipelines.image.recipe import Refinement


def scheduler(weight, levels=1, steps=4, begin=0):
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    built = guided_scheduler(plain, dict(plain.config), weight, levels)
    built.set_timesteps(steps)
    built.set_begin_index(begin)
    return built


@pytest.mark.parametrize("shape", [(1, 4, 8, 12), (2, 3, 7, 9)])
@pytest.mark.parametrize("levels", [1, 2])
def test_the_projection_is_idempotent_and_keeps_constants(shape, levels):
    latents = torch.randn(shape)
    low = low_frequencies(latents, levels)
    torch.testing.assert_close(low_frequencies(low, levels), low)
    torch.testing.assert_close(low_frequencies(latents - low, levels), torch.zeros(shape))
    constant = torch.full(shape, 3.0)
    torch.testing.assert_close(low_frequencies(constant, levels), constant)


def test_tokens_of_flux_and_latents_convert_into_each_other():
    latents = torch.randn(2, 4, 6, 8)
    tokens = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(unpacked(tokens, latents.shape), latents)
    assert torch.equal(packed_like(latents, tokens), tokens)
    assert packed_like(latents, latents) is latents


def test_the_weight_falls_along_a_cosine_over_the_executed_steps():
    found = [scheduler(0.8, steps=6, begin=2).weight_at(index) for index in (2, 4, 6)]
    assert found == pytest.approx([0.8, 0.4, 0.0])


@pytest.mark.parametrize("packed", [False, True])
def test_guidance_moves_the_low_frequencies_alone(packed):
    built, plain = scheduler(1.0, begin=1), scheduler(0.0, begin=1)
    reference, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    timestep = built.timesteps[1:2]
    sample, _ = (s.scale_noise(reference, timestep, noise) for s in (built, plain))
    sigma = built.sigmas[1]
    velocity = noise - torch.randn(1, 4, 8, 8)  # towards another picture
    shaped = [FluxPipeline._pack_latents(x, *x.shape) if packed else x for x in (velocity, sample)]
    steps = [s.step(shaped[0], timestep[0], shaped[1]).prev_sample for s in (built, plain)]
    guided, free = (
        unpacked((step - shaped[1]) / (s.sigmas[2] - sigma), reference.shape)
        for step, s in zip(steps, (built, plain), strict=True)
    )
    torch.testing.assert_close(free, velocity, atol=1e-5, rtol=1e-4)
    low, wanted = low_frequencies(sample - sigma * guided, 1), low_frequencies(reference, 1)
    torch.testing.assert_close(low, wanted, atol=1e-5, rtol=1e-4)
    high = guided - low_frequencies(guided, 1)
    torch.testing.assert_close(high, velocity - low_frequencies(velocity, 1), atol=1e-5, rtol=1e-4)


def test_the_reference_as_prediction_leaves_the_velocity_alone():
    built = scheduler(1.0)
    reference, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    sample = built.scale_noise(reference, built.timesteps[:1], noise)
    step = built.step(noise - reference, built.timesteps[0], sample).prev_sample
    expected = sample + (built.sigmas[1] - built.sigmas[0]) * (noise - reference)
    torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-4)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="guidance must lie in 0 to 1"):
        Refinement(4, 0.5, guidance=1.5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, DDIMScheduler])
def test_guidance_of_models_that_predict_noise(scheduler_class, kind):
    """The scheduler's own clean picture, which it returns, has the low frequencies wanted."""
    options = {} if scheduler_class is EulerDiscreteScheduler else {"clip_sample": False}
    plain = scheduler_class(prediction_type=kind, **options)
    guided = guided_scheduler(plain, dict(plain.config), 1.0, 1)
    assert isinstance(guided, scheduler_class)
    reference, noise, prediction = torch.randn(3, 1, 4, 8, 8).unbind(0)
    found = []
    for scheduler in (guided, plain):
        scheduler.set_timesteps(4)
        timestep = scheduler.timesteps[1:2]
        sample = scheduler.add_noise(reference, noise, timestep)
        scheduler.scale_model_input(sample, timestep[0])
        found.append(scheduler.step(prediction, timestep[0], sample).pred_original_sample)
    own = guided.clean(prediction, timestep[0], sample)
    torch.testing.assert_close(own, found[1], atol=1e-4, rtol=1e-3)
    low = low_frequencies(found[0], 1)
    torch.testing.assert_close(low, low_frequencies(reference, 1), atol=1e-3, rtol=1e-3)
    high = found[1] - low_frequencies(found[1], 1)
    torch.testing.assert_close(found[0] - low, high, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_every_scheduler_finds_the_picture_behind_its_own_noise(scheduler_class):
    plain = scheduler_class()
    guided = guided_scheduler(plain, dict(plain.config), 1.0, 1)
    guided.set_timesteps(5)
    reference, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    for timestep in guided.timesteps[1:]:
        sample = guided.add_noise(reference, noise, timestep[None])
        found = guided.clean(noise, timestep, sample)
        torch.testing.assert_close(found, reference, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler]
)
def test_flow_schedulers_end_at_the_low_frequencies_of_the_reference(scheduler_class):
    """A model that predicts no velocity; the last step of the weight's cosine is no whole one."""
    plain = scheduler_class(shift=6.0)
    reference, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    distances = []
    for weight in (0.0, 1.0):
        guided = guided_scheduler(plain, dict(plain.config), weight, 1)
        guided.set_timesteps(6)
        assert guided.config.shift == 6.0
        x = guided.scale_noise(reference, guided.timesteps[2:3], noise)
        found = guided.clean(noise - reference, guided.timesteps[2], x)
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
        guided.set_begin_index(2)
        generator = torch.Generator().manual_seed(0)
        for timestep in guided.timesteps[2:]:
            options = {"generator": generator} if scheduler_class is FlowMatchLCMScheduler else {}
            x = guided.step(torch.zeros_like(x), timestep, x, **options).prev_sample
        distances.append(float(low_frequencies(x - reference, 1).square().mean()))
    assert distances[1] < 0.7 * distances[0]


def test_guided_schedulers_of_several_steps_reach_the_reference():
    """A model that predicts plain noise would end elsewhere; PNDM repeats its first timesteps."""
    plain = PNDMScheduler(skip_prk_steps=True)
    reference, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    distances = []
    for weight in (0.0, 1.0):
        scheduler = guided_scheduler(plain, dict(plain.config), weight, 2)
        scheduler.set_timesteps(10)
        x = scheduler.add_noise(reference, noise, scheduler.timesteps[5:6])
        for timestep in scheduler.timesteps[5:]:
            x = scheduler.step(torch.zeros_like(x), timestep, x).prev_sample
        distances.append(float(low_frequencies(x - reference, 2).square().mean()))
    assert distances[1] < 0.5 * distances[0]


def test_schedulers_that_cannot_be_guided_are_named():
    with pytest.raises(InputError, match="got LCMScheduler"):
        guided_scheduler(LCMScheduler(), {}, 1.0, 1)
    with pytest.raises(InputError, match="got FlowMatchHeunDiscreteScheduler"):
        guided_scheduler(FlowMatchHeunDiscreteScheduler(), {}, 1.0, 1)
    flow = UniPCMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True)
    with pytest.raises(InputError, match="with a flow schedule"):
        guided_scheduler(flow, dict(flow.config), 1.0, 1)
