"""Compares attention methods above native size with the truth: the vector drawing at that size.

A scene of the training set is rendered small, refined to the large size by each method, and
compared with its own large rendering:

    python samples/embedded compare methods --packages build/embedded/packages
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffaccel import FullAttn, NeighborhoodAttn, RectifiedSpaAttn, SparseAttn
from diffaccel.methods import Method
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.image import ImageJob, refine_image
from diffaccel.pipelines.image.presets import EMBEDDED
from diffaccel.pipelines.loading import load_image_pipeline
from diffaccel.progress import Timing
from diffaccel.quality.pictures import gradient_agreement, psnr
from embedded.scenes import BACKGROUNDS, Background, Placed, Scene, plain_caption, render
from embedded.vocabulary import Thing, load_vocabulary

METHODS: tuple[Method, ...] = (
    FullAttn(),
    SparseAttn(0.1),
    SparseAttn(0.1, neighbors=True, selector="pooled", corrector="none"),
    RectifiedSpaAttn(0.9, p_remain=0.0),
    RectifiedSpaAttn(0.9, p_remain=0.0, correction="centroids"),
    NeighborhoodAttn(16),
)
PAIR = ("red apple", "rocket", "blue")


def scene_of(vocabulary: Sequence[Thing], first: str, second: str, background: str) -> Scene:
    """Puts two objects side by side on a plain background."""
    number = {thing.names[0]: index for index, thing in enumerate(vocabulary)}
    placed = (
        Placed(number[first], 0.035, 0.275, 0.45),
        Placed(number[second], 0.515, 0.275, 0.45),
    )
    return Scene(placed, Background((background,), (BACKGROUNDS[background],), 0))


def main() -> None:
    """Writes the pictures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path("build/embedded/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/embedded/methods"))
    parser.add_argument("--start", type=int, default=512, help="side of the small picture")
    parser.add_argument("--size", type=int, default=2048, help="side of the large picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    vocabulary = load_vocabulary(args.packages)
    pipe = load_image_pipeline(EMBEDDED_IMAGE, device="cpu")
    first, second, background = PAIR
    scene = scene_of(vocabulary, first, second, background)
    things = tuple(placed.thing for placed in scene.objects)
    prompt = plain_caption(tuple(vocabulary), things, background)
    small = Image.fromarray(render(vocabulary, scene, args.start))
    truth = render(vocabulary, scene, args.size)
    print("| method | attended | denoising, s | PSNR, dB | edges |")
    print("|---|---|---|---|---|")
    for number, method in enumerate(METHODS):
        timing = Timing()
        job = ImageJob(prompt, (args.size, args.size), EMBEDDED, method)
        refined, report = refine_image(pipe, job, small, timing=timing)
        refined.save(args.out / f"{number}-{type(method).__name__}.png")
        seconds = timing.seconds[f"denoise {job.label}"]
        picture = np.asarray(refined)
        print(
            f"| `{method!r}` | {report.density:.1%} | {seconds:.1f} | "
            f"{psnr(picture, truth):.2f} | {gradient_agreement(picture, truth):.2f} |",
            flush=True,
        )
