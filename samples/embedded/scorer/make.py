"""Makes the embedded scorer: pictures, training, evaluation, folder.

Every stage leaves a file in the work folder. A run that was interrupted goes on from there; a
finished training is not repeated.
"""

from pathlib import Path

from diffaccel.quality.objectives import PromptMatch
from embedded.arguments import add_vocabulary, making, started
from embedded.scorer.evaluate import evaluate_scorer
from embedded.scorer.export import export_scorer, load_scorer, write_scorer_card
from embedded.scorer.pictures import FOUR, draw_all_pictures
from embedded.scorer.train import ScorerTraining, train_scorer
from embedded.vocabulary import Thing, load_vocabulary


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
    parser = making(__doc__)
    add_vocabulary(parser)
    parser.add_argument("--minutes", type=float, default=15.0)
    args = started(parser)
    vocabulary = load_vocabulary(args.packages, args.vocabulary)
    settings = ScorerTraining(minutes=args.minutes)
    if args.draw_only:
        draw_all_pictures(vocabulary, settings.chunks, args.work, settings.groups)
        return
    weights = train_scorer(vocabulary, settings, args.work)
    folder = args.out or args.work / "scorer"
    print(finish_scorer(vocabulary, settings, weights, args.work, folder))
