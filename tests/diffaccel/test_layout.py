import dataclasses

import pytest

from diffaccel.layout import Segment, TokenLayout


def test_image_places_text_around_the_grid():
    layout = TokenLayout.image(5, 7, text_before=3, text_after=2)
    assert layout.length == 40
    assert layout.grid == (1, 5, 7)
    assert layout.visual_slice == slice(3, 38)
    assert layout.exact_slices == (slice(0, 3), slice(38, 40))
    assert layout.text_length == 5


def test_video_keeps_frames_height_width_apart():
    layout = TokenLayout.video(2, 3, 5, text_after=4)
    assert layout.grid == (2, 3, 5)
    assert layout.visual_slice == slice(0, 30)
    assert layout.exact_slices == (slice(30, 34),)


def test_condition_tokens_are_no_text_but_lie_outside_the_visual_slice():
    layout = TokenLayout(
        (
            Segment("text", 3),
            Segment("condition", 4, (1, 2, 2)),
            Segment("visual", 6, (1, 2, 3)),
            Segment("condition", 5),
        )
    )
    assert layout.text_length == 3
    assert layout.exact_slices == (slice(0, 7), slice(13, 18))
    assert layout.own_slices == (slice(0, 3), slice(7, 13))
    assert layout.visual_slice == slice(7, 13)


def test_cutting_takes_text_off_the_end_and_nothing_else():
    layout = TokenLayout.video(2, 3, 5, text_after=4)
    assert layout.cut(32) == TokenLayout.video(2, 3, 5, text_after=2)
    assert layout.cut(30) == TokenLayout.video(2, 3, 5)
    assert layout.cut(29) == layout
    before = TokenLayout.video(2, 3, 5, text_before=4)
    assert before.cut(32) == before


def test_text_alone_has_no_visual_part():
    layout = TokenLayout((Segment("text", 9),))
    assert layout.visual is None and layout.grid is None
    assert layout.visual_slice == slice(0, 0)
    assert layout.exact_slices == layout.own_slices == (slice(0, 9),)


def test_is_hashable_comparable_frozen_and_its_repr_rebuilds_it():
    layout = TokenLayout.video(2, 3, 5, text_before=4)
    assert {layout: 1}[TokenLayout.video(2, 3, 5, text_before=4)] == 1
    assert layout != TokenLayout.video(2, 5, 3, text_before=4)
    assert eval(repr(layout)) == layout
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.segments = ()


def test_lists_become_tuples_so_that_the_layout_stays_hashable():
    layout = TokenLayout([Segment("visual", 6, [1, 2, 3])])
    assert hash(layout) == hash(TokenLayout.image(2, 3))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: TokenLayout.image(0, 4), "height must be an integer of at least 1, got height=0"),
        (lambda: TokenLayout.image(4, 2.5), "width"),
        (lambda: TokenLayout.image(4, True), "width"),
        (lambda: TokenLayout.image(4, 4, text_before=-1), "length=-1"),
        (lambda: Segment("visual", 7, (1, 2, 3)), "frames \\* height \\* width"),
        (lambda: Segment("visual", 6), "needs its grid"),
        (lambda: Segment("visual", 6, (2, 3)), "three integers"),
        (lambda: Segment("visual", 0, (0, 2, 3)), "at least 1"),
        (lambda: Segment("text", 6, (1, 2, 3)), "no grid"),
        (lambda: Segment("audio", 6), "kind must be one of"),
        (lambda: TokenLayout((Segment("visual", 1, (1, 1, 1)),) * 2), "at most one visual"),
    ],
)
def test_refuses_what_makes_no_layout(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_refuses_segments_of_another_type():
    with pytest.raises(TypeError, match="Segment objects, got tuple"):
        TokenLayout((("text", 3),))
