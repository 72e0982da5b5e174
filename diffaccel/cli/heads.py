"""`diffaccel heads`: search, show and apply attention heads that guide a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import App, Group, Parameter

from diffaccel.cli.options.argument_types import COUNT, SHARE, model_source, usable_device
from diffaccel.cli.options.heads_options import DrawingOptions, SearchOptions, SheetOptions
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.guidance.head_search.search import Draw, SearchSettings, SearchState
    from diffaccel.quality.objectives import Objective

WHERE = Parameter(name=["--output", "-o"], metavar="FILE", group=Group("Output", sort_key=3))


heads = App(
    name="heads",
    help="Search attention heads that guide a model.\n\nFinds heads whose damage, compared with "
    "the sound model, guides it towards an objective; shows them and draws with them.",
)


@heads.command
def search(
    prompts: Annotated[tuple[str, ...], Parameter(metavar="PROMPT…")],
    /,
    options: Annotated[SearchOptions, Parameter(name="*")],
    drawing: Annotated[DrawingOptions, Parameter(name="*")] = DrawingOptions(),
    *,
    output: Annotated[Path, WHERE] = Path("heads.json"),
) -> int:
    """Search heads for an objective.

    Tries every head and keeps the best, in rounds. An interrupted search goes on when it is
    started again with the same words.

    Args:
        prompts: What is drawn with each head, one or more.
        output: The heads that were found (default: heads.json).
    """
    from diffaccel.files import check_folder_of
    from diffaccel.guidance.head_search.search import SearchSettings, search_heads
    from diffaccel.progress import ProgressBars

    check_folder_of(output)
    _check_prompts(*prompts, *options.held_out)
    objective = chosen_objective(options)
    settings = SearchSettings(
        objective=options.objective,
        prompts=prompts,
        seeds=tuple(range(drawing.seed, drawing.seed + len(prompts))),
        per_round=options.per_round,
        rounds=options.rounds,
        strength=options.strength,
        scale=drawing.scale,
        layers=options.layers,
    )
    pipe, draw = _load(drawing)
    try:
        with ProgressBars() as timing, timing.phases({"search": _trials(pipe, settings)}) as done:
            state = search_heads(
                pipe, draw, objective, settings, file=output, advance=lambda: done("search")
            )
    except KeyboardInterrupt:
        print(f"diffaccel: interrupted; the same words go on from {output}")
        return 1
    _print_state(state, 3)
    if options.held_out:
        _print_held_out(pipe, draw, objective, state, options.held_out)
    print(output)
    return 0


@heads.command
def show(
    file: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    /,
    options: Annotated[SheetOptions, Parameter(name="*")] = SheetOptions(),
    drawing: Annotated[DrawingOptions, Parameter(name="*")] = DrawingOptions(),
    *,
    top: Annotated[int, COUNT] = 10,
    output: Annotated[Path, WHERE] = Path("heads.png"),
) -> int:
    """Show what a search found, or what each head does.

    Prints the result of a search. With `--sheet` it draws a prompt with each of the model's heads
    damaged, side by side, to explore styles.

    Args:
        file: Of a search.
        top: Heads that are shown per round (default: 10).
        output: The sheet (default: heads.png).
    """
    if file is None and options.sheet is None:
        raise InputError("heads show needs a FILE of a search, or --sheet with a prompt")
    if file is not None:
        from diffaccel.guidance.head_search.search import SearchState

        _print_state(SearchState.load(file), top)
    if options.sheet is not None:
        _draw_sheet(options.sheet, options, drawing, output)
    return 0


@heads.command
def apply(
    file: Annotated[Path, Parameter(metavar="FILE")],
    prompt: str,
    /,
    drawing: Annotated[DrawingOptions, Parameter(name="*")] = DrawingOptions(),
    *,
    strength: Annotated[float | None, SHARE] = None,
    output: Annotated[Path, WHERE] = Path("guided.png"),
) -> int:
    """Draw a prompt with the heads of a file.

    Draws at native size, guided by the heads.

    Args:
        file: Of a search.
        prompt: What to draw.
        strength: Of the damage, in (0, 1] (default: the file's).
        output: The picture (default: guided.png).
    """
    from diffaccel.files import check_image_path, write_image
    from diffaccel.guidance.attachment import set_guidance
    from diffaccel.guidance.perturb.heads import HeadPerturbation

    check_image_path(output)
    _check_prompts(prompt)
    perturbation = HeadPerturbation.load(file)
    if strength is not None:
        perturbation = replace(perturbation, strength=strength)
    pipe, draw = _load(drawing)
    try:
        guidance = set_guidance(pipe, perturbation, scale=drawing.scale)
    except ValueError as error:
        raise InputError(f"{file} does not fit the model: {error}") from error
    with guidance:
        write_image(draw([prompt], [drawing.seed])[0], output)
    print(f"{output}\n  {guidance.report()}")
    return 0


def chosen_objective(options: SearchOptions) -> Objective:
    """Returns the objective that is named, with the scorer in the package where none is.

    Raises:
        InputError: The name is unknown, or its argument is missing or unreadable.
    """
    from diffaccel.pipelines.embedded import EMBEDDED_SCORER
    from diffaccel.quality.objectives import objective_named

    embedded = EMBEDDED_SCORER if EMBEDDED_SCORER.is_dir() else None
    return objective_named(options.objective, options.reference, options.scorer or embedded)


def _draw_sheet(prompt: str, options: SheetOptions, drawing: DrawingOptions, output: Path) -> None:
    from diffaccel.files import check_image_path, write_image
    from diffaccel.guidance.head_search.search import all_heads
    from diffaccel.guidance.head_search.sheet import HeadSheet, head_sheet
    from diffaccel.progress import ProgressBars

    check_image_path(output)
    _check_prompts(prompt)
    pipe, draw = _load(drawing)
    heads = all_heads(pipe, options.layers)
    with ProgressBars() as timing, timing.phases({"draw": len(heads) + 1}) as advance:
        shown = HeadSheet(prompt, tuple(heads), drawing.seed, options.strength, drawing.scale)
        sheet = head_sheet(pipe, draw, shown, lambda: advance("draw"))
    write_image(sheet, output)
    print(f"{output} ({len(heads)} heads, labelled layer.head)")


def _load(drawing: DrawingOptions) -> tuple[Any, Draw]:
    """Loads the model, and returns it with a function that draws with it."""
    from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
    from diffaccel.pipelines.image.generate import native_drawing
    from diffaccel.pipelines.image.presets import preset_for
    from diffaccel.pipelines.loading import load_image_pipeline

    source = model_source(drawing.model) or EMBEDDED_IMAGE
    pipe = load_image_pipeline(source, device=usable_device(drawing.device))
    return pipe, native_drawing(pipe, preset_for(pipe, source), drawing.steps)


def _trials(pipe: Any, settings: SearchSettings) -> int:
    """Number of candidates over all rounds, the model without guidance included."""
    from diffaccel.guidance.head_search.search import all_heads

    count = len(all_heads(pipe, settings.layers))
    return 1 + sum(count - index * settings.per_round for index in range(settings.rounds))


def _print_state(state: SearchState, top: int) -> None:
    """Prints the heads that a search has tried."""
    from rich.console import Console
    from rich.table import Table

    name, unguided = state.settings.objective, cast(float, state.unguided)
    table = Table("round", "layer.head", name, "against none", "chosen")
    for number, scores in enumerate(state.rounds, start=1):
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        for (layer, head), score in ranked[:top]:
            chosen = "yes" if (layer, head) in state.chosen else ""
            gain = f"{score - unguided:+.4g}"
            table.add_row(str(number), f"{layer}.{head}", f"{score:.4g}", gain, chosen)
    console = Console()
    console.print(table)
    found = ", ".join(f"{layer}.{head}" for layer, head in state.chosen) or "none yet"
    console.print(f"without guidance: {unguided:.4g}; chosen heads: {found}")


def _print_held_out(
    pipe: Any, draw: Draw, objective: Objective, state: SearchState, prompts: tuple[str, ...]
) -> None:
    """Draws prompts that the search has not seen, without and with its heads, and compares."""
    from diffaccel.guidance.head_search.search import held_out_scores

    seeds = tuple(range(1000, 1000 + len(prompts)))
    plain, guided = held_out_scores(pipe, draw, objective, state, prompts, seeds)
    mean = [sum(scores) / len(scores) for scores in (plain, guided)]
    better = sum(b > a for a, b in zip(plain, guided, strict=True))
    print(
        f"held out: {state.settings.objective} {mean[0]:.4g} without, {mean[1]:.4g} with the "
        f"heads; higher in {better} of {len(prompts)} pictures"
    )


def _check_prompts(*prompts: str) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("prompts must not be empty, got nothing; say what to draw")
