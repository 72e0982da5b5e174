"""Measures whether the embedded video model shows the object and the motion it is asked for.

Run on its own, it evaluates a finished folder: figures, a contact sheet and a preview.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image

from diffaccel.quality.contact_sheet import grid
from embedded.arguments import evaluating
from embedded.image.evaluate import border_colour, object_features
from embedded.video.clips import (
    FRAMES,
    MOTIONS,
    PIXELS,
    Actor,
    Clip,
    held_out_clips,
    load_cast,
    plain_caption,
    render_clip,
    render_frame,
)

SHEET_PROMPTS = (
    "a rocket flies to the left",
    "a red apple bounces on a blue background",
    "a butterfly flies up on a green background",
    "a fish swims to the right on a teal background",
    "a star turns on a purple background",
    "a heart grows on a pink background",
    "a car drives to the left on a yellow background",
    "a balloon shrinks on an orange background",
)
SHEET_FRAMES = (0, 4, 8, 12, 16)
TURN_WEIGHT = 0.1  # of how the object looks at the end, against where it was
FOREGROUND = 0.12  # difference from the background, in 0 to 1


@dataclass(frozen=True, slots=True)
class VideoCall:
    """Arguments of the pipeline with which the model is used and measured.

    Attributes:
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of guidance towards the prompt.
        max_sequence_length: Rows to which prompts are padded.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    max_sequence_length: int = 512


def generate_clips(
    pipe: WanPipeline, prompts: list[str], seeds: list[int], call: VideoCall, batch: int = 4
) -> list[np.ndarray]:
    """Generates one clip (17, 128, 128, 3), uint8, per prompt."""
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        frames = pipe(
            part,
            negative_prompt=[""] * len(part),
            num_frames=FRAMES,
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=call.num_inference_steps,
            guidance_scale=call.guidance_scale,
            max_sequence_length=call.max_sequence_length,
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
        ).frames
        clips += list((frames * 255).round().astype(np.uint8))
    return clips


def shows_object(cast: tuple[Actor, ...], clip: Clip, video: np.ndarray) -> bool:
    """Whether the asked object is nearest of all, at the moment when it is seen best.

    Every object of the cast is drawn doing the same on the same background, and compared by
    `object_features`.

    Args:
        cast: The objects.
        clip: What was asked for.
        video: (F, H, W, 3) uint8.
    """
    progress = {"turn": 0.0, "shrink": 0.0, "grow": 1.0}.get(clip.motion, 0.5)
    found = object_features(video[round(progress * (len(video) - 1))])
    scores = [
        object_features(render_frame(cast, replace(clip, actor=other), progress, PIXELS)) @ found
        for other in range(len(cast))
    ]
    return int(np.argmax(scores)) == clip.actor


def track(video: np.ndarray) -> np.ndarray:
    """Follows what stands in front of the background.

    Args:
        video: (F, H, W, 3) uint8.

    Returns:
        (F, 3): centre from the left and from the top, and root of the area, in units of the
        picture's side.
    """
    found = []
    for picture in video:
        pixels = picture.astype(np.float32) / 255
        mask = np.abs(pixels - border_colour(pixels)).max(axis=-1) > FOREGROUND
        rows, columns = np.nonzero(mask)
        if len(rows) == 0:
            found.append((0.5, 0.5, 0.0))
            continue
        height, width = mask.shape
        found.append((columns.mean() / width, rows.mean() / height, mask.mean() ** 0.5))
    return np.array(found)


def shows_motion(cast: tuple[Actor, ...], clip: Clip, video: np.ndarray) -> bool:
    """Whether the asked motion of the asked object is nearest of all motions.

    Motions differ by the root mean square between tracks, plus a tenth of the difference in
    `object_features` of the last frames, which tells turning from rest.
    """
    own, last = track(video), object_features(video[-1])
    distances = []
    for motion in MOTIONS:
        shown = render_clip(cast, replace(clip, motion=motion), len(video))
        likeness = float(object_features(shown[-1]) @ last)
        distance = np.sqrt(np.square(track(shown) - own).mean())
        distances.append(distance + TURN_WEIGHT * (1 - likeness))
    return MOTIONS[int(np.argmin(distances))] == clip.motion


def draw_sheets(pipe: WanPipeline, out: Path, call: VideoCall) -> None:
    """Draws fixed prompts: five frames of each as contact.png, all frames as preview.webp."""
    videos = generate_clips(pipe, list(SHEET_PROMPTS), list(range(len(SHEET_PROMPTS))), call)
    frames = [Image.fromarray(video[index]) for video in videos for index in SHEET_FRAMES]
    grid(frames, len(SHEET_FRAMES)).save(out / "contact.png")
    moments = [
        grid([Image.fromarray(video[index]) for video in videos], 4) for index in range(FRAMES)
    ]
    moments[0].save(
        out / "preview.webp", save_all=True, append_images=moments[1:], duration=90, quality=80
    )


def evaluate_video(
    pipe: WanPipeline, cast: tuple[Actor, ...], out: Path, call: VideoCall, count: int = 48
) -> dict[str, float]:
    """Measures on clips that training never saw, and draws the sheets.

    Args:
        pipe: The pipeline.
        cast: What it should be able to show.
        out: Folder for `evaluation.json`, `contact.png` and `preview.webp`.
        call: How to call the pipeline.
        count: Number of prompts.

    Returns:
        Shares of prompts whose object is right, whose motion is right, and both.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    draw_sheets(pipe, out, call)
    clips = held_out_clips(random.Random(5), cast)[:count]
    prompts = [plain_caption(cast, clip) for clip in clips]
    videos = generate_clips(pipe, prompts, list(range(len(prompts))), call)
    objects, motions = (
        [judge(cast, clip, video) for clip, video in zip(clips, videos, strict=True)]
        for judge in (shows_object, shows_motion)
    )
    both = [a and b for a, b in zip(objects, motions, strict=True)]
    figures = {
        "prompts": len(prompts),
        **{
            name: sum(right) / len(right)
            for name, right in (("object", objects), ("motion", motions), ("both", both))
        },
    }
    missed = {
        prompt: {"object": a, "motion": b}
        for prompt, a, b in zip(prompts, objects, motions, strict=True)
        if not (a and b)
    }
    report = {**figures, "call": repr(call), "missed": missed}
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return figures


def main() -> None:
    """Evaluates a pipeline folder."""
    parser = evaluating(__doc__, "video-evaluation", 48)
    usual = VideoCall()
    parser.add_argument("--steps", type=int, default=usual.num_inference_steps)
    parser.add_argument("--guidance", type=float, default=usual.guidance_scale)
    parser.add_argument("--length", type=int, default=usual.max_sequence_length)
    args = parser.parse_args()
    pipe = WanPipeline.from_pretrained(args.model)
    call = VideoCall(args.steps, args.guidance, args.length)
    print(evaluate_video(pipe, load_cast(args.packages), args.out, call, args.count))
