"""The embedded video model, untrained: parts, one step of training, the folder that is written."""

import json

import pytest
import torch
from diffusers import WanPipeline

from diffaccel.cli import main
from diffaccel.pipelines import embedded

CAPTIONS = ["a rocket flies to the left", "", "a red apple grows on a blue background"]


@pytest.fixture(scope="module")
def model(cast):
    from embedded.video.clips import words_of
    from embedded.video.model import VideoModel

    torch.manual_seed(0)
    return VideoModel(words_of(cast)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """An exported pipeline with untrained weights."""
    from embedded.video.export import export_video
    from embedded.video.vae import new_video_vae

    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    export_video(model, new_video_vae().eval(), folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("length", [512, 40])
def test_counted_pads_are_what_the_pipeline_computes(model, folder, length):
    torch.manual_seed(1)
    torch.nn.init.normal_(model.transformer.proj_out.weight, 0, 0.05)
    pipe = model.pipeline(None, 2.0)
    rows = pipe._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=length)
    noisy, sigma = torch.randn(3, 16, 2, 4, 6), torch.tensor([0.9, 0.5, 0.2])
    stock = pipe.transformer(noisy, 1000 * sigma, rows, return_dict=False)[0]
    found = model(noisy, sigma, CAPTIONS, length)
    torch.nn.init.zeros_(model.transformer.proj_out.weight)
    assert found.std() > 0.1
    torch.testing.assert_close(found, stock, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_places_can_be_read_off_pure_noise(model):
    """Without the code in the first blocks, the share explained is 0."""
    torch.manual_seed(2)
    found = []
    hook = model.transformer.blocks[1].register_forward_hook(lambda _m, _a, out: found.append(out))
    model(torch.randn(8, 16, 5, 16, 16), torch.ones(8), [CAPTIONS[0]] * 8, 512)
    hook.remove()
    states = torch.nn.functional.pad(
        torch.nn.functional.layer_norm(found[0], (256,)), (0, 1), value=1
    )
    places = torch.cartesian_prod(torch.arange(5.0), torch.arange(8.0), torch.arange(8.0))
    places -= places.mean(0)
    seen, asked = states[:6].flatten(0, 1), states[6:].flatten(0, 1)
    map_ = torch.linalg.solve(seen.T @ seen + 3 * torch.eye(257), seen.T @ places.repeat(6, 1))
    error = (asked @ map_ - places.repeat(2, 1)).square().mean(0)
    assert (1 - error / places.square().mean(0)).min() > 0.6


@pytest.mark.slow
def test_steps_on_a_fixed_batch_lower_the_loss(cast, tmp_path):
    from embedded.training.run import TrainingRun, flow_optimisers
    from embedded.video.clips import words_of
    from embedded.video.model import VideoModel
    from embedded.video.train import flow_loss

    torch.manual_seed(0)
    model, clean = VideoModel(words_of(cast)), torch.randn(2, 16, 1, 8, 8)
    path = tmp_path / "running.pt"

    def losses():
        torch.manual_seed(1)
        loss = flow_loss(model, clean, CAPTIONS[::2], 512, 1.0)
        loss.backward()
        return {"loss": loss.item()}

    def run():
        return TrainingRun("test", model, flow_optimisers(model, 2e-3, 0.4, 0.15), path, minutes=1)

    first, values = run(), []
    for _ in range(4):
        first.take_step(losses)
        values.append(losses()["loss"])
    assert values[3] < values[0] - 0.01
    first.save()
    resumed = run()
    assert resumed.step == 4
    for old, new in zip(first.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.slow
def test_the_autoencoder_starts_as_a_codec_and_learns(cast):
    from embedded.video.clips import Clip, plain_ground, render_clip
    from embedded.video.vae import (
        VideoVaeTraining,
        decode_unclamped,
        new_video_vae,
        reconstruct,
        to_video,
    )

    torch.manual_seed(0)
    vae = new_video_vae()
    clip = render_clip(cast, Clip(0, "left", plain_ground("teal")), frames=5, pixels=32)
    target = to_video(clip[None])
    with torch.no_grad():
        latents = vae.encode(target).latent_dist.mode()
        assert latents.shape == (1, 16, 2, 4, 4)
        free = decode_unclamped(vae, latents)
        assert torch.equal(free.clamp(-1, 1), vae.decode(latents).sample)
    optimiser = torch.optim.Adam(vae.parameters(), 3e-3)
    values = []
    for _ in range(8):
        optimiser.zero_grad()
        values.append(reconstruct(vae, target, VideoVaeTraining(1))["mse"])
        optimiser.step()
    assert values[-1] < 0.7 * values[0]


def test_the_folder_is_stock_and_small(folder):
    pipe = WanPipeline.from_pretrained(folder)
    assert {type(part).__name__ for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {
        "WanTransformer3DModel",
        "AutoencoderKLWan",
        "UMT5EncoderModel",
    }
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 11.5e6


@pytest.mark.slow
def test_the_command_line_uses_the_embedded_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "EMBEDDED_VIDEO", folder)
    fast = ["--steps", "1", "--refine-steps", "1", "--device", "cpu", "--frames", "5"]
    path = tmp_path / "clip"
    assert main(["sample", CAPTIONS[0], "-o", str(path), *fast]) == 0
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["model"] == "embedded" and record["size"] == [128, 128]
    assert record["density"] == {}
    words = [CAPTIONS[0], "-o", str(tmp_path / "large"), *fast, "--size", "192x160"]
    assert main(["sample", *words]) == 0
    record = json.loads((tmp_path / "large.json").read_text())
    assert record["native"] == [144, 112]
    assert 0 < record["density"]["transformer"] < 1


def test_the_card_is_filled_in(model, folder, tmp_path):
    from embedded.video.export import write_video_card
    from embedded.video.vae import new_video_vae

    figures = ("object", "motion", "both", "prompts", "steps", "guidance", "psnr", "course")
    write_video_card(tmp_path, model, new_video_vae(), {name: f"<{name}>" for name in figures})
    card = (tmp_path / "README.md").read_text()
    assert all(f"<{name}>" in card for name in figures) and not {"$", "{"} & set(card)
    assert "3.8 M" in card
