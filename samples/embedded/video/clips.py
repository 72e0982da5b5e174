"""Composes the training clips: one vector drawing that moves before a background, and captions."""

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedded.scenes import (
    BACKGROUNDS,
    CANVAS,
    DRAWING_SIZE,
    Background,
    Window,
    rasterise,
    with_article,
)
from embedded.vocabulary import Thing, load_vocabulary

CAST = Path(__file__).with_name("moving_objects.json")
FRAMES = 17
PIXELS = 128
UNNAMED = "white"  # background of clips whose caption names none
UNNAMED_WEIGHT = 3  # how much more often it is drawn than another
MOTIONS = ("left", "right", "up", "down", "turn", "grow", "shrink", "bounce", "rest")
GERUNDS = {
    "moves": "moving",
    "flies": "flying",
    "drives": "driving",
    "swims": "swimming",
    "crawls": "crawling",
    "floats": "floating",
    "sails": "sailing",
    "rolls": "rolling",
    "turns": "turning",
    "rotates": "rotating",
    "spins": "spinning",
    "grows": "growing",
    "shrinks": "shrinking",
    "bounces": "bouncing",
    "jumps": "jumping",
}
IN_PLACE = {  # verbs of motions whose verb does not depend on the object, the usual one first
    "turn": ("turns", "rotates", "spins"),
    "grow": ("grows",),
    "shrink": ("shrinks",),
    "bounce": ("bounces", "jumps"),
}
MOVING_SIZE = 0.48  # side of an object that moves, in units of the picture's
RESTING_SIZE = 0.6
SMALLEST, LARGEST = 0.34, 0.74
NEAR, FAR = 0.34, 0.66  # centres between which objects move
TURN = 120.0  # degrees
ZOOMS = (2, 2, 3, 4, 4)  # of close-ups


@dataclass(frozen=True, slots=True)
class Actor:
    """An object that moves.

    Attributes:
        thing: Its drawing and names.
        verb: How it moves from place to place, e.g. "flies".
        faces: Where its drawing looks, "left", "right" or "" if it does not matter. It is
            mirrored when it moves the other way.
    """

    thing: Thing
    verb: str
    faces: str


@dataclass(frozen=True, slots=True)
class Clip:
    """What a clip shows.

    Attributes:
        actor: Index into the cast.
        motion: One of `MOTIONS`.
        background: What lies behind.
        window: The part of the picture that is seen.
    """

    actor: int
    motion: str
    background: Background
    window: Window = Window()


@dataclass(frozen=True, slots=True)
class Pose:
    """How the object lies at one moment, in units of the picture's side.

    Attributes:
        x: Centre, from the left.
        y: Centre, from the top.
        size: Side of the square that the drawing fills.
        angle: Turned clockwise, in degrees.
    """

    x: float = 0.5
    y: float = 0.5
    size: float = MOVING_SIZE
    angle: float = 0.0


def load_cast(packages: Path) -> tuple[Actor, ...]:
    """Reads the objects that move, in the order of moving_objects.json."""
    drawings = {thing.names[0]: thing for thing in load_vocabulary(packages)}
    return tuple(
        Actor(drawings[name], **how) for name, how in json.loads(CAST.read_text()).items()
    )


def pose(motion: str, progress: float) -> Pose:
    """Places the object.

    Args:
        motion: One of `MOTIONS`; every motion has one course, which a model learns from few clips.
        progress: Share of the clip that has passed, 0 to 1.
    """
    forth = NEAR + (FAR - NEAR) * progress
    back = FAR - (FAR - NEAR) * progress
    if motion in ("left", "right"):
        return Pose(x=forth if motion == "right" else back)
    if motion in ("up", "down"):
        return Pose(y=forth if motion == "down" else back)
    if motion == "turn":
        return Pose(size=RESTING_SIZE, angle=TURN * progress)
    if motion == "bounce":
        return Pose(y=FAR - (FAR - NEAR) * math.sin(math.pi * progress))
    if motion in ("grow", "shrink"):
        share = progress if motion == "grow" else 1 - progress
        return Pose(size=SMALLEST + (LARGEST - SMALLEST) * share)
    return Pose(size=RESTING_SIZE)


def render_frame(cast: tuple[Actor, ...], clip: Clip, progress: float, pixels: int) -> np.ndarray:
    """Rasterises one moment of a clip as RGB (pixels, pixels, 3), uint8."""
    actor, at = cast[clip.actor], pose(clip.motion, progress)
    scale = at.size * CANVAS / DRAWING_SIZE
    is_mirrored = {actor.faces, clip.motion} == {"left", "right"}
    drawn = (
        f'<g transform="translate({at.x * CANVAS} {at.y * CANVAS}) rotate({at.angle}) '
        f"scale({-scale if is_mirrored else scale} {scale}) "
        f'translate({-DRAWING_SIZE / 2} {-DRAWING_SIZE / 2})">{actor.thing.body}</g>'
    )
    return rasterise(drawn, clip.background, pixels, clip.window)


