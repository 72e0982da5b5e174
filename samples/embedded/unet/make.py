"""Makes the embedded U-Net model: data, training, evaluation, folder.

Every stage leaves a file in the work folder. A run that was interrupted goes on from there; a
finished training is not repeated. In the work folder of the embedded image model it finds the
autoencoder and the pictures of that one.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from embedded.arguments import add_vocabulary, making, started
from embedded.image.evaluate import evaluate
from embedded.unet.evaluate import UNetCall, generate_with_unet
from embedded.unet.export import export_unet, load_unet_model, write_unet_card
from embedded.unet.train import UNetTraining, coarse_training, draw_latents, train_unet
from embedded.vocabulary import Thing, load_vocabulary


def load_vae(folder: Path | None, work: Path) -> AutoencoderKL:
    """Loads the given autoencoder, else that in the work folder, else the embedded one."""
    if folder is None:
        folder = work / "vae" if (work / "vae").exists() else EMBEDDED_IMAGE / "vae"
    return AutoencoderKL.from_pretrained(folder).eval()


def finish_unet(
    vocabulary: tuple[Thing, ...],
    vae: AutoencoderKL,
    settings: UNetTraining,
    weights: Path,
    earlier: str,
    work: Path,
    folder: Path,
) -> dict[str, float]:
    """Exports the U-Net model, evaluates the folder and writes its card.

    Args:
        vocabulary: What it draws.
        vae: Its autoencoder.
        settings: How it was trained.
        weights: What came of that.
        earlier: What the training began with, for the card.
        work: Where the pictures of the evaluation go.
        folder: Where the pipeline goes.
    """
    model, step = load_unet_model(vocabulary, weights)
    export_unet(model, vae, folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    out = work / "unet-evaluation"
    figures = evaluate(pipe, vocabulary, out, UNetCall(), draw=generate_with_unet)
    training = {
        "earlier": earlier,
        "minutes": settings.minutes,
        "step": step,
        "batch": settings.batch,
        "objects": len(vocabulary),
    }
    write_unet_card(folder, Image.open(out / "contact.png"), model, figures, training)
    return figures


def main() -> None:
    """Runs every stage that has not been finished in the work folder."""
    parser = making(__doc__)
    add_vocabulary(parser)
    parser.add_argument("--vae", type=Path, help="autoencoder; default: that of the image model")
    parser.add_argument("--minutes", type=float, default=45.0, help="of the U-Net at 256 px")
    parser.add_argument(
        "--coarse-minutes", type=float, default=42.0, help="at 128 px, before that"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at 256 px")
    parser.add_argument("--start", type=Path, help="weights or pipeline folder of the U-Net")
    args = started(parser)
    vocabulary = load_vocabulary(args.packages, args.vocabulary)
    vae = load_vae(args.vae, args.work)
    for_unet = UNetTraining(minutes=args.minutes, learning_rate=args.learning_rate)
    for_coarse = coarse_training(args.coarse_minutes)
    if args.draw_only:
        draw_latents(vocabulary, vae, for_coarse, args.work)
        draw_latents(vocabulary, vae, for_unet, args.work)
        return
    folder = args.out or args.work / "unet"
    coarse, earlier = None, "Earlier weights, then"
    if args.start is None:
        coarse = train_unet(vocabulary, vae, for_coarse, args.work)
        step = torch.load(coarse, weights_only=True)["step"]
        earlier = f"{for_coarse.minutes:.0f} minutes of training at 128 px "
        earlier += f"({step} steps of {for_coarse.batch} pictures) without the finest level, then"
    unet = train_unet(vocabulary, vae, for_unet, args.work, args.start, coarse)
    print(finish_unet(vocabulary, vae, for_unet, unet, earlier, args.work, folder))
