"""Makes the embedded U-Net model and the embedded scorer: data, training, evaluation, folders.

Every stage leaves a file in the work folder. A run that was interrupted goes on from there; a
finished training is not repeated. In the work folder of the embedded image model it finds the
autoencoder and the pictures of that one.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from evaluate import evaluate
from evaluate_scorer import evaluate_scorer
from evaluate_unet import UNetCall, generate_with_unet
from export_scorer import export_scorer, load_scorer, write_scorer_card
from export_unet import export_unet, load_unet_model, write_unet_card
from PIL import Image
from scorer_pictures import FOUR, draw_all_pictures
from train_scorer import ScorerTraining, train_scorer
from train_unet import UNetTraining, coarse_training, draw_latents, train_unet
from vocabulary import Thing, fetch_packages, load_vocabulary

from diffaccel.pipelines.loading import EMBEDDED_IMAGE
from diffaccel.quality.objectives import PromptMatch


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


def finish_scorer(
    vocabulary: tuple[Thing, ...],
    settings: ScorerTraining,
    weights: Path,
    work: Path,
    folder: Path,
) -> dict[str, float]:
    """Exports the scorer, evaluates the folder and writes its card."""
    model, step = load_scorer(vocabulary, weights)
    export_scorer(model, folder)
    figures = evaluate_scorer(PromptMatch(folder), vocabulary, work / "scorer-evaluation")
    training = {
        "minutes": settings.minutes,
        "step": step,
        "batch": FOUR * settings.batch_groups,
        "pictures": FOUR * settings.groups * settings.chunks,
        "objects": len(vocabulary),
    }
    write_scorer_card(folder, model, figures, training)
    return figures


def main() -> None:
    """Runs every stage that has not been finished in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--out", type=Path, help="gets unet and scorer; default: --work")
    parser.add_argument("--packages", type=Path, help="folder of the npm archives")
    parser.add_argument("--vocabulary", choices=("curated", "all"), default="curated")
    parser.add_argument("--vae", type=Path, help="autoencoder; default: that of the image model")
    parser.add_argument("--minutes", type=float, default=45.0, help="of the U-Net at 256 px")
    parser.add_argument(
        "--coarse-minutes", type=float, default=42.0, help="at 128 px, before that"
    )
    parser.add_argument("--scorer-minutes", type=float, default=15.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at 256 px")
    parser.add_argument("--start", type=Path, help="weights or pipeline folder of the U-Net")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--draw-only", action="store_true", help="only draw pictures; may run beside training"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    packages = args.packages or args.work / "packages"
    fetch_packages(packages)
    vocabulary = load_vocabulary(packages, args.vocabulary)
    args.work.mkdir(parents=True, exist_ok=True)
    vae = load_vae(args.vae, args.work)
    for_unet = UNetTraining(minutes=args.minutes, learning_rate=args.learning_rate)
    for_coarse = coarse_training(args.coarse_minutes)
    for_scorer = ScorerTraining(minutes=args.scorer_minutes)

    if args.draw_only:
        draw_latents(vocabulary, vae, for_coarse, args.work)
        draw_latents(vocabulary, vae, for_unet, args.work)
        draw_all_pictures(vocabulary, for_scorer.chunks, args.work, for_scorer.groups)
        return
    out = args.out or args.work
    scorer = train_scorer(vocabulary, for_scorer, args.work)
    if not (out / "scorer" / "README.md").exists():
        print(finish_scorer(vocabulary, for_scorer, scorer, args.work, out / "scorer"))
    coarse, earlier = None, "Earlier weights, then"
    if args.start is None:
        coarse = train_unet(vocabulary, vae, for_coarse, args.work)
        step = torch.load(coarse, weights_only=True)["step"]
        earlier = f"{for_coarse.minutes:.0f} minutes of training at 128 px "
        earlier += f"({step} steps of {for_coarse.batch} pictures) without the finest level, then"
    unet = train_unet(vocabulary, vae, for_unet, args.work, args.start, coarse)
    print(finish_unet(vocabulary, vae, for_unet, unet, earlier, args.work, out / "unet"))


if __name__ == "__main__":
    main()
