"""Composes the training pictures: vector scenes of one to three objects, and their captions."""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
import resvg_py
from PIL import Image

from embedded.vocabulary import Thing

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 152, 156),
    "black": (22, 22, 26),
    "red": (214, 48, 49),
    "orange": (244, 144, 52),
    "yellow": (250, 214, 82),
    "green": (70, 168, 92),
    "teal": (38, 156, 160),
    "blue": (66, 124, 222),
    "purple": (134, 84, 190),
    "pink": (246, 164, 196),
    "brown": (134, 94, 66),
}
OPENINGS = ("", "", "", "", "an image of ", "a picture of ", "a drawing of ", "an emoji of ")
FUNCTION_WORDS = "a an and on to gradient background"
CLOSE_UP_OPENINGS = ("close-up of ", "a close-up of ", "macro image of ")
FAVOURITES = ("red apple", "rocket")  # of the README's first picture, drawn more often
FAVOURITE_WEIGHT = 16
MAIN_OBJECTS = frozenset(  # everyday objects, which some pools show alone
    "anchor, banana, bicycle, burger, bus, butterfly, cactus, car, cat, dog, elephant, football, "
    "glass of wine, guitar, hammer, heart, house, key, lemon, owl, penguin, pizza, sailboat, "
    "star, strawberry, sunflower, tractor, tree, umbrella, watermelon".split(", ")
)
SINGULAR_ENDINGS = ("ss", "us", "os", "is")
DRAWING_SIZE = 128  # side of the canvas on which every drawing is given
CANVAS = 1000  # side of the canvas of a scene, in user units


@dataclass(frozen=True, slots=True)
class Placed:
    """An object in a scene, in units of the canvas side.

    Attributes:
        thing: Index into the vocabulary.
        x: Left edge.
        y: Top edge.
        size: Side of the square that the drawing fills.
    """

    thing: int
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Background:
    """A plain or gradient background; `angle` in degrees, 90 runs from top to bottom."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    angle: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What a training picture shows. Objects come left to right, or top to bottom."""

    objects: tuple[Placed, ...]
    background: Background


@dataclass(frozen=True, slots=True)
class Window:
    """A square part of a scene, in units of the canvas side."""

    x: float = 0.0
    y: float = 0.0
    size: float = 1.0

    def shows(self, placed: Placed) -> bool:
        """Whether a fair part of the object lies inside."""
        margin = 0.15 * placed.size
        return (
            placed.x + margin < self.x + self.size
            and placed.x + placed.size - margin > self.x
            and placed.y + margin < self.y + self.size
            and placed.y + placed.size - margin > self.y
        )


def random_scene(
    rng: random.Random,
    vocabulary: tuple[Thing, ...],
    shares: tuple[float, float, float] = (0.6, 0.28, 0.12),
    variety: float = 1.0,
    main_only: bool = False,
) -> Scene:
    """Draws a scene: mostly one object, else two or three that do not overlap.

    Args:
        rng: Source of chance.
        vocabulary: The drawings; `FAVOURITES` come `FAVOURITE_WEIGHT` times as often as others.
        shares: How often scenes have one, two and three objects.
        variety: How far places and sizes vary; at 0 each number of objects has one arrangement,
            which a model learns from far fewer pictures.
        main_only: Whether to show `MAIN_OBJECTS` alone.
    """
    count = rng.choices((1, 2, 3), shares)[0]
    weights = [FAVOURITE_WEIGHT if t.names[0] in FAVOURITES else 1 for t in vocabulary]
    if main_only:
        weights = [int(thing.names[0] in MAIN_OBJECTS) for thing in vocabulary]
    chosen: list[int] = []
    while len(chosen) < count:
        thing = rng.choices(range(len(vocabulary)), weights)[0]
        if thing not in chosen:
            chosen.append(thing)
    if count == 1:
        size = 0.8 + variety * rng.uniform(-0.3, 0.12)
        centres = [(0.5, 0.5)]
        spread = (0.06, 0.06)
    elif count == 2:
        size = 0.45 + variety * rng.uniform(-0.11, 0.02)
        centres = [(0.26, 0.5), (0.74, 0.5)]
        spread = (0.02, 0.04)
        if rng.random() < 0.2 * variety:
            centres = [(0.5, 0.26), (0.5, 0.74)]
    else:
        size = 0.31 + variety * rng.uniform(-0.05, 0.01)
        centres = [(0.175, 0.5), (0.5, 0.5), (0.825, 0.5)]
        spread = (0.01, 0.07)
    placed = []
    for thing, (x, y) in zip(chosen, centres, strict=True):
        own = size * (1 - variety * rng.uniform(0.0, 0.08))
        left, top = (
            min(max(centre + variety * rng.gauss(0, jitter) - own / 2, 0.01), 0.99 - own)
            for centre, jitter in zip((x, y), spread, strict=True)
        )
        placed.append(Placed(thing, left, top, own))
    return Scene(tuple(placed), random_background(rng))


def random_background(rng: random.Random) -> Background:
    """Draws one named colour (two thirds of the time) or a gradient between two."""
    names = tuple(rng.sample(list(BACKGROUNDS), 1 if rng.random() < 0.67 else 2))
    colours = tuple(
        tuple(min(255, max(0, round(c + rng.gauss(0, 4)))) for c in BACKGROUNDS[name])
        for name in names
    )
    return Background(names, colours, rng.choice((90, 90, 0, 45)))


