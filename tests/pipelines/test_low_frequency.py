"""Low-frequency guidance: the projection, the weights, and what it does to a velocity."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from diffaccel.pipelines.low_frequency import (
    LowFrequencyScheduler,
    low_frequencies,
    packed_like,
    unpacked,
)
from diffaccel.pipelines.presets import Refinement


def scheduler(weight, levels=1, steps=4, begin=0):
    config = dict(FlowMatchEulerDiscreteScheduler(shift=1.0).config)
    built = LowFrequencyScheduler.guided(config, weight, levels)
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
