"""Scaled rotary positions: the formulas, what is left alone, exact restoration."""

import math

import pytest
import torch

from diffaccel.bindings.rope import Linear, Ntk, Riflex, Yarn, scaled_rope
from diffaccel.errors import InputError

FREQUENCIES = 10_000.0 ** -(torch.arange(14, dtype=torch.float64) / 14)


@pytest.mark.parametrize("axis", [Linear(1.0), Ntk(1.0), Yarn(1.0, 64)])
def test_a_factor_of_one_changes_nothing(axis):
    torch.testing.assert_close(axis.rescaled(FREQUENCIES), FREQUENCIES, rtol=1e-12, atol=0)
    assert axis.amplitude == 1.0


def test_ntk_scales_the_base():
    dim, factor = 28, 4.0
    base = 10_000.0 * factor ** (dim / (dim - 2))
    expected = base ** -(torch.arange(14, dtype=torch.float64) / 14)
    torch.testing.assert_close(Ntk(factor).rescaled(FREQUENCIES), expected)
    assert Ntk(factor).rescaled(FREQUENCIES)[0] == 1.0
    torch.testing.assert_close(Ntk(factor).rescaled(FREQUENCIES)[-1], FREQUENCIES[-1] / factor)


def test_yarn_interpolates_slow_frequencies_and_keeps_fast_ones():
    found = Yarn(4.0, native=64).rescaled(FREQUENCIES)
    turns = FREQUENCIES * 64 / (2 * math.pi)
    assert torch.equal(found[turns >= 8], FREQUENCIES[turns >= 8]) and (turns >= 8).any()
    slow = turns <= 1
    torch.testing.assert_close(found[slow], FREQUENCIES[slow] / 4)
    assert Yarn(4.0, 64).amplitude == pytest.approx(1 + 0.1 * math.log(4))


def test_riflex_changes_one_frequency_of_a_long_video_alone():
    frequencies = 10_000.0 ** -(torch.arange(22, dtype=torch.float64) / 22)
    period = 2 * math.pi / frequencies[5]
    assert torch.equal(Riflex(int(period)).rescaled(frequencies), frequencies)
    found = Riflex(120).rescaled(frequencies)
    changed = found != frequencies
    assert changed.nonzero().flatten().tolist() == [5]
    assert found[5] == pytest.approx(0.9 * 2 * math.pi / 120)
    with pytest.raises(ValueError, match="component must be at most 22"):
        Riflex(120, component=23).rescaled(frequencies)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["flux", "wan2.1", "qwen", "cogvideox"])
def test_a_pipeline_comes_back_bit_for_bit(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    model, stock = tiny.pipe.transformer, tiny.sample()
    with scaled_rope(model, height=Ntk(1.0), width=Linear(1.0)):
        torch.testing.assert_close(tiny.sample(), stock, atol=1e-5, rtol=1e-4)
    for arguments in ({"height": Ntk(4.0)}, {"width": Linear(2.0)}, {"height": Yarn(2.0, 4)}):
        with scaled_rope(model, **arguments):
            assert not torch.allclose(tiny.sample(), stock, atol=1e-4)
        assert torch.equal(tiny.sample(), stock)
    with pytest.raises(RuntimeError, match="stop"), scaled_rope(model, height=Ntk(2.0)):
        raise RuntimeError("stop")
    assert torch.equal(tiny.sample(), stock)


def test_halved_distances_are_what_linear_scaling_means(tiny_pipelines):
    """FLUX at doubled position ids and factor 2 is FLUX at plain ids."""
    embed = tiny_pipelines.flux().pipe.transformer
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(5.0), torch.arange(7.0))
    plain = embed.pos_embed(ids)
    with scaled_rope(embed, frames=Linear(2.0), height=Linear(2.0), width=Linear(2.0)):
        scaled = embed.pos_embed(ids * 2)
    for found, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_other_models_are_refused(tiny_pipelines):
    model = tiny_pipelines.sd15().pipe.unet
    with pytest.raises(InputError, match="got UNet2DConditionModel"), scaled_rope(model):
        pass


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ntk(0.5), "factor must be at least 1"),
        (lambda: Yarn(2.0, 0), "native must be at least 1"),
        (lambda: Yarn(2.0, 64, slow=9.0), "slow less than fast"),
        (lambda: Riflex(0), "length and component"),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
