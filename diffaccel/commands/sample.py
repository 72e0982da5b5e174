"""`diffaccel sample`: text to an image, or with `--frames` to a video, of any size."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from diffaccel.commands import sample_video
from diffaccel.commands.method_options import add_method_options, check_knob_names, parse_method
from diffaccel.commands.sample_video import RECIPES
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
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="diffusers folder or hub name (default: the small model in the package)",
    )
    parser.add_argument(
        "--size", metavar="WxH", help="in pixels, multiples of 16 (default: the native size)"
    )
    add_method_options(parser)
    parser.add_argument("--steps", type=_at_least(1), metavar="N", help="steps at native size")
    parser.add_argument(
        "--refine-steps", type=_at_least(1), metavar="N", help="steps of each larger stage"
    )
    parser.add_argument(
        "--strength",
        type=_strength,
        metavar="S",
        help="share of the noise schedule that larger stages redo, in (0, 1]",
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="S", help="of the noise (default: 0)"
    )
    parser.add_argument(
        "--frames", type=_at_least(1), metavar="N", help="makes a video, of 4 k + 1 frames"
    )
    parser.add_argument(
        "--fps", type=_at_least(1), default=16, metavar="F", help="of a video (default: 16)"
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=RECIPES[0],
        help="how a video goes beyond what the model knows: freeswim for its size, windows for "
        "its length (default: freeswim)",
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
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Checks the arguments, then loads, generates and writes."""
    if not arguments.prompt.strip():
        raise InputError("the prompt must not be empty, got nothing; say what to draw")
    size = _parse_size(arguments.size) if arguments.size else None
    arguments.output = arguments.output or Path("sample.mp4" if arguments.frames else "sample.png")
    if arguments.frames:
        from diffaccel.environment import best_device

        arguments.device = _check_device(arguments.device or best_device())
        return sample_video.execute(arguments, size)
    if arguments.method:
        parse_method(arguments.method, arguments.knobs)  # refuses before anything is loaded
    else:
        check_knob_names(arguments.knobs)

    from diffaccel.output import check_image_path, write_image, write_sidecar

    check_image_path(arguments.output)

    from diffaccel.attach import UnsupportedModelError
    from diffaccel.environment import best_device, device_name, package_versions
    from diffaccel.pipelines.image import check_size, generate_image
    from diffaccel.pipelines.loading import EMBEDDED_IMAGE, load_image_pipeline
    from diffaccel.pipelines.presets import EMBEDDED, preset_for
    from diffaccel.progress import ProgressBars

    if size:
        check_size(*size)
    device = _check_device(arguments.device or best_device())
    source = arguments.model or EMBEDDED_IMAGE
    if source == EMBEDDED_IMAGE:  # its preset is known without loading it
        parse_method(arguments.method or EMBEDDED.method, arguments.knobs, EMBEDDED.knobs)
    started = perf_counter()
    pipe = load_image_pipeline(source, device=device)
    preset = preset_for(pipe, source)
    method = parse_method(arguments.method or preset.method, arguments.knobs, preset.knobs)
    refinement = replace(
        preset.refinement,
        steps=arguments.refine_steps or preset.refinement.steps,
        strength=arguments.strength or preset.refinement.strength,
    )
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
        "refinement": {"steps": refinement.steps, "strength": refinement.strength},
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


def _parse_size(text: str) -> tuple[int, int]:
    """Reads `WxH`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match:
        raise InputError(f"--size must be WxH in pixels, got {text!r}; write --size 1024x768")
    return int(match[1]), int(match[2])


def _at_least(least: int) -> Callable[[str], int]:
    """Returns an argument type for integers of at least `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text}")
        return number

    return parse


def _strength(text: str) -> float:
    """Reads a share in (0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return number


def _check_device(name: str) -> str:
    """Returns the name if PyTorch can put a tensor there."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device must be usable by PyTorch, got {name!r} ({reason}); try --device cpu"
        ) from error
    return name
