"""Makes the embedded video model: fetches the data, trains, evaluates and writes the folder.

Every stage leaves a file in the work folder. A run that was interrupted goes on from there; a
finished stage is not repeated.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

from embedded.arguments import making, started
from embedded.video.clips import Actor, load_cast
from embedded.video.evaluate import VideoCall, evaluate_video
from embedded.video.export import export_video, load_video_model, write_video_card
from embedded.video.latents import draw_chunks
from embedded.video.train import VideoStage, train_video_stage
from embedded.video.vae import VideoVaeTraining, held_out_psnr, train_video_vae

CHUNKS = 12  # four clips of every object and motion
CLOSE_UPS = 6  # two of each


def stages(
    minutes: float, scale: int, learning_rate: float, is_new: bool
) -> tuple[VideoStage, ...]:
    """Plans the diffusion training: mostly first frames, which are cheap, then whole clips.

    Some whole clips are among the first frames, so that the model does not forget about time.

    Args:
        minutes: Wall-clock length of both.
        scale: Multiplies the number of clips.
        learning_rate: Peak rate.
        is_new: Whether training starts from untrained weights; else there are whole clips alone.
    """
    share = 0.3 if is_new else 0.0
    first = VideoStage(
        "first-frames",
        minutes=share * minutes,
        learning_rate=learning_rate,
        chunks=CHUNKS * scale,
        tokens=2048,
        frames=(1, 1, 1, 5),
        decay=0.35,
    )
    clips = VideoStage(
        "clips",
        minutes=(1 - share) * minutes,
        learning_rate=(0.8 if is_new else 1.0) * learning_rate,
        chunks=CHUNKS * scale,
        tokens=5120,
        close_ups=CLOSE_UPS * scale,
        decay=0.75,
        average=0.98,
        seed=1,
    )
    return (first, clips) if is_new else (clips,)


def codecs_of(minutes: float) -> tuple[VideoVaeTraining, ...]:
    """Plans the training of the autoencoder: clips, then close-ups too, which move faster."""
    close = VideoVaeTraining(
        minutes=0.35 * minutes, name="vae-close", learning_rate=5e-4, pictures=0.0, close_ups=0.6
    )
    return VideoVaeTraining(minutes=0.65 * minutes), close


def load_vae(folder: Path) -> AutoencoderKLWan:
    """Loads the autoencoder of a finished pipeline."""
    return AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()


def course(work: Path, codecs: tuple[VideoVaeTraining, ...], plan: tuple[VideoStage, ...]) -> str:
    """Says how long the stages were, as rows of a table."""
    rows = []
    for codec in codecs:
        state = torch.load(work / f"{codec.name}.pt", weights_only=True)
        shown = "single frames, then clips" if codec.pictures else "clips and close-ups"
        rows.append(f"| autoencoder: {shown}, {minutes_of(state)} | {state['step']:,} steps |")
    for stage in plan:
        state = torch.load(work / f"{stage.name}-running.pt", weights_only=True)
        frames = ", ".join(map(str, stage.frames))
        rows.append(
            f"| {stage.name}: first {frames} latent frames in turn, {minutes_of(state)} "
            f"| {state['step']:,} steps of {stage.tokens:,} tokens |"
        )
    return "\n".join(rows)


def minutes_of(state: dict) -> str:
    """Says how long the run of a checkpoint has taken."""
    return f"{state['spent_s'] / 60:.0f} minutes"


def train_codecs(
    cast: tuple[Actor, ...], codecs: tuple[VideoVaeTraining, ...], work: Path
) -> AutoencoderKLWan:
    """Trains the autoencoder in stages, each from the one before."""
    start: Path | None = None
    for codec in codecs:
        vae = train_video_vae(cast, codec, work, start)
        start = work / codec.name
    return vae


def finish_video(
    cast: tuple[Actor, ...],
    vae: AutoencoderKLWan,
    weights: Path,
    course: str,
    work: Path,
    folder: Path,
    count: int,
) -> None:
    """Exports the model, evaluates the folder and writes its sheets and card."""
    model = load_video_model(cast, weights)
    export_video(model, vae, folder)
    call, evaluation = VideoCall(), work / "evaluation"
    figures = evaluate_video(WanPipeline.from_pretrained(folder), cast, evaluation, call, count)
    print(figures)
    Image.open(evaluation / "contact.png").save(folder / "contact.jpg", quality=88)
    (folder / "preview.webp").write_bytes((evaluation / "preview.webp").read_bytes())
    told = {name: f"{value:.0%}" for name, value in figures.items() if name != "prompts"}
    told |= {
        "prompts": str(figures["prompts"]),
        "steps": str(call.num_inference_steps),
        "guidance": str(call.guidance_scale),
        "psnr": f"{held_out_psnr(vae, cast):.1f}",
        "course": course,
    }
    write_video_card(folder, model, vae, told)


def main() -> None:
    """Runs every stage that has not been finished in the work folder."""
    parser = making(__doc__, "build/embedded-video")
    parser.add_argument("--vae-minutes", type=float, default=28.0)
    parser.add_argument("--minutes", type=float, default=60.0, help="of diffusion training")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scale", type=int, default=1, help="multiplies the training clips")
    parser.add_argument(
        "--start",
        type=Path,
        help="weights to start from, or a pipeline folder, whose autoencoder is kept too",
    )
    parser.add_argument("--count", type=int, default=48, help="prompts of the evaluation")
    args = started(parser)
    cast = load_cast(args.packages)
    plan = stages(args.minutes, args.scale, args.learning_rate, is_new=args.start is None)

    codecs = () if args.start is not None and args.start.is_dir() else codecs_of(args.vae_minutes)
    vae = train_codecs(cast, codecs, args.work) if codecs else load_vae(args.start)
    if args.draw_only:
        draw_chunks(cast, vae, "clips", CHUNKS * args.scale, args.work)
        draw_chunks(cast, vae, "close-ups", CLOSE_UPS * args.scale, args.work)
        return
    weights: Path | None = args.start
    for stage in plan:
        weights = train_video_stage(cast, vae, stage, args.work, weights)
    folder = args.out or args.work / "video"
    finish_video(
        cast, vae, weights, course(args.work, codecs, plan), args.work, folder, args.count
    )