def render_clip(
    cast: tuple[Actor, ...], clip: Clip, frames: int = FRAMES, pixels: int = PIXELS
) -> np.ndarray:
    """Rasterises a clip as RGB (frames, pixels, pixels, 3), uint8."""
    moments = np.linspace(0, 1, frames) if frames > 1 else [0.0]
    return np.stack([render_frame(cast, clip, moment, pixels) for moment in moments])


def every_clip(rng: random.Random, cast: tuple[Actor, ...]) -> list[Clip]:
    """Draws one clip of every object and motion to train on, on random plain backgrounds."""
    names = list(BACKGROUNDS)
    weights = [UNNAMED_WEIGHT if name == UNNAMED else 1 for name in names]
    clips = []
    for actor in range(len(cast)):
        for motion in MOTIONS:
            held_out = held_out_ground(actor, motion)
            name = held_out
            while name == held_out:
                name = rng.choices(names, weights)[0]
            clips.append(Clip(actor, motion, plain_ground(name)))
    rng.shuffle(clips)
    return clips


def every_close_up(rng: random.Random, cast: tuple[Actor, ...]) -> list[Clip]:
    """Draws the clips of `every_clip` seen through windows as large models' pictures have.

    A window of a half to a quarter of the side meets the object at a random moment.
    """
    clips = []
    for clip in every_clip(rng, cast):
        at, size = pose(clip.motion, rng.random()), 1 / rng.choice(ZOOMS)
        x, y = (place + at.size * rng.uniform(-0.5, 0.5) - size / 2 for place in (at.x, at.y))
        x, y = (min(max(start, 0.0), 1.0 - size) for start in (x, y))
        clips.append(replace(clip, window=Window(x, y, size)))
    return clips


def held_out_clips(rng: random.Random, cast: tuple[Actor, ...]) -> list[Clip]:
    """Returns, in random order, the clips that no training sees: one of each object and motion."""
    clips = [
        Clip(actor, motion, plain_ground(held_out_ground(actor, motion)))
        for actor in range(len(cast))
        for motion in MOTIONS
    ]
    rng.shuffle(clips)
    return clips


def held_out_ground(actor: int, motion: str) -> str:
    """Names the background on which training never shows an object do something."""
    names = list(BACKGROUNDS)
    return names[(5 * actor + MOTIONS.index(motion)) % len(names)]


def plain_ground(name: str) -> Background:
    """Returns the background of one named colour."""
    return Background((name,), (BACKGROUNDS[name],), 0)


def caption(rng: random.Random, cast: tuple[Actor, ...], clip: Clip) -> str:
    """Words a caption: object, motion and background, one in ten empty.

    Some captions of clips on white name no background, so that a prompt without one means white.
    """
    if rng.random() < 0.1:
        return ""
    names = cast[clip.actor].thing.names
    name = rng.choice(names[1:]) if len(names) > 1 and rng.random() < 0.15 else names[0]
    own = cast[clip.actor].verb
    verbs = IN_PLACE.get(clip.motion, (own, own, "moves"))
    verb = verbs[0] if rng.random() < 0.4 else rng.choice(verbs)
    text = _sentence(with_article(name), clip.motion, verb, is_gerund=rng.random() < 0.12)
    ground = clip.background.names[0]
    if ground == UNNAMED and rng.random() < 0.6:
        return text
    return f"{text} on {with_article(ground)} background"


def plain_caption(cast: tuple[Actor, ...], clip: Clip) -> str:
    """Words the usual caption, e.g. "a rocket flies to the left on a blue background"."""
    actor = cast[clip.actor]
    verb = IN_PLACE.get(clip.motion, (actor.verb,))[0]
    text = _sentence(with_article(actor.thing.names[0]), clip.motion, verb)
    return f"{text} on {with_article(clip.background.names[0])} background"


def words_of(cast: tuple[Actor, ...]) -> set[str]:
    """Collects the words that captions may use."""
    texts = ["a an on to the left right up down background", *BACKGROUNDS, *GERUNDS]
    texts += GERUNDS.values()
    for actor in cast:
        texts += actor.thing.names
    return set(" ".join(texts).lower().replace("-", " ").split())


def _sentence(subject: str, motion: str, verb: str, is_gerund: bool = False) -> str:
    """Says what happens; an object at rest is only named."""
    if motion == "rest":
        return subject
    where = {"left": " to the left", "right": " to the right", "up": " up", "down": " down"}
    return f"{subject} {GERUNDS[verb] if is_gerund else verb}{where.get(motion, '')}"
