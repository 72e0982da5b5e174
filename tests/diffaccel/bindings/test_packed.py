"""Packed sequences: what their positions and indices tell, and what they do not."""

import pytest
import torch
from tiny_models import MODELS

from diffaccel.bindings import LayoutUnknown, ModelCall, binding_of
from diffaccel.bindings.packed import last_run, packed_grids


def video(times, height=3, width=4):
    sides = torch.arange(float(height)), torch.arange(float(width))
    return torch.cartesian_prod(torch.tensor(times), *sides)


def test_a_video_ends_where_time_falls_or_frames_differ():
    places = torch.cat([video([4.0, 5.0]), video([0.0, 1.0, 2.0]), video([3.0], 2, 5)])
    assert packed_grids(places) == [(2, 3, 4), (3, 3, 4), (1, 2, 5)]


def test_a_shorter_frame_begins_another_video():
    places = video([0.0, 1.0, 9.0, 10.0, 11.0])
    spans = torch.tensor([1.0, 8.0, 8.0, 1.0, 1.0]).repeat_interleave(12)
    assert packed_grids(places) == [(5, 3, 4)]
    assert packed_grids(places, spans) == [(3, 3, 4), (2, 3, 4)]


def test_scrambled_frames_are_refused():
    places = video([0.0, 1.0])
    with pytest.raises(LayoutUnknown, match="raster order"):
        packed_grids(places[torch.randperm(24, generator=torch.Generator().manual_seed(0))])


def test_the_last_run_of_indices():
    assert last_run(torch.tensor([2, 3, 7, 8, 9])) == (7, 10)
    assert last_run(torch.tensor([4])) == (4, 5)
    assert last_run(torch.arange(0)) == (0, 0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "LTXVideoTransformer3DModel:condition",
            {"video_coords": lambda x: x + torch.tensor([0.0, 1.0])[:, None, None]},
            "differ between the samples",
        ),
        (
            "MiniMaxH3Transformer3DModel",
            {"text_indices": lambda x: x.flip(0)},
            "text does not come first",
        ),
        (
            "MiniMaxH3Transformer3DModel:references",
            {"audio_indices": lambda x: x[:0]},
            "not told apart",
        ),
        (
            "Cosmos3OmniTransformer",
            {"vision_sequence_indexes": lambda x: x.flip(0)},
            "do not follow the text",
        ),
        (
            "Cosmos3OmniTransformer",
            {"vision_noisy_frame_indexes": lambda x: [x[0][:0]]},
            "0 videos are denoised",
        ),
    ],
)
def test_orders_that_no_pipeline_has_are_refused(name, changes, message):
    tiny = MODELS[name]()
    binding = binding_of(tiny.model)
    changed = {key: change(tiny.arguments[key]) for key, change in changes.items()}
    call = ModelCall({**tiny.arguments, **changed}, {})
    with pytest.raises(LayoutUnknown, match=message):
        binding.layout(tiny.model, call, binding.layers(tiny.model)[0])
