"""`diffaccel plan`: what a sample would compute, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffaccel.cli.dense_calls import OVERRULE
from diffaccel.cli.options.argument_types import model_source, usable_device
from diffaccel.cli.options.recipe_options import check_recipe, image_job
from diffaccel.cli.options.sample_options import SampleOptions
from diffaccel.cli.video import check_video_options, video_job, video_source
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.pipelines.plan.image import Phase, Plan
    from diffaccel.pipelines.plan.rates import Rates


def plan(
    prompt: str = "",
    /,
    options: Annotated[SampleOptions, Parameter(name="*")] = SampleOptions(),
) -> int:
    """Print what a sample would compute.

    Tokens, attention density, memory and time of each phase, estimated from the model's
    configuration files: no weight is read.

    Args:
        prompt: Is not looked at.
    """
    check_recipe(options)
    return print_plan(options)


def print_plan(options: SampleOptions) -> int:
    """Plans what checked options ask for, and prints it."""
    from diffaccel.machine import device_name
    from diffaccel.pipelines.plan.image import dtype_on
    from diffaccel.pipelines.plan.rates import measure_rates

    device = usable_device(options.device)
    make = _video_plan if options.frames else _image_plan
    plan, model, heads = make(options, device)
    rates = measure_rates(device, dtype_on(device), *heads)
    dtype = str(dtype_on(device)).removeprefix("torch.")
    print(f"{model}: {plan.parameters / 1e6:,.1f} M parameters, {dtype} on {device_name(device)}")
    for phase in plan.phases:
        print(_described(phase, rates))
    print(_total(plan, rates))
    return 0


def _image_plan(options: SampleOptions, device: str) -> tuple[Plan, str, tuple[int, int]]:
    from diffaccel.bindings import UnsupportedModelError
    from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
    from diffaccel.pipelines.image.presets import named_preset
    from diffaccel.pipelines.plan.image import plan_image
    from diffaccel.pipelines.plan.operations import attention_heads
    from diffaccel.pipelines.plan.skeleton import read_outline

    source = model_source(options.model) or EMBEDDED_IMAGE
    outline = read_outline(source)
    model: Any
    (_, model), *_ = outline.denoisers.items()
    sample_size = model.config.get("sample_size")
    preset = named_preset(
        outline.class_name, source, sample_size, outline.vae_scale_factor_spatial
    )
    try:
        plan = plan_image(outline, image_job(None, options, preset), device=device)
    except UnsupportedModelError as error:
        raise InputError(str(error)) from error
    name = "embedded model" if source == EMBEDDED_IMAGE else str(source)
    recipe = options.recipe or preset.recipe
    return plan, f"{name}, recipe {recipe}", attention_heads(model)


def _video_plan(options: SampleOptions, device: str) -> tuple[Plan, str, tuple[int, int]]:
    from diffaccel.pipelines.plan.operations import attention_heads
    from diffaccel.pipelines.plan.skeleton import read_outline
    from diffaccel.pipelines.plan.video import plan_video

    check_video_options(options)
    outline = read_outline(video_source(options), is_video=True)
    plan = plan_video(outline, video_job(outline, None, options), device=device)
    return (
        plan,
        options.model or "embedded model",
        attention_heads(next(iter(outline.denoisers.values()))),
    )


def _described(phase: Phase, rates: Rates) -> str:
    from diffaccel.attach.forecast import EXPECTED_SLOWER

    frames, rows, columns = phase.grid
    grid = f"{rows} x {columns}" if phase.frames == 1 else f"{frames} x {rows} x {columns}"
    pixels = phase.size[0] * phase.size[1] * phase.frames
    text = f" + {phase.text} of text" if phase.text else ""
    shares = phase.shares
    lines = [
        f"{phase.name} ({pixels:,} pixels): {phase.steps} steps, {phase.rows:g} denoiser rows",
        f"  tokens     {phase.visual:,} ({grid}){text}",
        f"  attention  {phase.method}",
    ]
    if phase.note:
        lines.append(f"             {phase.note}")
        if EXPECTED_SLOWER in phase.note:
            lines.append(f"             {OVERRULE}")
    density = (
        f"exact {shares.exact:.2%}, visited {shares.visited:.2%}, ideal {shares.ideal:.2%}"
        if shares.exact is not None
        else "known only after a run"
    )
    lines.append(f"  density    {density}")
    lines.append(f"  memory     {phase.memory / 1e9:.1f} GB at the peak")
    seconds = f"denoising at least {_duration(rates.denoising_seconds(phase))}"
    if phase.autoencoder_flop:
        seconds += f", autoencoder {_duration(rates.autoencoder_seconds(phase))}"
    lines.append(
        f"  time       attention {phase.attention_time:.3g} x dense, denoiser "
        f"{phase.time:.3g} x dense; {seconds}"
    )
    return "\n".join(lines)


def _total(plan: Plan, rates: Rates) -> str:
    seconds = sum(
        rates.denoising_seconds(phase) + rates.autoencoder_seconds(phase) for phase in plan.phases
    )
    memory = max(phase.memory for phase in plan.phases)
    notes = [
        f"together at least {_duration(seconds)} and {memory / 1e9:.1f} GB",
        "how: ratios count operations, dense attention at the same size and steps being 1; "
        "seconds divide them by rates measured here a moment ago on small problems "
        f"(attention {rates.attention / 1e12:.3g}, products {rates.product / 1e12:.3g}, "
        f"convolutions {rates.convolution / 1e12:.3g} TFLOP/s); they are lower bounds, as "
        "work element by element is not counted (measured on a CPU at 4096x4096: about twice as "
        "long); a floor on the attention mass, "
        "loading and text encoding are left out; memory is a rough sum with everything on one "
        "device",
    ]
    return "\n".join([*notes, *(f"note: {note}" for note in plan.notes)])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
