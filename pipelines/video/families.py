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
from diffaccel.pipelines.video.long_video import TimeWindows


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
        given_frames: Latent frames at the beginning that a given picture decides.
        frame_axis: Axis of the denoiser's latents along which frames lie; None for packed tokens.
        windows: How to go beyond the native length, or why that is not possible.
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
    given_frames: int = 0
    frame_axis: int | None = 2
    windows: TimeWindows | str = TimeWindows()


_NOISE = FreeSwim(strength=0.5)  # no shift: half of a schedule of noise leaves the composition
_CHANNELS_LAST = LatentCodec("channels-last")
_PATCHES = LatentCodec("patches")


_GIVEN = "a given first frame belongs to one window alone"
_SOUND = "sound is denoised together with all frames"
_STATISTICS = "the statistics of its autoencoder are those of single frames, and end with 16"


def _of_length(latent_frames: int) -> TimeWindows:
    """Windows of native length that share 3 of 8 frames with each neighbour, as Wan's do."""
    return TimeWindows(latent_frames, latent_frames * 3 // 8)


VIDEO_FAMILIES: dict[str, VideoFamily] = {
    "AnimateDiffPipeline": VideoFamily(
        (512, 512), 8, 1, 50, recipe=_NOISE, windows=_of_length(16)
    ),
    "AnyFlowPipeline": VideoFamily((832, 480), 16, 4, 50, frame_axis=1),
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
        frame_axis=1,
        windows=_of_length(13),
    ),  # fmt: skip
    "CogVideoXImageToVideoPipeline": VideoFamily(
        (720, 480),
        16,
        4,
        50,
        LatentCodec("frames-first"),
        text=226,
        recipe=_NOISE,
        latent_step=2,
        windows=_GIVEN,
    ),  # fmt: skip
    "Cosmos2_5_PredictBasePipeline": VideoFamily((1280, 704), 16, 4, 36, windows=_of_length(24)),
    # Its noise has no shift: at 0.7 of the schedule it is 12 times as large as the clip.
    "CosmosTextToWorldPipeline": VideoFamily((1280, 704), 16, 8, 36, windows=_STATISTICS),
    "CosmosVideoToWorldPipeline": VideoFamily((1280, 704), 16, 8, 36, windows=_GIVEN),
    "EasyAnimatePipeline": VideoFamily((512, 512), 16, 4, 50, text=256, windows=_of_length(13)),
    "HunyuanVideo15Pipeline": VideoFamily(
        (848, 480), 16, 4, 50, text=1000, windows=_of_length(31)
    ),
    "HunyuanVideoPipeline": VideoFamily((1280, 720), 16, 4, 50, text=256, windows=_of_length(33)),
    "Kandinsky5I2VPipeline": VideoFamily(
        (768, 512), 16, 4, 50, _CHANNELS_LAST, given_frames=1, windows=_GIVEN
    ),
    "Kandinsky5T2VPipeline": VideoFamily(
        (768, 512), 16, 4, 50, _CHANNELS_LAST, frame_axis=1, windows=_of_length(31)
    ),
    "LTX2ImageToVideoPipeline": VideoFamily(
        (768, 512), 32, 8, 30, _PATCHES, given_frames=1, windows=_GIVEN
    ),
    "LTX2Pipeline": VideoFamily((768, 512), 32, 8, 30, _PATCHES, windows=_SOUND),
    "LTXImageToVideoPipeline": VideoFamily(
        (704, 512), 32, 8, 50, _PATCHES, given_frames=1, windows=_GIVEN
    ),
    "LTXPipeline": VideoFamily(
        (704, 512), 32, 8, 50, _PATCHES, frame_axis=None, windows=_of_length(21)
    ),
    "MochiPipeline": VideoFamily((848, 480), 16, 6, 64, text=256, windows=_of_length(28)),
    "MotifVideoPipeline": VideoFamily((1280, 736), 16, 4, 50, text=512, windows=_of_length(31)),
    "SkyReelsV2ImageToVideoPipeline": VideoFamily((960, 544), 16, 4, 50, windows=_GIVEN),
    "SkyReelsV2Pipeline": VideoFamily((960, 544), 16, 4, 50, windows=_of_length(25)),
}
REFUSED: dict[str, str] = {
    "AnyFlowFARPipeline": "it denoises chunk after chunk, each from noise, against cached ones",
    "Cosmos2VideoToWorldPipeline": "its sigmas rise to 80 where its flow scheduler noises up to 1",
    "Cosmos2TextToImagePipeline": "its sigmas rise to 80 where its flow scheduler noises up to 1",
    "Cosmos2_5_TransferPipeline": "it denoises chunk after chunk, each from noise",
    "Cosmos3OmniPipeline": "it denoises sound and actions in one sequence with its frames",
    "HeliosPipeline": "it denoises chunk after chunk, each from noise, after a history",
    "HeliosPyramidPipeline": "it denoises chunk after chunk, at sizes that grow in each",
    "HunyuanVideoFramepackPipeline": "it denoises section after section, each from noise",
    "MiniMaxH3ModularPipeline": "it is made of modular blocks, which lay text, sound and frames "
    "out in one sequence and have no prepare_latents",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "each of its frames has a schedule of its "
    "own",
    "SkyReelsV2DiffusionForcingPipeline": "each of its frames has a schedule of its own",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "each of its frames has a schedule of its "
    "own",
}
"""Pipelines that do not go beyond their native size, and what stops them."""
