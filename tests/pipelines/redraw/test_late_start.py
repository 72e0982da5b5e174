"""A stock pipeline that starts from a picture: what its image-to-image twin draws."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from diffaccel.pipelines.redraw.late_start import started_from, starting_late
from diffaccel.pipelines.redraw.latents import LatentCodec

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"height": 64, "width": 96, "num_inference_steps": 5}


def without_noise(vae):
    """Makes the posterior of an autoencoder a point, so that drawing from it is its mode."""
    vae.register_to_config(shift_factor=vae.config.shift_factor or 0.25)
    channels = vae.quant_conv.out_channels // 2
    vae.quant_conv.weight.data[channels:] = 0.0
    vae.quant_conv.bias.data[channels:] = -30.0


@pytest.mark.parametrize(
    ("name", "codec"),
    [("flux", LatentCodec("quads")), ("sd3", LatentCodec()), ("sd15", LatentCodec())],
)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_it_is_the_image_to_image_pipeline(tiny_pipelines, name, codec, strength):
    tiny = tiny_pipelines.BUILDERS[name]()
    pipe = tiny.pipe
    without_noise(pipe.vae)
    if name == "sd15":  # whose twin knows no shift
        pipe.vae.register_to_config(shift_factor=None)
    told = {key: value for key, value in tiny.arguments.items() if "embeds" in key}
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    twin = AutoPipelineForImage2Image.from_pipe(pipe)
    twin.set_progress_bar_config(disable=True)
    expected = twin(
        **told, **SIZE, image=picture, strength=strength, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip

    clean = codec.encode(pipe.vae, picture * 2 - 1)
    generator = torch.Generator().manual_seed(0)
    torch.randn(clean.shape, generator=generator)  # the twin draws from the posterior first
    steps = []
    scheduler = starting_late(pipe.scheduler, strength, lambda: steps.append(1))
    own = pipe.scheduler
    with started_from(pipe, scheduler, clean, codec):
        found = pipe(**told, **SIZE, output_type="latent", generator=generator).images

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(steps) == round(5 * strength)
    assert pipe.scheduler is own and "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (LatentCodec(), (2, 4, 6, 10)),
        (LatentCodec("quads"), (2, 4, 6, 10)),
        (LatentCodec("frames-first"), (2, 4, 3, 6, 10)),
        (LatentCodec("channels-last"), (2, 4, 3, 6, 10)),
    ],
)
def test_unpacking_undoes_packing(codec, shape):
    latents = torch.randn(shape)
    packed = codec.pack(latents, None)
    assert torch.equal(codec.unpack(packed, latents, None), latents)
