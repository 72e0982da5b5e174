"""`diffaccel sample`: text to an image, or with `--frames` to a video, of any size."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from diffaccel.cli import plan
from diffaccel.cli import video as sample_video
from diffaccel.cli.options.argument_types import at_least, model_source, parse_size, usable_device
from diffaccel.cli.options.method_options import add_method_options
from diffaccel.cli.options.recipe_options import add_recipe_options, check_recipe, chosen_recipe
from diffaccel.errors import InputError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "sample",
        help="generate an image or a video from a text",
        description="Generates an image, or a video with --frames. Above the model's native size "
        "it is refined with sparse attention. Writes the result and a .json beside it.",
    )
    parser.add_argument("prompt", help="what to draw")
    add_options(parser)
    parser.add_argument(
        "--plan-only",
        action="store_true",
        help="print what it would compute, see `diffaccel plan`, and stop",
    )
    parser.set_defaults(execute=execute)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `sample` and `plan` have in common to a parser."""
    parser.add_argument(
        "--model",
        type=model_source,
        metavar="ID_OR_FOLDER",
        help="diffusers folder or hub name (default: the small transformer in the package; "
        "embedded-unet is the small U-Net in it)",
    )
    parser.add_argument(
        "--size", metavar="WxH", help="in pixels, multiples of 16 (default: the native size)"
    )
    add_method_options(parser)
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="steps at native size")
    add_recipe_options(parser)
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="S", help="of the noise (default: 0)"
    )
    parser.add_argument(
        "--frames", type=at_least(1), metavar="N", help="makes a video, of 4 k + 1 frames"
    )
    parser.add_argument(
        "--fps", type=at_least(1), default=16, metavar="F", help="of a video (default: 16)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".png, .jpg or .webp; of a video .mp4, or a new folder for its frames as .png "
        "(default: sample.png or sample.mp4)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best one)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Checks the arguments, then loads, generates and writes."""
    if not arguments.prompt.strip():
        raise InputError("the prompt must not be empty, got nothing; say what to draw")
    check_recipe(arguments)
    if arguments.plan_only:
        return plan.execute(arguments)
    size = parse_size(arguments.size) if arguments.size else None
    arguments.output = arguments.output or Path("sample.mp4" if arguments.frames else "sample.png")
    if arguments.frames:
        from diffaccel.machine import best_device

        arguments.device = usable_device(arguments.device or best_device())
        return sample_video.execute(arguments, size)

    from diffaccel.files import check_image_path, write_image, write_sidecar

    check_image_path(arguments.output)

    from diffaccel.attach.attachment import UnsupportedModelError
    from diffaccel.machine import best_device, device_name, package_versions
    from diffaccel.pipelines.image.generate import check_size, generate_image
    from diffaccel.pipelines.image.presets import EMBEDDED, preset_for
    from diffaccel.pipelines.loading import EMBEDDED_IMAGE, load_image_pipeline
    from diffaccel.progress import ProgressBars

    if size:
        check_size(*size)
    device = usable_device(arguments.device or best_device())
    source = arguments.model or EMBEDDED_IMAGE
    if source == EMBEDDED_IMAGE:  # its preset is known without loading it
        chosen_recipe(arguments, EMBEDDED)
    started = perf_counter()
    pipe = load_image_pipeline(source, device=device)
    preset = preset_for(pipe, source)
    refinement, method = chosen_recipe(arguments, preset)
    width, height = size or (preset.native, preset.native)
    try:
        with ProgressBars() as timing:
            result = generate_image(
                pipe,
                arguments.prompt,
                width,
                height,
                preset=preset,
                method=method,
                steps=arguments.steps,
                refinement=refinement,
                seed=arguments.seed,
                timing=timing,
            )
            with timing.phases({"write": 1}):
                write_image(result.image, arguments.output)
    except UnsupportedModelError as error:
        raise InputError(str(error)) from error
    seconds = perf_counter() - started
    record = {
        "command": ["diffaccel", *sys.argv[1:]],
        "prompt": arguments.prompt,
        "model": "embedded" if source == EMBEDDED_IMAGE else str(source),
        "size": [width, height],
        "stages": [list(stage) for stage in result.stages],
        "seed": arguments.seed,
        "steps": arguments.steps or preset.steps,
        "recipe": arguments.recipe or preset.recipe,
        "refinement": asdict(refinement),
        "method": repr(method),
        "density": {stage: report.density for stage, report in result.reports.items()},
        "seconds": {"total": round(seconds, 3), **result.seconds},
        "device": device_name(device),
        "dtype": str(pipe.transformer.dtype if hasattr(pipe, "transformer") else pipe.unet.dtype),
        "versions": package_versions(),
    }
    write_sidecar(record, arguments.output)
    print(f"{arguments.output} ({width}x{height}, {seconds:.1f} s)")
    for stage, report in result.reports.items():
        print(f"  {stage}: {method}, {report.density:.1%} of the attention computed")
    return 0
