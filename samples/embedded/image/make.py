"""Makes the embedded image model: fetches the data, trains, evaluates and writes the folder.

Every stage leaves a file in the work folder. A run that was interrupted goes on from there; a
finished stage is not repeated.
"""

from dataclasses import replace
from pathlib import Path

from diffusers import FluxPipeline

from embedded.arguments import add_vocabulary, making, started
from embedded.image.evaluate import Call, evaluate
from embedded.image.export import export, load_model
from embedded.image.latents import GROUP, PoolKind, draw_chunks
from embedded.image.train import (
    CLOSE_256,
    MAIN_256,
    PAIRS_128,
    PAIRS_256,
    VARIETY,
    WHOLE_128,
    WHOLE_256,
    Stage,
    train_stage,
)
from embedded.image.vae import VaeTraining, train_vae
from embedded.vocabulary import load_vocabulary


def stages(
    minutes: float,
    scale: int,
    learning_rate: float,
    variety: float = VARIETY,
    pictures: int = 600,
) -> tuple[Stage, ...]:
    """Plans the diffusion training: a cheap stage at 128 px, then 256 px with close-ups.

    Args:
        minutes: Wall-clock length of both.
        scale: Multiplies the number of chunks of pictures.
        learning_rate: Peak rate of the first stage.
        variety: How far places and sizes of objects vary, see `random_scene`.
        pictures: Pictures of a chunk.
    """

    def drawn(kind: PoolKind) -> PoolKind:
        suffix = "" if variety == VARIETY else f"-{variety:g}"
        return replace(kind, name=kind.name + suffix, variety=variety, pictures=pictures)

    return (
        Stage(
            "stage-128",
            minutes=0.35 * minutes,
            learning_rate=learning_rate,
            whole=drawn(WHOLE_128),
            whole_chunks=20 * scale,
            batch=32,
            pairs=drawn(PAIRS_128),
            pair_chunks=10 * scale,
            noise_mean=1.0,
            decay=0.35,
            lengths=(24,),
            long_captions=0.0,
        ),
        Stage(
            "stage-256",
            minutes=0.65 * minutes,
            learning_rate=0.75 * learning_rate,
            whole=drawn(WHOLE_256),
            whole_chunks=8 * scale,
            batch=16,
            pairs=drawn(PAIRS_256),
            pair_chunks=4 * scale,
            main=drawn(MAIN_256),
            main_chunks=6 * scale,
            close_ups=drawn(CLOSE_256),
            close_up_chunks=3 * scale,
            close_up_groups=2,
            close_up_every=3,
            noise_mean=1.0,
            decay=0.75,
            average=0.98,
            seed=1,
        ),
    )


def main() -> None:
    """Runs every stage that has not been finished in the work folder."""
    parser = making(__doc__)
    add_vocabulary(parser)
    parser.add_argument("--vae-minutes", type=float, default=15.0)
    parser.add_argument("--minutes", type=float, default=100.0, help="of diffusion training")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--scale", type=int, default=1, help="multiplies the training pictures")
    parser.add_argument("--pictures", type=int, default=600, help="of a chunk")
    parser.add_argument(
        "--variety",
        type=float,
        default=VARIETY,
        help="of places and sizes, 0 to 1; wants GPU time",
    )
    parser.add_argument("--evaluated", type=int, default=100, help="prompts of the evaluation")
    parser.add_argument("--start", type=Path, help="weights or pipeline folder to start from")
    args = started(parser)
    vocabulary = load_vocabulary(args.packages, args.vocabulary)
    plan = stages(
        args.minutes,
        args.scale,
        args.learning_rate,
        args.variety,
        GROUP * -(-args.pictures // GROUP),
    )

    vae = train_vae(vocabulary, VaeTraining(minutes=args.vae_minutes), args.work).eval()
    if args.draw_only:
        for stage in plan:
            for kind, count in (*stage.pools, *stage.close_up_pools):
                draw_chunks(vocabulary, vae, kind, count, args.work)
        return
    weights: Path | None = args.start
    for stage in plan:
        weights = train_stage(vocabulary, vae, stage, args.work, weights)
    model = load_model(vocabulary, weights)
    folder = args.out or args.work / "image"
    export(model, vae, folder)
    pipe = FluxPipeline.from_pretrained(folder)
    figures = evaluate(pipe, vocabulary, args.work / "evaluation", Call(), args.evaluated)
    print(figures)
