"""The embedded U-Net model, untrained: parts, training, the folder that is written."""

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from diffaccel.pipelines import embedded, loading
from diffaccel.pipelines.image.presets import EMBEDDED_UNET, preset_for

CAPTIONS = ["a rocket on a blue background", "", "a red apple and a rocket", "rocket"]
MADE = embedded.EMBEDDED_UNET.is_dir()


@pytest.fixture(scope="module")
def vocabulary(cast):
    return tuple(actor.thing for actor in cast)


@pytest.fixture
def model(vocabulary):
    from embedded.image.train import words_of
    from embedded.unet.model import UNetModel

    torch.manual_seed(0)
    return UNetModel(words_of(vocabulary)).eval()


@pytest.fixture(scope="module")
def vae(embedded):
    """A tiny untrained autoencoder with the shift and the scale of a trained one."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3,
        shift_factor=0.2,
    ).eval()


@torch.no_grad()
def test_autoencoder_without_shift_gives_the_same_pictures(vae):
    from embedded.unet.export import without_shift

    twin = without_shift(vae)
    assert twin.config.shift_factor is None
    assert twin.config.scaling_factor == vae.config.scaling_factor
    pictures, latents = torch.randn(2, 3, 48, 32), torch.randn(2, 8, 6, 4)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    before, after = (coder.encode(pictures).latent_dist for coder in (vae, twin))
    torch.testing.assert_close(after.mean, before.mean - shift, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after.logvar, before.logvar)
    expected = vae.decode(latents / scale + shift).sample
    assert (vae.decode(latents / scale).sample - expected).abs().max() > 1e-3
    torch.testing.assert_close(twin.decode(latents / scale).sample, expected, atol=1e-5, rtol=1e-5)


def test_unpack_undoes_pack(embedded):
    from embedded.image.latents import pack
    from embedded.unet.train import unpack

    latents = torch.randn(2, 8, 6, 6)
    assert torch.equal(unpack(pack(latents)), latents)


def test_noise_levels_are_high_and_reach_the_last(embedded):
    from embedded.unet.model import new_scheduler
    from embedded.unet.train import draw_timesteps

    torch.manual_seed(0)
    drawn = draw_timesteps(4000, 0.7)
    assert drawn.min() >= 0 and drawn.max() == 999
    assert abs(drawn.float().median() - 1000 * 0.5 ** (1 / 1.7)) < 5
    assert new_scheduler().alphas_cumprod[999] == 0


@torch.no_grad()
def test_untrained_heads_look_back_by_one_and_three_words(model):
    encoder = model.text_encoder
    words = torch.randint(3, len(model.tokenizer), (1, 20))
    rows = encoder.encoder.layers[0].layer_norm1(encoder.embeddings(words))
    attention = encoder.encoder.layers[0].self_attn
    query, key = (
        projection(rows).view(20, 3, 32).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj)
    )
    best = (query @ key.mT).argmax(-1)
    assert torch.equal(best[1, 3:], torch.arange(2, 19))
    assert torch.equal(best[2, 3:], torch.arange(17))


@torch.no_grad()
def test_captions_are_encoded_as_the_pipeline_does(model):
    stock, empty = model.pipeline(None).encode_prompt(CAPTIONS[2], "cpu", 1, True)
    rows = model.encode([CAPTIONS[2], ""])
    torch.testing.assert_close(torch.cat([stock, empty]), rows)
    swapped = model.encode(["a rocket and a red apple"])
    assert (rows[:1] - swapped).abs().max() > 0.1


@pytest.mark.slow
def test_steps_lower_the_loss_of_a_batch(model):
    from embedded.unet.train import UNetTraining, optimisers_of, train_on, velocity_loss

    settings = UNetTraining(minutes=1.0)
    clean = torch.randn(4, 8, 1, 1).expand(4, 8, 16, 16)
    optimisers = optimisers_of(model, settings)
    trained = {id(w) for o in optimisers for group in o.param_groups for w in group["params"]}
    assert trained == {id(weight) for weight in model.parameters()}

    def loss():
        torch.manual_seed(3)
        with torch.no_grad():
            return velocity_loss(model, clean, CAPTIONS, settings.noise_tilt).item()

    before = loss()
    for step in range(6):
        torch.manual_seed(step)
        model.zero_grad(set_to_none=True)
        assert train_on(
            model, [(clean, CAPTIONS), (clean[:2], CAPTIONS[:2])], settings
        ).keys() == {
            "whole",
            "close-ups",
        }
        for optimiser in optimisers:
            optimiser.step()
    assert loss() < 0.9 * before
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.slow
def test_training_resumes_from_its_checkpoint(vocabulary, vae, tmp_path):
    from embedded.image.latents import PoolKind, draw_chunk
    from embedded.unet.train import UNetTraining, train_unet

    kind = PoolKind("tiny", 64, close_ups=False, seed=1, pictures=4)
    draw_chunk(vocabulary[:2] * 2, vae, kind, 0, tmp_path)
    settings = {"pools": ((kind, 1),), "close_ups": None, "batch": 2, "save_every": 1, "name": "n"}
    steps = []
    for minutes in (0.01, 0.1):
        weights = train_unet(vocabulary[:2] * 2, vae, UNetTraining(minutes, **settings), tmp_path)
        steps.append(torch.load(weights, weights_only=True)["step"])
        assert torch.load(tmp_path / "n-running.pt", weights_only=True)["step"] == steps[-1]
        assert weights == tmp_path / "n.pt"
        weights.unlink()
    assert 1 <= steps[0] < steps[1]


@torch.no_grad()
def test_a_grown_model_draws_what_the_coarse_one_does(vocabulary):
    """Exactly, where the outermost convolutions look at single pixels and add nothing."""
    from embedded.image.train import words_of
    from embedded.unet.model import UNetModel

    torch.manual_seed(0)
    coarse, whole = (UNetModel(words_of(vocabulary), is_coarse) for is_coarse in (True, False))
    for name, weight in coarse.unet.named_parameters():
        weight.add_(0.1 * torch.randn_like(weight))
        if name.startswith(("conv_in.", "conv_out.")):
            centre = weight[..., 1, 1].clone() if weight.ndim == 4 else None
            weight.zero_()
            if centre is not None:
                weight[..., 1, 1] = centre
    whole.grow(coarse.state_dict())
    noisy, times = torch.randn(2, 8, 16, 24), torch.tensor([999, 300])
    expected = coarse(2 * torch.nn.functional.avg_pool2d(noisy, 2), times, CAPTIONS[:2])
    expected = torch.nn.functional.interpolate(expected, scale_factor=2.0)
    torch.testing.assert_close(whole(noisy, times, CAPTIONS[:2]), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1
    with pytest.raises(RuntimeError, match="size mismatch"):
        whole.grow(whole.state_dict())


def test_the_coarse_stage_has_files_of_its_own(embedded):
    from embedded.unet.train import UNetTraining, coarse_training

    coarse = coarse_training(minutes=1.0)
    assert coarse.name != UNetTraining(1.0).name
    assert coarse.is_coarse and coarse.close_ups is None
    assert {kind.pixels for kind, _ in coarse.pools} == {128}


@pytest.mark.slow
def test_export_loads_as_a_stock_pipeline(model, vae, vocabulary, tmp_path):
    from embedded.unet.export import export_unet, load_unet_model
    from embedded.unet.model import UNetModel

    torch.manual_seed(1)
    torch.nn.init.normal_(model.unet.conv_out.weight, 0, 0.05)
    export_unet(model, vae, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 256
    assert str(tmp_path) not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    noisy, step = torch.randn(1, 8, 8, 8), torch.tensor([700])
    with torch.no_grad():
        expected = model(noisy, step, CAPTIONS[:1])
        rows = pipe.encode_prompt(CAPTIONS[0], "cpu", 1, False)[0]
        found = pipe.unet(noisy, step, rows).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=2e-2)
    picture = pipe(CAPTIONS[0], num_inference_steps=2, height=64, width=64, guidance_scale=3.0)
    assert picture.images[0].size == (64, 64)

    twin = UNetModel(["rocket", "a", "pear"])
    twin.adopt(tmp_path)
    torch.testing.assert_close(twin.unet.state_dict(), pipe.unet.state_dict())
    assert load_unet_model(vocabulary, None)[1] == 0


def test_model_is_small(model):
    count = sum(weight.numel() for weight in model.unet.parameters())
    assert count < 2.4e6
    down, up = model.unet.down_blocks, model.unet.up_blocks
    for blocks in ((up[3],), (down[1], up[2]), (down[2], up[1]), (down[3],)):
        assert all(
            layer.transformer_blocks[0].attn1.heads * 40
            == layer.transformer_blocks[0].attn1.inner_dim
            for block in blocks
            for layer in block.attentions
        )


@pytest.mark.slow
@pytest.mark.skipif(not MADE, reason="the embedded U-Net model is not made")
def test_embedded_model_draws_a_red_apple_on_white():
    pipe = loading.load_image_pipeline(embedded.EMBEDDED_UNET)
    preset = preset_for(pipe, embedded.EMBEDDED_UNET)
    assert preset == EMBEDDED_UNET
    picture = pipe(
        "a red apple on a white background",
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        **preset.arguments,
    ).images[0]
    assert picture.size == (256, 256)
    middle, corner = picture.getpixel((128, 150)), picture.getpixel((4, 4))
    assert middle[0] > middle[1] + 40 and min(corner) > 150


@pytest.mark.skipif(
    not (MADE and embedded.EMBEDDED_SCORER.is_dir()),
    reason="the embedded U-Net model and scorer are not made",
)
def test_both_embedded_folders_stay_small():
    folders = (embedded.EMBEDDED_UNET, embedded.EMBEDDED_SCORER)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert all((folder / "README.md").is_file() for folder in folders)