def random_window(rng: random.Random, scene: Scene, zoom: float) -> Window:
    """Draws a window of one `zoom`-th of the canvas side, three quarters of them on an object."""
    size = 1 / zoom
    if rng.random() < 0.75:
        target = rng.choice(scene.objects)
        x = target.x + rng.random() * target.size - size / 2
        y = target.y + rng.random() * target.size - size / 2
    else:
        x, y = rng.random(), rng.random()
    # On the grid of 16-pixel tokens that a picture of `zoom` x 256 pixels has.
    steps = round(16 * zoom)
    column, row = (min(max(round(c * steps), 0), steps - 16) for c in (x, y))
    return Window(column / steps, row / steps, size)


def caption(
    rng: random.Random, vocabulary: tuple[Thing, ...], scene: Scene, window: Window
) -> str:
    """Words a caption of the part of a scene that a window shows.

    A close-up is described as such most of the time, else by the caption of the whole scene or
    by nothing, since every part of a large picture is generated under the same caption.
    """
    if rng.random() < 0.1:
        return ""
    visible = [placed for placed in scene.objects if window.shows(placed)]
    opening = rng.choice(OPENINGS)
    if window.size < 1:
        chance = rng.random()
        if chance < 0.25:
            return ""
        if chance < 0.55:
            visible = list(scene.objects)
        else:
            opening = rng.choice(CLOSE_UP_OPENINGS)
    ground = _background_phrase(rng, scene.background)
    if not visible:
        return (opening + ground.removeprefix("on ")).strip()
    named = [_object_phrase(rng, vocabulary[placed.thing]) for placed in visible]
    listed = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    if rng.random() < 0.25:
        return (opening + listed).strip()
    return f"{opening}{listed} {ground}".strip()


def plain_caption(vocabulary: tuple[Thing, ...], things: tuple[int, ...], background: str) -> str:
    """Words the usual caption, e.g. "a red apple and a rocket on a blue background"."""
    named = [with_article(vocabulary[thing].names[0]) for thing in things]
    listed = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return f"{listed} on {with_article(background)} background"


def _object_phrase(rng: random.Random, thing: Thing) -> str:
    """Names an object, mostly by its usual name."""
    chance = rng.random()
    if thing.tags and chance < 0.05:
        name = rng.choice(thing.tags)
    elif len(thing.names) > 1 and chance < 0.3:
        name = rng.choice(thing.names[1:])
    else:
        name = thing.names[0]
    return name if rng.random() < 0.12 else with_article(name)


def _background_phrase(rng: random.Random, background: Background) -> str:
    """Names a background."""
    if len(background.names) == 2:
        first, second = background.names
        kind = rng.choice((f"{first} to {second} gradient", f"{first} and {second} gradient"))
    else:
        kind = background.names[0]
    if rng.random() < 0.15:
        return f"on {kind}"
    return f"on {with_article(kind)} background"


def with_article(name: str) -> str:
    """Puts "a" or "an" before a singular."""
    if name.endswith("s") and not name.endswith(SINGULAR_ENDINGS):
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def render(
    vocabulary: tuple[Thing, ...], scene: Scene, pixels: int, window: Window | None = None
) -> np.ndarray:
    """Rasterises a window of a scene.

    Args:
        vocabulary: The drawings.
        scene: What to draw.
        pixels: Side of the picture in pixels.
        window: The part to show; the whole canvas by default.

    Returns:
        RGB picture (pixels, pixels, 3), uint8.
    """
    unit = CANVAS
    drawn = "".join(
        f'<g transform="translate({p.x * unit} {p.y * unit}) '
        f'scale({p.size * unit / DRAWING_SIZE})">{vocabulary[p.thing].body}</g>'
        for p in scene.objects
    )
    return rasterise(drawn, scene.background, pixels, window or Window())


def rasterise(drawn: str, background: Background, pixels: int, window: Window) -> np.ndarray:
    """Rasterises a window of SVG elements in front of a background.

    Args:
        drawn: The elements, on a canvas with a side of `CANVAS`.
        background: What lies behind them.
        pixels: Side of the picture in pixels.
        window: The part to show.

    Returns:
        RGB picture (pixels, pixels, 3), uint8.
    """
    radians = math.radians(background.angle)
    stops = background.colours
    paint = f"rgb{stops[0]}"
    defs = ""
    if len(stops) == 2:
        defs = (
            f'<defs><linearGradient id="ground" x1="0" y1="0" x2="{math.cos(radians):.3f}" '
            f'y2="{math.sin(radians):.3f}"><stop offset="0" stop-color="rgb{stops[0]}"/>'
            f'<stop offset="1" stop-color="rgb{stops[1]}"/></linearGradient></defs>'
        )
        paint = "url(#ground)"
    unit = CANVAS
    view = f"{window.x * unit} {window.y * unit} {window.size * unit} {window.size * unit}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{pixels}" height="{pixels}" viewBox="{view}">{defs}'
        f'<rect width="{unit}" height="{unit}" fill="{paint}"/>{drawn}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def words_of(vocabulary: tuple[Thing, ...]) -> set[str]:
    """Collects the words that captions may use."""
    texts = [FUNCTION_WORDS, *BACKGROUNDS, *OPENINGS, *CLOSE_UP_OPENINGS]
    for thing in vocabulary:
        texts += [*thing.names, *thing.tags]
    kept = "".join(c if c.isalnum() and c.isascii() else " " for c in " ".join(texts).lower())
    return set(kept.split())
