"""Stages, sizes and determinism of image generation."""

import diffusers
import pytest
from PIL import Image

from diffaccel.errors import InputError
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.image.generate import generate_image, refine_image
from diffaccel.pipelines.image.job import ImageJob, check_size, plan_stages
from diffaccel.pipelines.image.presets import preset_for
from diffaccel.pipelines.image.tiling import tile_count
from diffaccel.pipelines.loading import load_image_pipeline


@pytest.mark.parametrize(
    ("size", "native", "factor", "stages"),
    [
        ((256, 256), 256, 4.0, [(256, 256)]),
        ((128, 192), 256, 4.0, [(128, 192)]),
        ((1024, 1024), 256, 4.0, [(256, 256), (1024, 1024)]),
        ((4096, 4096), 256, 4.0, [(256, 256), (1024, 1024), (4096, 4096)]),
        ((4096, 4096), 1024, 2.0, [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((2048, 512), 256, 4.0, [(512, 128), (2048, 512)]),
    ],
)
def test_stages_grow_by_at_most_the_factor(size, native, factor, stages):
    assert list(plan_stages(*size, native, factor)) == stages


def test_stages_of_odd_sizes_are_multiples_of_16():
    for stage in plan_stages(3008, 1616, 256, 4.0):
        check_size(*stage)


@pytest.mark.parametrize("size", [(100, 96), (96, 8), (0, 16), (-16, 16)])
def test_bad_sizes_are_refused(size):
    with pytest.raises(InputError, match="multiples of 16"):
        check_size(*size)


def test_tile_count_matches_the_autoencoder():
    """Counted from the calls that the stock tiled encoder and decoder make."""
    import torch
    from diffusers import AutoencoderKL

    from diffaccel.pipelines.image.tiling import tiled

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=2,
        mid_block_add_attention=False,
    )
    calls = {"encode": 0, "decode": 0}

    def count(kind):
        calls[kind] += 1

    before = dict(vars(vae))
    with torch.no_grad(), tiled(vae, count):
        latent = vae.encode(torch.zeros(1, 3, 640, 960)).latent_dist.mode()
        picture = vae.decode(latent).sample
    assert picture.shape == (1, 3, 640, 960)
    assert calls == {"encode": tile_count(960, 640), "decode": tile_count(960, 640)}
    assert {name: value for name, value in vars(vae).items() if name in before} == before
    assert not vae.use_tiling


@pytest.mark.parametrize(
    "cache", [diffusers.FirstBlockCacheConfig(), diffusers.TaylorSeerCacheConfig()]
)
def test_caches_that_refinement_cannot_serve_are_refused_before_the_run(cache):
    """diffusers' image-to-image pipelines do not tell caches which prompt they ask for."""
    pipe = load_image_pipeline(EMBEDDED_IMAGE)
    pipe.transformer.enable_cache(cache)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    job = ImageJob("a red apple", (512, 512), preset_for(pipe, EMBEDDED_IMAGE))
    with pytest.raises(InputError, match=r"FluxImg2ImgPipeline makes the calls .* disable_cache"):
        generate_image(pipe, job)
    with pytest.raises(InputError, match="cannot follow"):
        refine_image(pipe, job, Image.new("RGB", (256, 256)))
