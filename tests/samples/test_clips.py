"""The composer of the training clips: what is drawn is what the caption says."""

import json
import random

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def clips(embedded):
    from embedded.video import clips

    return clips


def tracked(clips, cast, motion, actor=0):
    from embedded.video.evaluate import track

    clip = clips.Clip(actor, motion, clips.plain_ground("green"))
    return track(clips.render_clip(cast, clip, frames=9, pixels=64))


@pytest.mark.parametrize(
    ("motion", "change"),
    [
        ("left", (-1, 0, 0)),
        ("right", (1, 0, 0)),
        ("up", (0, -1, 0)),
        ("down", (0, 1, 0)),
        ("grow", (0, 0, 1)),
        ("shrink", (0, 0, -1)),
        ("rest", (0, 0, 0)),
        ("bounce", (0, 0, 0)),
    ],
)
def test_objects_move_where_the_motion_says(clips, cast, motion, change):
    course = tracked(clips, cast, motion, actor=1)
    found = course[-1] - course[0]
    signs = np.where(np.abs(found) > 0.1, np.sign(found), 0)
    assert tuple(signs) == change


def test_a_bouncing_object_rises_once_and_comes_back(clips, cast):
    height = tracked(clips, cast, "bounce")[:, 1]
    assert height.argmin() == len(height) // 2
    assert np.all(np.diff(height[: len(height) // 2]) < 0)
    assert abs(height[0] - height[-1]) < 0.01


def test_a_turning_object_turns_by_a_third(clips, cast):
    clip = clips.Clip(1, "turn", clips.plain_ground("white"))
    video = clips.render_clip(cast, clip, frames=5, pixels=64)
    turned = Image.fromarray(video[0]).rotate(-120, resample=Image.BICUBIC, fillcolor="white")
    assert np.abs(video[0].astype(int) - video[-1]).mean() > 3
    assert np.abs(np.asarray(turned).astype(int) - video[-1]).mean() < 1.5


def test_an_object_with_a_front_looks_where_it_goes(clips, cast):
    left, right = (
        clips.render_frame(cast, clips.Clip(0, motion, clips.plain_ground("white")), 0.5, 64)
        for motion in ("left", "right")
    )
    assert np.abs(left.astype(int) - right[:, ::-1]).mean() < 1
    ball = (
        clips.render_frame(cast, clips.Clip(1, motion, clips.plain_ground("white")), 0.5, 64)
        for motion in ("left", "right")
    )
    assert np.array_equal(*ball)


@pytest.mark.parametrize(
    ("motion", "text"),
    [
        ("left", "a rocket flies to the left on an orange background"),
        ("up", "a rocket flies up on an orange background"),
        ("turn", "a rocket turns on an orange background"),
        ("bounce", "a rocket bounces on an orange background"),
        ("rest", "a rocket on an orange background"),
    ],
)
def test_plain_captions(clips, cast, motion, text):
    clip = clips.Clip(0, motion, clips.plain_ground("orange"))
    assert clips.plain_caption(cast, clip) == text


def test_captions_use_known_words_and_name_object_motion_and_ground(clips, cast):
    rng, words = random.Random(0), clips.words_of(cast)
    empty = unnamed = 0
    for clip in [clip for _ in range(40) for clip in clips.every_clip(rng, cast)]:
        text = clips.caption(rng, cast, clip)
        empty += not text
        assert set(text.split()) <= words
        if not text:
            continue
        assert any(name in text for name in cast[clip.actor].thing.names)
        if clip.motion in ("left", "right"):
            assert f"to the {clip.motion}" in text
        is_named = f"{clip.background.names[0]} background" in text
        assert is_named or clip.background.names == ("white",)
        unnamed += not is_named
    assert 0.05 < empty / 720 < 0.16 and unnamed > 20


def test_training_never_shows_what_is_held_out(clips, cast):
    held_out = {
        (c.actor, c.motion, c.background.names) for c in clips.held_out_clips(random, cast)
    }
    rng = random.Random(0)
    seen = {
        (c.actor, c.motion, c.background.names)
        for _ in range(60)
        for c in clips.every_clip(rng, cast)
    }
    assert len(held_out) == len(cast) * len(clips.MOTIONS)
    assert not held_out & seen and len(seen) > 150


def test_every_object_is_in_the_vocabulary_and_has_a_gerund(clips, embedded):
    names = [names[0] for names in json.loads((embedded / "vocabulary.json").read_text()).values()]
    cast = json.loads(clips.CAST.read_text())
    assert {"rocket", "red apple"} <= set(cast) <= set(names)
    assert {how["verb"] for how in cast.values()} <= set(clips.GERUNDS)
    assert {how["faces"] for how in cast.values()} <= {"", "left", "right"}


@pytest.mark.slow
def test_the_judges_know_the_truth(clips, cast):
    from embedded.video.evaluate import shows_motion, shows_object

    clip = clips.Clip(0, "left", clips.plain_ground("yellow"))
    video = clips.render_clip(cast, clip)
    assert shows_object(cast, clip, video) and shows_motion(cast, clip, video)
    other = clips.Clip(1, "turn", clip.background)
    assert not shows_object(cast, other, video) and not shows_motion(cast, other, video)
    nothing = np.full_like(video, 200)
    assert not shows_motion(cast, clip, nothing)


def test_close_ups_meet_their_objects(clips, cast):
    close = clips.every_close_up(random.Random(0), cast)
    assert sorted((clip.actor, clip.motion) for clip in close) == sorted(
        (clip.actor, clip.motion) for clip in clips.every_clip(random.Random(0), cast)
    )
    for clip in close:
        window = clip.window
        assert window.size in {1 / zoom for zoom in clips.ZOOMS}
        assert 0 <= min(window.x, window.y) and max(window.x, window.y) + window.size <= 1
        seen = clips.render_clip(cast, clip, frames=17, pixels=16).astype(int)
        assert np.abs(seen - clip.background.colours[0]).max() > 20, clip
