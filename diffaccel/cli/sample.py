"""`diffaccel sample`: text to an image, or with `--frames` to a video, of any size."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated

from cyclopts import Parameter

from diffaccel.cli.dense_calls import described, recorded
from diffaccel.cli.options.argument_types import model_source, usable_device
from diffaccel.cli.options.recipe_options import check_recipe, image_job
from diffaccel.cli.options.sample_options import OUTPUT, SampleOptions
from diffaccel.cli.plan import print_plan
from diffaccel.cli.video import sample_video
from diffaccel.errors import InputError


def sample(
    prompt: str,
    /,
    options: Annotated[SampleOptions, Parameter(name="*")] = SampleOptions(),
    *,
    plan_only: Annotated[bool, OUTPUT] = False,
) -> int:
    """Generate an image or a video from a text.

    Above the model's native size it is refined with sparse attention. The result is written with a
    .json beside it that says how it was made.

    Args:
        prompt: What to draw.
        plan_only: Print what it would compute, see `diffaccel plan`, and stop.
    """
    if not prompt.strip():
        raise InputError("the prompt must not be empty, got nothing; say what to draw")
    check_recipe(options)
    if plan_only:
        return print_plan(options)
    if options.frames:
        return sample_video(prompt, options, options.output or Path("sample.mp4"))
    return sample_image(prompt, options, options.output or Path("sample.png"))


def sample_image(prompt: str, options: SampleOptions, output: Path) -> int:
    """Loads a model, draws and writes."""
    from diffaccel.files import check_image_path, write_image, write_sidecar

    check_image_path(output)

    from diffaccel.attach.attachment import UnsupportedModelError
    from diffaccel.machine import device_name, package_versions
    from diffaccel.methods import FullAttn
    from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
    from diffaccel.pipelines.image.generate import generate_image
    from diffaccel.pipelines.image.job import check_size
    from diffaccel.pipelines.image.presets import EMBEDDED, preset_for
    from diffaccel.pipelines.loading import load_image_pipeline
    from diffaccel.progress import ProgressBars

    if options.size:
        check_size(*options.size)
    device = usable_device(options.device)
    source = model_source(options.model) or EMBEDDED_IMAGE
    if source == EMBEDDED_IMAGE:  # its preset is known without loading it
        image_job(prompt, options, EMBEDDED)
    started = perf_counter()
    pipe = load_image_pipeline(source, device=device)
    preset = preset_for(pipe, source)
    job = image_job(prompt, options, preset)
    try:
        with ProgressBars() as timing:
            result = generate_image(pipe, job, timing=timing)
            with timing.phases({"write": 1}):
                write_image(result.image, output)
    except UnsupportedModelError as error:
        raise InputError(str(error)) from error
    seconds = perf_counter() - started
    record = {
        "command": ["diffaccel", *sys.argv[1:]],
        "prompt": prompt,
        "model": "embedded" if source == EMBEDDED_IMAGE else str(source),
        "size": list(job.size),
        "stages": [list(stage) for stage in result.stages],
        "seed": options.seed,
        "steps": job.native_steps,
        "recipe": options.recipe or preset.recipe,
        "refinement": asdict(job.switches),
        "method": repr(job.method),
        "density": {stage: report.density for stage, report in result.reports.items()},
        "error": {stage: report.worst_error for stage, report in result.reports.items()},
        "attention": recorded(result.reports),
        "seconds": {"total": round(seconds, 3), **result.seconds},
        "device": device_name(device),
        "dtype": str(pipe.transformer.dtype if hasattr(pipe, "transformer") else pipe.unet.dtype),
        "versions": package_versions(),
    }
    write_sidecar(record, output)
    print(f"{output} ({job.label}, {seconds:.1f} s)")
    for stage, report in result.reports.items():
        share = "unknown" if report.density is None else f"{report.density:.1%}"
        worst = report.worst_error
        measured = "" if worst is None else f", error at most {worst:.3f} as measured"
        print(f"  {stage}: {job.method}, {share} of the attention computed{measured}")
        if not isinstance(job.method, FullAttn) and (line := described(stage, report)):
            print(line)
    return 0
