"""Measures whether the embedded U-Net model draws what it is asked for.

Run on its own, it evaluates a finished folder: accuracy over the vocabulary and a contact sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from embedded.arguments import add_vocabulary, evaluating
from embedded.image.evaluate import evaluate
from embedded.vocabulary import load_vocabulary


@dataclass(frozen=True, slots=True)
class UNetCall:
    """Arguments of the pipeline with which the model is used and measured.

    Attributes:
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of guidance towards the prompt.
        size: Side of the picture in pixels.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    size: int = 256


def generate_with_unet(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: UNetCall,
    batch: int = 8,
) -> list[Image.Image]:
    """Generates one picture per prompt."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        pictures += pipe(
            list(prompts[start : start + batch]),
            guidance_scale=call.guidance_scale,
            num_inference_steps=call.num_inference_steps,
            height=call.size,
            width=call.size,
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
        ).images
    return pictures


def main() -> None:
    """Evaluates a pipeline folder."""
    parser = evaluating(__doc__, "unet-evaluation")
    add_vocabulary(parser)
    usual = UNetCall()
    parser.add_argument("--steps", type=int, default=usual.num_inference_steps)
    parser.add_argument("--cfg", type=float, default=usual.guidance_scale)
    parser.add_argument("--size", type=int, default=usual.size)
    args = parser.parse_args()
    vocabulary = load_vocabulary(args.packages, args.vocabulary)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None)
    call = UNetCall(args.steps, args.cfg, args.size)
    print(evaluate(pipe, vocabulary, args.out, call, args.count, draw=generate_with_unet))
