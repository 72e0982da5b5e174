"""`diffaccel heads`: search, show and apply attention heads that guide a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffaccel.cli.options.argument_types import at_least, model_source, share, usable_device
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffaccel.guidance.head_search.search import Draw, SearchState


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "heads",
        help="search attention heads that guide a model",
        description="Finds attention heads whose damage, compared with the sound model, guides "
        "it towards an objective; shows them and draws with them.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", required=True)
    _add_search(actions)
    _add_show(actions)
    _add_apply(actions)


def _add_search(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "search",
        help="search heads for an objective",
        description="Tries every head and keeps the best, in rounds. An interrupted search goes "
        "on when it is started again with the same words.",
    )
    parser.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="what is drawn with each head, one or more"
    )
    parser.add_argument(
        "--objective",
        required=True,
        metavar="NAME",
        help="what is maximised: sharpness, saturation, brightness, darkness, colourfulness, "
        "similarity (with --reference), prompt-match (with --scorer)",
    )
    parser.add_argument("--reference", metavar="FILE", help="picture to come near to")
    parser.add_argument(
        "--scorer",
        metavar="ID_OR_FOLDER",
        help="CLIP model or PickScore; default: the small one in the package",
    )
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="PROMPT",
        help="a prompt on which the result is tested, repeatable",
    )
    parser.add_argument("--per-round", type=at_least(1), default=3, metavar="K")
    parser.add_argument("--rounds", type=at_least(1), default=1, metavar="R")
    parser.add_argument("--layers", metavar="I,J,…", help="layers that are tried (default: all)")
    parser.add_argument("--strength", type=share, default=1.0, metavar="U", help="in (0, 1]")
    _add_common(parser, "heads.json")
    parser.set_defaults(execute=_search)


def _add_show(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "show",
        help="show what a search found, or what each head does",
        description="Prints the result of a search. With --sheet it draws a prompt with each of "
        "the model's heads damaged, side by side, to explore styles.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="of a search")
    parser.add_argument("--top", type=at_least(1), default=10, metavar="N", help="per round")
    parser.add_argument("--sheet", metavar="PROMPT", help="draw this prompt with every head")
    parser.add_argument("--layers", metavar="I,J,…", help="layers of the sheet (default: all)")
    parser.add_argument("--strength", type=share, default=1.0, metavar="U", help="in (0, 1]")
    _add_common(parser, "heads.png")
    parser.set_defaults(execute=_show)


def _add_apply(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "apply",
        help="draw a prompt with the heads of a file",
        description="Draws a prompt at native size, guided by the heads of a file.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="of a search")
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--strength", type=share, metavar="U", help="default: the file's")
    _add_common(parser, "guided.png")
    parser.set_defaults(execute=_apply)


def _add_common(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument(
        "--model",
        type=model_source,
        metavar="ID_OR_FOLDER",
        help="default: the small transformer in the package; embedded-unet is its small U-Net",
    )
    parser.add_argument("--scale", type=float, default=3.0, metavar="W", help="of the guidance")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="default: the model's")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S")
    parser.add_argument("--device", metavar="NAME", help="default: the best one")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(output), metavar="FILE", help=output
    )


def _search(arguments: argparse.Namespace) -> int:
    from diffaccel.files import check_folder_of
    from diffaccel.guidance.head_search.search import SearchSettings, held_out_scores, search_heads
    from diffaccel.progress import ProgressBars
    from diffaccel.quality.objectives import objective_named

    check_folder_of(arguments.output)
    _check_prompts([*arguments.prompts, *arguments.held_out])
    objective = objective_named(arguments.objective, arguments.reference, arguments.scorer)
    prompts = tuple(arguments.prompts)
    settings = SearchSettings(
        objective=arguments.objective,
        prompts=prompts,
        seeds=tuple(range(arguments.seed, arguments.seed + len(prompts))),
        per_round=arguments.per_round,
        rounds=arguments.rounds,
        strength=arguments.strength,
        scale=_checked_scale(arguments.scale),
        layers=_parse_layers(arguments.layers),
    )
    pipe, draw = _load(arguments)
    try:
        with ProgressBars() as timing, timing.phases({"search": _trials(pipe, settings)}) as done:
            state = search_heads(
                pipe,
                draw,
                objective,
                settings,
                file=arguments.output,
                advance=lambda: done("search"),
            )
    except KeyboardInterrupt:
        print(f"diffaccel: interrupted; the same words go on from {arguments.output}")
        return 1
    _print_state(state, 3)
    if arguments.held_out:
        held_out = tuple(arguments.held_out)
        seeds = tuple(range(1000, 1000 + len(held_out)))
        plain, guided = held_out_scores(pipe, draw, objective, state, held_out, seeds)
        mean = [sum(scores) / len(scores) for scores in (plain, guided)]
        better = sum(b > a for a, b in zip(plain, guided, strict=True))
        print(
            f"held out: {arguments.objective} {mean[0]:.4g} without, {mean[1]:.4g} with the "
            f"heads; higher in {better} of {len(held_out)} pictures"
        )
    print(arguments.output)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.file is None and arguments.sheet is None:
        raise InputError("heads show needs a FILE of a search, or --sheet with a prompt")
    if arguments.file is not None:
        from diffaccel.guidance.head_search.search import SearchState

        _print_state(SearchState.load(arguments.file), arguments.top)
    if arguments.sheet is not None:
        _draw_sheet(arguments)
    return 0


def _draw_sheet(arguments: argparse.Namespace) -> None:
    from diffaccel.files import check_image_path, write_image
    from diffaccel.guidance.head_search.search import all_heads
    from diffaccel.guidance.head_search.sheet import HeadSheet, head_sheet
    from diffaccel.progress import ProgressBars

    check_image_path(arguments.output)
    _check_prompts([arguments.sheet])
    scale, layers = _checked_scale(arguments.scale), _parse_layers(arguments.layers)
    pipe, draw = _load(arguments)
    heads = all_heads(pipe, layers)
    with ProgressBars() as timing, timing.phases({"draw": len(heads) + 1}) as advance:
        shown = HeadSheet(arguments.sheet, tuple(heads), arguments.seed, arguments.strength, scale)
        sheet = head_sheet(pipe, draw, shown, lambda: advance("draw"))
    write_image(sheet, arguments.output)
    print(f"{arguments.output} ({len(heads)} heads, labelled layer.head)")


def _apply(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from diffaccel.files import check_image_path, write_image
    from diffaccel.guidance.attachment import set_guidance
    from diffaccel.guidance.perturb.heads import HeadPerturbation

    check_image_path(arguments.output)
    _check_prompts([arguments.prompt])
    perturbation = HeadPerturbation.load(arguments.file)
    if arguments.strength is not None:
        perturbation = replace(perturbation, strength=arguments.strength)
    scale = _checked_scale(arguments.scale)
    pipe, draw = _load(arguments)
    try:
        guidance = set_guidance(pipe, perturbation, scale=scale)
    except ValueError as error:
        raise InputError(f"{arguments.file} does not fit the model: {error}") from error
    with guidance:
        write_image(draw([arguments.prompt], [arguments.seed])[0], arguments.output)
    print(f"{arguments.output}\n  {guidance.report()}")
    return 0


def _load(arguments: argparse.Namespace) -> tuple["DiffusionPipeline", "Draw"]:
    """Loads the model, and returns it with a function that draws with it."""
    from diffaccel.machine import best_device
    from diffaccel.pipelines.image.native import native_drawing
    from diffaccel.pipelines.image.presets import preset_for
    from diffaccel.pipelines.loading import EMBEDDED_IMAGE, load_image_pipeline

    source = arguments.model or EMBEDDED_IMAGE
    device = usable_device(arguments.device or best_device())
    pipe = load_image_pipeline(source, device=device)
    return pipe, native_drawing(pipe, preset_for(pipe, source), arguments.steps)


def _trials(pipe: "DiffusionPipeline", settings: object) -> int:
    """Number of candidates over all rounds, the model without guidance included."""
    from diffaccel.guidance.head_search.search import all_heads

    count = len(all_heads(pipe, settings.layers))
    return 1 + sum(count - index * settings.per_round for index in range(settings.rounds))


def _print_state(state: "SearchState", top: int) -> None:
    """Prints the heads that a search has tried."""
    from rich.console import Console
    from rich.table import Table

    name = state.settings.objective
    table = Table("round", "layer.head", name, "against none", "chosen")
    for number, scores in enumerate(state.rounds, start=1):
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        for (layer, head), score in ranked[:top]:
            chosen = "yes" if (layer, head) in state.chosen else ""
            gain = f"{score - state.unguided:+.4g}"
            table.add_row(str(number), f"{layer}.{head}", f"{score:.4g}", gain, chosen)
    console = Console()
    console.print(table)
    found = ", ".join(f"{layer}.{head}" for layer, head in state.chosen) or "none yet"
    console.print(f"without guidance: {state.unguided:.4g}; chosen heads: {found}")


def _check_prompts(prompts: list[str]) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("prompts must not be empty, got nothing; say what to draw")


def _checked_scale(scale: float) -> float:
    if not 0 < scale < float("inf"):
        raise InputError(f"--scale must be above 0, got {scale}")
    return scale


def _parse_layers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise InputError(f"--layers must be integers such as 0,1,4, got {text!r}") from error
