"""Configurations refuse values of the wrong kind, and name the field."""

import dataclasses
import math
from importlib import import_module

import numpy as np
import pytest

from diffaccel import (
    HeadPerturbation,
    HierarchicalWindowAttn,
    NormalizedAttention,
    ProportionalAttn,
    SkipLayers,
    SparseAttn,
)
from diffaccel.methods.names import METHODS
from diffaccel.pipelines.image.recipe import Refinement
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.long_video import TimeWindows


def named(path):
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


CONFIGS = (
    *(named(path)() for path in METHODS.values()),
    HierarchicalWindowAttn(),
    ProportionalAttn(),
    HeadPerturbation(heads=((0, 0),)),
    NormalizedAttention(),
    SkipLayers((1,)),
    Refinement(steps=1, strength=0.5),
    FreeSwim(),
    TimeWindows(),
)
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
ACCEPTED = {"layers", "heads", "negative_prompt"}  # lists are made tuples; any text is a prompt


@pytest.mark.parametrize("wrong", ["text", math.nan, [1], object], ids=str)
@pytest.mark.parametrize(
    ("config", "name"), FIELDS, ids=[f"{type(config).__name__}.{name}" for config, name in FIELDS]
)
def test_no_field_takes_anything(config, name, wrong):
    if name in ACCEPTED and wrong in ("text", [1]):
        return
    with pytest.raises((TypeError, ValueError), match=name) as raised:
        dataclasses.replace(config, **{name: wrong})
    assert "instances of" not in str(raised.value)


@pytest.mark.parametrize("word", ["no", 0, 1])
def test_a_switch_is_true_or_false(word):
    with pytest.raises(ValueError, match="neighbors must be True or False, got neighbors="):
        SparseAttn(neighbors=word)


def test_true_is_no_number_and_numpy_numbers_are():
    with pytest.raises(ValueError, match="keep must be a number, got keep=True"):
        SparseAttn(keep=True)
    assert SparseAttn(keep=np.float32(0.5)).keep == 0.5
