"""Every denoiser class that a pipeline of diffusers names is served, or refused with a reason."""

from __future__ import annotations

import inspect
import typing

import diffusers
import pytest
from diffusers.models.modeling_utils import ModelMixin
from tiny_models import MODELS
from torch import nn

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.bindings import BINDINGS, REFUSED, UnsupportedModelError, binding_of
from diffaccel.bindings.catalogue import DENOISING, catalogue
from diffaccel.cli import main
from diffaccel.methods import FullAttn
from diffaccel.methods.published import PUBLISHED


def test_every_class_is_bound_or_refused():
    assert set(BINDINGS) | set(REFUSED) == set(catalogue())
    assert not set(BINDINGS) & set(REFUSED)


@pytest.mark.slow
def test_the_catalogue_is_what_an_import_of_diffusers_says():
    named: dict[str, set[str]] = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
            continue
        for part, hint in typing.get_type_hints(kind.__init__).items():
            for model in typing.get_args(hint) or (hint,) if part in DENOISING else ():
                if inspect.isclass(model) and issubclass(model, ModelMixin):
                    named.setdefault(model.__name__, set()).add(name)
    entries = catalogue()
    for model, pipelines in named.items():
        assert pipelines <= set(entries[model].pipelines), model


def test_a_refused_class_says_why_and_an_unknown_one_what_to_write():
    for name, reason in REFUSED.items():
        kind = type(name, (nn.Module,), {})
        with pytest.raises(UnsupportedModelError, match="no method serves") as caught:
            binding_of(kind())
        assert reason in str(caught.value)
    with pytest.raises(UnsupportedModelError, match=r'BINDINGS\["Linear"\] = YourBinding'):
        set_attn_processor(nn.Linear(2, 2), FullAttn())


def test_info_lists_every_class_with_what_works(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["info", "--models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in catalogue())
    assert all(reason in printed for reason in REFUSED.values())
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    published = {name for name, line in rows.items() if "│ published" in line}
    assert published == {
        "FluxTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "WanTransformer3DModel",
        "CogVideoXTransformer3DModel",
    }
    assert all("│ reasoned" in rows[name] for name in BINDINGS if name not in published)


def test_every_family_that_a_binding_may_name_has_settings():
    for binding in BINDINGS.values():
        assert set(binding.families()) <= set(PUBLISHED)
    for name in ("WanTransformer3DModel", "UNet2DConditionModel", "HeliosTransformer3DModel"):
        tiny = MODELS[name]()
        assert binding_of(tiny.model).family(tiny.model, None) in BINDINGS[name].families()
