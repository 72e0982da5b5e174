"""How stock video pipelines other than Wan are called, and how they get beyond native size.

Sizes, steps and guidance are the pipelines' own defaults. The recipes are reasoned: their weights
were not at hand. All redraw 0.7 of the schedule under a larger shift, as FreeSwim does (Wu et al.,
2025, https://arxiv.org/abs/2511.14712); where text is joint, the low frequencies of the smaller
clip take the place of its full path (I-Max, Du et al., 2024, https://arxiv.org/abs/2410.07536).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diffaccel.pipelines.redraw.latents import LatentCodec
from diffaccel.pipelines.video.freeswim import FreeSwim


@dataclass(frozen=True, slots=True)
class VideoFamily:
    """Calling conventions of one stock pipeline.

    Attributes:
        native: Size (width, height) in pixels of what it was trained on.
        multiple: Pixels per token along rows and columns.
        frame_step: Frames per latent frame; a clip has 1 more than a multiple of it.
        steps: Denoising steps at native size.
        codec: How the pipeline holds its latents.
        text: Text tokens that join the video's in self-attention, 0 where there are none.
        recipe: How to go above native size.
        arguments: Further arguments of every call.
        latent_step: A clip has 1 more latent frame than a multiple of this.
    """

    native: tuple[int, int]
    multiple: int
    frame_step: int
    steps: int
    codec: LatentCodec = LatentCodec()
    text: int = 0
    recipe: FreeSwim = FreeSwim()
    arguments: dict[str, object] = field(default_factory=dict)
    latent_step: int = 1


_NOISE = FreeSwim(strength=0.5)  # no shift: half of a schedule of noise leaves the composition
VIDEO_FAMILIES: dict[str, VideoFamily] = {
    "AnimateDiffPipeline": VideoFamily((512, 512), 8, 1, 50, recipe=_NOISE),
    "AnyFlowPipeline": VideoFamily((832, 480), 16, 4, 50),
    # Its autoencoder makes 8 frames of 2 latent ones, 9 of 3: only odd numbers come out exact.
    "CogVideoXPipeline": VideoFamily(
        (720, 480),
        16,
        4,
        50,
        LatentCodec("frames-first"),
        text=226,
        recipe=_NOISE,
        latent_step=2,
    ),  # fmt: skip
    "EasyAnimatePipeline": VideoFamily((512, 512), 16, 4, 50, text=256),
    "HunyuanVideo15Pipeline": VideoFamily((848, 480), 16, 4, 50, text=1000),
    "HunyuanVideoPipeline": VideoFamily((1280, 720), 16, 4, 50, text=256),
    "Kandinsky5T2VPipeline": VideoFamily((768, 512), 16, 4, 50, LatentCodec("channels-last")),
    "LTXPipeline": VideoFamily((704, 512), 32, 8, 50, LatentCodec("patches")),
    "MochiPipeline": VideoFamily((848, 480), 16, 6, 64, text=256),
    "MotifVideoPipeline": VideoFamily((1280, 736), 16, 4, 50, text=512),
    "SkyReelsV2Pipeline": VideoFamily((960, 544), 16, 4, 50),
}
