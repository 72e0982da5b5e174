"""Where a run stands: by the scheduler's own list and index, in any dtype, wherever it starts."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from diffaccel import FullAttn, HeadPerturbation, NeighborhoodAttn, set_attn_processor

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))
)


def scheduler_for(name, family):
    """Returns a scheduler that makes a flow of a flow model, or skips."""
    scheduler_class = getattr(diffusers, name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    is_flow = family != "sd15"
    if is_flow and "use_flow_sigmas" not in accepted and "Flow" not in name and "RF" not in name:
        pytest.skip("not for flow models")
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if is_flow else {}
    try:
        return scheduler_class(**settings)
    except (ImportError, TypeError) as error:
        pytest.skip(f"cannot be built: {error}")


def with_scheduler(tiny, name, family):
    tiny.pipe.scheduler = scheduler_for(name, family)
    try:
        return tiny.sample(num_inference_steps=STEPS)
    except Exception as error:  # noqa: BLE001 - the stock pipeline does not run with it
        pytest.skip(f"stock does not run with it: {type(error).__name__}")


@pytest.mark.parametrize("family", ["sd15", "wan2.1"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_the_steps_that_were_asked_for(tiny_pipelines, name, family):
    tiny = tiny_pipelines.BUILDERS[family]()
    with_scheduler(tiny, name, family)
    attachment = set_attn_processor(tiny.pipe, FullAttn())
    for _ in range(2):
        tiny.sample(num_inference_steps=STEPS)
        assert attachment.report().denoisers[0].steps == STEPS


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DDIMScheduler"]
)
def test_dense_steps_are_whole_steps(tiny_pipelines, name):
    """Of a step that calls the model twice, both calls are dense."""
    tiny = tiny_pipelines.sd15()
    with_scheduler(tiny, name, "sd15")
    calls = []
    handle = tiny.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    method = NeighborhoodAttn(4, dense_steps=2, dense_layers=())
    attachment = set_attn_processor(tiny.pipe, method, always=True)
    tiny.sample(num_inference_steps=STEPS)
    handle.remove()
    (denoiser,) = attachment.report().denoisers
    assert sorted(denoiser.dense_steps) == [0, 1] and denoiser.steps == STEPS
    per_step = {"PNDMScheduler": 8, "DDIMScheduler": 2}.get(name, 4)
    assert denoiser.layers[0].dense_calls == {"dense_steps=2": per_step}
    assert denoiser.layers[0].sparse_calls == len(calls) - per_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "steps"), [(64, 28), (2048, 28), (4096, 50)])
def test_rounded_timesteps_hide_no_step(dtype, size, steps):
    """At 4096 pixels all timesteps of FLUX are one number in bf16."""
    heads = dict(attention_head_dim=8, num_attention_heads=1, axes_dims_rope=(2, 2, 4))
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=0, num_single_layers=1, joint_attention_dim=8,
        pooled_projection_dim=8, **heads,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=4096, shift=3.0
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(scheduler=scheduler, transformer=model.to(dtype), **parts)
    pipe.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(steps, mu=shift_of(size))
    seen = []
    attachment = set_attn_processor(pipe, FullAttn())
    state = model._forward_pre_hooks
    clock = next(iter(state.values())).__self__.method.clock
    for timestep in scheduler.timesteps:
        clock.tick(timestep.to(dtype) / 1000, pipe)
        seen.append(clock.step)
        scheduler.step(torch.zeros(1, 4, 4), timestep, torch.zeros(1, 4, 4))
    attachment.remove()
    assert seen == list(range(steps)) and clock.planned == steps


def shift_of(size):
    """The shift of FLUX for a square picture."""
    tokens = (size // 16) ** 2
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def image_to_image(tiny_pipelines, scheduler):
    tiny = tiny_pipelines.sd15()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=tiny.pipe.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    embeds = {k: v for k, v in tiny.arguments.items() if "prompt_embeds" in k}

    def sample(**changes):
        with torch.no_grad():
            return pipe(
                image=torch.rand(1, 3, 32, 48), **embeds, output_type="latent", **changes
            ).images

    return pipe, sample


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler",
     "DPMSolverMultistepScheduler"],
)  # fmt: skip
def test_image_to_image_counts_the_steps_that_run(tiny_pipelines, name, strength):
    settings = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe, sample = image_to_image(tiny_pipelines, getattr(diffusers, name)(**settings))
    attachment = set_attn_processor(pipe, FullAttn())
    clock = next(iter(pipe.unet._forward_pre_hooks.values())).__self__.method.clock
    # The list of PNDM has one entry more, a repeated one that runs at full strength only.
    steps = round(10 * strength) + (name == "PNDMScheduler" and strength < 1)
    first = []
    handle = pipe.unet.register_forward_hook(lambda *_: first.append(clock.progress))
    for _ in range(2):
        first.clear()
        sample(num_inference_steps=10, strength=strength)
        assert attachment.report().denoisers[0].steps == clock.planned == steps
        assert first[0] == pytest.approx(1 - strength, abs=0.11)
    handle.remove()


def test_windows_of_guidance_are_shares_of_the_steps_that_run(tiny_pipelines):
    pipe, sample = image_to_image(tiny_pipelines, diffusers.DDIMScheduler())
    with pipe.set_guidance(HeadPerturbation(layers=(1,)), start=0.5, stop=1.0) as guidance:
        sample(num_inference_steps=10, strength=0.4)
        assert (guidance.report().steps, guidance.report().guided_steps) == (4, 2)


def test_an_early_end_counts_the_steps_that_ran(tiny_pipelines):
    tiny = tiny_pipelines.wan21()
    attachment = set_attn_processor(tiny.pipe, FullAttn())

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    tiny.sample(num_inference_steps=5, callback_on_step_end=stop)
    assert attachment.report().denoisers[0].steps == 2
    tiny.sample(num_inference_steps=5)
    assert attachment.report().denoisers[0].steps == 5


def test_a_run_of_one_step_is_a_run(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    attachment = set_attn_processor(tiny.pipe, FullAttn())
    for _ in range(3):
        tiny.sample(num_inference_steps=1)
        (denoiser,) = attachment.report().denoisers
        assert denoiser.steps == 1 and denoiser.layers[0].dense_calls != {}
        assert sum(denoiser.layers[0].dense_calls.values()) == 1


def test_inversion_is_one_run(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    attachment = set_attn_processor(tiny.pipe, FullAttn())
    scheduler = diffusers.DDIMInverseScheduler()
    tiny.pipe.scheduler = scheduler
    tiny.sample(num_inference_steps=STEPS)
    assert attachment.report().denoisers[0].steps == STEPS


def test_a_model_without_a_pipeline_follows_its_timesteps(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    model = tiny.pipe.unet
    attachment = set_attn_processor(model, FullAttn())
    arguments = {"sample": torch.randn(1, 4, 8, 8)}
    text = tiny.arguments["prompt_embeds"]
    for timesteps in ([900, 900, 500, 100], [100, 500, 900], [900]):
        attachment.reset()
        for timestep in timesteps:
            with torch.no_grad():
                model(timestep=torch.tensor(timestep), encoder_hidden_states=text, **arguments)
        assert attachment.report().denoisers[0].steps == len(set(timesteps))


def test_the_pipeline_that_runs_tells_the_steps_of_a_shared_model(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    first = tiny.pipe
    second = diffusers.StableDiffusionPipeline.from_pipe(first, requires_safety_checker=False)
    second.scheduler = diffusers.HeunDiscreteScheduler()
    second.set_progress_bar_config(disable=True)
    attachment = set_attn_processor(first, FullAttn())
    tiny.sample(num_inference_steps=3)
    tiny.pipe = second
    tiny.sample(num_inference_steps=5)
    assert attachment.report().denoisers[0].steps == 5
